"""What train_hf.py and convert_hf.py share: text, optimiser, Trainer, results."""

import calm_threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import json
import math
import re
import sys
import zipfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from lm_data import default_root, load_corpus
from mfu import add_peak_option, describe, peak_tflops, training_flops, utilisation
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from omni_moe.integrations.transformers import (
    ExpertLoadCallback,
    num_active_parameters,
    omni_moe_layers,
    plot_expert_load,
)

WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.05
DECAY_SHARE = 0.2  # of the steps, at the end of warmup-stable-decay
FINAL_LR_SHARE = 0.02
EVAL_BLOCKS = 64
SAMPLE_TEMPERATURE = 0.8


def add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--experts", type=positive_int, default=4096, help="atomic experts per layer")
    add("--experts-per-token", type=positive_int, default=32)
    add("--seq-len", type=positive_int, default=128, help="tokens of context")
    add("--batch", type=positive_int, default=8, help="sequences per step")
    add("--steps", type=positive_int, default=1500)
    add("--expert-lr", type=float, default=1e-2, help="peak learning rate of the expert tables")
    add("--log-every", type=positive_int, default=25, help="steps between log entries")
    add("--eval-every", type=positive_int, default=250, help="steps between held-out losses")
    add("--save-every", type=positive_int, default=500, help="steps between checkpoints")
    add("--keep", type=positive_int, default=1, help="checkpoints to keep")
    add("--bf16", action="store_true", help="bf16 autocast")
    add("--gradient-checkpointing", action="store_true")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--seed", type=int, default=0)
    add("--data", type=Path, default=default_root(), help="directory of .py files to train on")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add_peak_option(parser)
    add("--report-to", default="none", help="tensorboard, wandb, ... (see TrainingArguments)")
    add("--prompt", default="class Parser:\n    def ", help="start of the generated sample")
    add("--sample-tokens", type=int, default=100, help="length of the generated sample")


def parse_with_gpu_defaults(
    parser: argparse.ArgumentParser, gpu_settings: dict
) -> argparse.Namespace:
    """Parses the command line; under --gpu `gpu_settings` are the defaults."""
    summary = ", ".join(f"{name}={value}" for name, value in gpu_settings.items())
    parser.add_argument("--gpu", action="store_true", help=f"defaults for one GPU: {summary}")
    if parser.parse_args().gpu:
        parser.set_defaults(**gpu_settings)
    return parser.parse_args()


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


# ---- text ----------------------------------------------------------------------------------------


class TokenBlocks(torch.utils.data.Dataset):
    """A text as blocks of `length` tokens; what is left at the end is dropped."""

    def __init__(self, ids: Tensor, length: int) -> None:
        if ids.numel() < length:
            raise ValueError(f"data: expected at least {length} tokens, got {ids.numel()}")
        self.blocks = ids[: ids.numel() // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}

    def spread(self, count: int) -> "TokenBlocks":
        """At most `count` blocks, evenly over the text."""
        stride = math.ceil(len(self) / count)
        return TokenBlocks(self.blocks[::stride].flatten(), self.blocks.shape[1])


def load_texts(root: Path) -> tuple[str, str]:
    """The training and the held-out text of `lm_data.load_corpus`."""
    train, held_out = load_corpus(root)
    return tuple(bytes(text.numpy()).decode(errors="replace") for text in (train, held_out))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids, 1-D int64. Line by line, which is faster than one long string."""
    lines = text.splitlines(keepends=True)
    batches = (lines[i : i + 10_000] for i in range(0, len(lines), 10_000))
    encoded = (tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in batches)
    return torch.tensor([token for batch in encoded for line in batch for token in line])


# ---- training ------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, lr: float, expert_lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    A row of the expert tables gets a gradient only when its expert is chosen. So the tables learn
    at a higher rate, and without decay, which would shrink the rows in between.
    """
    tables = {
        id(table.weight)
        for layer in omni_moe_layers(model).values()
        for table in (layer.up_embed, layer.down_embed)
    }
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    groups = {"experts": [], "matrices": [], "others": []}
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        name = "experts" if id(parameter) in tables else "matrices" if is_matrix else "others"
        groups[name].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups["experts"], "lr": expert_lr, "weight_decay": 0.0},
            {"params": groups["matrices"], "lr": lr, "weight_decay": WEIGHT_DECAY},
            {"params": groups["others"], "lr": lr, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )


def make_trainer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, str],
) -> Trainer:
    train, held_out = (TokenBlocks(tokenize(tokenizer, text), args.seq_len) for text in texts)
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": math.ceil(DECAY_SHARE * args.steps),
            "min_lr_ratio": FINAL_LR_SHARE,
        },
        warmup_steps=math.ceil(WARMUP_SHARE * args.steps),
        logging_steps=min(args.log_every, args.steps),
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        save_total_limit=args.keep,
        include_num_input_tokens_seen="all",  # logs tokens per second
        prediction_loss_only=True,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=args.cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not args.cpu,
        seed=args.seed,
        report_to=args.report_to,
        # A bar on a terminal alone: in a log file each step of it would be a line.
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out.spread(EVAL_BLOCKS),
        optimizers=(make_optimizer(model, args.lr, args.expert_lr), None),
        processing_class=tokenizer,
    )
    ExpertLoadCallback().add_to(trainer)
    return trainer


def train(args: argparse.Namespace, trainer: Trainer) -> None:
    """Trains, from the last checkpoint under --resume, and writes the results to --out."""
    model = trainer.model
    print(
        f"{num_active_parameters(model):,} active parameters per token of "
        f"{model.num_parameters():,}; {args.steps} steps of {args.batch} x {args.seq_len} tokens "
        f"on {trainer.args.device}"
    )
    checkpoint = checkpoint_to_resume(args.out) if args.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # the model and its tokenizer, in --out itself
    report(args, trainer, trainer.evaluate()["eval_loss"])


def checkpoint_to_resume(out: Path) -> str:
    """The newest whole checkpoint in `out`; one whose writing was cut short is passed over."""
    found = {
        int(number.group(1)): path
        for path in out.glob("checkpoint-*")
        if (number := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    for _, path in sorted(found.items(), reverse=True):
        fault = fault_of_checkpoint(path)
        if fault is None:
            return str(path)
        print(f"--resume: passing over {path}, which is not whole: {fault}", file=sys.stderr)
    found_none = "found none that is whole" if found else "found none"
    sys.exit(f"--resume: expected a checkpoint in {out}, {found_none}")


def fault_of_checkpoint(path: Path) -> str | None:
    """What a checkpoint of the Trainer lacks, without reading its weights; None if it is whole."""
    # The Trainer writes this file last, so that with it all others are there.
    state = path / "trainer_state.json"
    if not state.exists():
        return f"there is no {state.name}"
    for file in sorted(path.iterdir()):
        if not is_whole(file):
            return f"{file.name} is cut off"
    index = path / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    weights = shards or {"model.safetensors"}
    missing = sorted(name for name in weights if not (path / name).exists())
    return f"there is no {missing[0]}" if missing else None


def is_whole(file: Path) -> bool:
    """Whether a file that was cut off would be of another length than it says of itself."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(file)
    except (ValueError, SafetensorError):
        return False
    return True


def report(args: argparse.Namespace, trainer: Trainer, held_out_loss: float) -> None:
    """Generates a sample and writes loss.png, expert_load.png and metrics.json.

    A run that diverged has no sample.
    """
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    usage = [value for name, value in logged[-1].items() if name.startswith("expert_usage/")]
    speed = speed_of(args, trainer, logged[-1]["train_tokens_per_second"])
    metrics = {
        "held_out_loss": held_out_loss,
        "tokens_per_second": logged[-1]["train_tokens_per_second"],
        "expert_usage": usage,
        "num_parameters": trainer.model.num_parameters(),
        "num_active_parameters": num_active_parameters(trainer.model),
        **speed,
        "log_history": history,
    }
    write_metrics(args, metrics)
    plot_losses(history, args.out / "loss.png")
    plot_expert_load(history, args.out / "expert_load.png")
    print(f"\nheld-out loss {held_out_loss:.3f} nats per token")
    print(f"{metrics['tokens_per_second']:.0f} tokens per second, {describe(speed)}")
    print("experts used per layer:", ", ".join(f"{share:.1%}" for share in usage))
    if math.isfinite(held_out_loss):
        metrics["sample"] = generate(trainer, args.prompt, args.sample_tokens, args.seed)
        print(f"\nsample\n{metrics['sample']}\n")
        write_metrics(args, metrics)
    else:
        print("\nThe training diverged: there is no sample.\n")
    print(f"Wrote the model, loss.png, expert_load.png and metrics.json to {args.out}")


def write_metrics(args: argparse.Namespace, metrics: dict) -> None:
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))


def speed_of(
    args: argparse.Namespace, trainer: Trainer, tokens_per_second: float
) -> dict[str, float | None]:
    """Operations a second and MFU, of all devices, from the tokens a second."""
    ids = torch.zeros(args.batch, args.seq_len, dtype=torch.int64, device="meta")

    def loss_of(model: PreTrainedModel) -> Tensor:
        model.gradient_checkpointing_disable()
        # Without a cache Transformers looks for packed sequences in the values of the positions.
        return model(input_ids=ids, labels=ids, use_cache=True).loss

    flops_per_token = training_flops(trainer.model, loss_of) / ids.numel()
    device = trainer.args.device
    peak = args.peak_tflops or peak_tflops(device, "bf16" if args.bf16 else "fp32")
    num_devices = trainer.args.world_size
    return utilisation(flops_per_token * tokens_per_second, peak and num_devices * peak)


def generate(trainer: Trainer, prompt: str, num_tokens: int, seed: int) -> str:
    set_seed(seed)
    tokenizer = trainer.processing_class
    inputs = tokenizer(prompt, return_tensors="pt").to(trainer.model.device)
    ids = trainer.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=SAMPLE_TEMPERATURE,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def plot_losses(history: list[dict], path: Path) -> None:
    """Training loss as a line, held-out loss as points."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style, label in (("loss", "-", "training"), ("eval_loss", "o", "held-out")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)

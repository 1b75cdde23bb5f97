"""Trains a byte-level language model with OmniMoE layers, and a dense one of equal active size.

    python examples/train_lm.py                # a few minutes on two CPU cores; uses a GPU if any
    python examples/train_lm.py --resume       # goes on from the last checkpoint

Both models see the same batches of the Python standard library's own sources, under the same
optimiser settings: AdamW; one learning rate for matrices, with weight decay, and one for embeddings
(bytes and experts) and the output head, without. The dense model's MLP is so wide that both models
have the same number of active parameters per token. Ctrl-C saves a checkpoint and stops; a resumed
run continues exactly, since the order of the batches is the only randomness after initialisation.

Written to --out: checkpoint.pt, metrics.json, loss.png, expert_usage.png.
"""

import calm_threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import json
import math
import os
import pickle
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_data import (
    default_root,
    digest,
    load_corpus,
    random_windows,
    spread_windows,
    unigram_bits_per_byte,
)
from lm_model import ByteLM, DenseMLP, active_parameters, dense_width
from lm_plots import plot_expert_usage, plot_losses
from mfu import add_peak_option, describe, peak_tflops, training_flops, utilisation
from torch import Tensor, nn
from tqdm import tqdm

from omni_moe import OmniMoE, OmniMoEConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.02
EVAL_BATCH = 16
CURVE_WINDOWS = 32  # held-out windows of the points on the loss curve
FINAL_WINDOWS = 256  # held-out windows of the final numbers
SAMPLE_TEMPERATURE = 0.8

# A checkpoint can only be continued with the same values of these.
RUN_SETTINGS = (
    *("layers", "hidden", "head_size", "intermediate", "experts", "experts_per_token"),
    *("seq_len", "batch", "steps", "lr", "embedding_lr", "seed", "dtype"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=positive_int, default=4)
    add("--hidden", type=positive_int, default=128, help="hidden size")
    add("--head-size", type=positive_int, default=32, help="size of an attention head")
    add("--intermediate", type=positive_int, default=128, help="width of the shared MLP")
    add("--experts", type=positive_int, default=4096, help="atomic experts per layer")
    add("--experts-per-token", type=positive_int, default=64)
    add("--seq-len", type=positive_int, default=256, help="bytes of context")
    add("--batch", type=positive_int, default=4, help="sequences per step")
    add("--steps", type=positive_int, default=800)
    add("--lr", type=float, default=4e-3, help="peak learning rate of matrices")
    add("--embedding-lr", type=float, default=2e-2, help="of embeddings, experts and head")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("fp32", "bf16"), help="bf16: autocast (default on a GPU)")
    add_peak_option(parser)
    add("--data", type=Path, default=default_root(), help="directory of .py files to train on")
    add("--out", type=Path, default=Path("runs/train_lm"), help="directory of the results")
    add("--eval-every", type=positive_int, default=100, help="steps between held-out points")
    add("--checkpoint-every", type=positive_int, default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--prompt", default="class Parser:\n    def ", help="start of the generated sample")
    add("--sample-bytes", type=int, default=400, help="length of the generated sample")
    args = parser.parse_args()
    if args.hidden % args.head_size or args.head_size % 2:
        parser.error(
            f"--head-size: expected an even divisor of --hidden {args.hidden}, got {args.head_size}"
        )
    if args.batch * args.seq_len < 2:
        parser.error("--batch, --seq-len: expected at least 2 bytes a step for BatchNorm, got 1")
    if not args.prompt:
        parser.error("--prompt: expected at least one character, got none")
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    return args


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


class Learner:
    """One of the two models with its optimiser and its history, all in bits per byte."""

    def __init__(self, model: ByteLM, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.model = model.to(self.device)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=args.dtype == "bf16"
        )
        self.optimizer = make_optimizer(self.model, args)
        self.train_bits: list[float] = []
        self.held_out_bits: list[tuple[int, float]] = []
        self.step_seconds: list[float] = []  # of this process

    def _bits(self, windows: Tensor) -> Tensor:
        windows = windows.to(self.device)
        with self.autocast:
            logits = self.model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)

    def train_step(self, windows: Tensor, lr_factor: float) -> None:
        start = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        bits = self._bits(windows)
        self.optimizer.zero_grad()
        bits.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.train_bits.append(bits.item())  # waits for the device
        self.step_seconds.append(time.perf_counter() - start)

    def speed(self, args: argparse.Namespace) -> dict[str, float | None] | None:
        """Operations a second and MFU at the median step; None where there was no step."""
        if not self.step_seconds:
            return None
        ids = torch.zeros(args.batch, args.seq_len, dtype=torch.int64, device="meta")
        step_flops = training_flops(self.model, lambda model: model(ids).sum())
        peak = args.peak_tflops or peak_tflops(self.device, args.dtype)
        return utilisation(step_flops / statistics.median(self.step_seconds), peak)

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        self.model.eval()
        total = sum(self._bits(part).item() * len(part) for part in windows.split(EVAL_BATCH))
        return total / len(windows)

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "train_bits": self.train_bits,
            "held_out_bits": self.held_out_bits,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.train_bits = state["train_bits"]
        self.held_out_bits = state["held_out_bits"]


def make_learners(args: argparse.Namespace) -> dict[str, Learner]:
    config = OmniMoEConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_token=args.experts_per_token,
        norm_topk_prob=True,
        initializer_range=args.hidden**-0.5,
        track_expert_load=True,
    )
    makers = {
        "OmniMoE": lambda: OmniMoE(config),
        "dense": lambda: DenseMLP(args.hidden, dense_width(config)),
    }
    learners = {}
    for name, make_mlp in makers.items():
        torch.manual_seed(args.seed)
        model = ByteLM(args.layers, args.hidden, args.head_size, make_mlp)
        learners[name] = Learner(model, args)
    return learners


def make_optimizer(model: ByteLM, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices, embeddings, norms = [], [], []
    for module in model.modules():
        is_table = isinstance(module, nn.Embedding) or module is model.head
        for parameter in module.parameters(recurse=False):
            group = embeddings if is_table else matrices if parameter.ndim == 2 else norms
            group.append(parameter)
    return torch.optim.AdamW(
        [
            {"params": matrices, "initial_lr": args.lr, "weight_decay": WEIGHT_DECAY},
            {"params": embeddings, "initial_lr": args.embedding_lr, "weight_decay": 0.0},
            {"params": norms, "initial_lr": args.lr, "weight_decay": 0.0},
        ],
        betas=BETAS,
        fused=True,
    )


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warmup, then cosine decay."""
    progress = (step + 1) / num_steps
    if progress < WARMUP_SHARE:
        return progress / WARMUP_SHARE
    decay = (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * decay))


CHECKPOINT_KEYS = {"settings", "step", "batch_generator", "learners"}


class Checkpoint:
    """The state of a run on disk; replaced in one piece, so never half written."""

    def __init__(self, path: Path, settings: dict, learners: dict[str, Learner]) -> None:
        self.path = path
        self.settings = settings
        self.learners = learners
        self.batch_generator = torch.Generator().manual_seed(settings["seed"])

    def save(self, step: int) -> None:
        state = {
            "settings": self.settings,
            "step": step,
            "batch_generator": self.batch_generator.get_state(),
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def load(self) -> int:
        """Restores everything and returns the number of steps done."""
        if not self.path.exists():
            sys.exit(f"--resume: expected a checkpoint at {self.path}, found none")
        state = self._read()
        for name, value in self.settings.items():
            made_with = state["settings"].get(name)
            if made_with != value:
                sys.exit(
                    f"--resume: the checkpoint was made with {name} = {made_with}, "
                    f"this run has {value}"
                )
        self.batch_generator.set_state(state["batch_generator"])
        for name, learner in self.learners.items():
            learner.load_state_dict(state["learners"][name])
        return state["step"]

    def _read(self) -> dict:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        # What torch says of an empty file, of one cut off and of one that is no checkpoint.
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or "it is empty"
        else:
            if isinstance(state, dict) and CHECKPOINT_KEYS <= state.keys():
                return state
            reason = "it is a file of another program"
        sys.exit(
            f"--resume: expected a whole checkpoint at {self.path}, but cannot read it: {reason}"
        )


class StopSignals:
    """While active, Ctrl-C (or SIGTERM) only sets `received`; a second one interrupts at once."""

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


def train(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    *,
    first_step: int,
    text: Tensor,
    curve: Tensor,
) -> int | None:
    """Runs the remaining steps. Returns the signal that stopped it early, if one did."""
    learners = checkpoint.learners
    # A bar on a terminal alone: in a log file each step of it would be a line.
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=None)
    with StopSignals() as stop, bar:
        for step in range(first_step, args.steps):
            windows = random_windows(text, args.batch, args.seq_len, checkpoint.batch_generator)
            for learner in learners.values():
                learner.train_step(windows, learning_rate_factor(step, args.steps))
            done = step + 1
            if done % args.eval_every == 0 or done == args.steps:
                for learner in learners.values():
                    learner.held_out_bits.append((done, learner.evaluate(curve)))
                if bar.disable:
                    losses = (f"{n} {x.held_out_bits[-1][1]:.3f}" for n, x in learners.items())
                    print(f"step {done}: held-out bits per byte {', '.join(losses)}", flush=True)
            bar.update()
            bar.set_postfix({n: f"{x.train_bits[-1]:.2f}" for n, x in learners.items()})
            if done % args.checkpoint_every == 0 or done == args.steps or stop.received:
                checkpoint.save(done)
            if stop.received and done < args.steps:
                bar.close()
                print(f"Stopped after step {done}. Continue with --resume.")
                return stop.received
    return None


def report(args: argparse.Namespace, learners: dict[str, Learner], bits: dict[str, float]) -> None:
    """Prints the result, generates a sample and writes the plots and metrics.json.

    A run that diverged has no sample.
    """
    omni_model = learners["OmniMoE"].model
    layers = [module for module in omni_model.modules() if isinstance(module, OmniMoE)]
    loads = [layer.expert_load() for layer in layers]
    metrics = {
        "settings": {name: getattr(args, name) for name in RUN_SETTINGS},
        "held_out_bits_per_byte": bits,
        "active_parameters": {n: active_parameters(x.model) for n, x in learners.items()},
        "total_parameters": {
            n: sum(p.numel() for p in x.model.parameters()) for n, x in learners.items()
        },
        "speed": {n: x.speed(args) for n, x in learners.items()},
        "expert_usage": [load.usage for load in loads],
        "expert_unevenness": [load.unevenness for load in loads],
        "train_bits_per_byte": {n: x.train_bits for n, x in learners.items()},
        "held_out_curve": {n: x.held_out_bits for n, x in learners.items()},
    }
    write_metrics(args, metrics)
    plot_losses(
        metrics["train_bits_per_byte"],
        metrics["held_out_curve"],
        bits["unigram"],
        args.out / "loss.png",
    )
    plot_expert_usage(layers, args.out / "expert_usage.png")

    print("\nheld-out bits per byte")
    for name, value in bits.items():
        print(f"  {name:8} {value:.3f}")
    print("experts used per layer:", ", ".join(f"{load.usage:.1%}" for load in loads))
    print("unevenness per layer (KL):", ", ".join(f"{load.unevenness:.2f}" for load in loads))
    for name, speed in metrics["speed"].items():
        if speed is not None:
            print(f"{name}: {describe(speed)}")

    if math.isfinite(bits["OmniMoE"]):
        metrics["sample"] = sample_of(args, omni_model)
        print(f"\nsample from the OmniMoE model\n{metrics['sample']}\n")
        write_metrics(args, metrics)
    else:
        print("\nThe training of the OmniMoE model diverged: there is no sample.\n")
    print(f"Wrote checkpoint.pt, metrics.json, loss.png and expert_usage.png to {args.out}")


def write_metrics(args: argparse.Namespace, metrics: dict) -> None:
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))


def sample_of(args: argparse.Namespace, model: ByteLM) -> str:
    sample = model.generate(
        args.prompt.encode(),
        num_bytes=args.sample_bytes,
        window=args.seq_len,
        temperature=SAMPLE_TEMPERATURE,
        seed=args.seed,
    )
    return sample.decode(errors="replace")


def main() -> int:
    args = parse_args()
    start = time.perf_counter()
    try:
        train_text, held_out_text = load_corpus(args.data)
        final_windows = spread_windows(held_out_text, FINAL_WINDOWS, args.seq_len)
        curve_windows = spread_windows(held_out_text, CURVE_WINDOWS, args.seq_len)
        learners = make_learners(args)
    except ValueError as error:
        sys.exit(f"train_lm.py: {error}")
    print(
        f"{train_text.numel() / 1e6:.1f} MB to train on, {held_out_text.numel() / 1e6:.1f} MB "
        f"held out; {args.steps} steps of {args.batch} x {args.seq_len} bytes "
        f"on {args.device} in {args.dtype}"
    )
    for name, learner in learners.items():
        total = sum(parameter.numel() for parameter in learner.model.parameters())
        active = active_parameters(learner.model)
        print(f"  {name:8} {active:>10,} active parameters per token of {total:,}")

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in RUN_SETTINGS}
    settings["data"] = digest(train_text)
    checkpoint = Checkpoint(args.out / "checkpoint.pt", settings, learners)
    first_step = checkpoint.load() if args.resume else 0
    stop_signal = train(
        args, checkpoint, first_step=first_step, text=train_text, curve=curve_windows
    )
    if stop_signal is not None:
        return 128 + stop_signal

    for module in learners["OmniMoE"].model.modules():
        if isinstance(module, OmniMoE):
            module.reset_expert_load()
    bits = {name: learner.evaluate(final_windows) for name, learner in learners.items()}
    bits["unigram"] = unigram_bits_per_byte(train_text, final_windows[:, 1:])
    report(args, learners, bits)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

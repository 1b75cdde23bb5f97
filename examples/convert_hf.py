"""Replaces the MLPs of a pretrained decoder by OmniMoE layers and continues training it.

    python examples/convert_hf.py path/to/checkpoint
    python examples/convert_hf.py path/to/checkpoint --layers 8 16 --gpu --resume

The checkpoint is a local directory with model and tokenizer, of any decoder whose MLP has gate, up
and down projections (Llama, Qwen3, Mistral, Gemma, SmolLM ...). The converted model starts with the
same outputs; the text is the Python standard library's own sources. Written to --out: the model and
its tokenizer, checkpoints, loss.png, expert_load.png, metrics.json.
"""

import argparse
import sys
from pathlib import Path

from hf_training import (
    add_training_options,
    load_texts,
    make_trainer,
    parse_with_gpu_defaults,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from omni_moe.integrations.transformers import replace_mlp

GPU_SETTINGS = {
    "experts": 16384,
    "experts_per_token": 128,
    "seq_len": 1024,
    "batch": 8,
    "steps": 1000,
    "lr": 2e-5,
    "expert_lr": 1e-3,
    "bf16": True,
    "gradient_checkpointing": True,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="directory of the model and its tokenizer")
    add("--layers", type=int, nargs="+", help="layers to convert (default: all)")
    add("--lr", type=float, default=1e-4, help="peak learning rate of all but the experts")
    add("--out", type=Path, default=Path("runs/convert_hf"), help="directory of the results")
    add_training_options(parser)
    return parse_with_gpu_defaults(parser, GPU_SETTINGS)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    try:
        if not (args.checkpoint / "config.json").exists():
            raise ValueError(f"checkpoint: expected a config.json in {args.checkpoint}, found none")
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        # Weights in fp32: bf16 ones would lose small updates; --bf16 only computes in it.
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="float32")
        replace_mlp(
            model,
            num_experts=args.experts,
            num_experts_per_token=args.experts_per_token,
            layers=args.layers,
            norm_topk_prob=True,
            track_expert_load=True,
        )
        trainer = make_trainer(args, model, tokenizer, load_texts(args.data))
    except ValueError as error:
        sys.exit(f"convert_hf.py: {error}")
    if not args.resume:
        print(f"held-out loss before training {trainer.evaluate()['eval_loss']:.3f} nats per token")
    train(args, trainer)


if __name__ == "__main__":
    main()

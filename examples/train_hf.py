"""Trains an OmniMoE language model from scratch with Transformers' Trainer.

    python examples/train_hf.py            # a few minutes on two CPU cores; uses a GPU if any
    python examples/train_hf.py --gpu      # the paper's 12 x 768 with fewer experts, in bf16
    python examples/train_hf.py --resume   # goes on from the last checkpoint

The text is the Python standard library's own sources; a byte-level BPE tokenizer is trained on it
first. Written to --out: the model and its tokenizer, for `AutoModelForCausalLM.from_pretrained`,
checkpoints, loss.png, expert_load.png, metrics.json.
"""

import argparse
import sys
from pathlib import Path

from hf_training import (
    add_training_options,
    load_texts,
    make_trainer,
    parse_with_gpu_defaults,
    positive_int,
    train,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from omni_moe.integrations.transformers import OmniMoeConfig, OmniMoeForCausalLM

END_OF_TEXT = "<|endoftext|>"

GPU_SETTINGS = {
    "layers": 12,
    "hidden": 768,
    "intermediate": 768,
    "heads": 12,
    "key_value_heads": 4,
    "vocab": 16384,
    "experts": 16384,
    "experts_per_token": 128,
    "seq_len": 1024,
    "batch": 16,
    "steps": 2000,
    "lr": 1e-3,
    "expert_lr": 4e-3,
    "bf16": True,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=positive_int, default=4)
    add("--hidden", type=positive_int, default=128, help="hidden size")
    add("--intermediate", type=positive_int, default=128, help="width of the shared MLP")
    add("--heads", type=positive_int, default=4, help="attention heads")
    add("--key-value-heads", type=positive_int, default=2)
    add("--vocab", type=positive_int, default=2048, help="tokens of the tokenizer")
    add("--lr", type=float, default=4e-3, help="peak learning rate of all but the experts")
    add("--out", type=Path, default=Path("runs/train_hf"), help="directory of the results")
    add_training_options(parser)
    return parse_with_gpu_defaults(parser, GPU_SETTINGS)


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OmniMoeForCausalLM:
    config = OmniMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=args.seq_len,
        initializer_range=args.hidden**-0.5,
        num_experts=args.experts,
        num_experts_per_token=args.experts_per_token,
        norm_topk_prob=True,
        track_expert_load=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OmniMoeForCausalLM(config)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    try:
        texts = load_texts(args.data)
        tokenizer = train_tokenizer(texts[0], args.vocab)
        trainer = make_trainer(args, make_model(args, tokenizer), tokenizer, texts)
    except ValueError as error:
        sys.exit(f"train_hf.py: {error}")
    train(args, trainer)


if __name__ == "__main__":
    main()

"""Language models of the benchmark: a preset with OmniMoE layers, and a dense one beside it.

They are Transformers'. What only models need is imported where it is used.
"""

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

SEQUENCE_LENGTH = 1024
VOCAB_SIZE = 32768
HEAD_SIZE = 64


def omni_moe(case: Case, device: torch.device) -> nn.Module:
    """`OmniMoeForCausalLM` of the case's sizes, in its dtype and training mode."""
    return _made(_config(case), case, device)


def dense(case: Case, device: torch.device) -> nn.Module:
    """The same decoder with SwiGLU MLPs of as many parameters as a token meets in the layers."""
    from transformers import Qwen3Config

    from examples.lm_model import dense_width

    config = _config(case)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings",
             "tie_word_embeddings")  # fmt: skip
    same = {name: getattr(config, name) for name in names}
    width = dense_width(config.layer_config())
    return _made(Qwen3Config(**same, intermediate_size=width), case, device)


def _config(case: Case):
    from omni_moe.integrations.transformers import OmniMoeConfig

    shape = case.shape
    num_heads = max(1, shape["hidden"] // HEAD_SIZE)
    return OmniMoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 3),
        head_dim=HEAD_SIZE,
        num_experts=shape["experts"],
        num_experts_per_token=shape["k"],
        expert_grid=(shape["rows"], shape["cols"]),
    )


def _made(config, case: Case, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    return model.train()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss of ids (B, S)."""
    # Without a cache Transformers looks for packed sequences in the values of the positions: eager
    # waits for the device then, and a compiled model masks what it attends to by a tensor.
    return model(input_ids=ids, labels=ids, use_cache=True).loss


def training_flops(model: nn.Module, ids: Tensor) -> int:
    """Of forward and backward; only the K experts of a token count, whichever way they are run."""
    from examples import mfu

    on_meta = ids.to("meta")
    return mfu.training_flops(model, lambda copy: loss_of(copy, on_meta))


def speed(flops: int, num_tokens: int, us: float, device: torch.device) -> dict[str, float | None]:
    """Parts of a row: tokens and TFLOP a second, and their share of the peak in bf16, if known."""
    from examples import mfu

    rates = mfu.utilisation(flops / us * 1e6, mfu.peak_tflops(device, "bf16"))
    return {"tokens_per_second": round(num_tokens / us * 1e6)} | {
        name: None if value is None else round(value, 4) for name, value in rates.items()
    }

"""Operations and plans of the classic mixture of experts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omni_moe import GpuProperties, plan
from omni_moe.modules import MixtureOfExperts

T, H, I, E, K = 15, 16, 24, 8, 2  # noqa: E741
H200 = GpuProperties(num_sms=132, l2_bytes=60 * 2**20, shared_bytes_per_block=227 * 2**10)


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops():
    layer = MixtureOfExperts(H, I, E, K, shared_intermediate_size=I)
    x = torch.randn(T, H, requires_grad=True)
    linear = T * K * 2 * H * I
    gate, shared, combine = T * 2 * H * E, 3 * T * 2 * H * I, T * K * 2 * H
    outputs = []
    forward = counted(lambda: outputs.append(layer(x)[0]))
    assert forward == gate + 3 * linear + combine + shared
    backward = counted(lambda: outputs[0].sum().backward())
    # The dot products of the weights' gradients; the sum that undoes the permutation has none.
    assert backward == 2 * (gate + 3 * linear + shared) + combine


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "threads"),
    [
        (4096, "bfloat16", 256),
        (2048, "bfloat16", 256),
        (1024, "bfloat16", 128),
        (100, "bfloat16", 16),
        (8, "bfloat16", 1),
        (100, "float32", 32),
    ],
)
def test_plans(hidden_size, dtype, threads):
    sizes = {"num_tokens": 4096, "hidden_size": hidden_size, "num_experts": 256}
    plans = plan(
        "omni_permute", **sizes, num_experts_per_token=8, dtype=getattr(torch, dtype), gpu=H200
    )
    aligned = hidden_size % (8 if dtype == "bfloat16" else 4) == 0
    for name in ("permute", "unpermute"):
        assert plans[name]["uses_vectors"] == aligned
        assert plans[name]["threads_per_row"] == threads
        assert plans[name]["num_blocks"] == 4096 * threads // 256
    assert plans["unpermute_backward"]["num_blocks"] == 4096 * 8 // 8
    rows = plans["expert_rows"]
    assert (rows["pairs_per_block"], rows["num_blocks"]) == (256, 128)
    assert rows["workspace_bytes"] == 128 * 256 * 4 + 256 * 8


def test_every_size_has_plans():
    for num_tokens in (0, 1, 37):
        for hidden_size in (0, 1, 1000):
            for num_experts in (0, 1, 4096):
                for k in (0, 1, 3):
                    plan(
                        "omni_permute",
                        num_tokens=num_tokens,
                        hidden_size=hidden_size,
                        num_experts=num_experts,
                        num_experts_per_token=k,
                        gpu=H200,
                    )

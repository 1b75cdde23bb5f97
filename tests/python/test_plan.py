"""The plans of the CUDA kernels, seen from Python; the shapes are those of tests/cpp."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from helpers import needs_gpu

from omni_moe import GpuProperties, plan

A100 = GpuProperties(num_sms=108, l2_bytes=40 * 2**20, shared_bytes_per_block=163 * 2**10)
H200 = GpuProperties(
    num_sms=132,
    l2_bytes=60 * 2**20,
    shared_bytes_per_block=227 * 2**10,
    has_early_launch=True,
    has_hopper_kernels=True,
)


def expert_plans(num_tokens, hidden_size, num_experts, num_experts_per_token, **options):
    return plan(
        "omni_expert",
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        **{"gpu": H200} | options,
    )


@pytest.mark.parametrize(
    ("shape", "strategy", "tile_bytes"),
    [
        ((1024, 1024, 4096, 32), "l2_tiled", 256),
        ((4096, 1024, 4096, 16), "l2_tiled", 512),
        ((4096, 1024, 65536, 16), "l2_tiled", 256),
        ((4096, 1024, 1048576, 64), "fused", None),
        ((1024, 1024, 102400, 4096), "l2_tiled", 256),
        ((64, 1024, 65536, 16), "fused", None),
    ],
)
def test_strategies_of_experts(shape, strategy, tile_bytes):
    for kernel in expert_plans(*shape).values():  # the passes of forward and backward are the same
        assert (kernel["strategy"], kernel.get("tile_bytes")) == (strategy, tile_bytes)


def test_only_the_numbers_of_the_strategy_are_given():
    assert expert_plans(1, 1024, 65536, 512)["expert_forward"] == {
        "strategy": "two_phase",
        "threads": 512,
        "num_splits": 16,
        "pairs_per_split": 32,
        "workspace_bytes": 4 * 16 * 1024,
    }
    assert expert_plans(64, 1024, 65536, 16)["expert_forward"] == {
        "strategy": "fused",
        "workspace_bytes": 0,
    }


def test_dtype_and_device_count():
    """fp32 rows of 1001 elements are aligned no more than bf16 ones; 1004 are."""
    shape = (4096, 1004, 65536, 16)
    assert expert_plans(*shape)["expert_forward"]["strategy"] == "two_phase"
    wide = expert_plans(*shape, dtype=torch.float32)
    assert wide["expert_forward"]["strategy"] == "l2_tiled"
    small_l2 = replace(H200, l2_bytes=2**20)
    assert expert_plans(4096, 1024, 4096, 16, gpu=small_l2)["expert_forward"]["tile_bytes"] == 256


def test_schedules():
    assert expert_plans(4096, 1024, 65536, 16)["expert_backward"]["schedule"] == "counting"
    assert expert_plans(4096, 512, 8, 4)["expert_backward"]["schedule"] == "radix_sort"


def test_router():
    few = plan(
        "omni_router", num_tokens=4096, num_rows=64, num_cols=64, num_experts_per_token=16, gpu=H200
    )
    assert few["router_forward"]["kernel"] == "warp"
    many = plan(
        "omni_router",
        num_tokens=4096,
        num_rows=320,
        num_cols=320,
        num_experts_per_token=512,
        gpu=H200,
    )
    assert many["router_forward"]["kernel"] == "block"
    # Without an order of the experts, as the layer asks for them.
    assert few["router_forward_unsorted"] == few["router_forward"]
    assert many["router_forward_unsorted"]["kernel"] == "unsorted"
    assert few["router_backward"].keys() == many["router_backward"].keys()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "kernel"),
    [
        (4096, 256, 8, {"kernel": "warp", "items_per_lane": 8, "num_blocks": 512,
                        "workspace_bytes": 512 * 256 * 4}),
        (4096, 8, 2, {"kernel": "warp", "items_per_lane": 2, "num_blocks": 512,
                      "workspace_bytes": 512 * 8 * 4}),
        # The counts of one block need no sum.
        (8, 1024, 32, {"kernel": "warp", "items_per_lane": 32, "num_blocks": 1,
                       "workspace_bytes": 0}),
        (4096, 64, 33, {"kernel": "block", "num_blocks": 264, "workspace_bytes": 264 * 64 * 4}),
        (3, 4096, 2, {"kernel": "block", "num_blocks": 3, "workspace_bytes": 3 * 4096 * 4}),
    ],
)  # fmt: skip
def test_topk_router(num_tokens, num_experts, k, kernel):
    plans = plan(
        "omni_topk_router",
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_experts_per_token=k,
        gpu=H200,
    )
    assert plans["topk_router_forward"] == kernel
    assert plans["topk_router_backward"]["warps_per_block"] == (4 if num_experts <= 2048 else 2)
    # As many pairs as experts in a block: no more counts than pairs, but for the last block's.
    slots = plans["expert_slots"]
    assert slots["pairs_per_block"] == max(256, num_experts)
    assert slots["num_blocks"] == -(-num_tokens * k // slots["pairs_per_block"])


@pytest.mark.parametrize(
    ("changed", "has_kernel"),
    [
        ({}, True),
        ({"num_tokens": 65536}, False),  # not all blocks fit on the device at once
        ({"num_rows": 60}, False),
        ({"dtype": torch.float32}, False),
        ({"gpu": A100}, False),
    ],
)
def test_router_logits(changed, has_kernel):
    given = {"num_tokens": 4096, "hidden_size": 1024, "num_rows": 64, "num_cols": 64, "gpu": H200}
    plans = plan("omni_router_logits", **given | changed)
    assert (plans["router_logits_forward"] is not None) == has_kernel
    assert plans["batch_norm_forward"]["num_panels"] >= 2


@pytest.mark.parametrize(
    ("changed", "has_kernel"),
    [({}, True), ({"hidden_size": 1001}, False), ({"dtype": torch.float32}, False),
     ({"gpu": A100}, False)],
)  # fmt: skip
def test_mlp(changed, has_kernel):
    given = {"num_tokens": 4096, "hidden_size": 1024, "intermediate_size": 4096, "gpu": H200}
    plans = plan("omni_mlp", **given | changed)
    assert (plans["gated_linear_forward"] is not None) == has_kernel
    assert (plans["gated_linear_backward"] is not None) == has_kernel
    assert plans["gated_activation_forward"]["uses_vectors"]


def test_bands_need_a_grid():
    sizes = dict(num_tokens=4096, hidden_size=1024, num_experts=320**2, num_experts_per_token=512)
    assert plan("omni_expert", **sizes, gpu=H200)["expert_forward"]["strategy"] == "l2_tiled"
    on_grid = plan("omni_expert", **sizes, num_cols=320, gpu=H200)
    for name in ("expert_forward", "expert_backward"):
        assert on_grid[name]["strategy"] == "bands"
        assert on_grid[name]["max_tasks"] <= 640


TINY = GpuProperties(num_sms=1, l2_bytes=0, shared_bytes_per_block=48 * 2**10)


@pytest.mark.parametrize("gpu", [A100, H200, TINY], ids=["A100", "H200", "tiny"])
def test_every_size_has_plans(gpu):
    for num_tokens, k, size in product((0, 1, 37, 4096), (0, 1, 16, 2000), (0, 8, 100, 1000)):
        expert_plans(num_tokens, size, 4096, k, gpu=gpu)
        plan(
            "omni_router",
            num_tokens=num_tokens,
            num_rows=50,
            num_cols=64,
            num_experts_per_token=k,
            gpu=gpu,
        )
        plan(
            "omni_topk_router",
            num_tokens=num_tokens,
            num_experts=4 * size,
            num_experts_per_token=k,
            gpu=gpu,
        )
        plan("omni_mlp", num_tokens=num_tokens, hidden_size=size, intermediate_size=size, gpu=gpu)
        plan(
            "omni_router_logits",
            num_tokens=num_tokens,
            hidden_size=size,
            num_rows=50,
            num_cols=64,
            gpu=gpu,
        )


def test_errors():
    with pytest.raises(ValueError, match="num_experts >= 0, but got -1"):
        expert_plans(4, 8, -1, 2)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, but got float64"):
        expert_plans(4, 8, 16, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected op to be one of omni_router, .*got 'softmax'"):
        plan("softmax", gpu=H200)
    with pytest.raises(ValueError, match=r"for omni_mlp the sizes num_tokens, .*got num_tokens$"):
        plan("omni_mlp", num_tokens=4, gpu=H200)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            expert_plans(4, 8, 16, 2, gpu=None)


@needs_gpu
def test_the_current_gpu_is_the_default():
    here = GpuProperties.of()
    assert here.num_sms > 0 and here.l2_bytes > 0 and here.shared_bytes_per_block >= 48 * 2**10
    assert {field.name for field in fields(here)} == set(vars(here))
    shape = (4096, 1024, 65536, 16)
    assert expert_plans(*shape, gpu=None) == expert_plans(*shape, gpu=here)

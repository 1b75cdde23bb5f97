"""The plan of the CUDA expert passes, seen from Python; the shapes are those of tests/cpp."""

from dataclasses import replace

import pytest
import torch
from helpers import needs_gpu

from omni_moe import GpuProperties, expert_plan

H200 = GpuProperties(
    num_sms=132,
    l2_bytes=60 * 2**20,
    shared_bytes_per_sm=228 * 2**10,
    shared_bytes_per_block=227 * 2**10,
    compute_capability=(9, 0),
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
def test_strategies(shape, strategy, tile_bytes):
    plan = expert_plan(*shape, gpu=H200)
    assert (plan["strategy"], plan.get("tile_bytes")) == (strategy, tile_bytes)


def test_only_the_numbers_of_the_strategy_are_given():
    split = expert_plan(1, 1024, 65536, 512, gpu=H200)
    assert split == {
        "strategy": "two_phase",
        "threads": 512,
        "num_splits": 16,
        "pairs_per_split": 32,
        "workspace_bytes": 4 * 16 * 1024,
    }
    assert expert_plan(64, 1024, 65536, 16, gpu=H200) == {
        "strategy": "fused",
        "workspace_bytes": 0,
    }


def test_dtype_and_device_count():
    """fp32 rows of 1001 elements are aligned no more than bf16 ones; 1004 are."""
    assert expert_plan(4096, 1004, 65536, 16, gpu=H200)["strategy"] == "two_phase"
    wide = expert_plan(4096, 1004, 65536, 16, dtype=torch.float32, gpu=H200)
    assert wide["strategy"] == "l2_tiled"
    small_l2 = replace(H200, l2_bytes=2**20)
    assert expert_plan(4096, 1024, 4096, 16, gpu=small_l2)["tile_bytes"] == 256


def test_errors():
    with pytest.raises(ValueError, match="num_experts >= 0, but got -1"):
        expert_plan(4, 8, -1, 2, gpu=H200)
    with pytest.raises(ValueError, match=r"but got torch\.float64"):
        expert_plan(4, 8, 16, 2, dtype=torch.float64, gpu=H200)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            expert_plan(4, 8, 16, 2)


@needs_gpu
def test_the_current_gpu_is_the_default():
    here = GpuProperties.of()
    assert here.num_sms > 0 and here.l2_bytes > 0
    assert here.shared_bytes_per_block <= here.shared_bytes_per_sm
    assert expert_plan(4096, 1024, 65536, 16) == expert_plan(4096, 1024, 65536, 16, gpu=here)

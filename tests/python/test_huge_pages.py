"""Large gradients on the CPU: they ask for huge pages and leave nothing of that behind."""

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close, run, run_in_double

import omni_moe
from benchmarks.memory import peak_memory
from omni_moe import reference

SMAPS = Path("/proc/self/smaps")
has_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or not SMAPS.exists()
    or "VmFlags" not in SMAPS.read_text(),
    reason="needs Linux with transparent huge pages and the flags of mappings",
)

H = 1024


def advised_bytes() -> int:
    """What the process has asked huge pages for: the mappings that have the flag hg."""
    total = size = 0
    for line in SMAPS.read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            size = int(mapping[2], 16) - int(mapping[1], 16)
        elif line.startswith("VmFlags:") and "hg" in line.split():
            total += size
    return total


def inputs_of(mib: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Few tokens, and two tables of `mib` MiB each."""
    num_experts = mib * 2**20 // (4 * H)
    hidden, up, down = (torch.randn(rows, H) for rows in (5, num_experts, num_experts))
    indices = torch.randint(num_experts, (5, 3))
    return [hidden, up, down, torch.rand(5, 3)], indices, torch.randn(5, H)


def gradients(inputs, indices, grad) -> list[torch.Tensor]:
    return run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)[1]


@has_huge_pages
@pytest.mark.parametrize("mib", [8, 24, 32, 40])
def test_the_advice_ends_with_the_gradients(mib):
    """Three steps: what the allocator does with a block changes once one was freed."""
    given = inputs_of(mib)
    before = advised_bytes()
    for _ in range(3):
        grads = gradients(*given)
        if mib >= 32:
            assert advised_bytes() >= before + 2 * mib * 2**20
        del grads
        assert advised_bytes() == before


def test_against_oracle(deterministic_memory):
    inputs, indices, grad = inputs_of(40)
    got = gradients(inputs, indices, grad)
    _, want = run_in_double(lambda *args: reference.omni_expert(*args, indices), inputs, grad)
    for i, (mine, oracle) in enumerate(zip(got, want, strict=True)):
        assert_close(mine, oracle, f"gradient {i}", num_terms=H)


def test_a_large_gradient_can_be_resized():
    """Larger, smaller than a mapping of its own, and to nothing."""
    up_grad = gradients(*inputs_of(40))[1]
    want = up_grad.clone()
    for num_rows in (12_000, 100):
        up_grad.resize_(num_rows, H)
        both = min(num_rows, len(want))
        assert torch.equal(up_grad[:both], want[:both])
    up_grad.untyped_storage().resize_(0)
    assert up_grad.untyped_storage().nbytes() == 0


def test_the_profiler_sees_large_gradients():
    given = inputs_of(40)
    peak = peak_memory(lambda: gradients(*given), torch.device("cpu"))
    assert peak.peak_mib >= 80 > peak.without_results_mib

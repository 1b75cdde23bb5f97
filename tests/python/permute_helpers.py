"""Choices of experts and their rows, for the tests of the permutation."""

import torch
from torch import Tensor

from omni_moe.ops import omni_expert_rows, omni_expert_slots


def choose(num_tokens: int, num_experts: int, k: int, pattern: str) -> Tensor:
    """(T, K) int32 ids, no expert twice a token but in "one"."""
    scores = torch.rand(num_tokens, num_experts)
    ids = scores.argsort(-1)[:, :k].int()
    if pattern == "one":
        return torch.full_like(ids, num_experts - 1)
    if pattern == "masked":
        ids[torch.rand(num_tokens) < 0.4] = -1
        ids[torch.rand(ids.shape) < 0.1] = -1
    return ids


def rows_of(indices: Tensor, num_experts: int, layout: str) -> tuple[Tensor, Tensor, int, bool]:
    """`row_id_map`, `expert_ends`, number of rows and `padded`, of a layout by name."""
    capacity = max(1, indices.numel() // num_experts)
    if layout == "dense":
        return *omni_expert_rows(indices, num_experts), indices.numel(), False
    if layout == "dropped":
        slots = omni_expert_slots(indices, num_experts, capacity)
        num_rows = min(indices.numel(), num_experts * capacity)
        return *omni_expert_rows(indices, num_experts, slots), num_rows, False
    assert layout == "padded", layout
    maps = omni_expert_rows(indices, num_experts, capacity=capacity)
    return *maps, num_experts * capacity, True

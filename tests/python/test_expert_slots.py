"""Places of the experts' queues, in order of tokens or of priorities."""

import pytest
import torch
from helpers import assert_bitwise, on_devices

from omni_moe import reference
from omni_moe.ops import omni_expert_slots

NAN = float("nan")


@pytest.mark.parametrize("capacity", [0, 1, 5, 10**6])
@pytest.mark.parametrize(
    "shape",
    [(0, 8, 2), (1, 1, 1), (37, 60, 4), (5000, 8, 2), (700, 300, 8), (64, 4096, 16)],
    ids=str,
)
@on_devices
def test_slots(device, shape, capacity):
    num_tokens, num_experts, k = shape
    ids = torch.randint(-1, num_experts, (num_tokens, k), dtype=torch.int32)
    one_expert = torch.full_like(ids, num_experts - 1)
    nothing = torch.full_like(ids, -1)
    for indices in (ids, one_expert, nothing):
        # Two decimals: many are equal.
        priorities = torch.rand(num_tokens, k).mul(100).round().div(100)
        for order in (None, priorities):
            want = reference.omni_expert_slots(indices, num_experts, capacity, order)
            order = None if order is None else order.to(device)
            slots = omni_expert_slots(indices.to(device), num_experts, capacity, order)
            assert_bitwise(slots.cpu(), want)


@on_devices
def test_slots_by_priority(device):
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [-1, 0]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.1, 0.5], [0.7, 0.5], [NAN, 1], [9, 0.7]], device=device)
    slots = omni_expert_slots(ids, 3, 3, weights.requires_grad_())
    assert slots.tolist() == [[-1, 0], [1, 1], [0, 0], [-1, 2]]
    assert omni_expert_slots(ids, 3, 3).tolist() == [[0, 0], [1, 1], [2, 0], [-1, -1]]

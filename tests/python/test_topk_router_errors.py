"""Bad input of the top-k router and of its slots: which argument, what was expected, what came."""

import pytest
import torch

from omni_moe.ops import omni_expert_slots, omni_topk_router


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring_func": "tanh"}, "scoring_func to be one of softmax, sigmoid, sqrtsoftplus, but"),
        ({"group_score": "mean"}, "group_score to be one of top2_sum, max, but got 'mean'"),
        ({"n_group": 5}, "n_group to divide the 12 experts, but got 5"),
        ({"n_group": 0}, "n_group to divide the 12 experts, but got 0"),
        ({"n_group": 4, "topk_group": 5}, "topk_group between 1 and the 4 groups, but got 5"),
        ({"n_group": 4, "topk_group": 0}, "topk_group between 1 and the 4 groups, but got 0"),
        ({"n_group": 12}, "num_experts_per_token between 0 and the 1 experts of the chosen groups"),
        ({"token_mask": torch.ones(5)}, "token_mask to be Bool, but got Float"),
        (
            {"e_score_correction_bias": torch.ones(12).half()},
            "e_score_correction_bias to be Float, but got Half",
        ),
        (
            {"replay_indices": torch.zeros(5, 2).int()},
            r"replay_indices.size\(1\) to equal the num_experts_per_token \(3\)",
        ),
        ({"replay_indices": torch.zeros(5, 3)}, "replay_indices to be int32 or int64, but got"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_value_errors(device, options, message):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(ValueError, match="omni_topk_router: expected " + message):
        omni_topk_router(torch.zeros(5, 12, device=device), 3, **options)


def test_errors_of_numbers():
    logits = torch.zeros(5, 12)
    for k in (-1, 13):
        with pytest.raises(ValueError, match=f"0 and the 12 experts .*, but got {k}"):
            omni_topk_router(logits, k)
    with pytest.raises(ValueError, match="at most 4096 experts, but got 4097"):
        omni_topk_router(torch.zeros(1, 4097), 1)
    ids = torch.zeros(5, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="omni_expert_slots: expected capacity >= 0, but got -1"):
        omni_expert_slots(ids, 8, -1)
    with pytest.raises(ValueError, match="num_experts between 0 and 4096, but got 4097"):
        omni_expert_slots(ids, 4097, 1)
    with pytest.raises(ValueError, match="indices to be int32, but got Long"):
        omni_expert_slots(ids.long(), 8, 1)


@pytest.mark.parametrize("value", [-2, 12])
def test_ids_out_of_range(value):
    ids = torch.zeros(5, 3, dtype=torch.int32)
    ids[3, 2] = value
    logits = torch.zeros(5, 12)
    message = rf"expected indices in \[-1, 12\), but got {value} at indices\[3, 2\]"
    with pytest.raises(IndexError, match=message):
        omni_topk_router(logits, 3, replay_indices=ids)
    with pytest.raises(IndexError, match=message):
        omni_expert_slots(ids, 12, 4)
    with pytest.raises(IndexError, match=message):
        torch.ops.omni_moe._omni_topk_router_backward(
            torch.zeros(5, 3), logits, ids, "sigmoid", False, 1.0
        )

"""Good arguments of every op, of which tests of errors change one."""

import torch

ops = torch.ops.omni_moe

T, H, E, K, I, R, C = 5, 8, 12, 3, 6, 4, 3  # noqa: E741


def arguments(op, device="cpu"):
    """Good arguments of an op, by name, in order."""
    choice = torch.randint(E, (T, K), device=device)
    floats = {
        "hidden_states": (T, H),
        "up_weights": (E, H),
        "down_weights": (E, H),
        "routing_weights": (T, K),
        "router_logits": (T, E),
        "router_logits_x": (T, R),
        "router_logits_y": (T, C),
        "grad_scores": (T, K),
        "grad_routing_weights": (T, K),
        "grad_expert_states": (T, H),
        "x": (2, T, H),
        "gate_weight": (I, H),
        "up_weight": (I, H),
        "down_weight": (H, I),
        "grad_output": (2, T, H),
        "gate": (2, T, I),
        "up": (2, T, I),
        "pre_activations": (T, K),
        "addend": (T, H),
        "up_embed": (E, H),
        "down_embed": (E, H),
    }
    others = {
        "num_experts_per_token": K,
        "num_rows": R,
        "num_cols": C,
        "norm_topk_prob": False,
        "sorted": True,
        "num_experts": E,
        "capacity": 2,
        "scoring_func": "softmax",
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2_sum",
        "e_score_correction_bias": torch.zeros(E, device=device),
        "token_mask": torch.ones(T, dtype=torch.bool, device=device),
        "replay_indices": choice,
        "priorities": torch.rand(T, K, device=device),
        "activation": "silu",
        "save_for_backward": False,
        "output_mask": [True] * 4,
        "indices": choice.int() if "router" in op or "slots" in op else choice,
    }
    schema = getattr(ops, op).default._schema
    return {
        argument.name: torch.randn(floats[argument.name], device=device)
        if argument.name in floats
        else others[argument.name]
        for argument in schema.arguments
    }


def call_with(op, device="cpu", **changed):
    given = arguments(op, device) | changed
    return getattr(ops, op)(**given)


ALL_OPS = (
    "omni_router",
    "_omni_router_backward",
    "omni_softmax_router",
    "_omni_softmax_router_backward",
    "omni_topk_router",
    "_omni_topk_router_backward",
    "omni_expert_slots",
    "omni_expert",
    "_omni_expert_backward",
    "omni_mlp",
    "_omni_mlp_backward",
    "_omni_mlp_backward_consume",
    "omni_expert_mlp",
)
ROUTERS = ("omni_router", "omni_softmax_router")
TOPK_ROUTERS = ("omni_topk_router", "_omni_topk_router_backward")
EXPERTS = ("omni_expert", "_omni_expert_backward")
MLPS = ("omni_mlp", "_omni_mlp_backward")

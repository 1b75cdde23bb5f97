"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: registered on import.

As everywhere in that counter, a multiplication with its addition is two operations, and only matrix
products and sums of products count: not the choice of experts, norms or activations. A backward
pass counts what the gradients that are asked for take. Arguments are shapes, named as in the ops'
schemas.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def _router_logits(
    hidden_states: Shape, gate_x: Shape, gate_y: Shape, *args: Any, **kwargs: Any
) -> int:
    return 2 * math.prod(hidden_states) * (gate_x[0] + gate_y[0])  # (T, H) x (H, R + C)


def _router_logits_backward(
    grad_router_logits_x: Shape,
    grad_router_logits_y: Shape,
    hidden_states: Shape,
    gate_x: Shape,
    gate_y: Shape,
    router_logits_x: Shape,
    router_logits_y: Shape,
    inv_std: Shape,
    training: bool,
    output_mask: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    return sum(output_mask) * _router_logits(hidden_states, gate_x, gate_y)


def _router_logits_per_token_backward(
    grad_router_logits_x: Shape,
    grad_router_logits_y: Shape,
    hidden_states: Shape,
    gate_x: Shape,
    gate_y: Shape,
    router_logits_x: Shape,
    router_logits_y: Shape,
    inv_std: Shape,
    norm: str,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    return sum(output_mask) * _router_logits(hidden_states, gate_x, gate_y)


def _products_of_pairs(hidden_states: Shape, indices: Shape) -> int:
    """One product of length H for each of the T * K pairs of a token and an expert."""
    return 2 * math.prod(indices) * hidden_states[-1]


def _expert(
    hidden_states: Shape,
    up_weights: Shape,
    down_weights: Shape,
    routing_weights: Shape,
    indices: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * _products_of_pairs(hidden_states, indices)  # hidden . up; the sum of rows of down


def _expert_backward(
    grad_expert_states: Shape,
    hidden_states: Shape,
    up_weights: Shape,
    down_weights: Shape,
    routing_weights: Shape,
    indices: Shape,
    pre_activations: Shape,
    activation: str,
    addend: Shape | None,
    output_mask: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    of_hidden, of_up, of_down, of_routing = output_mask
    through_down = of_hidden or of_up or of_routing  # grad . down
    num_products = through_down + of_hidden + of_up + of_down
    return num_products * _products_of_pairs(hidden_states, indices)


def _mlp(x: Shape, gate_weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 3 * 2 * math.prod(x) * gate_weight[0]  # gate, up and down


def _mlp_backward(
    grad_output: Shape,
    x: Shape,
    gate_weight: Shape,
    up_weight: Shape,
    down_weight: Shape,
    gate: Shape,
    up: Shape,
    activation: str,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    of_x, of_gate, of_up, of_down = output_mask
    through_down = of_x or of_gate or of_up
    num_products = through_down + 2 * of_x + of_gate + of_up + of_down
    return num_products * 2 * math.prod(x) * gate_weight[0]


def _grouped_linear(rows: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    """Every row has an expert: how many have none is known to the device alone."""
    return 2 * math.prod(rows) * weight[1]  # (N, H) x (H, O)


def _grouped_linear_backward(
    grad_output: Shape,
    rows: Shape,
    weight: Shape,
    expert_ends: Shape,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    return sum(output_mask) * _grouped_linear(rows, weight)


def _unpermute(
    rows: Shape,
    row_id_map: Shape,
    expert_ends: Shape,
    weights: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 0 if weights is None else 2 * math.prod(row_id_map) * rows[1]


def _unpermute_backward(
    grad_tokens: Shape,
    rows: Shape,
    row_id_map: Shape,
    expert_ends: Shape,
    weights: Shape,
    padded: bool,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    return output_mask[1] * 2 * math.prod(row_id_map) * rows[1]  # a dot product for each pair


def _expert_mlp(
    hidden_states: Shape,
    up_embed: Shape,
    down_embed: Shape,
    routing_weights: Shape,
    indices: Shape,
    gate_weight: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    experts = _expert(hidden_states, up_embed, down_embed, routing_weights, indices)
    return experts + _mlp(hidden_states, gate_weight)


_FORMULAS: dict[str, Callable[..., int]] = {
    "omni_router": _nothing,
    "_omni_router_backward": _nothing,
    "omni_softmax_router": _nothing,
    "_omni_softmax_router_backward": _nothing,
    "omni_topk_router": _nothing,
    "_omni_topk_router_backward": _nothing,
    "omni_expert_slots": _nothing,
    "omni_expert_rows": _nothing,
    "omni_permute": _nothing,
    "omni_unpermute": _unpermute,
    "_omni_unpermute_backward": _unpermute_backward,
    "_omni_grouped_linear": _grouped_linear,
    "_omni_grouped_linear_backward": _grouped_linear_backward,
    "_omni_gated_activation": _nothing,
    "_omni_gated_activation_backward": _nothing,
    "omni_router_logits": _router_logits,
    "_omni_router_logits_eval": _router_logits,
    "_omni_router_logits_backward": _router_logits_backward,
    "omni_router_logits_per_token": _router_logits,
    "_omni_router_logits_per_token_backward": _router_logits_per_token_backward,
    "omni_expert": _expert,
    "_omni_expert_backward": _expert_backward,
    "omni_mlp": _mlp,
    "_omni_mlp_backward": _mlp_backward,
    "_omni_mlp_backward_consume": _mlp_backward,
    "omni_expert_mlp": _expert_mlp,
}

for _name, _formula in _FORMULAS.items():
    _op = getattr(torch.ops.omni_moe, _name)
    if _op not in flop_registry:  # where Python imports the package a second time
        register_flop_formula(_op)(_formula)

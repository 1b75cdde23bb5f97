"""The baseline: the same functions as one would write them with PyTorch's stock operators.

They compute in the dtype of the inputs, where the oracle of `omni_moe.reference` widens it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_moe import OmniMoE
from omni_moe.activations import ACTIVATION_FUNCTIONS


def router(
    router_logits_x: Tensor,
    router_logits_y: Tensor,
    num_experts_per_token: int,
    norm_topk_prob: bool = False,
) -> tuple[Tensor, Tensor]:
    """Product-key routing: the top-K of each axis, then the top-K of their K x K sums.

    Shapes as `reference.omni_softmax_router`, but `indices` are int64 and equal sums come in any
    order.
    """
    num_rows, num_cols = router_logits_x.shape[-1], router_logits_y.shape[-1]
    log_probs_x, log_probs_y = router_logits_x.log_softmax(-1), router_logits_y.log_softmax(-1)
    best_x, rows = log_probs_x.topk(min(num_experts_per_token, num_rows), dim=-1)
    best_y, cols = log_probs_y.topk(min(num_experts_per_token, num_cols), dim=-1)
    sums = (best_x.unsqueeze(-1) + best_y.unsqueeze(-2)).flatten(-2)
    ids = (rows.unsqueeze(-1) * num_cols + cols.unsqueeze(-2)).flatten(-2)
    scores, positions = sums.topk(num_experts_per_token, dim=-1)
    weights = scores.exp()
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.gather(-1, positions)


def expert(
    hidden_states: Tensor,
    up_weights: Tensor,
    down_weights: Tensor,
    routing_weights: Tensor,
    indices: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Gather and batched matrix product, with two copies (T, K, H). As `reference.omni_expert`."""
    up = F.embedding(indices, up_weights)
    down = F.embedding(indices, down_weights)
    scores = torch.matmul(up, hidden_states.unsqueeze(-1)).squeeze(-1)
    gates = ACTIVATION_FUNCTIONS[activation](scores) * routing_weights
    return torch.matmul(gates.unsqueeze(-2), down).squeeze(-2)


def mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Three linear calls and an elementwise product. As `reference.omni_mlp`."""
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return F.linear(ACTIVATION_FUNCTIONS[activation](gate) * up, down_weight)


def layer(module: OmniMoE, hidden_states: Tensor, chunk: int | None = None) -> Tensor:
    """Forward of an `OmniMoE` layer by the functions above. As `reference.omni_moe`.

    Args:
        module: the layer.
        hidden_states: (..., H).
        chunk: so many tokens at a time behind the router's logits, whose BatchNorm takes the whole
            batch; by default all of them.
    """
    tokens = hidden_states.flatten(0, -2)
    logits_x = module.router_norm_x(module.router_gate_x(tokens))
    logits_y = module.router_norm_y(module.router_gate_y(tokens))
    if chunk is None or chunk >= len(tokens):
        return _behind_logits(module, tokens, logits_x, logits_y).view_as(hidden_states)
    parts = zip(tokens.split(chunk), logits_x.split(chunk), logits_y.split(chunk), strict=True)
    return torch.cat([_behind_logits(module, *part) for part in parts]).view_as(hidden_states)


def _behind_logits(module: OmniMoE, tokens: Tensor, logits_x: Tensor, logits_y: Tensor) -> Tensor:
    config = module.config
    routing_weights, indices = router(
        logits_x, logits_y, config.num_experts_per_token, config.norm_topk_prob
    )
    expert_states = expert(
        tokens,
        up_weights=module.up_embed.weight,
        down_weights=module.down_embed.weight,
        routing_weights=routing_weights,
        indices=indices,
        activation=config.hidden_act,
    )
    shared_states = mlp(
        tokens,
        gate_weight=module.gate_proj.weight,
        up_weight=module.up_proj.weight,
        down_weight=module.down_proj.weight,
        activation=config.hidden_act,
    )
    return expert_states + shared_states

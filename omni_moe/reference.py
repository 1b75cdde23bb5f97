"""Every function of the library in plain PyTorch: the oracle of the tests and of the benchmarks.

Written for clarity, differentiable by autograd, on any device and in any floating-point dtype. fp16
and bf16 inputs are computed in fp32 and rounded once, at the output; fp64 inputs in fp64. Argument
orders are those of the operators in `torch.ops.omni_moe`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_moe.activations import ACTIVATION_FUNCTIONS

if TYPE_CHECKING:
    from omni_moe.modules.omni_moe import OmniMoE


def _wide(x: Tensor) -> Tensor:
    """fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _best_pairs(logits_x: Tensor, logits_y: Tensor, num_pairs: int) -> Tensor:
    """Ids (T, K) int64 of the best sums: descending, equal sums by ascending id, NaN first.

    Sums of finite logits that overflow are compared as their halves.
    """
    x, y = logits_x.detach().unsqueeze(-1), logits_y.detach().unsqueeze(-2)
    sums, halves = (x + y).flatten(-2), (x / 2 + y / 2).flatten(-2)
    beyond = torch.where(sums.isinf(), halves, torch.zeros_like(halves))
    order = beyond.sort(dim=-1, descending=True, stable=True).indices
    sums = sums.gather(-1, order)
    best = sums.sort(dim=-1, descending=True, stable=True).indices[..., :num_pairs]
    return order.gather(-1, best)


def _pair_sums(values_x: Tensor, values_y: Tensor, indices: Tensor) -> Tensor:
    """(T, K): `values_x[row] + values_y[col]` of the given ids, differentiable."""
    num_cols = values_y.shape[-1]
    rows = indices.div(num_cols, rounding_mode="floor")
    return values_x.gather(-1, rows) + values_y.gather(-1, indices % num_cols)


def omni_router(
    router_logits_x: Tensor, router_logits_y: Tensor, num_experts_per_token: int
) -> tuple[Tensor, Tensor]:
    """Top-K of the full R x C grid of sums `x[row] + y[col]`; the grid need not be square.

    Args:
        router_logits_x: (T, R).
        router_logits_y: (T, C).
        num_experts_per_token: K, 0 <= K <= R * C.

    Returns:
        scores: (T, K) in the dtype of the logits, descending, equal scores by ascending id.
        indices: (T, K) int32, `id = row * C + col`.
    """
    logits_x, logits_y = _wide(router_logits_x), _wide(router_logits_y)
    indices = _best_pairs(logits_x, logits_y, num_experts_per_token)
    scores = _pair_sums(logits_x, logits_y, indices)
    return scores.to(router_logits_x.dtype), indices.int()


def omni_softmax_router(
    router_logits_x: Tensor,
    router_logits_y: Tensor,
    num_experts_per_token: int,
    norm_topk_prob: bool = False,
) -> tuple[Tensor, Tensor]:
    """`omni_router` with weights `exp(log_softmax(x)[row] + log_softmax(y)[col])`.

    Args:
        router_logits_x: (T, R).
        router_logits_y: (T, C).
        num_experts_per_token: K, 0 <= K <= R * C.
        norm_topk_prob: divide the K weights of a token by their sum.

    Returns:
        routing_weights: (T, K) in the dtype of the logits.
        indices: (T, K) int32, chosen on the sums of the logits. Where a log_softmax is NaN the
            token's weights are NaN and its ids 0 ... K-1.
    """
    logits_x, logits_y = _wide(router_logits_x), _wide(router_logits_y)
    log_probs_x, log_probs_y = logits_x.log_softmax(-1), logits_y.log_softmax(-1)

    indices = _best_pairs(logits_x, logits_y, num_experts_per_token)
    undefined = (log_probs_x.isnan().any(-1) | log_probs_y.isnan().any(-1)).unsqueeze(-1)
    first_ids = torch.arange(num_experts_per_token, device=indices.device)
    indices = torch.where(undefined, first_ids, indices)

    weights = _pair_sums(log_probs_x, log_probs_y, indices).exp()
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(router_logits_x.dtype), indices.int()


def omni_expert(
    hidden_states: Tensor,
    up_weights: Tensor,
    down_weights: Tensor,
    routing_weights: Tensor,
    indices: Tensor,
    activation: str = "silu",
) -> Tensor:
    """`out[t] = sum_k act(hidden[t] . up[idx[t,k]]) * routing[t,k] * down[idx[t,k]]`.

    Args:
        hidden_states: (T, H).
        up_weights: (E, H).
        down_weights: (E, H).
        routing_weights: (T, K).
        indices: (T, K) int32 or int64 in [0, E).
        activation: a key of `omni_moe.activations.ACTIVATION_FUNCTIONS`.

    Returns:
        expert_states: (T, H) in the dtype of `hidden_states`.
    """
    up = F.embedding(indices, _wide(up_weights))  # (T, K, H)
    down = F.embedding(indices, _wide(down_weights))  # (T, K, H)
    scores = torch.einsum("th,tkh->tk", _wide(hidden_states), up)
    gates = ACTIVATION_FUNCTIONS[activation](scores) * _wide(routing_weights)
    return torch.einsum("tk,tkh->th", gates, down).to(hidden_states.dtype)


def flash_expert(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    activation: str = "silu",
) -> Tensor:
    """`omni_expert` under the older naming: `down_weights` scores, `up_weights` projects back."""
    return omni_expert(
        hidden_states,
        up_weights=down_weights,
        down_weights=up_weights,
        routing_weights=routing_weights,
        indices=indices,
        activation=activation,
    )


def omni_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    activation: str = "silu",
) -> Tensor:
    """`(act(x gate_weight^T) * (x up_weight^T)) down_weight^T`.

    Args:
        x: (..., H).
        gate_weight: (I, H).
        up_weight: (I, H).
        down_weight: (H, I).
        activation: a key of `omni_moe.activations.ACTIVATION_FUNCTIONS`.

    Returns:
        (..., H) in the dtype of `x`.
    """
    gate = F.linear(_wide(x), _wide(gate_weight))
    up = F.linear(_wide(x), _wide(up_weight))
    activated = ACTIVATION_FUNCTIONS[activation](gate) * up
    return F.linear(activated, _wide(down_weight)).to(x.dtype)


def omni_router_logits(
    hidden_states: Tensor,
    gate_x: Tensor,
    gate_y: Tensor,
    batch_norm_buffers: Sequence[Tensor],
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """BatchNorm without affine parameters of the logits of two gates.

    Args:
        hidden_states: (T, H).
        gate_x: (R, H).
        gate_y: (C, H).
        batch_norm_buffers: empty, or running mean (R,), running variance (R,) and the count ()
            int64 of batches, then the same for the C columns; updated in place if `training`.
        training: use the batch's mean and variance, not the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        router_logits_x: (T, R) in the dtype of `hidden_states`.
        router_logits_y: (T, C).
    """
    buffers = list(batch_norm_buffers) or [None] * 6
    normed = []
    for gate, (running_mean, running_var, num_batches_tracked) in (
        (gate_x, buffers[:3]),
        (gate_y, buffers[3:]),
    ):
        logits = F.linear(_wide(hidden_states), _wide(gate))
        if training:
            mean, var = logits.mean(0), logits.var(0, correction=0)
            if num_batches_tracked is not None:
                num_batches_tracked += 1
            if running_mean is not None and len(logits) > 0:
                unbiased = logits.detach().var(0)
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean.detach())
                running_var.copy_((1 - momentum) * running_var + momentum * unbiased)
        else:
            mean, var = running_mean.to(logits.dtype), running_var.to(logits.dtype)
        normed.append(((logits - mean) / (var + eps).sqrt()).to(hidden_states.dtype))
    return normed[0], normed[1]


def omni_moe(module: "OmniMoE", hidden_states: Tensor) -> Tensor:
    """Forward of an `OmniMoE` layer by the functions above, with the layer's own parameters.

    BatchNorm is called as in the layer: in training mode it updates its running statistics.

    Args:
        module: the layer.
        hidden_states: (..., H).

    Returns:
        (..., H) in the dtype of `hidden_states`.
    """
    config = module.config
    tokens = hidden_states.flatten(0, -2)
    routing_weights, indices = omni_softmax_router(
        module.router_norm_x(module.router_gate_x(tokens)),
        module.router_norm_y(module.router_gate_y(tokens)),
        config.num_experts_per_token,
        config.norm_topk_prob,
    )
    expert_states = omni_expert(
        tokens,
        up_weights=module.up_embed.weight,
        down_weights=module.down_embed.weight,
        routing_weights=routing_weights,
        indices=indices,
        activation=config.hidden_act,
    )
    shared_states = omni_mlp(
        tokens,
        gate_weight=module.gate_proj.weight,
        up_weight=module.up_proj.weight,
        down_weight=module.down_proj.weight,
        activation=config.hidden_act,
    )
    return (expert_states + shared_states).view_as(hidden_states)

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
    router_logits_x: Tensor,
    router_logits_y: Tensor,
    num_experts_per_token: int,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Top-K of the full R x C grid of sums `x[row] + y[col]`; the grid need not be square.

    Args:
        router_logits_x: (T, R).
        router_logits_y: (T, C).
        num_experts_per_token: K, 0 <= K <= R * C.
        sorted: changes nothing here: False allows any order, and this is one.

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
    token_mask: Tensor | None = None,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """`omni_router` with weights `exp(log_softmax(x)[row] + log_softmax(y)[col])`.

    Args:
        router_logits_x: (T, R).
        router_logits_y: (T, C).
        num_experts_per_token: K, 0 <= K <= R * C.
        norm_topk_prob: divide the K weights of a token by their sum.
        token_mask: (T,) bool, False for tokens that choose nothing.
        sorted: changes nothing here: False allows any order, and this is one.

    Returns:
        routing_weights: (T, K) in the dtype of the logits; 0 for masked tokens.
        indices: (T, K) int32, chosen on the sums of the logits; -1 for masked tokens. Where a
            log_softmax is NaN the token's weights are NaN and its ids 0 ... K-1.
    """
    logits_x, logits_y = _wide(router_logits_x), _wide(router_logits_y)
    if token_mask is not None:  # what masked tokens hold, NaN too, must reach no gradient
        logits_x, logits_y = (
            logits.masked_fill(~token_mask.unsqueeze(-1), 0) for logits in (logits_x, logits_y)
        )
    log_probs_x, log_probs_y = logits_x.log_softmax(-1), logits_y.log_softmax(-1)

    indices = _best_pairs(logits_x, logits_y, num_experts_per_token)
    undefined = (log_probs_x.isnan().any(-1) | log_probs_y.isnan().any(-1)).unsqueeze(-1)
    first_ids = torch.arange(num_experts_per_token, device=indices.device)
    indices = torch.where(undefined, first_ids, indices)

    weights = _pair_sums(log_probs_x, log_probs_y, indices).exp()
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    if token_mask is not None:
        weights = weights.masked_fill(~token_mask.unsqueeze(-1), 0)
        indices = torch.where(token_mask.unsqueeze(-1), indices, -1)
    return weights.to(router_logits_x.dtype), indices.int()


def _topk_scores(logits: Tensor, scoring_func: str) -> Tensor:
    if scoring_func == "softmax":
        return logits.softmax(-1)
    if scoring_func == "sigmoid":
        return logits.sigmoid()
    assert scoring_func == "sqrtsoftplus", scoring_func
    # sqrt(log(1 + exp(x))); F.softplus is linear above 20. Far below zero that is exp(x / 2), whose
    # gradient exists even where the score is 0.
    is_low = logits < -40
    softplus = torch.logaddexp(logits.masked_fill(is_low, 0), torch.zeros_like(logits))
    return torch.where(is_low, (logits.clamp(max=0) / 2).exp(), softplus.sqrt())


def _topk_choice(
    values: Tensor, group_values: Tensor, k: int, n_group: int, topk_group: int, group_score: str
) -> Tensor:
    """Ids (T, K) int64 of the best values in the best groups, ties by ascending id, NaN first."""
    num_tokens, num_experts = values.shape
    kept = torch.ones_like(values, dtype=torch.bool)
    if topk_group < n_group:
        grouped = group_values.view(num_tokens, n_group, num_experts // n_group)
        num_best = min(2 if group_score == "top2_sum" else 1, grouped.shape[-1])
        scores = grouped.sort(dim=-1, descending=True).values[..., :num_best].sum(-1)
        groups = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, groups, True)
        kept = kept.repeat_interleave(num_experts // n_group, dim=-1)
    by_value = values.sort(dim=-1, descending=True, stable=True).indices
    order = kept.gather(-1, by_value).int().sort(dim=-1, descending=True, stable=True).indices
    return by_value.gather(-1, order)[:, :k]


def omni_topk_router(
    router_logits: Tensor,
    num_experts_per_token: int,
    scoring_func: str = "softmax",
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    e_score_correction_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    replay_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts of the greatest `score + bias` in the best groups, and their weights.

    Args:
        router_logits: (T, E).
        num_experts_per_token: K, 0 <= K <= E * topk_group / n_group.
        scoring_func: softmax, sigmoid or sqrtsoftplus.
        norm_topk_prob: divide the K scores of a token by their sum.
        routed_scaling_factor: multiplies all weights.
        n_group: groups of E / n_group neighbouring experts.
        topk_group: groups kept.
        group_score: top2_sum or max of a group's scores, bias included.
        e_score_correction_bias: (E,) added to the scores for the choice alone.
        token_mask: (T,) bool, False for tokens that choose nothing.
        replay_indices: (T, K) in [-1, E), the choice to be used.

    Returns:
        routing_weights: (T, K) in the dtype of the logits; 0 where the id is -1.
        indices: (T, K) int32; -1 for masked tokens.
        expert_counts: (E,) int64.
    """
    logits = _wide(router_logits)
    num_experts = logits.shape[1]
    if replay_indices is not None:
        indices = replay_indices.long()
    else:
        scores = _topk_scores(logits.detach(), scoring_func)
        values = logits.detach()  # in the order of the scores, and free of their rounding
        if e_score_correction_bias is not None:
            values = scores = scores + e_score_correction_bias
        elif scoring_func == "softmax":
            values = torch.where(scores.isnan().any(-1, keepdim=True), scores, values)
        group_values = scores if group_score == "top2_sum" else values
        indices = _topk_choice(
            values, group_values, num_experts_per_token, n_group, topk_group, group_score
        )
    if token_mask is not None:
        indices = torch.where(token_mask.unsqueeze(-1), indices, -1)
    is_chosen = indices >= 0
    ids = indices.clamp(min=0)

    if scoring_func == "softmax" and norm_topk_prob:
        # The softmax of the chosen logits; through log_softmax, so that it is NaN where that is.
        chosen = logits.log_softmax(-1).gather(-1, ids)
        weights = chosen.masked_fill(~is_chosen, -torch.inf).softmax(-1)
    else:
        if scoring_func == "softmax":
            weights = logits.softmax(-1).gather(-1, ids)
        else:
            weights = _topk_scores(logits.gather(-1, ids), scoring_func)
        weights = weights.masked_fill(~is_chosen, 0)
        if norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = (weights * routed_scaling_factor).masked_fill(~is_chosen, 0)
    counts = torch.bincount(indices[is_chosen], minlength=num_experts)
    return weights.to(router_logits.dtype), indices.int(), counts


def omni_expert_slots(
    indices: Tensor, num_experts: int, capacity: int, priorities: Tensor | None = None
) -> Tensor:
    """The place of each pair in its expert's queue, or -1 past the capacity.

    Args:
        indices: (T, K) in [-1, E).
        num_experts: E.
        capacity: places in each queue.
        priorities: (T, K); queue by these, descending, instead of by position.

    Returns:
        slots: (T, K) int32.
    """
    ids = indices.flatten()
    slots = torch.full_like(ids, -1, dtype=torch.int32)
    for expert in range(num_experts):
        pairs = (ids == expert).nonzero().flatten()
        if priorities is not None:
            order = priorities.flatten()[pairs].sort(descending=True, stable=True).indices
            pairs = pairs[order]
        pairs = pairs[:capacity]
        slots[pairs] = torch.arange(len(pairs), dtype=torch.int32, device=slots.device)
    return slots.view_as(indices)


def omni_expert_rows(
    indices: Tensor,
    num_experts: int,
    slots: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The row of each pair in an array of tokens in expert order, and where each expert ends.

    Args:
        indices: (T, K) in [-1, E).
        num_experts: E.
        slots: (T, K) places of the pairs in their experts' queues, -1 for none.
        capacity: rows of each expert; None: as many as it has pairs.

    Returns:
        row_id_map: (T, K) int32, -1 for pairs without a row.
        expert_ends: (E,) int32.
    """
    if slots is None:
        slots = omni_expert_slots(indices, num_experts, indices.numel())
    begin, ends = 0, []
    row_id_map = torch.full_like(slots, -1)
    for expert in range(num_experts):
        fits = slots >= 0 if capacity is None else (slots >= 0) & (slots < capacity)
        is_here = (indices == expert) & fits
        row_id_map[is_here] = begin + slots[is_here]
        ends.append(begin + int(is_here.sum()))
        begin = ends[-1] if capacity is None else begin + capacity
    return row_id_map, torch.tensor(ends, dtype=torch.int32, device=indices.device)


def omni_permute(tokens: Tensor, row_id_map: Tensor, num_rows: int) -> Tensor:
    """`rows[row_id_map[t, k]] = tokens[t]`, zeros elsewhere.

    Args:
        tokens: (T, H).
        row_id_map: (T, K) in [-1, N), no row twice.
        num_rows: N.

    Returns:
        rows: (N, H).
    """
    pairs = (row_id_map >= 0).nonzero()
    rows = tokens.new_zeros(num_rows, tokens.shape[1])
    return rows.index_put((row_id_map[pairs[:, 0], pairs[:, 1]].long(),), tokens[pairs[:, 0]])


def omni_unpermute(rows: Tensor, row_id_map: Tensor, weights: Tensor | None = None) -> Tensor:
    """`tokens[t] = sum_k weights[t, k] * rows[row_id_map[t, k]]`.

    Args:
        rows: (N, H).
        row_id_map: (T, K) in [-1, N); pairs of -1 add nothing.
        weights: (T, K), or None for ones.

    Returns:
        tokens: (T, H) in the dtype of `rows`.
    """
    padded = F.pad(_wide(rows), (0, 0, 0, 1))  # row -1 is zero
    factors = torch.ones_like(row_id_map) if weights is None else weights
    factors = factors.to(padded.dtype).masked_fill(row_id_map < 0, 0)
    return torch.einsum("tk,tkh->th", factors, padded[row_id_map.long()]).to(rows.dtype)


def mixture_of_experts(
    hidden_states: Tensor,
    routing_weights: Tensor,
    indices: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """Experts that are MLPs, one after the other: `out[t] = sum_k w[t,k] * E_idx[t,k](hidden[t])`.

    `E(x) = down act(up x)`, or with `gated` `down (act(gate x) * (up x))`.

    Args:
        hidden_states: (T, H).
        routing_weights: (T, K).
        indices: (T, K) in [-1, E); pairs of -1 add nothing.
        up_proj: (E, I, H), or with `gated` (E, 2I, H), gate before up.
        down_proj: (E, H, I).
        up_bias: (E, I) or (E, 2I).
        down_bias: (E, H).
        activation: a key of `omni_moe.activations.ACTIVATION_FUNCTIONS`.
        gated: see above.

    Returns:
        (T, H) in the dtype of `hidden_states`.
    """
    act, hidden = ACTIVATION_FUNCTIONS[activation], _wide(hidden_states)
    out = torch.zeros_like(hidden)
    for expert in range(len(down_proj)):
        tokens, choices = (indices == expert).nonzero(as_tuple=True)
        biases = [None if bias is None else _wide(bias[expert]) for bias in (up_bias, down_bias)]
        inner = F.linear(hidden[tokens], _wide(up_proj[expert]), biases[0])
        if gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        rows = F.linear(inner, _wide(down_proj[expert]), biases[1])
        out = out.index_add(0, tokens, rows * _wide(routing_weights[tokens, choices, None]))
    return out.to(hidden_states.dtype)


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
    token_mask: Tensor | None = None,
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
        token_mask: (T,) bool; in training, False for tokens that are not part of the batch.

    Returns:
        router_logits_x: (T, R) in the dtype of `hidden_states`; 0 for tokens not in the batch.
        router_logits_y: (T, C).
    """
    if training and token_mask is not None:
        options = (batch_norm_buffers, training, momentum, eps)
        of_batch = omni_router_logits(hidden_states[token_mask], gate_x, gate_y, *options)
        return tuple(
            logits.new_zeros(len(token_mask), logits.shape[1]).index_put((token_mask,), logits)
            for logits in of_batch
        )
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
            if running_mean is not None and len(logits) > 1:
                unbiased = logits.detach().var(0)
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean.detach())
                running_var.copy_((1 - momentum) * running_var + momentum * unbiased)
        else:
            mean, var = running_mean.to(logits.dtype), running_var.to(logits.dtype)
        normed.append(((logits - mean) / (var + eps).sqrt()).to(hidden_states.dtype))
    return normed[0], normed[1]


def omni_router_logits_per_token(
    hidden_states: Tensor,
    gate_x: Tensor,
    gate_y: Tensor,
    norm: str = "layer_norm",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm without affine parameters of each token's logits of two gates.

    Args:
        hidden_states: (T, H).
        gate_x: (R, H).
        gate_y: (C, H).
        norm: layer_norm or rms_norm.
        eps: added to the variance, or to the mean square.

    Returns:
        router_logits_x: (T, R) in the dtype of `hidden_states`.
        router_logits_y: (T, C).
    """
    assert norm in ("layer_norm", "rms_norm"), norm
    normed = []
    for gate in (gate_x, gate_y):
        logits = F.linear(_wide(hidden_states), _wide(gate))
        if norm == "layer_norm":
            logits = logits - logits.mean(-1, keepdim=True)
        scale = (logits.square().mean(-1, keepdim=True) + eps).sqrt()
        normed.append((logits / scale).to(hidden_states.dtype))
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

"""Typed functions over `torch.ops.omni_moe`, the operators that the C++ library registers.

Letters: T tokens, H hidden size, I intermediate size, R x C the expert grid, E = R * C experts,
K experts per token. All functions support autograd (first order), autocast, torch.compile, fake
tensors and CUDA graphs; shapes, dtypes and devices are checked in C++ before any launch, and
non-contiguous inputs are accepted. "The paper" is arXiv 2602.05711.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_moe.ops.permute import omni_expert_rows, omni_permute, omni_unpermute  # noqa: F401

# Operators are called as `.default`: the search for an overload would cost 0.5 us a call.


def omni_router(
    router_logits_x: Tensor,
    router_logits_y: Tensor,
    num_expert_sqrt: int,
    num_experts_per_token: int,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """The K best experts of a square grid by `score(row, col) = x[row] + y[col]`.

    The Cartesian-product router of the paper (`S_ij = p_r[i] + p_c[j]`). Sums are taken and
    compared in fp32 (fp64 for fp64 logits); equal sums come in ascending id order, NaN sorts first
    as in `torch.topk`, and sums of finite logits that overflow keep their order. The operator
    `torch.ops.omni_moe.omni_router` also takes R != C.

    Args:
        router_logits_x: (T, R) logits of the grid's rows; fp32, fp16, bf16 (fp64 on CPU).
        router_logits_y: (T, C) logits of its columns, same dtype.
        num_expert_sqrt: side of the grid; must equal both R and C.
        num_experts_per_token: K, 0 <= K <= R * C.
        sorted: as in `torch.topk`. False returns the same K experts of each token in any order, the
            same on every run of one device, and is faster where K is large.

    Returns:
        scores: (T, K) in the dtype of the logits, descending if `sorted`; differentiable.
        indices: (T, K) int32, `id = row * C + col`.

    Raises:
        ValueError: `num_expert_sqrt` is not the width of both logit tensors.
        ValueError: ranks, row counts, dtypes or devices disagree, or K is out of range.
    """
    for name, logits in (("x", router_logits_x), ("y", router_logits_y)):
        if logits.shape[-1:] != (num_expert_sqrt,):
            raise ValueError(
                f"router_logits_{name}: expected shape (T, num_expert_sqrt) = "
                f"(T, {num_expert_sqrt}), got {tuple(logits.shape)}"
            )
    return torch.ops.omni_moe.omni_router.default(
        router_logits_x, router_logits_y, num_experts_per_token, sorted
    )


def omni_softmax_router(
    router_logits_x: Tensor,
    router_logits_y: Tensor,
    num_experts_per_token: int,
    norm_topk_prob: bool = False,
    token_mask: Tensor | None = None,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """The K most probable experts and their routing weights, from the two logit vectors.

    `weight(row, col) = exp(log_softmax(x)[row] + log_softmax(y)[col])`, divided by the sum of the
    K chosen when `norm_topk_prob` (Eq. 2 of the paper). Experts are selected on the fp32 sums of
    the logits themselves, which a token's log_softmax only shifts by a constant, in the order of
    `omni_router`. Where a log_softmax is NaN (a NaN or +inf logit, or all of them -inf) all weights
    of that token are NaN and its ids are 0 ... K-1.

    Args:
        router_logits_x: (T, R) logits of the grid's rows; fp32, fp16, bf16 (fp64 on CPU).
        router_logits_y: (T, C) logits of its columns, same dtype.
        num_experts_per_token: K, 0 <= K <= R * C.
        norm_topk_prob: make the weights of each token sum to 1.
        token_mask: (T,) bool, False for tokens that choose nothing: their ids are -1, their weights
            and gradients 0.
        sorted: as in `torch.topk`. False returns the same K experts of each token in any order, the
            same on every run of one device, and is faster where K is large.

    Returns:
        routing_weights: (T, K) in the dtype of the logits, descending if `sorted`; differentiable.
        indices: (T, K) int32, `id = row * C + col`.

    Raises:
        ValueError: ranks, row counts, dtypes or devices disagree, or K is out of range.
    """
    return torch.ops.omni_moe.omni_softmax_router.default(
        router_logits_x,
        router_logits_y,
        num_experts_per_token,
        norm_topk_prob,
        token_mask,
        sorted=sorted,
    )


def omni_expert(
    hidden_states: Tensor,
    up_weights: Tensor,
    down_weights: Tensor,
    routing_weights: Tensor,
    indices: Tensor,
    activation: str = "silu",
    addend: Tensor | None = None,
    num_cols: int = 0,
) -> Tensor:
    """Weighted sum of each token's K atomic experts `E_i(x) = act(x . up_i) * down_i`.

    `out[t] = sum_k act(hidden[t] . up[idx[t,k]]) * routing[t,k] * down[idx[t,k]]`, the routed term
    `(g * act(x W[I]^T)) V[I]` of the paper's layer. An expert chosen twice counts twice. Products
    and sums are accumulated in fp32 (fp64 for fp64) and rounded once; results are bitwise the same
    on every run, forward and backward.

    Args:
        hidden_states: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        up_weights: (E, H), same dtype.
        down_weights: (E, H), same dtype.
        routing_weights: (T, K), same dtype.
        indices: (T, K) int32 or int64, each in [0, E).
        activation: silu, gelu, gelu_tanh, relu or identity.
        addend: (T, H), same dtype; added before the one rounding, so that a layer needs no pass of
            its own for the sum with its shared MLP.
        num_cols: C, if the experts are the cells `id = row * C + col` of a router's grid; 0 if they
            are not. Says nothing about the result: with hundreds of experts per token it lets fp16
            and bf16 run on the tensor cores of Hopper GPUs, where each coefficient `act(...) *
            routing` and each partial sum over a row or a column of the grid is rounded to the
            dtype, and where a NaN or infinity in `down_weights` spreads to the tokens that chose
            an expert of the same row or column.

    Returns:
        expert_states: (T, H) in the dtype of `hidden_states`; differentiable with respect to all
        floating-point arguments.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
    expert_states, _ = torch.ops.omni_moe.omni_expert.default(
        hidden_states,
        up_weights,
        down_weights,
        routing_weights,
        indices,
        activation,
        addend,
        num_cols=num_cols,
    )
    return expert_states


def flash_expert(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    activation: str = "silu",
) -> Tensor:
    """`omni_expert` under the older naming: `down_weights` scores, `up_weights` projects back.

    `out[t] = sum_k act(hidden[t] . down[idx[t,k]]) * routing[t,k] * up[idx[t,k]]`.

    Args:
        hidden_states: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        down_weights: (E, H), same dtype; multiplied with the hidden states.
        up_weights: (E, H), same dtype; summed into the output.
        indices: (T, K) int32 or int64, each in [0, E).
        routing_weights: (T, K), same dtype as `hidden_states`.
        activation: silu, gelu, gelu_tanh, relu or identity.

    Returns:
        expert_states: (T, H) in the dtype of `hidden_states`; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
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
    """The shared dense MLP: `(act(x gate_weight^T) * (x up_weight^T)) down_weight^T`.

    The `MLP(x)` term of the paper's layer.

    Args:
        x: (..., H); fp32, fp16, bf16 (fp64 on CPU).
        gate_weight: (I, H), same dtype.
        up_weight: (I, H), same dtype.
        down_weight: (H, I), same dtype.
        activation: silu, gelu, gelu_tanh, relu or identity.

    Returns:
        (..., H) in the dtype of `x`; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
    """
    output, *_ = torch.ops.omni_moe.omni_mlp.default(
        x, gate_weight, up_weight, down_weight, activation
    )
    return output


def omni_expert_mlp(
    hidden_states: Tensor,
    up_embed: Tensor,
    down_embed: Tensor,
    routing_weights: Tensor,
    indices: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    activation: str = "silu",
    num_cols: int = 0,
) -> Tensor:
    """Atomic experts plus shared MLP of the same tokens: the paper's layer behind its router.

    `omni_expert(hidden_states, up_embed, down_embed, routing_weights, indices) +
    omni_mlp(hidden_states, gate_weight, up_weight, down_weight)`, with neither the sum of the two
    nor that of their gradients as a pass of its own, and a backward pass ordered for the least
    memory.

    Args:
        hidden_states: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        up_embed: (E, H), same dtype.
        down_embed: (E, H), same dtype.
        routing_weights: (T, K), same dtype.
        indices: (T, K) int32 or int64, each in [0, E).
        gate_weight: (I, H), same dtype.
        up_weight: (I, H), same dtype.
        down_weight: (H, I), same dtype.
        activation: silu, gelu, gelu_tanh, relu or identity; of experts and MLP.
        num_cols: as in `omni_expert`.

    Returns:
        (T, H) in the dtype of `hidden_states`; differentiable with respect to all floating-point
        arguments.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
    output, *_ = torch.ops.omni_moe.omni_expert_mlp.default(
        hidden_states,
        up_embed,
        down_embed,
        routing_weights,
        indices,
        gate_weight,
        up_weight,
        down_weight,
        activation,
        num_cols=num_cols,
    )
    return output


def omni_topk_router(
    router_logits: Tensor,
    num_experts_per_token: int,
    *,
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
    """The K best of E experts with independent logits, their routing weights, and expert counts.

    `weight = routed_scaling_factor * score`, with `norm_topk_prob` divided by the sum of the K
    chosen scores. Experts are chosen by `score + e_score_correction_bias` in fp32 (fp64 for fp64):
    descending, equal ones by ascending id, NaN first as in `torch.topk`. Without a bias that is the
    order of the logits, which are then compared themselves. Mixtral is `norm_topk_prob=True`,
    Qwen3-MoE the same by its configuration, DeepSeek-V3 `scoring_func="sigmoid"` with groups and
    bias (arXiv 2412.19437, Eq. 12-16). A softmax over the K chosen logits alone, top-k before the
    score, is `norm_topk_prob=True`; sigmoid and sqrtsoftplus are the same before and after.

    Where a softmax is NaN (a NaN or +inf logit, or all of them -inf) the token's weights are NaN,
    and as all its scores are equal its ids are the lowest that may be chosen.

    Args:
        router_logits: (T, E), E <= 4096; fp32, fp16, bf16 (fp64 on CPU).
        num_experts_per_token: K, 0 <= K <= E * topk_group / n_group.
        scoring_func: softmax over the E logits, sigmoid, or sqrtsoftplus: sqrt(log(1 + exp(x))).
        norm_topk_prob: make the weights of each token sum to `routed_scaling_factor`. The sum of
            sigmoids or sqrtsoftpluses has 1e-20 added, as in DeepSeek-V3.
        routed_scaling_factor: multiplies all weights.
        n_group: of E / n_group neighbouring experts each; must divide E.
        topk_group: groups that experts are chosen from, the best of the n_group.
        group_score: what a group is worth: top2_sum, the sum of its two best scores (DeepSeek-V3),
            or max, its best one (DeepSeek-V2); bias included.
        e_score_correction_bias: (E,) fp32 (fp64 for fp64 logits); changes the choice, not the
            weights, and has no gradient.
        token_mask: (T,) bool, False for tokens that choose nothing: their ids are -1, their weights
            and gradients 0, and they are not counted.
        replay_indices: (T, K) int32 or int64 in [-1, E), a choice to be used as it is: groups and
            bias are not looked at. Ids of -1 have the weight 0 and are not counted.

    Returns:
        routing_weights: (T, K) in the dtype of the logits, in the order of the choice;
            differentiable with respect to the logits.
        indices: (T, K) int32.
        expert_counts: (E,) int64, how many tokens chose each expert.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a name is unknown, or K, `n_group` or
            `topk_group` is out of range.
        IndexError: a replayed id is outside [-1, E) (CPU; a device-side assert on CUDA).
    """
    return torch.ops.omni_moe.omni_topk_router.default(
        router_logits,
        num_experts_per_token,
        scoring_func,
        norm_topk_prob,
        routed_scaling_factor,
        n_group,
        topk_group,
        group_score,
        e_score_correction_bias,
        token_mask,
        replay_indices,
    )


def omni_expert_slots(
    indices: Tensor, num_experts: int, capacity: int, priorities: Tensor | None = None
) -> Tensor:
    """The place of each pair of token and expert in the expert's queue, or -1 past its capacity.

    The pairs of an expert queue in the order of the tokens, or by descending priority where that is
    given (equal ones in the order of the tokens, NaN first). With routing weights as priorities
    the least probable pairs are dropped. No atomics decide a place: the slots are the same on every
    run.

    Args:
        indices: (T, K) int32 in [-1, E), as of `omni_topk_router`; pairs of -1 have no place.
        num_experts: E, at most 4096.
        capacity: places in each queue, >= 0.
        priorities: (T, K) floating point; no gradient.

    Returns:
        slots: (T, K) int32 in [-1, capacity).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a number is out of range.
        IndexError: an index is outside [-1, E) (CPU; a device-side assert on CUDA).
    """
    priorities = None if priorities is None else priorities.detach()
    return torch.ops.omni_moe.omni_expert_slots.default(indices, num_experts, capacity, priorities)


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
    """Both gates of the router and the BatchNorm of their logits.

    Two `F.batch_norm(hidden_states @ gate.T, ...)` without affine parameters. One kernel on Hopper
    GPUs for batches that fit there at once (4096 tokens by 768 logits on an H200), where the
    products are not rounded before they are normalised. Runs in the autocast dtype. Statistics are
    taken in fp32 (fp64 for fp64) and outputs rounded once; results are bitwise the same on every
    run. With T = 0 outputs are empty and only the counters change. With a mask the batch is of the
    tokens that count: the others have no part in means and variances, their logits are 0 and have
    no gradient. A single one that counts has no variance: its logits are 0, too, and only the
    counters change (an error would have to wait for the device). The one kernel knows no masks.

    Args:
        hidden_states: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        gate_x: (R, H), same dtype.
        gate_y: (C, H), same dtype.
        batch_norm_buffers: what two BatchNorms carry from batch to batch: `running_mean` (R,),
            `running_var` (R,) and `num_batches_tracked` () int64 of x, then those of y with C
            columns. The four statistics share one floating dtype, fp32 in the best case. Empty:
            nothing is tracked.
        training: normalise by the batch's own statistics, and update the buffers in place (they
            must be contiguous then); else normalise by the running ones, and write nothing.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        token_mask: (T,) bool, False for tokens that do not count. Without effect unless `training`:
            running statistics normalise each token by itself.

    Returns:
        router_logits_x: (T, R) in the dtype of `hidden_states`, contiguous; differentiable.
        router_logits_y: (T, C), the same.

    Raises:
        ValueError: shapes, dtypes or devices disagree, `eps` is not positive, there is one token in
            training without a mask (it has no variance), or there are no buffers outside training.
    """
    if training:
        logits_x, logits_y, _ = torch.ops.omni_moe.omni_router_logits.default(
            hidden_states, gate_x, gate_y, batch_norm_buffers, momentum, eps, token_mask
        )
        return logits_x, logits_y
    if len(batch_norm_buffers) != 6:
        raise ValueError(
            "omni_router_logits: expected the 6 batch_norm_buffers unless training, but got "
            f"{len(batch_norm_buffers)}"
        )
    mean_x, var_x, _, mean_y, var_y, _ = batch_norm_buffers
    logits_x, logits_y, _ = torch.ops.omni_moe._omni_router_logits_eval.default(
        hidden_states, gate_x, gate_y, mean_x, var_x, mean_y, var_y, eps
    )
    return logits_x, logits_y


def omni_router_logits_per_token(
    hidden_states: Tensor,
    gate_x: Tensor,
    gate_y: Tensor,
    norm: str = "layer_norm",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Both gates of the router and the norm of each token's logits on their own.

    Two `F.layer_norm(hidden_states @ gate.T, ...)` or `F.rms_norm` without affine parameters: the R
    logits of a token are normalised by their own mean and variance, and so are its C. No token sees
    another, and training computes what evaluation does. Runs in the autocast dtype. Statistics are
    taken in fp32 (fp64 for fp64) and outputs rounded once, as are the products before, to the dtype
    of `hidden_states`; results are bitwise the same on every run.

    Args:
        hidden_states: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        gate_x: (R, H), same dtype.
        gate_y: (C, H), same dtype.
        norm: layer_norm, `(x - mean) / sqrt(var + eps)`, or rms_norm, `x / sqrt(mean(x^2) + eps)`.
        eps: added to the variance or the mean square.

    Returns:
        router_logits_x: (T, R) in the dtype of `hidden_states`, contiguous; differentiable.
        router_logits_y: (T, C), the same.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the norm is unknown, or `eps` is not
            positive.
    """
    logits_x, logits_y, _ = torch.ops.omni_moe.omni_router_logits_per_token.default(
        hidden_states, gate_x, gate_y, norm, eps
    )
    return logits_x, logits_y

"""Losses that keep a router without BatchNorm balanced, from the factorised probabilities.

Letters: T tokens, R x C the expert grid, E = R * C experts, K experts per token. The probability of
an expert is a product, `p[t, row * C + col] = softmax(x[t])[row] * softmax(y[t])[col]`, so its mean
over the tokens is one (R, T) x (T, C) GEMM and its logsumexp a sum of two: nothing here has T * E
elements. Computed in fp32 whatever the dtype of the logits (fp64 for fp64), under autocast too.
"""

import contextlib

import torch
from torch import Tensor

__all__ = ["add_expert_counts", "load_balancing_loss", "router_z_loss"]


def load_balancing_loss(
    router_logits_x: Tensor, router_logits_y: Tensor, indices: Tensor
) -> Tensor:
    """`E * sum_e f_e P_e`: 1 for an even load, up to E when all choose the same expert.

    Eq. 4-6 of the Switch Transformer (arXiv 2101.03961): f_e is the share of expert e in the T * K
    choices, P_e the mean of its probability over the tokens. f has no gradient, and sums to 1 for
    any K. Transformers' `load_balancing_loss_func` does not divide by K: what is a coefficient c
    there is K * c here.

    Args:
        router_logits_x: (T, R) logits of the grid's rows, as given to the router; floating point.
        router_logits_y: (T, C) logits of its columns.
        indices: (T, K) chosen experts, int32 or int64 in [0, R * C).

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable with respect to the logits; 0 for
        T = 0 or K = 0. The same bits on every run.

    Raises:
        ValueError: shapes disagree, or the indices are no integers.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
    _check_logits(router_logits_x, router_logits_y)
    num_tokens = router_logits_x.shape[0]
    if indices.dim() != 2 or indices.shape[0] != num_tokens:
        raise ValueError(
            f"indices: expected shape (T, K) with T = {num_tokens}, got {tuple(indices.shape)}"
        )
    with _without_autocast(router_logits_x):
        probs_x = _wide(router_logits_x, router_logits_y).softmax(-1)
        probs_y = _wide(router_logits_y, router_logits_x).softmax(-1)
        prob_sums = probs_x.T @ probs_y  # (R, C)
        num_experts = prob_sums.numel()
        # int32 can hold T * K choices of one expert, and compiled code has an atomic for it.
        counts = torch.zeros(num_experts, dtype=torch.int32, device=indices.device)
        add_expert_counts(counts, indices)
        shares = counts.view_as(prob_sums).to(prob_sums.dtype) / max(indices.numel(), 1)
        return (shares * prob_sums).sum() * (num_experts / max(num_tokens, 1))


def router_z_loss(router_logits_x: Tensor, router_logits_y: Tensor) -> Tensor:
    """Mean over the tokens of the squared logsumexp of all E scores `x[row] + y[col]`.

    Keeps the logits small: Eq. 5 of ST-MoE (arXiv 2202.08906), in which the logsumexp over the grid
    is `logsumexp(x) + logsumexp(y)`.

    Args:
        router_logits_x: (T, R) logits of the grid's rows; floating point.
        router_logits_y: (T, C) logits of its columns.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable; 0 for T = 0.

    Raises:
        ValueError: shapes disagree.
    """
    _check_logits(router_logits_x, router_logits_y)
    with _without_autocast(router_logits_x):
        log_sums = _wide(router_logits_x, router_logits_y).logsumexp(-1)
        log_sums = log_sums + _wide(router_logits_y, router_logits_x).logsumexp(-1)
        return log_sums.square().sum() / max(router_logits_x.shape[0], 1)


@torch.no_grad()
def add_expert_counts(counts: Tensor, indices: Tensor) -> None:
    """Adds to `counts` (E,), int32 or int64, how often each expert stands in `indices`.

    Adds with integer atomics, whose order does not change the result. Does not wait for the device
    and allocates a single element.

    Raises:
        ValueError: the indices are no integers.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: expected int32 or int64, got {indices.dtype}")
    ones = counts.new_ones(1).expand(indices.numel())
    counts.index_add_(0, indices.flatten(), ones)


def _check_logits(x: Tensor, y: Tensor) -> None:
    for name, logits in (("x", x), ("y", y)):
        if logits.dim() != 2 or not logits.is_floating_point():
            raise ValueError(
                f"router_logits_{name}: expected floating point of two dimensions, got "
                f"{logits.dtype} of shape {tuple(logits.shape)}"
            )
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"router_logits_y: expected as many rows as router_logits_x, {x.shape[0]}, "
            f"got {y.shape[0]}"
        )


def _without_autocast(logits: Tensor) -> contextlib.AbstractContextManager:
    if logits.is_meta:  # a device without autocast
        return contextlib.nullcontext()
    return torch.autocast(logits.device.type, enabled=False)


def _wide(logits: Tensor, other: Tensor) -> Tensor:
    """In fp32, or fp64 if either of the two is."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, other.dtype), torch.float32)
    return logits.to(dtype)

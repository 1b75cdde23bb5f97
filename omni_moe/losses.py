"""Losses that keep routers balanced and their logits small.

Of the Cartesian router from its factorised probabilities, and of the top-k router over E
independent logits (`topk_...`). Letters: T tokens, R x C the expert grid, E = R * C experts, K
experts per token. The probability of an expert is a product, `p[t, row * C + col] =
softmax(x[t])[row] * softmax(y[t])[col]`, so its mean over the tokens is one (R, T) x (T, C) GEMM
and its logsumexp a sum of two: nothing here has T * E elements but what takes logits of that many.
Computed in fp32 whatever the dtype of the logits (fp64 for fp64), under autocast too.
"""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add_expert_counts",
    "load_balancing_loss",
    "router_z_loss",
    "topk_load_balancing_loss",
    "topk_router_z_loss",
    "topk_sequence_load_balancing_loss",
]


def load_balancing_loss(
    router_logits_x: Tensor,
    router_logits_y: Tensor,
    indices: Tensor,
    token_mask: Tensor | None = None,
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
        token_mask: (T,) bool, False for tokens that do not count, whatever their logits and ids.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable with respect to the logits; 0 where no
        token counts, or K = 0. The same bits on every run.

    Raises:
        ValueError: shapes disagree, or dtypes are wrong.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
    _check_logits(router_logits_x, router_logits_y, token_mask)
    num_tokens = router_logits_x.shape[0]
    if indices.dim() != 2 or indices.shape[0] != num_tokens:
        raise ValueError(
            f"indices: expected shape (T, K) with T = {num_tokens}, got {tuple(indices.shape)}"
        )
    with _without_autocast(router_logits_x):
        x, y = _counting_pair(router_logits_x, router_logits_y, token_mask)
        probs_x, probs_y = x.softmax(-1), y.softmax(-1)
        if token_mask is not None:
            probs_x = probs_x.masked_fill(~token_mask.unsqueeze(-1), 0)
        prob_sums = probs_x.T @ probs_y  # (R, C)
        num_experts = prob_sums.numel()
        # int32 can hold T * K choices of one expert, and compiled code has an atomic for it.
        counts = torch.zeros(num_experts, dtype=torch.int32, device=indices.device)
        add_expert_counts(counts, indices, token_mask)
        counts = counts.view_as(prob_sums).to(prob_sums.dtype)
        if token_mask is None:
            shares = counts / max(indices.numel(), 1)
            return (shares * prob_sums).sum() * (num_experts / max(num_tokens, 1))
        num_counting = token_mask.sum().clamp(min=1).to(prob_sums.dtype)
        shares = counts / (num_counting * max(indices.shape[1], 1))
        return (shares * prob_sums).sum() * (num_experts / num_counting)


def router_z_loss(
    router_logits_x: Tensor, router_logits_y: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Mean over the tokens of the squared logsumexp of all E scores `x[row] + y[col]`.

    Keeps the logits small: Eq. 5 of ST-MoE (arXiv 2202.08906), in which the logsumexp over the grid
    is `logsumexp(x) + logsumexp(y)`.

    Args:
        router_logits_x: (T, R) logits of the grid's rows; floating point.
        router_logits_y: (T, C) logits of its columns.
        token_mask: (T,) bool, False for tokens that do not count.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable; 0 where no token counts.

    Raises:
        ValueError: shapes disagree, or dtypes are wrong.
    """
    _check_logits(router_logits_x, router_logits_y, token_mask)
    with _without_autocast(router_logits_x):
        x, y = _counting_pair(router_logits_x, router_logits_y, token_mask)
        squares = (x.logsumexp(-1) + y.logsumexp(-1)).square()
        if token_mask is None:
            return squares.sum() / max(router_logits_x.shape[0], 1)
        return squares.masked_fill(~token_mask, 0).sum() / token_mask.sum().clamp(min=1)


def topk_load_balancing_loss(
    router_logits: Tensor,
    expert_counts: Tensor,
    *,
    scoring_func: str = "softmax",
    token_mask: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """`E * sum_e f_e P_e` of the top-k router: 1 for an even load, up to E for one expert alone.

    The auxiliary loss of GShard (arXiv 2006.16668) and the Switch Transformer (arXiv 2101.03961,
    Eq. 4-6). f_e is the share of expert e in all choices, without gradient; P_e is the mean over
    the tokens of its score, divided by the token's sum of scores unless they are a softmax.
    Transformers' `load_balancing_loss_func` does not divide f by K: what is a coefficient c there
    is K * c here.

    A function of its arguments alone, so that activation checkpointing does not change it. Under
    gradient accumulation it is the loss of a micro-batch, and the mean over micro-batches is that
    of a batch balanced micro-batch by micro-batch; with the counts of all micro-batches together,
    as a first pass gives them, it is that of the whole batch.

    Args:
        router_logits: (T, E) as given to the router; floating point.
        expert_counts: (E,) integers, how often each expert was chosen, as the router returns them:
            before capacity, and without masked tokens.
        scoring_func: of the router: softmax, sigmoid or sqrtsoftplus.
        token_mask: (T,) bool, False for tokens that do not count.
        process_group: balance the tokens of all its ranks together (arXiv 2501.11873). The counts
            and numbers of tokens are added up over the ranks, without gradient; the mean over the
            ranks of what is returned, which is what data parallelism makes of gradients, is the
            loss of all tokens together. All ranks must call it.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable with respect to the logits; 0 where no
        token counts. The same bits on every run.

    Raises:
        ValueError: shapes disagree, the logits are no floats, or a name is unknown.
    """
    _check_topk(router_logits, token_mask, 2)
    num_experts = router_logits.shape[1]
    if expert_counts.shape != (num_experts,):
        raise ValueError(
            f"expert_counts: expected shape ({num_experts},), got {tuple(expert_counts.shape)}"
        )
    with _without_autocast(router_logits):
        prob_sums = _token_shares(router_logits, scoring_func, token_mask).sum(0)
        with torch.no_grad():
            tokens = _num_counting(router_logits, token_mask).reshape(1)
            totals = torch.cat([expert_counts.detach().to(torch.int64), tokens])
            num_ranks = 1
            if process_group is not None:
                dist.all_reduce(totals, group=process_group)
                num_ranks = dist.get_world_size(process_group)
            counts, tokens = totals[:-1].to(prob_sums.dtype), totals[-1].to(prob_sums.dtype)
            # By division of integers that are 0 together: no NaN where nothing counts.
            shares = counts / counts.sum().clamp(min=1)
            scale = num_experts * num_ranks / tokens.clamp(min=1)
        return (shares * prob_sums).sum() * scale


def topk_sequence_load_balancing_loss(
    router_logits: Tensor,
    indices: Tensor,
    *,
    scoring_func: str = "softmax",
    token_mask: Tensor | None = None,
) -> Tensor:
    """The mean over sequences of `topk_load_balancing_loss` of each alone.

    The complementary loss of DeepSeek-V3 (arXiv 2412.19437, Eq. 17-20).

    Args:
        router_logits: (B, S, E) logits of B sequences of S tokens; floating point.
        indices: (B, S, K) chosen experts, int32 or int64; -1 for none.
        scoring_func: of the router.
        token_mask: (B, S) bool, False for tokens that do not count.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable with respect to the logits; the mean
        is that over the sequences that have a token which counts, 0 if none has.

    Raises:
        ValueError: shapes disagree, or dtypes are wrong.
        IndexError: an index is outside [-1, E) (CPU; a device-side assert on CUDA).
    """
    _check_topk(router_logits, token_mask, 3)
    num_sequences, num_tokens, num_experts = router_logits.shape
    if indices.dim() != 3 or indices.shape[:2] != router_logits.shape[:2]:
        raise ValueError(
            f"indices: expected shape (B, S, K) with B, S = {num_sequences}, {num_tokens}, "
            f"got {tuple(indices.shape)}"
        )
    with _without_autocast(router_logits):
        with torch.no_grad():
            if token_mask is not None:
                indices = torch.where(token_mask.unsqueeze(-1), indices, -1)
            # The first place of each row is for -1. An id that is past either end of its row shall
            # raise, not count in the next one.
            rows = torch.arange(num_sequences, device=indices.device).view(-1, 1, 1)
            places = rows * (num_experts + 1) + indices + 1
            places = torch.where((indices >= -1) & (indices < num_experts), places, -1)
            counts = torch.zeros(
                num_sequences * (num_experts + 1), dtype=torch.int32, device=indices.device
            )
            add_expert_counts(counts, places)
            counts = counts.view(num_sequences, num_experts + 1)[:, 1:]
        probs = _token_shares(router_logits, scoring_func, token_mask)
        tokens = _num_counting(router_logits, token_mask, keep=1).to(probs.dtype)
        shares = counts.to(probs.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
        losses = (shares * probs.sum(1)).sum(-1) * num_experts / tokens.clamp(min=1)
        return losses.sum() / (tokens > 0).sum().clamp(min=1)


def topk_router_z_loss(router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of the squared logsumexp of their E logits: ST-MoE (arXiv 2202.08906).

    Args:
        router_logits: (..., E); floating point.
        token_mask: (...) bool, False for tokens that do not count.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable; 0 where no token counts.

    Raises:
        ValueError: shapes disagree, or dtypes are wrong.
    """
    _check_topk(router_logits, token_mask, router_logits.dim())
    with _without_autocast(router_logits):
        squares = _counting_logits(router_logits, token_mask).logsumexp(-1).square()
        if token_mask is not None:
            squares = squares.masked_fill(~token_mask, 0)
        return squares.sum() / _num_counting(router_logits, token_mask).clamp(min=1)


def _check_topk(logits: Tensor, token_mask: Tensor | None, rank: int) -> None:
    if logits.dim() != rank or logits.dim() < 1 or not logits.is_floating_point():
        raise ValueError(
            f"router_logits: expected floating point of {max(rank, 1)} dimensions, got "
            f"{logits.dtype} of shape {tuple(logits.shape)}"
        )
    _check_mask(token_mask, logits.shape[:-1])


def _check_mask(token_mask: Tensor | None, shape: torch.Size) -> None:
    if token_mask is None or (token_mask.shape == shape and token_mask.dtype == torch.bool):
        return
    raise ValueError(
        f"token_mask: expected bool of shape {tuple(shape)}, got {token_mask.dtype} of shape "
        f"{tuple(token_mask.shape)}"
    )


def _counting_pair(x: Tensor, y: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in fp32, or fp64 if either is; 0 for tokens that do not count."""
    wide_x, wide_y = _wide(x, y), _wide(y, x)
    return _counting_logits(wide_x, token_mask), _counting_logits(wide_y, token_mask)


def _counting_logits(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """In fp32 or fp64, 0 for tokens that do not count: a NaN there must reach no gradient."""
    logits = _wide(logits, logits)
    return logits if token_mask is None else logits.masked_fill(~token_mask.unsqueeze(-1), 0)


def _num_counting(logits: Tensor, token_mask: Tensor | None, keep: int = 0) -> Tensor:
    """int64, how many tokens count: in all, or in each of the first `keep` dimensions."""
    shape = logits.shape[:-1]
    if token_mask is None:
        token_mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
    return token_mask.flatten(keep).sum(-1) if keep < len(shape) else token_mask.to(torch.int64)


def _token_shares(logits: Tensor, scoring_func: str, token_mask: Tensor | None) -> Tensor:
    """(..., E): each expert's share in the scores of its token, 0 for tokens that do not count."""
    logits = _counting_logits(logits, token_mask)
    if scoring_func == "softmax":
        shares = logits.softmax(-1)
    elif scoring_func == "sigmoid":
        # By way of the logarithms, which keep tokens whose scores are all tiny.
        shares = F.logsigmoid(logits).softmax(-1)
    elif scoring_func == "sqrtsoftplus":
        scores = F.softplus(logits).sqrt()
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    else:
        raise ValueError(
            f"scoring_func: expected one of softmax, sigmoid, sqrtsoftplus, got {scoring_func!r}"
        )
    return shares if token_mask is None else shares.masked_fill(~token_mask.unsqueeze(-1), 0)


@torch.no_grad()
def add_expert_counts(counts: Tensor, indices: Tensor, token_mask: Tensor | None = None) -> None:
    """Adds to `counts` (E,), int32 or int64, how often each expert stands in `indices`.

    Adds with integer atomics, whose order does not change the result. Does not wait for the device
    and allocates a single element, or with a mask some of the size of `indices`.

    Args:
        counts: (E,), changed in place.
        indices: (T, K), or of any shape without a mask.
        token_mask: (T,) bool, False for tokens whose ids do not count, whatever they are.

    Raises:
        ValueError: the indices are no integers.
        IndexError: an index is outside [0, E) (CPU; a device-side assert on CUDA).
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: expected int32 or int64, got {indices.dtype}")
    if token_mask is None:
        ones = counts.new_ones(1).expand(indices.numel())
    else:
        counted = token_mask.unsqueeze(-1).expand_as(indices)
        indices, ones = indices.where(counted, 0), counted.flatten().to(counts.dtype)
    counts.index_add_(0, indices.flatten(), ones)


def _check_logits(x: Tensor, y: Tensor, token_mask: Tensor | None) -> None:
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
    _check_mask(token_mask, x.shape[:1])


def _without_autocast(logits: Tensor) -> contextlib.AbstractContextManager:
    if logits.is_meta:  # a device without autocast
        return contextlib.nullcontext()
    return torch.autocast(logits.device.type, enabled=False)


def _wide(logits: Tensor, other: Tensor) -> Tensor:
    """In fp32, or fp64 if either of the two is."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, other.dtype), torch.float32)
    return logits.to(dtype)

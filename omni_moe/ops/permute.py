"""Tokens into expert order and back: typed functions over the ops of `csrc/torch/permute.cpp`."""

import torch
from torch import Tensor


def omni_expert_rows(
    indices: Tensor,
    num_experts: int,
    slots: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The row of each pair of token and expert in an array of tokens in expert order.

    A stable counting sort: rows of expert 0 come first, those of one expert in the order of the
    tokens, or of `slots`. The maps are those of TransformerEngine's `moe_permute` (`row_id_map`)
    and `torch.nn.functional.grouped_mm` (`offs`). Nothing waits for the device, and the rows are
    the same on every run.

    Args:
        indices: (T, K) int32 or int64 in [-1, E); pairs of -1 get no row.
        num_experts: E, at most 4096.
        slots: (T, K) int32, places in the experts' queues as of `omni_expert_slots`; pairs of -1
            get no row. None: all pairs queue in the order of the tokens.
        capacity: C, the rows of each expert, those that no pair fills among them; pairs past it get
            no row. None: rows lie one expert after the other without gaps.

    Returns:
        row_id_map: (T, K) int32, -1 for pairs without a row.
        expert_ends: (E,) int32, the row behind the last of each expert.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a number is out of range.
        IndexError: an index is outside [-1, E) (CPU; a device-side assert on CUDA).
    """
    return torch.ops.omni_moe.omni_expert_rows.default(indices, num_experts, slots, capacity)


def omni_permute(
    tokens: Tensor,
    row_id_map: Tensor,
    expert_ends: Tensor,
    num_rows: int,
    padded: bool = False,
) -> Tensor:
    """Tokens in expert order: `rows[row_id_map[t, k]] = tokens[t]`.

    Rows that no pair has are zeros. A token is read once and written to its K rows; the gradient is
    an un-permutation. Runs in the autocast dtype.

    Args:
        tokens: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        row_id_map: (T, K) int32 in [-1, N), no row twice, as of `omni_expert_rows`.
        expert_ends: (E,) int32, as of `omni_expert_rows`: says which rows are empty.
        num_rows: N, at least the number of rows that are used: T * K fits always; E * C if padded.
        padded: each expert has N / E rows (`capacity` of `omni_expert_rows`).

    Returns:
        rows: (N, H) in the dtype of `tokens`; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or N is out of range.
        IndexError: a row is outside [-1, N) (CPU; a device-side assert on CUDA).
    """
    return torch.ops.omni_moe.omni_permute.default(
        tokens, row_id_map, expert_ends, num_rows, padded
    )


def omni_unpermute(
    rows: Tensor,
    row_id_map: Tensor,
    expert_ends: Tensor,
    weights: Tensor | None = None,
    padded: bool = False,
) -> Tensor:
    """Tokens from their experts' rows: `tokens[t] = sum_k weights[t, k] * rows[row_id_map[t, k]]`.

    Sums are taken in fp32 (fp64 for fp64), in order of k, and rounded once; no atomics, forward or
    backward. A pair of row -1 adds nothing, whatever its weight. Runs in the autocast dtype.

    Args:
        rows: (N, H); fp32, fp16, bf16 (fp64 on CPU).
        row_id_map: (T, K) int32 in [-1, N), no row twice, as of `omni_expert_rows`.
        expert_ends: (E,) int32, as of `omni_expert_rows`; for the gradient.
        weights: (T, K) in the dtype of `rows` or in fp32 (fp64 for fp64); None: ones.
        padded: as in `omni_permute`.

    Returns:
        tokens: (T, H) in the dtype of `rows`; differentiable with respect to rows and weights.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        IndexError: a row is outside [-1, N) (CPU; a device-side assert on CUDA).
    """
    return torch.ops.omni_moe.omni_unpermute.default(rows, row_id_map, expert_ends, weights, padded)

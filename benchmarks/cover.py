"""The bands that cover a token's experts on the grid: the rule of the CUDA kernels, in PyTorch.

csrc/cuda/experts/bands/band_cover.cu has the rule in its first lines.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Bands with fewer of a token's pairs make no task: BandTuning::kMinPairs.
MIN_PAIRS = 3


class Cover(NamedTuple):
    """rows: (T, R) and cols: (T, C), whether a grid row or column is a task of the token.
    in_tail: (T, K), whether a pair lies in no task.
    """

    rows: Tensor
    cols: Tensor
    in_tail: Tensor

    @property
    def row_tasks(self) -> int:
        return int(self.rows.sum())

    @property
    def col_tasks(self) -> int:
        return int(self.cols.sum())

    @property
    def tail_pairs(self) -> int:
        return int(self.in_tail.sum())


def cover(indices: Tensor, num_rows: int, num_cols: int, min_pairs: int = MIN_PAIRS) -> Cover:
    """The cover of ids (T, K) on a grid, without the kernels' limit on the tasks of a token."""
    ids = indices.long()
    rows, cols = ids // num_cols, ids % num_cols
    counts = _count(rows, torch.ones_like(rows), num_rows)
    # Counts fall, ranks rise: the largest h such that h rows have h pairs each.
    falling = counts.sort(dim=1, descending=True).values
    ranks = torch.arange(1, num_rows + 1, device=ids.device)
    heights = (falling >= ranks).sum(1, keepdim=True)
    row_tasks = counts >= heights.clamp(min=min_pairs)
    left = ~row_tasks.gather(1, rows)
    col_tasks = _count(cols, left.long(), num_cols) >= min_pairs
    return Cover(row_tasks, col_tasks, left & ~col_tasks.gather(1, cols))


def _count(places: Tensor, weights: Tensor, size: int) -> Tensor:
    """(T, size): the weights (T, K) summed at their places (T, K)."""
    return torch.zeros(len(places), size, dtype=torch.long, device=places.device).scatter_add_(
        1, places, weights
    )

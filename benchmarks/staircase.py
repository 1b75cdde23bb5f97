"""Draws docs/plots/staircase.svg: one token's experts on the grid, and the bands that cover them.

    python -m benchmarks.staircase  prints how many bands a cover has on average, too

The ids are this library's router's on the CPU, from normal logits.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from benchmarks import plots, results
from benchmarks.cover import Cover, cover
from omni_moe import ops

PICTURE = results.ROOT / "docs" / "plots" / "staircase.svg"
# What a cell of the picture is, and its colour.
KINDS = {
    "not computed": "white",
    "computed with a row band, masked": "#cfe2f3",
    "computed with a column band, masked": "#fde3c8",
    "chosen, in a row band": "#1f5fa8",
    "chosen, in a column band": "#d9720f",
    "chosen, in the tail": "black",
}


class Choice(NamedTuple):
    """What a router chose: logits (T, R) and (T, C), ids (T, K), and their cover."""

    logits_x: Tensor
    logits_y: Tensor
    indices: Tensor
    cover: Cover


def choose(num_tokens: int, side: int, k: int) -> Choice:
    """From normal logits on a grid of side x side experts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_tokens, side, generator=generator)
    indices = ops.omni_softmax_router(logits[0], logits[1], k)[1]
    return Choice(logits[0], logits[1], indices, cover(indices, side, side))


def cells(choice: Choice, token: int) -> Tensor:
    """(R, C): the number of each cell's kind among KINDS."""
    num_rows, num_cols = choice.cover.rows.shape[1], choice.cover.cols.shape[1]
    rows, cols = choice.cover.rows[token], choice.cover.cols[token]
    # A pair lies in its row's band, if that is a task, and then in no column's.
    kinds = torch.zeros(num_rows, num_cols, dtype=torch.long)
    kinds[:, cols] = 2
    kinds[rows] = 1
    ids = choice.indices[token].long()
    in_row, in_tail = rows[ids // num_cols], choice.cover.in_tail[token]
    kinds.view(-1)[ids] = torch.where(in_tail, 5, torch.where(in_row, 3, 4))
    return kinds


def in_order(choice: Choice, token: int) -> Tensor:
    """The cells with the best row at the bottom and the best column at the left."""
    best_rows = choice.logits_x[token].argsort(descending=True)
    best_cols = choice.logits_y[token].argsort(descending=True)
    return cells(choice, token)[best_rows][:, best_cols]


def average_token(choice: Choice) -> int:
    """The first token whose cover is nearest to the average one."""
    parts = [part.sum(1).float() for part in choice.cover]
    return int(sum((part - part.mean()).abs() for part in parts).argmin())


def draw() -> Figure:
    small, large = choose(1024, 64, 64), choose(1024, 320, 512)
    token, other = average_token(small), average_token(large)
    figure = Figure(figsize=(13, 5), layout="constrained")
    grid, staircase, larger = figure.subplots(1, 3)
    _panel(grid, cells(small, token), "64 × 64, K 64, as the grid lies", "grid row", "grid column")
    ranks = "rows, the best first", "columns, the best first"
    _panel(staircase, in_order(small, token), _title(small, token), *ranks)
    _panel(larger, in_order(large, other)[:100, :100], _title(large, other), *ranks)
    patches = [Patch(facecolor=c, edgecolor="gray", label=name) for name, c in KINDS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _panel(axes: Axes, kinds: Tensor, title: str, ylabel: str, xlabel: str) -> None:
    colours = ListedColormap(list(KINDS.values()))
    axes.imshow(kinds.numpy(), cmap=colours, vmin=0, vmax=len(KINDS) - 1, origin="lower")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=9)


def _title(choice: Choice, token: int) -> str:
    num_rows, num_cols = choice.cover.rows.shape[1], choice.cover.cols.shape[1]
    rows, cols, in_tail = (part[token].sum().item() for part in choice.cover)
    return (
        f"{num_rows} × {num_cols}, K {choice.indices.shape[1]}, in order of the logits:\n"
        f"{rows} rows, {cols} columns, {in_tail} in the tail"
    )


def averages(num_tokens: int = 1024) -> Iterator[str]:
    """The lines of the table in docs/bands.md."""
    for side, k in ((64, 16), (64, 64), (320, 128), (320, 512), (320, 4096)):
        chosen = choose(num_tokens, side, k).cover
        tasks = chosen.row_tasks + chosen.col_tasks
        parts = (chosen.row_tasks, chosen.col_tasks, chosen.tail_pairs)
        cells = [f"{part / num_tokens:.1f}" for part in parts]
        cells.append(f"{100 * tasks * side / (num_tokens * side**2):.1f} %")
        yield f"| {side} × {side}, {k} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture")
    args = parser.parse_args(argv)
    for line in averages():
        print(line)
    print(plots.save(draw(), args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

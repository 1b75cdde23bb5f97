"""The tables and the picture of the records of `benchmarks.crossover`, for docs/bands.md.

Only the text between the markers of that page is replaced.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import plots, report, results
from benchmarks.results import Record, Row

PAGE = results.ROOT / "docs" / "bands.md"
PLOT_DIRECTORY = results.ROOT / "docs" / "plots"
BANDS = "bands"
# A choice is named as lost from here on, in time over that of the fastest strategy.
LOSS = 1.05


def write(directory: Path) -> list[Path]:
    """Rewrites page and pictures from all records in a directory."""
    records = [results.load(p) for p in sorted(directory.glob(f"*{results.CROSSOVER}.json"))]
    pictures = [
        plots.save(draw(record), PLOT_DIRECTORY / f"{_device(record)}-crossover.svg")
        for record in records
    ]
    sections = [
        "\n".join(section(record, picture))
        for record, picture in zip(records, pictures, strict=True)
    ]
    report.replace(PAGE, "\n\n".join(sections))
    return [PAGE, *pictures]


def _device(record: Record) -> str:
    return record.path.stem.removesuffix(results.CROSSOVER)


def gain(row: Row) -> float | None:
    """Time of the fastest gather over that of the bands; None where they do not take the shape."""
    gathers = [us for name, us in row["us"].items() if name != BANDS]
    return min(gathers) / row["us"][BANDS] if BANDS in row["us"] and gathers else None


def loss(row: Row) -> float:
    """Time of the planned strategy over that of the fastest."""
    return row["us"][row["planned"]] / min(row["us"].values())


def section(record: Record, picture: Path) -> Iterator[str]:
    header, rows = record.header, record.rows
    yield (
        f"{header['device']}, torch {header['torch']}, {header['date']}, source "
        f"`{header['source']}`, H {rows[0]['shape']['hidden']}, {rows[0]['dtype']}. Time of the "
        f"fastest gather over that of the bands: above 1 bands are faster. In bold where the plan "
        f"takes them."
    )
    yield ""
    yield f"![{picture.stem}](plots/{picture.name})"
    for side, own in _by_side(rows).items():
        ks = _sizes(own, "k")
        yield ""
        yield f"| {side} × {side}: T, K | {' | '.join(str(k) for k in ks)} |"
        yield "| ---: |" + " ---: |" * len(ks)
        for tokens in _sizes(own, "tokens"):
            cells = [_cell(_at(own, tokens, k)) for k in ks]
            yield f"| {tokens} | {' | '.join(cells)} |"
    yield ""
    yield from _verdict(rows)


def _cell(row: Row | None) -> str:
    value = None if row is None else gain(row)
    if value is None:
        return "–"
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"**{text}**" if row["planned"] == BANDS else text


def _verdict(rows: list[Row]) -> Iterator[str]:
    lost = sorted((row for row in rows if loss(row) > LOSS), key=loss, reverse=True)
    yield (
        f"The plan's strategy is the fastest, or within {LOSS - 1:.0%} of it, in "
        f"{len(rows) - len(lost)} of {len(rows)} shapes."
    )
    for row in lost[:5]:
        shape, us = row["shape"], row["us"]
        fastest = min(us, key=us.__getitem__)
        yield (
            f"- T {shape['tokens']}, {shape['rows']} × {shape['cols']}, K {shape['k']}: "
            f"{row['planned']} {us[row['planned']]:.0f} µs, {fastest} {us[fastest]:.0f} µs"
        )


def draw(record: Record) -> Figure:
    """A map for each grid: how much faster bands are, by colour; the strategy the plan takes."""
    grids = _by_side(record.rows)
    num_lines = math.ceil(len(grids) / 2)
    figure = Figure(figsize=(11, 1 + 3.6 * num_lines), layout="constrained")
    norm = TwoSlopeNorm(0, -2, 4)
    for position, (side, rows) in enumerate(grids.items(), start=1):
        axes = figure.add_subplot(num_lines, 2, position)
        image = _draw_grid(axes, rows, norm)
        axes.set_title(f"{side} × {side} experts", fontsize=10)
    bar = figure.colorbar(image, ax=figure.axes, label="fastest gather / bands")
    bar.set_ticks(range(-2, 5), labels=[f"{2.0**power:g}" for power in range(-2, 5)])
    figure.suptitle(
        f"Expert forward by strategy, {record.header['device']}\nletter: what the plan takes, "
        "b bands, l l2_tiled, f fused, t two_phase; red frame: over 5 % slower than another",
        fontsize=10,
    )
    return figure


def _draw_grid(axes: Axes, rows: list[Row], norm: TwoSlopeNorm):
    tokens, ks = _sizes(rows, "tokens"), _sizes(rows, "k")
    values = [[math.nan] * len(ks) for _ in tokens]
    for row in rows:
        line, column = tokens.index(row["shape"]["tokens"]), ks.index(row["shape"]["k"])
        value = gain(row)
        if value is not None:
            values[line][column] = math.log2(value)
        is_dark = value is not None and not 0.2 < norm(values[line][column]) < 0.8
        axes.text(
            column, line, row["planned"][0], ha="center", va="center", fontsize=8,
            color="white" if is_dark else "black",
        )  # fmt: skip
        if loss(row) > LOSS:
            corner = (column - 0.45, line - 0.45)
            axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="red", linewidth=1.5))
    image = axes.imshow(values, cmap="PuOr", norm=norm, origin="lower", aspect="auto")
    axes.set(xlabel="experts per token K", ylabel="tokens T")
    axes.set_xticks(range(len(ks)), [str(k) for k in ks], fontsize=7)
    axes.set_yticks(range(len(tokens)), [str(size) for size in tokens], fontsize=7)
    return image


def _by_side(rows: list[Row]) -> dict[int, list[Row]]:
    sides = _sizes(rows, "rows")
    return {side: [row for row in rows if row["shape"]["rows"] == side] for side in sides}


def _sizes(rows: list[Row], name: str) -> list[int]:
    return sorted({row["shape"][name] for row in rows})


def _at(rows: list[Row], tokens: int, k: int) -> Row | None:
    found = (r for r in rows if r["shape"]["tokens"] == tokens and r["shape"]["k"] == k)
    return next(found, None)

"""Plots of a record: time over each size that a sweep varies, time over the floor, and layers."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import layer_plots
from benchmarks.results import Record, Row

SWEPT = {"experts": "experts E", "k": "experts per token K", "tokens": "tokens T"}
MARKERS = {
    "omni_moe": "o", "eager": "s", "compile": "^", "dense_masked": "D", "gemms_only": "+",
    "hf_doge": "P", "gathers": "v",
}  # fmt: skip
# They have pictures of their own, and a picture of all cases no room for theirs.
OTHER_TABLES = ("layer_paper", "layer_growth")


def draw(record: Record, directory: Path) -> list[Path]:
    """Writes the plots that the record has rows for; returns their paths."""
    device = record.header["device"]
    figures = {
        "sweep": _sweep(record.rows),
        "roofline": _roofline(record.rows),
        "paper": layer_plots.paper(record.rows, device),
        "layer": layer_plots.growth(record.rows, device),
    }
    return [
        save(figure, directory / f"{record.path.stem}-{name}.svg")
        for name, figure in figures.items()
        if figure is not None
    ]


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture such that the same data give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem.rpartition("-")[2]}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    return path


def _sweep(rows: list[Row]) -> Figure | None:
    """One panel for each size: the rows of the sweep that differ in it alone."""
    swept = [row for row in rows if row["table"].endswith("sweep")]
    if not swept:
        return None
    base = _base_shape(swept)
    first, impls = swept[0], {row["impl"] for row in swept}
    same = [
        row for row in rows
        if row["impl"] in impls
        and all(row[name] == first[name] for name in ("op", "pass", "ids", "dtype", "timing"))
        and row["shape"].keys() == base.keys()
    ]  # fmt: skip
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(SWEPT)), SWEPT, strict=True):
        others = {name: value for name, value in base.items() if name != size}
        line = [row for row in same if others.items() <= row["shape"].items()]
        _lines(axes, line, size)
        axes.set(xscale="log", yscale="log", xlabel=SWEPT[size], ylabel="µs")
        sizes = sorted({row["shape"][size] for row in line})
        axes.set_xticks(sizes, [str(value) for value in sizes])
        axes.minorticks_off()
        axes.set_title(", ".join(f"{name} {value}" for name, value in others.items()), fontsize=8)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{first['op']} {first['pass']}, {first['dtype']}", fontsize=10)
    return figure


def _base_shape(rows: list[Row]) -> dict[str, int]:
    """The most frequent value of each size."""
    shapes = [row["shape"] for row in rows]
    values = {name: [shape[name] for shape in shapes] for name in shapes[0]}
    return {name: max(set(seen), key=seen.count) for name, seen in values.items()}


def _lines(axes: Axes, rows: list[Row], size: str) -> None:
    for impl in dict.fromkeys(row["impl"] for row in rows):
        points = sorted(
            (r["shape"][size], r["us"], r["us_min"], r["us_max"]) for r in rows if r["impl"] == impl
        )
        x, us, low, high = zip(*points, strict=True)
        marker = MARKERS.get(impl, "x")
        (line,) = axes.plot(x, us, marker=marker, markersize=4, label=impl)
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    floors = sorted({(r["shape"][size], r["floor_us"]) for r in rows if r["floor_us"]})
    if floors:
        axes.plot(*zip(*floors, strict=True), color="gray", linestyle="--", label="floor")


def _roofline(rows: list[Row]) -> Figure | None:
    """Time over floor of every measured case with a floor: 1 is the best there can be."""
    rows = [row for row in rows if row["floor_us"] and row["table"] not in OTHER_TABLES]
    rows = [row for row in rows if not row["table"].endswith("sweep")]
    if not rows:
        return None
    names = list(dict.fromkeys(_name(row) for row in rows))
    figure = Figure(figsize=(9, 1 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    for impl in dict.fromkeys(row["impl"] for row in rows):
        own = [row for row in rows if row["impl"] == impl]
        axes.scatter(
            [row["us"] / row["floor_us"] for row in own],
            [names.index(_name(row)) for row in own],
            marker=MARKERS.get(impl, "x"), label=impl, s=24,
        )  # fmt: skip
    axes.axvline(1, color="gray", linestyle="--")
    axes.set(xscale="log", xlabel="time / floor", yticks=range(len(names)), yticklabels=names)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure


def _name(row: Row) -> str:
    shape = " ".join(f"{name[0].upper()}{size}" for name, size in row["shape"].items())
    return f"{row['table']}: {row['op']} {row['pass']} {shape}"

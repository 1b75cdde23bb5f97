"""Pictures of the whole layer: the paper's Figure 4, and time over experts per token and in all."""

from collections.abc import Callable, Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import PAPER_K, PEER_K
from benchmarks.results import Row

# In the order of the legend: name, marker, colour.
STYLES = {
    "omni_moe": ("this library", "o", "tab:blue"),
    "dense_masked": ("all experts by two dense products, masked", "D", "tab:green"),
    "eager": ("eager PyTorch: rows gathered", "s", "tab:orange"),
    "peer": ("PEER, eager PyTorch", "^", "tab:red"),
}


def paper(rows: list[Row], device: str) -> Figure | None:
    """Latency and memory over tokens, a column for each number of experts per token.

    PEER's column is that of the same rank: its numbers of experts per token are others.
    """
    rows = [row for row in rows if row["table"] == "layer_paper"]
    if not rows:
        return None
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(2, len(PAPER_K), sharex=True, sharey="row")
    for column, ks in enumerate(zip(PAPER_K, PEER_K, strict=True)):
        own = [
            row for row in rows
            if (row["op"], row["shape"]["k"]) in (("layer", ks[0]), ("peer_layer", ks[1]))
        ]  # fmt: skip
        top, bottom = panels[0, column], panels[1, column]
        _lines(top, own, lambda shape: shape["tokens"], lambda row: row["us"] / 1e3)
        _lines(bottom, own, lambda shape: shape["tokens"], lambda row: row["peak_mib"])
        top.set_title(f"K {ks[0]}; PEER: K {ks[1]}", fontsize=9)
        ticks = {row["shape"]["tokens"]: str(row["shape"]["tokens"]) for row in rows}
        _log_axes(bottom, "tokens T", "", ticks)
    panels[0, 0].set(ylabel="ms", yscale="log")
    panels[1, 0].set(ylabel="peak memory beyond inputs, MiB", yscale="log")
    _finish(
        figure,
        f"Layer forward, the paper's latency setup, {_setup(rows)}, {device}\n"
        "eager PyTorch works in chunks of tokens where a copy of the rows takes more than 8 GiB",
    )
    return figure


def growth(rows: list[Row], device: str) -> Figure | None:
    """Time of a layer over experts per token, and over the number of experts."""
    layers = [row for row in rows if row["table"] in ("layer_paper", "layer_growth")]
    layers = [row for row in layers if row["op"] == "layer" and row["shape"]["tokens"] == 4096]
    by_k = [row for row in layers if row["shape"]["rows"] == row["shape"]["cols"] == 320]
    by_experts = [row for row in layers if row["shape"]["k"] == 512]
    if not by_k or not by_experts:
        return None
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, by_k, lambda shape: shape["k"], lambda row: row["us"] / 1e3)
    _lines(right, by_experts, lambda shape: shape["experts"], lambda row: row["us"] / 1e3)
    ks = {row["shape"]["k"]: str(row["shape"]["k"]) for row in by_k}
    _log_axes(left, "experts per token, of 320²", "ms", ks)
    sides = {row["shape"]["experts"]: f"{row['shape']['rows']}²" for row in by_experts}
    _log_axes(right, "experts, 512 per token", "", sides)
    left.set_yscale("log")
    _finish(figure, f"Layer forward, 4096 tokens, {_setup(layers)}, {device}")
    return figure


def _lines(
    axes: Axes, rows: list[Row], x_of: Callable[[dict], int], y_of: Callable[[Row], float]
) -> None:
    for impl, (label, marker, color) in STYLES.items():
        points = sorted((x_of(row["shape"]), y_of(row)) for row in rows if row["impl"] == impl)
        if points:
            axes.plot(
                *zip(*points, strict=True), marker=marker, markersize=4, color=color, label=label
            )


def _log_axes(axes: Axes, xlabel: str, ylabel: str, ticks: dict[int, str]) -> None:
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    sizes = sorted(ticks)
    axes.set_xticks(sizes, [ticks[size] for size in sizes], fontsize=8)
    axes.minorticks_off()


def _setup(rows: Iterable[Row]) -> str:
    row = next(row for row in rows if row["op"] == "layer")
    shape = row["shape"]
    return f"H {shape['hidden']}, shared MLP of width {shape['intermediate']}, {row['dtype']}"


def _finish(figure: Figure, title: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    entries: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), fontsize=9
    )
    figure.suptitle(title, fontsize=10)

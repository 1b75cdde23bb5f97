"""Turns the records into the tables of docs/benchmarks.md, a summary in README.md, and plots.

Only the text between the markers of those files is replaced.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import plots, results
from benchmarks.cases import cases_for
from benchmarks.results import Record, Row

REPORT = results.ROOT / "docs" / "benchmarks.md"
README = results.ROOT / "README.md"
PLOT_DIRECTORY = results.ROOT / "docs" / "plots"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

OURS = "omni_moe"
# Column order; others follow in the order of the record.
IMPLS = (
    OURS, "eager", "compile", "gathers", "dense_masked", "gemms_only", "upstream_triton", "hf_doge",
    "peer", "hf_grouped_mm", "hf_batched_mm", "scattermoe", "megablocks",
)  # fmt: skip
TITLES = {
    "cpu_expert": "Experts",
    "cpu_router": "Router",
    "cpu_layer": "Shared MLP and whole layer",
    "cpu_moe": "Classic mixture of experts",
    "cpu_sweep": "Experts, one size varied",
    "expert": "Experts, forward, uniform ids",
    "expert_router_ids": "Experts, forward, ids from a router",
    "expert_router_ids_train": "Experts, forward and backward, ids from a router",
    "expert_train": "Experts, forward and backward",
    "router": "Router",
    "mlp": "Shared MLP",
    "layer": "Whole layer",
    "layer_paper": "Whole layer, the paper's latency setup",
    "layer_growth": "Whole layer, experts per token and in all varied",
    "model": "Language model, one training step without the optimizer",
    "topk_router": "Top-k router, sigmoid scores with groups and a bias",
    "permute": "Permutation into expert order and back",
    "moe": "Classic mixture of experts",
    "decode": "Few tokens, inside a CUDA graph",
    "sweep": "Experts, one size varied",
}
# Tables around a case of another one.
VARIED = ("cpu_sweep", "sweep", "layer_growth")
LETTERS = {
    "tokens": "T", "hidden": "H", "intermediate": "I", "experts": "E", "rows": "R", "cols": "C",
    "k": "K", "layers": "L", "heads": "heads ", "groups": "G", "topk_groups": "M",
}  # fmt: skip


def write(directory: Path) -> list[Path]:
    """Rewrites report, summary and plots from all records in a directory."""
    records = results.load_all(directory)
    written = []
    sections = []
    for record in records:
        pictures = plots.draw(record, PLOT_DIRECTORY)
        written += pictures
        sections.append("\n".join(_section(record, pictures)))
    replace(REPORT, "\n\n".join(sections))
    replace(README, "\n\n".join("\n".join(_summary(record)) for record in records))
    return [REPORT, README, *written]


def replace(path: Path, text: str) -> None:
    content = path.read_text() if path.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if BEGIN not in content or END not in content:
        raise ValueError(f"{path}: expected the markers {BEGIN} and {END}")
    head, _, rest = content.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


# ---- one device ---------------------------------------------------------------------------------


def _section(record: Record, pictures: list[Path]) -> Iterator[str]:
    header = record.header
    yield f"## {header['device']}"
    yield ""
    yield _machine(record)
    yield ""
    for table, rows in _by_table(record):
        yield f"### {TITLES.get(table, table)}"
        yield ""
        yield from (_model_table if table == "model" else _table)(rows)
        yield ""
    for picture in pictures:
        yield f"![{picture.stem}](plots/{picture.name})"
    if record.skipped:
        yield ""
        yield from _skipped(record.skipped)


def _machine(record: Record) -> str:
    header = record.header
    parts = [f"torch {header['torch']}"]
    if header["cuda"]:
        parts.append(f"CUDA {header['cuda']}")
    else:
        parts.append(f"CPU threads {header['threads']}, {header['cpu_capability']} kernels")
    return f"{', '.join(parts)}, {header['date']}, source `{header['source']}`."


def _by_table(record: Record) -> Iterator[tuple[str, list[list[Row]]]]:
    """Each table with its cases, in the order of `cases_for`; a case is a list of rows."""
    cases = cases_for(record.header["device_type"])
    for table in dict.fromkeys(case.table for case in cases):
        groups = []
        for case in cases:
            wanted = results.row_of(case, "")
            rows = [row for row in record.rows if _same_case(row, wanted)]
            if case.table == table and rows:
                groups.append(rows)
        if groups:
            yield table, groups


def _same_case(row: Row, other: Row) -> bool:
    names = ("op", "pass", "shape", "ids", "dtype", "timing", "table")
    return all(row[name] == other[name] for name in names)


def _table(groups: list[list[Row]]) -> Iterator[str]:
    impls = _impls(row for rows in groups for row in rows)
    has_floor = any(rows[0]["floor_us"] for rows in groups)
    columns = ["case", *(f"{impl}, µs" for impl in impls)]
    columns += ["floor, µs"] if has_floor else []
    columns += ["eager / omni_moe", "peak MiB, omni_moe / eager", "error, omni_moe / eager"]
    yield f"| {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * (len(columns) - 1)}"
    for rows in groups:
        by_impl = {row["impl"]: row for row in rows}
        cells = [_case_text(rows[0])]
        cells += [_time(by_impl.get(impl)) for impl in impls]
        if has_floor:
            floor_us, name = rows[0]["floor_us"], rows[0]["floor"]
            cells.append(f"{_short(floor_us)} ({name})" if floor_us else "")
        cells.append(_speedup(by_impl))
        cells.append(_pair(by_impl, _memory))
        cells.append(_pair(by_impl, lambda row: f"{row['rel_err']:.0e}" if row["rel_err"] else "–"))
        yield f"| {' | '.join(cells)} |"


def _model_table(groups: list[list[Row]]) -> Iterator[str]:
    """A line for each model, whose step is also told as a speed."""
    yield "| case | model | ms | tokens a second | TFLOP/s | MFU | peak MiB |"
    yield "| --- | --- |" + " ---: |" * 5
    for rows in groups:
        for row in rows:
            mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
            yield (
                f"| {_case_text(row)} | {row['impl']} | {row['us'] / 1e3:.3g} "
                f"| {row['tokens_per_second']} | {row['tflops_per_second']:.3g} | {mfu} "
                f"| {_memory(row)} |"
            )


def _impls(rows: Iterable[Row]) -> list[str]:
    present = list(dict.fromkeys(row["impl"] for row in rows))
    return [impl for impl in IMPLS if impl in present] + [i for i in present if i not in IMPLS]


def _case_text(row: Row) -> str:
    shape = " ".join(f"{LETTERS[name]}{size}" for name, size in _shown_sizes(row))
    passes = {"forward": "forward", "forward_backward": "forward + backward"}[row["pass"]]
    return f"{row['op']} {passes}, {shape}, {row['dtype']}"


def _shown_sizes(row: Row) -> list[tuple[str, int]]:
    """E is left out where rows and columns are given, whose product it is."""
    shape = row["shape"]
    return [(n, s) for n, s in shape.items() if n != "experts" or "rows" not in shape]


def _time(row: Row | None) -> str:
    return "–" if row is None else _short(row["us"])


def _speedup(by_impl: dict[str, Row]) -> str:
    if OURS not in by_impl or "eager" not in by_impl:
        return "–"
    return f"{by_impl['eager']['us'] / by_impl[OURS]['us']:.1f}×"


def _memory(row: Row) -> str:
    text = f"{row['peak_mib']:.3g}"
    without = row["peak_mib_without_results"]
    return text if without is None else f"{text} ({without:.3g})"


def _pair(by_impl: dict[str, Row], text) -> str:
    return " / ".join(text(by_impl[i]) if i in by_impl else "–" for i in (OURS, "eager"))


def _short(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def _skipped(rows: list[Row]) -> Iterator[str]:
    yield "Not measured:"
    yield ""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(f"{row['impl']}: {row['reason']}", []).append(_case_text(row))
    for reason, cases in reasons.items():
        named = "; ".join(cases[:3]) + (f"; and {len(cases) - 3} more" if len(cases) > 3 else "")
        yield f"- {reason} ({named})"


# ---- README -------------------------------------------------------------------------------------


def _summary(record: Record) -> Iterator[str]:
    """The first case of each op and pass in the main dtype, this library against eager."""
    yield f"{record.header['device']}, {_machine(record)}"
    yield ""
    yield "| case | omni_moe, µs | eager PyTorch, µs | ratio |"
    yield "| --- | ---: | ---: | ---: |"
    seen = set()
    for table, groups in _by_table(record):
        for rows in groups:
            by_impl = {row["impl"]: row for row in rows}
            key = (table, rows[0]["op"], rows[0]["pass"])
            if key in seen or table in VARIED or not {OURS, "eager"} <= by_impl.keys():
                continue
            seen.add(key)
            ours, eager = by_impl[OURS], by_impl["eager"]
            yield (
                f"| {_case_text(ours)} | {_short(ours['us'])} | {_short(eager['us'])} "
                f"| {_speedup(by_impl)} |"
            )

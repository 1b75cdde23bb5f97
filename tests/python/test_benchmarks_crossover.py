"""The map of strategies, with given times in place of a GPU's, and the picture of a staircase."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import needs_gpu

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import crossover, crossover_report, report, results, staircase
from omni_moe import GpuProperties, ops

CPU = torch.device("cpu")
H100 = GpuProperties(
    num_sms=132, l2_bytes=50 * 2**20, shared_bytes_per_block=227 * 2**10, has_hopper_kernels=True
)


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(crossover, "TOKENS", (256, 1024))
    monkeypatch.setattr(crossover, "K", (4, 512))
    monkeypatch.setattr(crossover, "SIDES", (64, 320))


def given_times(case, indices):
    """Gathers in proportion to the pairs, bands to the experts; one is missing at 320 x 320."""
    shape = case.shape
    assert indices.shape == (shape["tokens"], shape["k"]) and indices.dtype == torch.int32
    assert indices.is_contiguous() and 0 <= indices.min() and indices.max() < shape["experts"]
    pairs = shape["tokens"] * shape["k"] / 1000
    times = {"two_phase": 3 * pairs, "fused": 2 * pairs, "l2_tiled": pairs}
    times["bands"] = shape["experts"] / 1000
    if shape["rows"] == 320:
        del times["two_phase"]
    return {name: lambda us=us: us for name, us in times.items()}


def measured(tmp_path) -> results.Record:
    record = results.open_record(CPU, tmp_path, results.CROSSOVER)
    crossover.run(record, CPU, H100, given_times, lambda _: None)
    return record


def test_every_shape_has_a_row(small_grid, tmp_path):
    record = measured(tmp_path)
    assert record.path.name == f"{results.slug(CPU)}_crossover.json"
    content = json.loads(record.path.read_text())
    shapes = {tuple(row["shape"][n] for n in ("tokens", "k", "rows")) for row in content["rows"]}
    assert shapes == {(t, k, side) for t in (256, 1024) for k in (4, 512) for side in (64, 320)}
    assert len(content["rows"]) == 8
    row = next(
        row for row in content["rows"]
        if row["shape"] == {
            "tokens": 1024, "hidden": 1024, "experts": 102400, "k": 512, "rows": 320, "cols": 320,
        }
    )  # fmt: skip
    assert row["us"] == {"fused": 1048.58, "l2_tiled": 524.29, "bands": 102.4}
    assert row["planned"] == crossover.planned_strategy(list(crossover.cases())[-2], H100)


def test_fewer_tokens_have_the_same_ids(small_grid):
    seen = {}
    for case in crossover.cases():
        shape = case.shape
        ids = crossover.router_ids(1024, shape["rows"], shape["k"], CPU)
        seen.setdefault((shape["rows"], shape["k"]), ids)
        assert ids.equal(seen[shape["rows"], shape["k"]])  # drawn afresh, and yet the same
        assert ids.sort(1).values.diff(dim=1).gt(0).all()  # no expert twice


def test_other_records_are_none_of_the_harness_s(small_grid, tmp_path):
    measured(tmp_path)
    assert results.load_all(tmp_path) == []
    again = results.open_record(CPU, tmp_path, results.CROSSOVER)
    assert len(again.rows) == 8  # of the same source


def row(us: dict[str, float], planned: str, tokens: int = 256, k: int = 4) -> dict:
    shape = {"tokens": tokens, "hidden": 8, "experts": 16, "k": k, "rows": 4, "cols": 4}
    return {"shape": shape, "dtype": "bfloat16", "us": us, "planned": planned}


def test_gain_and_loss_of_a_row():
    times = {"fused": 30.0, "l2_tiled": 20.0, "bands": 10.0}
    assert crossover_report.gain(row(times, "bands")) == 2.0
    assert crossover_report.loss(row(times, "bands")) == 1.0
    assert crossover_report.loss(row(times, "fused")) == 3.0
    assert crossover_report.gain(row({"fused": 30.0}, "fused")) is None


def test_the_report_names_what_the_plan_loses(tmp_path):
    record = results.open_record(CPU, tmp_path, results.CROSSOVER)
    record.rows = [
        row({"fused": 30.0, "bands": 10.0}, "bands"),
        row({"fused": 30.0, "bands": 15.0}, "fused", tokens=1024),
        row({"fused": 10.0, "bands": 40.0}, "fused", k=8),
    ]
    page = "\n".join(crossover_report.section(record, tmp_path / "map.svg"))
    assert "| 256 | **3.00** | 0.25 |" in page
    assert "| 1024 | 2.00 | – |" in page
    assert "within 5% of it, in 2 of 3 shapes" in page
    assert "- T 1024, 4 × 4, K 4: fused 30 µs, bands 15 µs" in page


def test_report_and_picture_come_from_the_record(small_grid, tmp_path, monkeypatch, capsys):
    record = measured(tmp_path)
    page = tmp_path / "bands.md"
    page.write_text(f"before\n{report.BEGIN}\nwhat was there\n{report.END}\nafter\n")
    monkeypatch.setattr(crossover_report, "PAGE", page)
    monkeypatch.setattr(crossover_report, "PLOT_DIRECTORY", tmp_path / "plots")
    assert crossover.main(["--report-only", "--results", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "what was there" not in text
    assert "| 64 × 64: T, K | 4 | 512 |" in text and "| 320 × 320: T, K | 4 | 512 |" in text
    (picture,) = (tmp_path / "plots").iterdir()
    assert picture.name == f"{results.slug(CPU)}-crossover.svg"
    assert f"](plots/{picture.name})" in text
    first = picture.read_bytes()
    crossover_report.write(tmp_path)
    assert picture.read_bytes() == first

    maps = [axes for axes in crossover_report.draw(record).axes if axes.get_images()]
    assert [axes.get_title() for axes in maps] == ["64 × 64 experts", "320 × 320 experts"]
    values = maps[1].get_images()[0].get_array()
    assert values[1, 1] == pytest.approx(2.356, abs=1e-3)  # log2(524.288 / 102.4)
    assert [text.get_text() for text in maps[1].texts] == [
        planned[0] for planned in (r["planned"] for r in record.rows if r["shape"]["rows"] == 320)
    ]


def test_a_missing_library_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.so: expected the library of a CUDA build"):
        crossover.Calls(tmp_path / "none.so", CPU)


@needs_gpu
@pytest.mark.skipif(not crossover.LIBRARY.exists(), reason="the C++ tests are not built")
def test_every_strategy_gives_the_op_s_result(monkeypatch):
    monkeypatch.setattr(crossover, "TOKENS", (300,))
    monkeypatch.setattr(crossover, "K", (40,))
    monkeypatch.setattr(crossover, "SIDES", (24,))
    device = torch.device("cuda")
    (case,) = crossover.cases()
    indices = crossover.router_ids(300, 24, 40, device)
    calls = crossover.Calls(crossover.LIBRARY, device)
    samplers = calls.samplers(case, indices)
    assert {"two_phase", "fused", "l2_tiled"} <= samplers.keys() <= set(crossover.STRATEGIES)
    assert ("bands" in samplers) == GpuProperties.of().has_hopper_kernels
    weights = calls.routing_weights[: 300 * 40].view(300, 40)
    expected = ops.omni_expert(
        calls.hidden_states, calls.up_weights, calls.down_weights, weights, indices
    )
    # Bands round each coefficient and each partial output: the root of the sum of the squares of
    # what is added up tells how far such roundings go together. The op's result is rounded, too.
    up, down = (table.double()[indices.long()] for table in (calls.up_weights, calls.down_weights))
    dots = (up * calls.hidden_states[:300].double().unsqueeze(1)).sum(-1)
    coefficients = torch.nn.functional.silu(dots) * weights.double()
    sizes = (coefficients.unsqueeze(-1) * down).square().sum(1).sqrt()
    roundoff = 2.0**-9
    bound = roundoff * (4 * expected.double().abs() + 5 * sizes) + 1e-6
    for name, sampler in samplers.items():
        calls.expert_states.zero_()
        assert sampler() > 0
        error = (calls.expert_states.double() - expected.double()).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.2f} of the bound"
    half = replace(case, shape={**case.shape, "cols": 0})
    assert "bands" not in calls.samplers(half, indices)


# ---- the staircase ------------------------------------------------------------------------------


def test_a_choice_in_order_is_a_staircase():
    choice = staircase.choose(40, 16, 20)
    for token in range(40):
        chosen = staircase.in_order(choice, token) >= 3
        assert chosen.sum() == 20
        rows, cols = chosen.int(), chosen.t().int()
        assert (rows.diff(dim=1) <= 0).all() and (cols.diff(dim=1) <= 0).all()


def test_cells_are_what_the_cover_says():
    choice = staircase.choose(40, 16, 20)
    names = list(staircase.KINDS)
    for token in range(40):
        kinds = staircase.cells(choice, token)
        rows, cols = choice.cover.rows[token], choice.cover.cols[token]
        for row in range(16):
            for col in range(16):
                is_chosen = (choice.indices[token] == row * 16 + col).any()
                in_row, in_col = bool(rows[row]), bool(cols[col])
                expected = {
                    (True, True): "chosen, in a row band",
                    (False, True): "computed with a row band, masked",
                }.get((bool(is_chosen), in_row)) or {
                    (True, True): "chosen, in a column band",
                    (False, True): "computed with a column band, masked",
                    (True, False): "chosen, in the tail",
                    (False, False): "not computed",
                }[bool(is_chosen), in_col]
                assert names[kinds[row, col]] == expected


def test_the_picture_is_drawn(tmp_path, capsys):
    picture = tmp_path / "staircase.svg"
    assert staircase.main(["--out", str(picture)]) == 0
    assert picture.stat().st_size > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    # As in the docs, but for what another processor rounds otherwise.
    for line in lines:
        case, *averages = cells_of(line)
        in_docs = (cells_of(row) for row in crossover_report.PAGE.read_text().splitlines())
        (told,) = [cells[1:] for cells in in_docs if cells[0] == case]
        assert [float(cell.rstrip(" %")) for cell in averages] == pytest.approx(
            [float(cell.rstrip(" %")) for cell in told], abs=0.11
        )
    assert len(lines) == 5


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]

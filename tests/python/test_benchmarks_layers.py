"""Benchmarks of the layer's sweep: its peers, language models, covers, and their pictures."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_gpu

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import __main__ as entry
from benchmarks import eager, layer_plots, models, peers, problems, report, results, upstream
from benchmarks.cases import PAPER_K, PEER_K, Case, cases_for
from benchmarks.cover import MIN_PAIRS, cover
from benchmarks.peer_layer import PeerLayer
from omni_moe import GpuProperties, plan

CPU = torch.device("cpu")
LAYER = {
    "tokens": 37, "hidden": 24, "intermediate": 40, "experts": 35, "rows": 7, "cols": 5, "k": 9,
}  # fmt: skip
MODEL = {
    "tokens": 96, "layers": 2, "hidden": 64, "intermediate": 32, "experts": 64, "rows": 8,
    "cols": 8, "k": 4,
}  # fmt: skip


def layer_case(**changes) -> Case:
    case = Case(
        table="layer_paper", op="layer", pass_name="forward", shape=LAYER, dtype="float32",
        timing="wall", impls=("omni_moe", "eager", "dense_masked"),
    )  # fmt: skip
    return replace(case, **changes)


def peer_case(**changes) -> Case:
    shape = {name: size for name, size in LAYER.items() if name != "intermediate"}
    shape |= {"experts": 49, "cols": 7, "heads": 2, "k": 10}
    return layer_case(op="peer_layer", shape=shape, impls=("peer",), **changes)


def model_case(**changes) -> Case:
    case = Case(
        table="model", op="model", pass_name="forward_backward", shape=MODEL, dtype="float32",
        timing="wall",
    )  # fmt: skip
    return replace(case, **changes)


# ---- peers --------------------------------------------------------------------------------------


def random_peer_layer(num_experts_per_token: int = 10) -> PeerLayer:
    layer = PeerLayer(24, side=7, num_heads=2, num_experts_per_token=num_experts_per_token)
    with torch.no_grad():
        layer.keys.normal_()
    return layer.double()


def test_peer_layer_is_its_definition():
    layer, x = random_peer_layer(), torch.randn(19, 24, dtype=torch.float64)
    queries = F.batch_norm(layer.query_proj(x), None, None, training=True).view(19, 2, 2, -1)
    expected = torch.zeros_like(x)
    for token in range(19):
        for head in range(2):
            scores = torch.stack([
                layer.keys[0, e // 7] @ queries[token, 0, head]
                + layer.keys[1, e % 7] @ queries[token, 1, head]
                for e in range(49)
            ])  # fmt: skip
            best, experts = scores.topk(5)
            for weight, expert in zip(best.softmax(0), experts, strict=True):
                activation = F.gelu(layer.down_embed.weight[expert] @ x[token])
                expected[token] += weight * activation * layer.up_embed.weight[expert]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("chunk", [1, 8, 19, 100])
def test_peer_layer_in_chunks_is_the_same(chunk):
    layer, x = random_peer_layer(), torch.randn(19, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, chunk), layer(x))


def test_peer_layer_takes_every_expert_of_a_head():
    layer, x = random_peer_layer(2 * 49), torch.randn(5, 24, dtype=torch.float64)
    ids = layer.choose(layer.query_proj(x).unflatten(-1, (2, 2, -1)))[1]
    assert ids.sort(-1).values.equal(torch.arange(49).expand(5, 2, 49))
    for k in (9, 100):
        with pytest.raises(ValueError, match="multiple of 2 heads"):
            random_peer_layer(k)


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_eager_layer_in_chunks_is_the_same(chunk):
    problem = problems.make_problem(layer_case(dtype="float64"), CPU)
    x = problem.tensors["hidden_states"]
    whole = eager.layer(problem.module, x)
    torch.testing.assert_close(eager.layer(problem.module, x, chunk), whole)


@pytest.mark.parametrize("pass_name", ["forward", "forward_backward"])
@pytest.mark.parametrize("impl", ["omni_moe", "eager", "dense_masked"])
def test_layers_agree_with_the_oracle(impl, pass_name, monkeypatch):
    monkeypatch.setattr(peers, "COPY_BYTES", 4 * 8 * 9 * 24)  # of eight tokens, eager
    problem = problems.make_problem(layer_case(pass_name=pass_name), CPU)
    workload = peers.build(impl, problem)
    chunks = {"eager": {"chunk_tokens": 8}} if pass_name == "forward" else {}
    assert workload.facts == chunks.get(impl, {})
    assert problems.relative_error(problem, workload.run()) < 1e-5


def test_dense_masked_layer_works_in_chunks(monkeypatch):
    monkeypatch.setattr(peers, "COPY_BYTES", 4 * 5 * 35)  # of five tokens
    problem = problems.make_problem(layer_case(), CPU)
    workload = peers.build("dense_masked", problem)
    assert workload.facts == {"chunk_tokens": 5}
    assert problems.relative_error(problem, workload.run()) < 1e-5


def test_gathers_are_the_op_without_its_grid(monkeypatch):
    given = []
    op = peers.ops.omni_expert
    monkeypatch.setattr(
        peers.ops, "omni_expert",
        lambda *args, num_cols=0, **kwargs: given.append(num_cols) or op(*args, **kwargs),
    )  # fmt: skip
    shape = {"tokens": 9, "hidden": 8, "experts": 36, "rows": 6, "cols": 6, "k": 4}
    case = layer_case(op="expert", shape=shape, ids="router")
    problem = problems.make_problem(case, CPU)
    for impl in ("omni_moe", "gathers"):
        assert problems.relative_error(problem, peers.build(impl, problem).run()) < 1e-5
    assert given == [6, 0]
    shape = {name: size for name, size in shape.items() if name not in ("rows", "cols")}
    problem = problems.make_problem(replace(case, shape=shape, ids="uniform"), CPU)
    with pytest.raises(upstream.NotApplicable, match="grid"):
        peers.build("gathers", problem)
    peers.build("omni_moe", problem).run()
    assert given[2:] == [0]


# ---- language models ----------------------------------------------------------------------------


def test_the_model_is_a_preset():
    pytest.importorskip("transformers")
    from omni_moe.integrations.transformers.configuration import PRESETS, OmniMoeConfig

    (case,) = [case for case in cases_for("cuda") if case.op == "model"]
    config, preset = models._config(case), OmniMoeConfig.from_preset("12x768")
    assert all(getattr(config, name) == getattr(preset, name) for name in PRESETS["12x768"])
    assert config.layer_config().grid == preset.layer_config().grid == (320, 320)


def test_the_dense_model_has_as_many_active_parameters():
    pytest.importorskip("transformers")
    case = model_case()
    ours, dense = (make(case, CPU) for make in (models.omni_moe, models.dense))
    idle = 2 * 2 * (MODEL["experts"] - MODEL["k"]) * MODEL["hidden"]
    active = sum(p.numel() for p in ours.parameters()) - idle
    more = sum(p.numel() for p in dense.parameters()) - active
    assert 0 <= more < 2 * 3 * MODEL["hidden"]  # widths are rounded up
    assert ours.training and dense.training


def test_training_flops_count_the_experts_of_a_token():
    pytest.importorskip("transformers")
    ids = problems.make_problem(model_case(), CPU).tensors["input_ids"]
    fewer, more = (
        models.training_flops(models.omni_moe(model_case(shape={**MODEL, "k": k}), CPU), ids)
        for k in (4, 5)
    )
    # 4 H forward and 8 H backward for each of the pairs in two layers.
    assert more - fewer == 2 * 12 * MODEL["hidden"] * MODEL["tokens"]


def test_speed_is_told_of_the_whole_step():
    told = models.speed(flops=4 * 10**12, num_tokens=1000, us=2e6, device=CPU)
    assert told == {"tokens_per_second": 500, "tflops_per_second": 2.0, "mfu": None}


# ---- covers -------------------------------------------------------------------------------------


def cover_by_hand(ids: list[int], num_rows: int, num_cols: int) -> tuple[set, set, list[bool]]:
    """Of one token, in the words of band_cover.cu."""
    counts = [sum(i // num_cols == row for i in ids) for row in range(num_rows)]
    heights = range(num_rows + 1)
    h = max(h for h in heights if sum(count >= h for count in counts) >= h)
    rows = {row for row in range(num_rows) if counts[row] >= max(h, MIN_PAIRS)}
    left = [i for i in ids if i // num_cols not in rows]
    cols = {c for c in range(num_cols) if sum(i % num_cols == c for i in left) >= MIN_PAIRS}
    return rows, cols, [i // num_cols not in rows and i % num_cols not in cols for i in ids]


def ids_of_every_kind(num_rows: int, num_cols: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    logits_x = torch.randn(12, num_rows, generator=generator)
    logits_y = torch.randn(12, num_cols, generator=generator)
    return torch.cat([
        eager.router(logits_x, logits_y, k)[1],
        torch.randint(num_rows * num_cols, (12, k), generator=generator),  # with repeated ids
        torch.full((1, k), 7),
        torch.arange(k).remainder(num_cols)[None],  # of one row
        (torch.arange(k) % num_rows * num_cols)[None],  # of one column
        (torch.arange(k) % num_rows * num_cols + torch.arange(k) % num_cols)[None],  # a diagonal
    ])  # fmt: skip


@pytest.mark.parametrize(("num_rows", "num_cols", "k"), [(9, 9, 1), (7, 11, 20), (20, 6, 90)])
def test_cover_follows_the_rule(num_rows, num_cols, k):
    ids = ids_of_every_kind(num_rows, num_cols, k)
    covered = cover(ids.int(), num_rows, num_cols)
    for token, own in enumerate(ids.tolist()):
        rows, cols, in_tail = cover_by_hand(own, num_rows, num_cols)
        assert set(covered.rows[token].nonzero().flatten().tolist()) == rows
        assert set(covered.cols[token].nonzero().flatten().tolist()) == cols
        assert covered.in_tail[token].tolist() == in_tail
    assert covered.row_tasks == covered.rows.sum()
    assert covered.col_tasks == covered.cols.sum()
    assert covered.tail_pairs == covered.in_tail.sum()


def test_a_staircase_needs_no_more_tasks_than_the_plan_has():
    gpu = GpuProperties(
        num_sms=132, l2_bytes=50 * 2**20, shared_bytes_per_block=227 * 2**10,
        has_hopper_kernels=True,
    )  # fmt: skip
    planned = plan(
        "omni_expert", num_tokens=4096, hidden_size=1024, num_experts=320**2, num_cols=320,
        num_experts_per_token=512, gpu=gpu,
    )["expert_forward"]  # fmt: skip
    assert planned["strategy"] == "bands" and planned["min_pairs"] == MIN_PAIRS
    logits = torch.randn(2, 64, 320, generator=torch.Generator().manual_seed(0))
    covered = cover(eager.router(logits[0], logits[1], 512)[1], 320, 320)
    tasks = covered.rows.sum(1) + covered.cols.sum(1)
    assert tasks.float().mean() < planned["max_tasks"]
    assert covered.in_tail.sum(1).float().mean() < 8


# ---- runs, reports and pictures -----------------------------------------------------------------


def run(tmp_path, monkeypatch, cases, *arguments) -> dict:
    for module in (entry, report):
        monkeypatch.setattr(module, "cases_for", lambda _: cases)
    monkeypatch.setattr(report, "REPORT", tmp_path / "benchmarks.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PLOT_DIRECTORY", tmp_path / "plots")
    monkeypatch.setattr(upstream, "set_path", lambda _: None)
    threads = torch.get_num_threads()
    try:
        entry.main([
            "--device", "cpu", "--seconds", "0.01", "--results", str(tmp_path / "results"),
            *arguments,
        ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    (path,) = (tmp_path / "results").glob("*.json")
    return json.loads(path.read_text())


def test_a_run_measures_the_paper_s_sweep(tmp_path, monkeypatch, capsys):
    growth = layer_case(table="layer_growth", shape={**LAYER, "k": 3})
    content = run(tmp_path, monkeypatch, [layer_case(), peer_case(), growth])
    assert not content["skipped"]
    measured = [(row["op"], row["shape"]["k"], row["impl"]) for row in content["rows"]]
    impls = ("omni_moe", "eager", "dense_masked")
    expected = [("layer", 9, impl) for impl in impls] + [("peer_layer", 10, "peer")]
    assert sorted(measured) == sorted([*expected, *(("layer", 3, impl) for impl in impls)])
    for row in content["rows"]:
        assert row["us"] > 0 and row["peak_mib"] > 0
        assert row["impl"] == "peer" or row["rel_err"] < 1e-5
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| layer forward, T37 H24 I40 R7 C5 K9, float32 |" in page
    assert "| peer_layer forward, T37 H24 R7 C7 K10 heads 2, float32 | – |" in page


def test_a_run_tells_the_speed_of_models(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    arguments = ("--impl", "omni_moe", "dense", "--limit-seconds", "600")
    content = run(tmp_path, monkeypatch, [model_case()], *arguments)
    assert not content["skipped"]
    assert [row["impl"] for row in content["rows"]] == ["omni_moe", "dense"]
    for row in content["rows"]:
        assert row["tokens_per_second"] == pytest.approx(96e6 / row["us"], rel=0.01)
        assert row["tflops_per_second"] == pytest.approx(row["flops"] / row["us"] / 1e6, abs=1e-4)
        assert row["mfu"] is None
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| case | model | ms |" in page
    assert "| model forward + backward, T96 L2 H64 I32 R8 C8 K4, float32 | dense |" in page


def test_a_slow_implementation_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entry, "SLOWEST_CALL", 0)
    content = run(tmp_path, monkeypatch, [peer_case()])
    assert content["rows"] == []
    (skipped,) = content["skipped"]
    assert skipped["impl"] == "peer" and "TooSlow: one call takes" in skipped["reason"]


@needs_gpu
def test_a_run_of_layers_and_models_on_the_gpu(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    changes = {"dtype": "bfloat16", "timing": "events"}
    growth = layer_case(table="layer_growth", shape={**LAYER, "k": 3}, **changes)
    model = model_case(impls=("omni_moe", "dense"), **changes)
    cases = [layer_case(**changes), peer_case(**changes), growth, model]
    content = run(tmp_path, monkeypatch, cases, "--device", "cuda", "--limit-seconds", "600")
    assert not content["skipped"] and len(content["rows"]) == 3 + 1 + 3 + 2
    for row in content["rows"]:
        assert 0 < row["us_min"] <= row["us"] and row["peak_mib"] > 0
        if row["impl"] in ("omni_moe", "dense_masked") and row["op"] == "layer":
            assert row["rel_err"] < 0.02  # eager rounds before it chooses experts


def synthetic_rows() -> list[dict]:
    """A row for every case of the layer's tables, with times that no device has."""
    rows = []
    for case in cases_for("cuda"):
        if case.table in ("layer_paper", "layer_growth"):
            size = case.shape["tokens"] * case.shape["k"]
            rows += [
                results.row_of(case, impl) | {"us": size * (1 + i), "peak_mib": size / (1 + i)}
                for i, impl in enumerate(case.impls)
            ]
    return rows


def test_the_paper_s_figure_has_a_line_for_each_method():
    rows = synthetic_rows()
    figure = layer_plots.paper(rows, "a device")
    panels = [axes for axes in figure.axes if axes.get_lines()]
    assert len(panels) == 2 * len(PAPER_K)
    for axes in panels:
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [5] * 4
    top_right = figure.axes[len(PAPER_K) - 1]
    assert top_right.get_title() == f"K {PAPER_K[-1]}; PEER: K {PEER_K[-1]}"
    by_label = {line.get_label(): line for line in top_right.get_lines()}
    peer = by_label[layer_plots.STYLES["peer"][0]]
    assert list(peer.get_xdata()) == [1024, 2048, 4096, 8192, 16384]
    assert peer.get_ydata()[0] == pytest.approx(1024 * PEER_K[-1] / 1e3)
    ours = by_label["this library"]
    assert ours.get_ydata()[-1] == pytest.approx(16384 * PAPER_K[-1] / 1e3)


def test_the_figure_of_growth_has_both_panels():
    rows = synthetic_rows()
    left, right = layer_plots.growth(rows, "a device").axes
    for axes, sizes in (
        (left, [8, 32, 128, *PAPER_K]),
        (right, [side**2 for side in (64, 128, 256, 320, 512, 1024)]),
    ):
        assert [list(line.get_xdata()) for line in axes.get_lines()] == [sizes] * 3
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels == ["64²", "128²", "256²", "320²", "512²", "1024²"]


def test_figures_of_layers_need_their_rows():
    case = layer_case(op="mlp", table="mlp")
    rows = [results.row_of(case, "omni_moe") | {"us": 1.0, "peak_mib": 1.0}]
    assert layer_plots.paper(rows, "") is None and layer_plots.growth(rows, "") is None
    # A method that was left out somewhere has fewer points.
    rows = [row for row in synthetic_rows() if row["impl"] != "eager" or row["shape"]["k"] != 4096]
    assert [len(axes.get_lines()) for axes in layer_plots.paper(rows, "").axes[:4]] == [4, 4, 4, 3]


def test_copies_that_fit_are_not_cut():
    """The sweep's cases of up to 2^22 pairs go in one piece, as do all dense ones of its grid."""
    for case in cases_for("cuda"):
        if case.table == "layer_paper" and case.op == "layer":
            shape = case.shape
            problem = problems.Problem(
                case, {"hidden_states": torch.empty(1, dtype=torch.bfloat16)}, torch.empty(0)
            )
            chunk = peers._chunk(problem, shape["k"] * shape["hidden"])
            assert chunk == min(shape["tokens"], 2**22 // shape["k"])
            assert peers._chunk(problem, shape["experts"]) == shape["tokens"]

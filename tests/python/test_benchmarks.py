"""The benchmark harness on small CPU cases: every op, the record, the report, the loaders."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import needs_gpu

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import __main__ as entry
from benchmarks import floors, memory, peers, problems, report, results, timing, upstream
from benchmarks.cases import Case, cases_for

CPU = torch.device("cpu")
SIZES = {
    "expert": {"tokens": 37, "hidden": 24, "experts": 36, "k": 3},
    "router": {"tokens": 37, "rows": 6, "cols": 6, "k": 4},
    "mlp": {"tokens": 37, "hidden": 24, "intermediate": 40},
    "layer": {
        "tokens": 37, "hidden": 24, "intermediate": 40, "experts": 36, "rows": 6, "cols": 6, "k": 3,
    },
    "topk_router": {"tokens": 37, "experts": 32, "k": 4, "groups": 8, "topk_groups": 3},
    "permute": {"tokens": 37, "hidden": 24, "experts": 12, "k": 3},
    "moe": {"tokens": 37, "hidden": 24, "intermediate": 40, "experts": 12, "k": 3},
}  # fmt: skip


def small_case(op: str, pass_name: str = "forward", **changes) -> Case:
    case = Case(
        table=f"cpu_{op}", op=op, pass_name=pass_name, shape=SIZES[op], dtype="float32",
        timing="wall", ids="uniform" if op == "expert" else None, impls=("omni_moe", "eager"),
    )  # fmt: skip
    return replace(case, **changes)


@pytest.mark.parametrize("pass_name", ["forward", "forward_backward"])
@pytest.mark.parametrize("op", SIZES)
def test_implementations_agree_with_the_oracle(op, pass_name):
    problem = problems.make_problem(small_case(op, pass_name), CPU)
    for impl in ("omni_moe", "eager"):
        workload = peers.build(impl, problem)
        output = workload.run()
        assert len(output) == 1 + len(workload.leaves)
        assert (len(output) > 1) == (pass_name == "forward_backward")
        assert problems.relative_error(problem, output) < 1e-5


def test_dense_masked_is_the_expert_op():
    problem = problems.make_problem(small_case("expert", "forward_backward"), CPU)
    assert problems.relative_error(problem, peers.build("dense_masked", problem).run()) < 1e-5


def test_relative_error_sees_a_wrong_weight_gradient(monkeypatch):
    monkeypatch.setattr(problems, "ORACLE_ELEMENTS", 1000)  # a sample of the tokens
    problem = problems.make_problem(small_case("expert", "forward_backward"), CPU)
    output, hidden, up, down, routing = peers.build("omni_moe", problem).run()
    assert problems.relative_error(problem, [output, hidden, up, down, routing]) < 1e-5
    assert problems.relative_error(problem, [output, hidden, 1.1 * up, down, routing]) > 0.05
    assert problems.relative_error(problem, [output, hidden, up, down.zero_(), routing]) == 1


def test_redrawn_problems_share_their_tables():
    case = small_case("expert")
    first = problems.make_problem(case, CPU)
    second = problems.make_problem(case, CPU, 1, first)
    assert second.tensors["up_weights"] is first.tensors["up_weights"]
    assert not second.tensors["indices"].equal(first.tensors["indices"])


def test_router_ids_are_a_grid_top_k():
    shape = {**SIZES["expert"], "rows": 6, "cols": 6}
    problem = problems.make_problem(small_case("expert", ids="router", shape=shape), CPU)
    indices = problem.tensors["indices_long"]
    assert all(len(row.unique()) == 3 for row in indices)
    assert 0 <= indices.min() and indices.max() < 36


def test_peak_memory_sees_workspaces_and_separates_results():
    def call():
        scratch = torch.empty(2 * memory.MIB, dtype=torch.uint8)
        result = torch.empty(3 * memory.MIB, dtype=torch.uint8)
        del scratch
        later = torch.empty(memory.MIB, dtype=torch.uint8)
        del later
        return [result]

    call()
    peak = memory.peak_memory(call, CPU)
    assert peak.peak_mib == pytest.approx(5, abs=0.01)
    assert peak.without_results_mib == pytest.approx(2, abs=0.01)


def test_measure_alternates():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    timings = timing.measure(samplers, seconds_each=10, repetitions=(3, 4))
    assert "".join(order) == "ab" + "ab" * 4
    assert timings["a"] == timing.Timing(1.0, 1.0, 1.0, 4)


def test_floors_of_the_documented_shapes():
    def expert(tokens, experts, k, pass_name="forward"):
        shape = {"tokens": tokens, "hidden": 1024, "experts": experts, "k": k}
        case = small_case("expert", pass_name, shape=shape, dtype="bfloat16")
        ids = torch.randint(experts, (tokens, k), generator=torch.Generator().manual_seed(0))
        microseconds = {n: s * 1e6 for n, s in floors.expert_floors(case, ids, 2, H200).items()}
        name = floors.binding(case, microseconds)
        return name, round(microseconds[name])

    H200 = floors.H200
    assert expert(1024, 4096, 32) == ("l2_gather", 16)
    assert expert(4096, 65536, 16) == ("hbm", 44)
    assert expert(4096, 65536, 16, "forward_backward") == ("hbm", 151)


def test_floor_of_bands_counts_rows_columns_and_tail():
    shape = {"tokens": 2, "hidden": 8, "experts": 16, "rows": 4, "cols": 4, "k": 4}
    # A row of three and one left; a column of three and one left.
    ids = torch.tensor([[4, 6, 7, 9], [1, 5, 13, 8]])
    seconds = floors.expert_floors(small_case("expert", shape=shape), ids, 2, floors.H200)
    products = 4 * (4 + 4) * 8 / floors.H200.bf16_flops
    tail = 2 * 2 * 8 * 2 / floors.H200.l2_gather_bytes
    assert seconds["bands"] == pytest.approx(products + tail)


@pytest.mark.parametrize("pass_name", ["forward", "forward_backward"])
@pytest.mark.parametrize("op", SIZES)
def test_every_op_has_a_floor(op, pass_name):
    case = small_case(op, pass_name)
    known = floors.floors(problems.make_problem(case, CPU), floors.H200)
    assert known[floors.binding(case, known)] > 0


def test_every_case_is_well_formed():
    for device_type in ("cpu", "cuda"):
        cases = cases_for(device_type)
        keys = [results._key(results.row_of(case, "x")) for case in cases]
        assert len(set(keys)) == len(keys)
        assert any(case.quick for case in cases)
        for case in cases:
            assert set(case.impls or ()) <= set(peers.names())
            assert case.table in report.TITLES
            assert (case.timing == "wall") == (device_type == "cpu")
            if "rows" in case.shape and "experts" in case.shape:
                assert case.shape["rows"] * case.shape["cols"] == case.shape["experts"]


def test_a_run_writes_record_report_and_plots(tmp_path, monkeypatch, capsys):
    cases = [small_case("expert", p, quick=True) for p in ("forward", "forward_backward")]
    sweep = small_case("expert", table="cpu_sweep", shape={**SIZES["expert"], "k": 5})
    cases += [small_case("router", table="cpu_router"), small_case("layer"), sweep]
    for module in (entry, report):
        monkeypatch.setattr(module, "cases_for", lambda _: cases)
    monkeypatch.setattr(report, "REPORT", tmp_path / "benchmarks.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PLOT_DIRECTORY", tmp_path / "plots")
    monkeypatch.setattr(upstream, "set_path", lambda _: None)
    run = ["--device", "cpu", "--seconds", "0.01", "--results", str(tmp_path / "results")]
    threads = torch.get_num_threads()
    try:
        assert entry.main([*run, "--impl", "omni_moe", "eager", "upstream_triton"]) == 0
        assert entry.main([*run, "--op", "expert", "--quick"]) == 0
    finally:
        torch.set_num_threads(threads)

    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert content["header"]["device_type"] == "cpu"
    assert len(content["rows"]) == 2 * len(cases)
    assert {row["impl"] for row in content["skipped"]} == {"upstream_triton"}
    for row in content["rows"]:
        assert row["us_min"] <= row["us"] <= row["us_max"]
        assert row["rel_err"] < 1e-5 and row["floor_us"] is None
        assert row["peak_mib_without_results"] <= row["peak_mib"]
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| expert forward + backward, T37 H24 E36 K3, float32 |" in page
    assert page.count(report.BEGIN) == page.count(report.END) == 1
    assert list((tmp_path / "plots").glob("*-sweep.svg"))


@needs_gpu
def test_a_run_on_the_gpu(tmp_path, monkeypatch):
    cases = [
        small_case(op, pass_name, timing="events", dtype="bfloat16", table=op)
        for op in SIZES
        for pass_name in ("forward", "forward_backward")
    ]
    # A graph cannot hold the eager mixture of experts, whose loop waits for the device.
    graphs = [case for case in cases[::2] if case.op != "moe"]
    decode = [replace(case, timing="graph", table="decode") for case in graphs]
    monkeypatch.setattr(entry, "cases_for", lambda _: [*cases, *decode])
    monkeypatch.setattr(upstream, "set_path", lambda _: None)
    run = ["--device", "cuda", "--seconds", "0.01", "--no-report", "--results", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert entry.main(run) == 0
    finally:
        torch.set_num_threads(threads)
    (record,) = results.load_all(tmp_path)
    assert record.header["device_type"] == "cuda" and not record.skipped
    assert len(record.rows) == 2 * (len(cases) + len(decode))
    for row in record.rows:
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert row["peak_mib"] > 0
        if row["impl"] == "omni_moe":
            assert row["rel_err"] < 0.02


def test_a_record_is_of_one_source(tmp_path, monkeypatch, capsys):
    case = small_case("expert")
    row = results.row_of(case, "omni_moe") | {"us": 1.0}
    record = results.open_record(CPU, tmp_path)
    record.add(row)
    record.save()
    again = results.open_record(CPU, tmp_path)
    assert again.rows == [row]
    again.add(row | {"us": 2.0})
    again.add(row | {"impl": "eager"})
    assert [(r["impl"], r["us"]) for r in again.rows] == [("omni_moe", 2.0), ("eager", 1.0)]
    monkeypatch.setattr(results, "source_hash", lambda: "another")
    assert results.open_record(CPU, tmp_path).rows == []
    assert "starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changes_numbers"),
    [
        ("csrc/include/omni_moe/expert.h", True),
        ("csrc/cpu/include/vec.h", True),
        ("csrc/cuda/common/tuning.cuh", True),
        ("omni_moe/modules/layer.py", True),
        ("CMakeLists.txt", True),
        ("cmake/ChooseCuda.cmake", True),
        ("setup.py", True),
        ("benchmarks/timing.py", True),
        ("benchmarks/a_new_module.py", True),
        ("benchmarks/cases.py", False),
        ("benchmarks/report.py", False),
        ("benchmarks/results/cpu.json", False),
        ("omni_moe/include/omni_moe/expert.h", False),
        ("omni_moe/lib/libomni_moe.so", False),
        ("docs/benchmarks.md", False),
    ],
)
def test_the_source_hash_covers_what_changes_the_numbers(
    tmp_path, monkeypatch, file, changes_numbers
):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("CMakeLists.txt", "setup.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    before = results.source_hash()
    (tmp_path / file).write_text("after")
    assert (results.source_hash() != before) == changes_numbers


def test_the_source_hash_finds_its_files():
    """Each part that is named has files in this tree, and each module left out is one."""
    found = list(results._source_files())
    for name in results.SOURCES:
        assert any(path.is_relative_to(results.ROOT / name) for path in found), name
    for name in results._OTHERS:
        assert name == "omni_moe/include" or (results.ROOT / name).is_file(), name


def test_outcomes_of_tests_are_no_records(tmp_path):
    record = results.open_record(CPU, tmp_path)
    record.save()
    (tmp_path / f"{record.path.stem}_tests.json").write_text('{"suites": {}}')
    assert [found.path for found in results.load_all(tmp_path)] == [record.path]


def test_a_run_out_of_time_keeps_what_it_has(tmp_path, monkeypatch):
    cases = [small_case("expert"), small_case("router", table="cpu_router")]
    monkeypatch.setattr(entry, "cases_for", lambda _: cases)
    monkeypatch.setattr(upstream, "set_path", lambda _: None)
    threads = torch.get_num_threads()
    run = ["--device", "cpu", "--seconds", "0.01", "--no-report", "--results", str(tmp_path)]
    try:
        assert entry.main([*run, "--stop-after", "1e-9"]) == 0
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(entry.time, "monotonic", iter(range(100)).__next__)
        assert entry.main([*run, "--stop-after", "3", "--impl", "omni_moe"]) == 0
    finally:
        torch.set_num_threads(threads)
    (record,) = results.load_all(tmp_path)
    assert [row["op"] for row in record.rows] == ["expert"]


def test_reports_replace_only_the_text_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.replace(page, "new")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match="markers"):
        report.replace(page, "new")


def test_upstream_is_loaded_beside_this_package(tmp_path, monkeypatch):
    package = tmp_path / "omni_moe" / "ops" / "triton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not run')\n")
    (package / "utils.py").write_text("SCALE = 2\n")
    (package / "omni_mlp.py").write_text(
        "from . import utils\n"
        "class TritonSwiGLUFunc:\n"
        "    apply = staticmethod(lambda gate, up: utils.SCALE * gate * up)\n"
    )
    (package / "omni_router.py").write_text("import a_package_that_does_not_exist\n")
    with pytest.raises(upstream.NotApplicable, match="no checkout"):
        upstream.mlp()
    monkeypatch.setitem(upstream.sys.modules, upstream._PACKAGE, None)  # restored at the end
    upstream.set_path(tmp_path)
    eye = torch.eye(2)
    assert upstream.mlp()(torch.ones(1, 2), eye, eye, eye).tolist() == [[2.0, 2.0]]
    with pytest.raises(upstream.NotApplicable, match="does not import"):
        upstream.softmax_router(small_case("router"))
    with pytest.raises(FileNotFoundError, match="--upstream"):
        upstream.set_path(tmp_path / "nothing")


def test_published_kernels_are_compiled_before_they_are_tuned():
    pytest.importorskip("triton")
    log = []

    class Tuner:
        """What of Triton's Autotuner matters here."""

        keys, arg_names = ["size"], ["x", "size"]

        def warmup(self, *args, grid, **kwargs):
            log.append(("warmup", args, kwargs))

        def run(self, *args, grid, warmup, **kwargs):
            log.append(("run", args, kwargs))
            return "kernel"

    tuner = Tuner()
    upstream._tune_faster(tuner)
    for size in (8, 8, 16):
        assert tuner.run("x", size, grid=(1,), warmup=False, flag=True) == "kernel"
    assert [(name, args[1]) for name, args, _ in log] == [
        ("warmup", 8), ("run", 8), ("run", 8), ("warmup", 16), ("run", 16),
    ]  # fmt: skip
    assert all(kwargs == {"flag": True} for _, _, kwargs in log)

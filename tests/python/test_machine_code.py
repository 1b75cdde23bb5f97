"""Hashes of the built kernels, and what they say of the benchmarks' records."""

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import omni_moe
from benchmarks import check_records, machine_code, results

KERNELS = {"place_pairs_kernel": "01234567", "weight_grad_kernel": "89abcdef"}
RECORDED = {"architecture": "sm_90", "kernels": KERNELS}


@pytest.fixture
def cubins(tmp_path) -> list[Path]:
    """Copies of the library's cubins of sm_90."""
    if not omni_moe.build_info()["cuda_version"]:
        pytest.skip("the library was built without CUDA")
    try:
        with machine_code.extract_cubins(machine_code.LIBRARY, "sm_90") as found:
            for cubin in found:
                (tmp_path / cubin.name).write_bytes(cubin.read_bytes())
    except machine_code.ToolMissing as missing:
        pytest.skip(str(missing))
    if not found:
        pytest.skip("the library has no code of sm_90")
    return sorted(tmp_path.glob("*.cubin"))


def serve(monkeypatch, cubins: list[Path]) -> None:
    @contextmanager
    def extract(library, architecture):
        yield cubins

    monkeypatch.setattr(machine_code, "extract_cubins", extract)


def test_names_of_functions():
    anonymous = "_ZN8omni_moe4cuda44_GLOBAL__N__8f4e4780_11_schedule_cu_718f98bc"
    assert machine_code.function_name(anonymous + "18place_pairs_kernelEPKvl") == (
        "place_pairs_kernel"
    )
    scopes, arguments = "_ZN8omni_moe4cuda", "I13__nv_bfloat16NS0_12L2TileTuningILi256EEEEEvPKf"
    templated = f"{scopes}26expert_l2_tiled_sum_kernel{arguments}"
    assert machine_code.function_name(templated) == "expert_l2_tiled_sum_kernel"
    assert machine_code.function_name("_Z3addPf") == "add"
    assert machine_code.function_name("plain") == "plain"


def test_a_changed_instruction_changes_the_hash_of_its_kernel_alone(cubins, monkeypatch):
    before = machine_code.fingerprint(machine_code.LIBRARY, "sm_90")
    assert {"place_pairs_kernel", "weight_grad_kernel", "batch_norm_forward_kernel"} <= set(before)
    serve(monkeypatch, cubins)
    assert machine_code.fingerprint(machine_code.LIBRARY, "sm_90") == before
    for cubin in cubins:
        content = cubin.read_bytes()
        for name, (size, code) in machine_code._sections(content):
            if name.startswith(".text.") and "place_pairs_kernel" in name:
                at = content.index(code)
                assert content.count(code) == 1 and size == len(code)
                changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
                cubin.write_bytes(changed)
    after = machine_code.fingerprint(machine_code.LIBRARY, "sm_90")
    assert {name for name in before if before[name] != after[name]} == {"place_pairs_kernel"}


def test_names_of_files_are_not_part_of_a_hash(cubins, monkeypatch):
    before = machine_code.fingerprint(machine_code.LIBRARY, "sm_90")
    assert any(b"_GLOBAL__N__" in cubin.read_bytes() for cubin in cubins)
    for cubin in cubins:
        # The anonymous namespace of a file of another path, of as many letters.
        cubin.write_bytes(cubin.read_bytes().replace(b"_GLOBAL__N__", b"_GLOBAL__N_x"))
    serve(monkeypatch, cubins)
    assert machine_code.fingerprint(machine_code.LIBRARY, "sm_90") == before


def test_a_device_runs_code_of_its_own_generation(monkeypatch):
    listing = "1: libomni_moe.1.sm_80.cubin\n2: lib.2.sm_86.cubin\n3: lib.3.sm_90a.cubin"
    monkeypatch.setattr(machine_code, "_cuobjdump", lambda options, library: listing)
    expected = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90"}
    expected |= {(7, 5): None, (10, 0): None}
    for capability, architecture in expected.items():
        assert machine_code.architecture_for(capability, Path("lib")) == architecture


def test_tools_are_found_in_path_first(tmp_path, monkeypatch):
    for folder in ("path", "cuda/bin"):
        (tmp_path / folder).mkdir(parents=True)
        tool = tmp_path / folder / "cuobjdump"
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert machine_code.find_tool("cuobjdump") == tmp_path / "path" / "cuobjdump"
    monkeypatch.setenv("PATH", "")
    assert machine_code.find_tool("cuobjdump") == tmp_path / "cuda" / "bin" / "cuobjdump"
    with pytest.raises(machine_code.ToolMissing, match="no such_a_tool in PATH"):
        machine_code.find_tool("such_a_tool")


def test_the_header_of_a_record(monkeypatch, capsys):
    assert results.machine_code_of(torch.device("cpu")) is None
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine_code, "fingerprint", lambda library, architecture: KERNELS)
    monkeypatch.setattr(machine_code, "architecture_for", lambda capability, library: "sm_90")
    assert results.machine_code_of(gpu) == RECORDED
    monkeypatch.setattr(machine_code, "architecture_for", lambda capability, library: None)
    assert results.machine_code_of(gpu) is None
    assert capsys.readouterr().err == ""

    def no_tool(*_):
        raise machine_code.ToolMissing("no cuobjdump")

    monkeypatch.setattr(machine_code, "architecture_for", no_tool)
    assert results.machine_code_of(gpu) is None
    assert "without machine code: no cuobjdump" in capsys.readouterr().err


def line_for(header, built, directory, monkeypatch, capsys) -> tuple[str, int]:
    """What the command prints of a record, and its exit code with --strict."""
    (directory / "gpu.json").write_text(json.dumps({"header": header}))
    monkeypatch.setattr(results, "source_hash", lambda: "now")
    monkeypatch.setattr(machine_code, "fingerprint", lambda library, architecture: built)
    monkeypatch.setattr(check_records, "_library_is_older_than_kernels", lambda library: False)
    assert check_records.main(["--results", str(directory)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    status = check_records.main(["--results", str(directory), "--strict"])
    capsys.readouterr()
    return line.removeprefix("gpu.json: "), status


def test_what_is_said_of_a_record(tmp_path, monkeypatch, capsys):
    def said_of(source, recorded, built=KERNELS):
        header = {"source": source, "machine_code": recorded}
        return line_for(header, built, tmp_path, monkeypatch, capsys)

    assert said_of("now", RECORDED) == ("of this source", 0)
    assert said_of("then", RECORDED) == (
        "other source, same machine code; 2 kernels of sm_90; host code or measurement may differ",
        0,
    )
    changed = {**KERNELS, "weight_grad_kernel": "00000000", "new_kernel": "11111111"}
    assert said_of("then", RECORDED, changed) == (
        "older; kernels changed: new_kernel, weight_grad_kernel",
        1,
    )
    many = {f"kernel_{i}": "0" for i in range(4)}
    assert said_of("then", RECORDED, many)[0].endswith("kernel_3, place_pairs_kernel and 1 more")
    for recorded, built, reason in (
        (None, KERNELS, "the record has no machine code to compare"),
        (RECORDED, {}, "the library built here has no code of sm_90"),
    ):
        assert said_of("then", recorded, built) == (f"other source; {reason}", 1)


def test_records_of_tests_and_of_earlier_formats_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "source_hash", lambda: "now")
    (tmp_path / "gpu_tests.json").write_text('{"source": "now", "suites": {}}')
    (tmp_path / "old.json").write_text('{"header": {"source": "then"}, "rows": []}')
    assert check_records.main(["--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0] == "gpu_tests.json: of this source"
    assert lines[1] == "old.json: other source; the record has no machine code to compare"


def test_without_a_tool_nothing_is_compared(monkeypatch):
    def no_tool(*_):
        raise machine_code.ToolMissing("no cuobjdump")

    monkeypatch.setattr(machine_code, "fingerprint", no_tool)
    header = {"source": "then", "machine_code": RECORDED}
    state, details = check_records.judge(header, machine_code.LIBRARY)
    assert state is check_records.State.UNKNOWN and details.endswith("no cuobjdump")


def test_files_changed_since_a_record_was_committed(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    try:
        git("init")
    except OSError:
        pytest.skip("no git")
    record = tmp_path / "gpu.json"
    for name in ("csrc/a.cu", "omni_moe/b.py", "csrc/c.md", "gpu.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert check_records.files_changed_since(record) == []  # was never committed
    git("add", ".")
    git("commit", "-m", "one")
    assert check_records.files_changed_since(record) == []
    (tmp_path / "csrc/a.cu").write_text("2")
    (tmp_path / "csrc/c.md").write_text("2")
    git("commit", "-am", "two")
    (tmp_path / "omni_moe/b.py").write_text("2")  # is not committed
    assert check_records.files_changed_since(record) == ["csrc/a.cu", "omni_moe/b.py"]
    record.write_text("2")
    assert check_records.files_changed_since(record) == []  # is newer than its commit


def test_a_library_older_than_the_kernels_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "csrc").mkdir()
    source, library = tmp_path / "csrc" / "a.cu", tmp_path / "lib.so"
    for path in (source, library):
        path.write_text("")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(machine_code, "LIBRARY", library)
    for age, told in ((-10, False), (10, True)):
        os.utime(source, (library.stat().st_mtime + age,) * 2)
        assert check_records.main(["--results", str(tmp_path)]) == 0
        assert ("is older than csrc/" in capsys.readouterr().out) == told

"""The record of a device, benchmarks/results/<device>.json: a header, a row per measurement."""

import datetime
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import omni_moe
from benchmarks import machine_code
from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "benchmarks" / "results"

# What changes the numbers: the library, how it is built, and how it is measured.
SOURCES = ("csrc", "omni_moe", "benchmarks", "cmake", "CMakeLists.txt", "setup.py")
_SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".cmake", ".txt"}
# What does not: copies that the build installs, and modules that list cases (a row says what its
# case was), keep records or show them.
_OTHERS = (
    "omni_moe/include",
    *(f"benchmarks/{name}.py" for name in ("cases", "results", "record_tests", "report", "plots")),
    *(f"benchmarks/{name}.py" for name in ("check_records", "machine_code", "layer_plots")),
    *(f"benchmarks/{name}.py" for name in ("crossover_report", "staircase")),
)

# What follows a device in the name of a record of another kind: of benchmarks.crossover.
CROSSOVER = "_crossover"

Row = dict[str, Any]


@dataclass
class Record:
    """What was measured on one device with one source, whose hash is in the header.

    A new measurement replaces the row of its case and impl; the header describes the last run.
    """

    path: Path
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows = [r for r in self.rows if _key(r) != _key(row)] + [row]
        self.skipped = [r for r in self.skipped if _key(r) != _key(row)]

    def skip(self, row: Row) -> None:
        """Records why a case has no row, unless an earlier run left one."""
        self.skipped = [r for r in self.skipped if _key(r) != _key(row)]
        if all(_key(r) != _key(row) for r in self.rows):
            self.skipped.append(row)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = [f'"header": {json.dumps(self.header, indent=1)}']
        for name in ("rows", "skipped"):
            lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in getattr(self, name))
            parts.append(f'"{name}": [\n  {lines}\n ]' if lines else f'"{name}": []')
        self.path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


def load(path: Path) -> Record:
    content = json.loads(path.read_text())
    return Record(path, content["header"], content["rows"], content["skipped"])


def load_all(directory: Path) -> list[Record]:
    """All records `<device>.json` of a directory.

    Those of `benchmarks.crossover` and the outcomes of tests have more behind an underscore.
    """
    paths = sorted(directory.glob("*.json"))
    return [load(path) for path in paths if "_" not in path.stem]


def open_record(device: torch.device, directory: Path = DIRECTORY, kind: str = "") -> Record:
    """The record of this device with a new header: what was measured with this source is kept."""
    path = directory / f"{slug(device)}{kind}.json"
    header = {
        "device": device_name(device),
        "device_type": device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # what else ran, before the first case
        "cpu_capability": omni_moe.build_info()["cpu_capability"],
        "source": source_hash(),
        "machine_code": machine_code_of(device),
    }
    record = Record(path, header)
    if path.exists():
        earlier = load(path)
        if all(earlier.header[name] == header[name] for name in ("source", "torch")):
            record.rows, record.skipped = earlier.rows, earlier.skipped
        else:
            print(f"{path}: starts anew, it is of another source or torch", file=sys.stderr)
    return record


def row_of(case: Case, impl: str) -> Row:
    """The part of a row that says what was measured."""
    return {
        "op": case.op,
        "pass": case.pass_name,
        "shape": dict(case.shape),
        "ids": case.ids,
        "dtype": case.dtype,
        "timing": case.timing,
        "impl": impl,
        "table": case.table,
    }


def _key(row: Row) -> tuple:
    shape = tuple(sorted(row["shape"].items()))
    return shape, *(row[name] for name in ("op", "pass", "ids", "dtype", "timing", "impl"))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    return model.group(1).strip() if model else "unknown processor"


def slug(device: torch.device) -> str:
    name = device_name(device) if device.type == "cuda" else f"cpu {device_name(device)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def source_hash() -> str:
    """Fingerprint of what changes the numbers."""
    digest = hashlib.sha256()
    for path in sorted(_source_files()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _source_files() -> Iterator[Path]:
    for name in SOURCES:
        path = ROOT / name
        for file in path.rglob("*") if path.is_dir() else [path]:
            if is_source(file):
                yield file


def is_source(file: Path) -> bool:
    """Whether a file of `SOURCES` counts."""
    is_other = any(file.is_relative_to(ROOT / other) for other in _OTHERS)
    return file.suffix in _SOURCE_SUFFIXES and not is_other


def machine_code_of(device: torch.device) -> dict[str, Any] | None:
    """Fingerprint of the kernels that run on a GPU; None on a CPU, or where there is none to take.

    Keys: ``architecture`` of the code, ``kernels`` (name -> hash over its instances).
    """
    if device.type != "cuda":
        return None
    library = machine_code.LIBRARY
    try:
        architecture = machine_code.architecture_for(
            torch.cuda.get_device_capability(device), library
        )
        if architecture is None:
            return None
        kernels = machine_code.fingerprint(library, architecture)
    except machine_code.ToolMissing as missing:
        print(f"the record is without machine code: {missing}", file=sys.stderr)
        return None
    return {"architecture": architecture, "kernels": kernels}


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""

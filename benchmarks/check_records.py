"""Says of each record in benchmarks/results whether it is of the source and the kernels built here.

    python -m benchmarks.check_records [--strict]

A record of another source still tells the kernels' speed and results if the built library has the
same machine code; host code or the way of measuring may differ. The exit status is 0; under
--strict it is 1 if a record has neither this source nor this machine code.
"""

import argparse
import json
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks import machine_code, results

SHOWN = 5  # names in a line


class State(Enum):
    THIS_SOURCE = "of this source"
    SAME_CODE = "other source, same machine code"
    OTHER_CODE = "older"
    UNKNOWN = "other source"


def judge(header: dict[str, Any], library: Path) -> tuple[State, str]:
    """The state of a record, and the details to print behind it."""
    if header["source"] == results.source_hash():
        return State.THIS_SOURCE, ""
    recorded = header.get("machine_code")
    if not recorded:
        return State.UNKNOWN, "the record has no machine code to compare"
    architecture = recorded["architecture"]
    try:
        built = machine_code.fingerprint(library, architecture)
    except machine_code.ToolMissing as missing:
        return State.UNKNOWN, f"machine code is not compared: {missing}"
    if not built:
        return State.UNKNOWN, f"the library built here has no code of {architecture}"
    kernels = recorded["kernels"]
    changed = sorted(k for k in kernels.keys() | built.keys() if kernels.get(k) != built.get(k))
    if changed:
        return State.OTHER_CODE, f"kernels changed: {_some(changed)}"
    return (
        State.SAME_CODE,
        f"{len(built)} kernels of {architecture}; host code or measurement may differ",
    )


def files_changed_since(path: Path) -> list[str]:
    """Source files that git knows to have changed since the record was committed.

    The source that was measured can be older than that commit.
    """
    name = str(path.resolve())
    if not (commit := _git("log", "-1", "--format=%H", "--", name)):
        return []
    if _git("status", "--porcelain", "--", name):  # the record is newer than its commit
        return []
    changed = _git("diff", "--name-only", commit[0], "--", *results.SOURCES)
    return [name for name in changed if results.is_source(results.ROOT / name)]


def _git(*arguments: str) -> list[str]:
    """Lines of a command's output; none where there is no git or no repository."""
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=results.ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return run.stdout.splitlines()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _library_is_older_than_kernels(library: Path) -> bool:
    sources = (path for path in (results.ROOT / "csrc").rglob("*") if path.is_file())
    return any(path.stat().st_mtime > library.stat().st_mtime for path in sources)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strict", action="store_true", help="fail if a record is out of date")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, metavar="DIRECTORY")
    args = parser.parse_args(argv)
    library = machine_code.LIBRARY
    if _library_is_older_than_kernels(library):
        print(f"{library} is older than csrc/: its machine code is of an earlier source")
    states = set()
    for path in sorted(args.results.glob("*.json")):
        content = json.loads(path.read_text())
        state, details = judge(content.get("header", content), library)
        parts = [f"{path.name}: {state.value}", details]
        if state is State.SAME_CODE and (files := files_changed_since(path)):
            parts.append(f"files changed since it was committed: {_some(files)}")
        print("; ".join(filter(None, parts)))
        states.add(state)
    out_of_date = states & {State.OTHER_CODE, State.UNKNOWN}
    return int(args.strict and bool(out_of_date))


if __name__ == "__main__":
    sys.exit(main())

"""Runs the pytest and GoogleTest suites and records the outcome for this machine's device.

    python -m benchmarks.record_tests [--gtest PROGRAM ...] [pytest arguments]

Writes benchmarks/results/<device>_tests.json: header (device, torch, CUDA, date, hashes of source
and machine code) and, per suite, counts, failures and seconds. Exits with 1 if a test failed.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import results


def run_suites(commands: Mapping[str, list[str]], folder: Path) -> dict[str, dict]:
    """Runs suites side by side, each with a JUnit report, and returns their counts."""
    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        runs = {
            name: pool.submit(run_suite, command, folder / f"{name}.xml")
            for name, command in commands.items()
        }
        return {name: run.result() for name, run in runs.items()}


def run_suite(command: list[str], report: Path) -> dict:
    start = time.perf_counter()
    status = subprocess.run(command, check=False).returncode
    seconds = round(time.perf_counter() - start, 1)
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{c.get('classname')}.{c.get('name')}" for c in failed],
        "exit_status": status,
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gtest", nargs="*", default=[], type=Path, help="GoogleTest programs")
    args, pytest_arguments = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = {
            program.name: [
                str(program.resolve()),
                f"--gtest_output=xml:{folder / program.name}.xml",
                "--gtest_brief=1",
            ]
            for program in args.gtest
        }
        pytest = [sys.executable, "-m", "pytest", f"--junitxml={folder}/pytest.xml"]
        # The programs spend their time in oracles, on one core each.
        suites = run_suites(programs | {"pytest": [*pytest, *pytest_arguments]}, folder)

    record = {
        "device": results.device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "source": results.source_hash(),
        "machine_code": results.machine_code_of(device),
        "suites": suites,
    }
    path = results.DIRECTORY / f"{results.slug(device)}_tests.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path.read_text())
    return int(any(suite["exit_status"] for suite in suites.values()))


if __name__ == "__main__":
    sys.exit(main())

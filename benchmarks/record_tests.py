"""Runs the pytest and GoogleTest suites and records the outcome for this machine's device.

    python -m benchmarks.record_tests [--gtest PROGRAM ...] [pytest arguments]

Writes benchmarks/results/<device>_tests.json: header (device, torch, CUDA, date, source hash of
csrc/ and omni_moe/) and, per suite, counts, failures and seconds. Exits with 1 if a test failed.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks import results


def run_suite(command: list[str], report: Path) -> dict:
    """Runs one suite that writes a JUnit report, and returns its counts."""
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
    suites = {}
    with tempfile.TemporaryDirectory() as folder:
        for program in args.gtest:
            report = Path(folder) / f"{program.name}.xml"
            command = [str(program.resolve()), f"--gtest_output=xml:{report}", "--gtest_brief=1"]
            suites[program.name] = run_suite(command, report)
        report = Path(folder) / "pytest.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *pytest_arguments]
        suites["pytest"] = run_suite(command, report)

    record = {
        "device": results.device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "source": results.source_hash(),
        "suites": suites,
    }
    path = results.DIRECTORY / f"{results.slug(device)}_tests.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path.read_text())
    return int(any(suite["exit_status"] for suite in suites.values()))


if __name__ == "__main__":
    sys.exit(main())

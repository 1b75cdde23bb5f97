"""examples/train_lm.py with tiny sizes: its outputs, Ctrl-C, and a resumed run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_lm.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason=f"{SCRIPT} is not there")

NUM_STEPS = 150
SIZES = [
    *("--layers", "1", "--hidden", "16", "--head-size", "8", "--intermediate", "16"),
    *("--experts", "16", "--experts-per-token", "4", "--seq-len", "16", "--batch", "2"),
    *("--steps", str(NUM_STEPS), "--eval-every", "50", "--sample-bytes", "20", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Enough files that some are held out."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        lines = (f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(20))
        (root / f"module_{i}.py").write_text("\n".join(lines))
    return root


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *SIZES, "--data", str(corpus), "--out", str(out), *more]


def run_script(corpus: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(corpus, out, *more), capture_output=True, text=True, env=environment()
    )


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    done = run_script(corpus, out)
    assert done.returncode == 0, done.stderr
    return out


def test_outputs(whole_run):
    metrics = json.loads((whole_run / "metrics.json").read_text())
    for name in ("OmniMoE", "dense"):
        bits = metrics["train_bits_per_byte"][name]
        assert len(bits) == NUM_STEPS
        assert sum(bits[-10:]) < 0.8 * sum(bits[:10]), f"{name} does not learn"
        assert [step for step, _ in metrics["held_out_curve"][name]] == [50, 100, 150]
        assert metrics["held_out_bits_per_byte"][name] < 8
    assert all(0 < usage <= 1 for usage in metrics["expert_usage"])
    for plot in ("loss.png", "expert_usage.png"):
        assert (whole_run / plot).read_bytes().startswith(b"\x89PNG")


def test_interrupted_and_resumed(corpus, whole_run, tmp_path):
    """SIGINT leaves a checkpoint that loads; going on from it gives the uninterrupted run."""
    process = subprocess.Popen(
        command(corpus, tmp_path, "--checkpoint-every", "1000"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    progress = b""
    while b" 1/" not in progress and b"% " not in progress.replace(b"  0%", b""):
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, progress
        progress += chunk
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, stderr
    assert b"Continue with --resume" in stdout

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < NUM_STEPS
    assert not (tmp_path / "metrics.json").exists()

    done = run_script(corpus, tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    want = json.loads((whole_run / "metrics.json").read_text())
    got = json.loads((tmp_path / "metrics.json").read_text())
    for key in ("train_bits_per_byte", "held_out_curve"):
        for name in ("OmniMoE", "dense"):
            flat_got, flat_want = (torch.tensor(x[key][name]).flatten() for x in (got, want))
            torch.testing.assert_close(flat_got, flat_want, rtol=1e-5, atol=0)
    assert got["expert_usage"] == want["expert_usage"]


def test_resuming_with_other_settings_is_refused(corpus, whole_run):
    done = run_script(corpus, whole_run, "--resume", "--hidden", "32")
    assert done.returncode != 0
    assert "the checkpoint was made with hidden = 16, this run has 32" in done.stderr

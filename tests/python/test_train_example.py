"""examples/train_lm.py with tiny sizes: its outputs, Ctrl-C, and a resumed run."""

import fcntl
import json
import os
import runpy
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from helpers import environment

import omni_moe

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
    (out / "stdout").write_text(done.stdout)
    (out / "stderr").write_text(done.stderr)
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
    assert len(metrics["sample"]) > 0


def test_log_file(whole_run):
    """Where no terminal is, the losses are printed, and no bar at each step."""
    printed = (whole_run / "stdout").read_text()
    for step in (50, 100, 150):
        assert f"\nstep {step}: held-out bits per byte OmniMoE " in printed
    for stream in (printed, (whole_run / "stderr").read_text()):
        assert "step/s" not in stream and "\r" not in stream


def test_interrupted_and_resumed(corpus, whole_run, tmp_path):
    """SIGINT leaves a checkpoint that loads; going on from it gives the uninterrupted run."""
    terminal, errors = os.openpty()
    fcntl.ioctl(errors, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    process = subprocess.Popen(
        command(corpus, tmp_path, "--checkpoint-every", "1000"),
        stderr=errors,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    os.close(errors)
    progress = b""
    while b" 1/" not in progress and b"% " not in progress.replace(b"  0%", b""):
        chunk = os.read(terminal, 4096)
        assert chunk, progress
        progress += chunk
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    os.close(terminal)
    assert process.returncode == 128 + signal.SIGINT
    assert b"Continue with --resume" in stdout

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < NUM_STEPS
    assert not (tmp_path / "metrics.json").exists()

    done = run_script(corpus, tmp_path, "--resume", "--peak-tflops", "1e-3")
    assert done.returncode == 0, done.stderr
    want = json.loads((whole_run / "metrics.json").read_text())
    got = json.loads((tmp_path / "metrics.json").read_text())
    for key in ("train_bits_per_byte", "held_out_curve"):
        for name in ("OmniMoE", "dense"):
            flat_got, flat_want = (torch.tensor(x[key][name]).flatten() for x in (got, want))
            torch.testing.assert_close(flat_got, flat_want, rtol=1e-5, atol=0)
    assert got["expert_usage"] == want["expert_usage"]
    for name in ("OmniMoE", "dense"):
        assert want["speed"][name]["tflops_per_second"] > 0 and want["speed"][name]["mfu"] is None
        speed = got["speed"][name]
        assert speed["mfu"] == pytest.approx(speed["tflops_per_second"] / 1e-3)
    assert "of the device's peak (MFU)" in done.stdout


def test_resuming_with_other_settings_is_refused(corpus, whole_run):
    done = run_script(corpus, whole_run, "--resume", "--hidden", "32")
    assert done.returncode != 0
    assert "the checkpoint was made with hidden = 16, this run has 32" in done.stderr


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


SPOILED = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": cut_off,
    "cut off early": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "text": lambda path: path.write_text("not a checkpoint"),
    "other tensors": lambda path: torch.save({"weight": torch.zeros(3)}, path),
    "one tensor": lambda path: torch.save(torch.zeros(3), path),
}


@pytest.mark.parametrize("how", SPOILED)
def test_resuming_from_a_spoiled_checkpoint(how, corpus, whole_run, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((whole_run / "checkpoint.pt").read_bytes())
    SPOILED[how](path)
    done = run_script(corpus, tmp_path, "--resume")
    assert done.returncode == 1
    assert f"--resume: expected a whole checkpoint at {path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_diverged_run(corpus, tmp_path):
    """All results but a sample, of which there is none."""
    done = run_script(corpus, tmp_path, "--lr", "1e9", "--embedding-lr", "1e9", "--steps", "30")
    assert done.returncode == 0, done.stderr
    assert "The training of the OmniMoE model diverged" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["train_bits_per_byte"]["OmniMoE"]) == 30
    assert (
        metrics["held_out_bits_per_byte"]["OmniMoE"] != metrics["held_out_bits_per_byte"]["OmniMoE"]
    )
    assert "sample" not in metrics
    for plot in ("loss.png", "expert_usage.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["train_lm.py", "train_hf.py", "convert_hf.py"])
@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_that_wait_sleep(script, chosen):
    """Unless the user says otherwise: on shared cores, threads that spin starve each other."""
    if script != "train_lm.py":
        pytest.importorskip("transformers")
    variables = environment() | {"OMP_DISPLAY_ENV": "VERBOSE"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        variables.pop(name, None)
    if chosen:
        variables["OMP_WAIT_POLICY"] = chosen
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name(script)), "--help"],
        capture_output=True,
        text=True,
        env=variables,
    )
    assert done.returncode == 0
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("the OpenMP of this torch is not GNU's")
    assert ("GOMP_SPINCOUNT = '0'" in done.stderr) == (chosen is None)


def test_operations_of_a_training_step(monkeypatch):
    """Counted without touching the model: three times those of the forward pass."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    functions = runpy.run_path(str(SCRIPT.with_name("mfu.py")))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 64}
    config = omni_moe.OmniMoEConfig(**sizes, num_experts_per_token=4, track_expert_load=True)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), omni_moe.OmniMoE(config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.empty(15, 16, device="meta")
    flops = functions["training_flops"](model, lambda model: model(x).sum())
    assert flops == 3 * 46080 + 2 * (15 * 2 * 16 * 16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not model[1].expert_load().counts.any()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert functions["utilisation"](2e12, 8) == {"tflops_per_second": 2, "mfu": 0.25}
    assert functions["utilisation"](2e12, None)["mfu"] is None
    assert functions["peak_tflops"](torch.device("cpu"), "fp32") is None
    for name, dtype, peak in (
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA L4", "bf16", 121),
        ("a GPU to come", "bf16", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert functions["peak_tflops"](torch.device("cuda"), dtype) == peak

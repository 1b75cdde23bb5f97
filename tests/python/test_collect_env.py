"""`python -m omni_moe.collect_env`, also where the library cannot be loaded."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import omni_moe
from omni_moe import collect_env

PACKAGE = Path(omni_moe.__file__).parent


def report(*command, cwd, **environment) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd, capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(re.split(r": +", line, maxsplit=1) for line in done.stdout.splitlines())


def test_report():
    facts = report("-m", "omni_moe.collect_env", cwd=PACKAGE.parent)
    assert facts["omni_moe"] == str(PACKAGE)
    for name, value in omni_moe.build_info().items():
        assert facts[f"build {name}"] == (value or "none")
    assert facts["torch"].startswith(torch.__version__)
    assert facts["Python"].startswith("3.")
    assert len([name for name in facts if name.startswith("GPU")]) == max(
        1, torch.cuda.device_count()
    )
    assert {"CUDA driver", "nvcc", "OS", "transformers", "peft", "accelerate"} <= set(facts)


@pytest.fixture
def copy_without_library(tmp_path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "include", "lib")
    return shutil.copytree(PACKAGE, tmp_path / "omni_moe", ignore=ignore)


@pytest.mark.parametrize("cwd", [".", "omni_moe"])
def test_a_library_that_cannot_be_loaded(copy_without_library, tmp_path, cwd):
    facts = report(str(copy_without_library / "collect_env.py"), cwd=tmp_path / cwd)
    assert f"{copy_without_library}/lib/libomni_moe.so is missing" in facts["omni_moe"]
    assert facts["torch"].startswith(torch.__version__)


def test_neither_torch_nor_tools(copy_without_library, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: no such file')\n")
    path = str(copy_without_library / "collect_env.py")
    facts = report(path, cwd=tmp_path, PATH=str(tmp_path))
    assert facts["omni_moe"] == "cannot be imported: OSError: libcudart.so: no such file"
    assert facts["torch"] == facts["omni_moe"]
    assert facts["CUDA driver"] == facts["nvcc"] == "not found"
    assert facts["Python"].startswith("3.")


@pytest.mark.parametrize(
    ("architectures", "capability", "want"),
    [
        ("80-real 90-virtual 90a-real", (8, 0), "runs the code of sm_80"),
        ("80-real 90-virtual 90a-real", (8, 9), "runs the code of sm_80"),
        ("80-real 90-virtual 90a-real", (9, 0), "runs the code of sm_90a"),
        ("80-real 90-virtual 90a-real", (12, 0), "runs the PTX of compute_90, compiled when"),
        ("80-real 90-virtual 90a-real", (7, 5), "no code for it in this build"),
        ("80 90a-real", (10, 0), "runs the PTX of compute_80, compiled when"),
        ("80-real 86-real", (8, 9), "runs the code of sm_86"),
        ("86-real", (8, 0), "no code for it in this build"),
        ("90a", (10, 0), "no code for it in this build"),
        ("90a-real 90-real", (9, 0), "runs the code of sm_90a"),
        ("100f-real", (10, 3), "runs the code of sm_100f"),
        ("100f", (12, 0), "no code for it in this build"),
        ("native", (9, 0), "unknown whether there is code for it (built for native)"),
        ("", (9, 0), "no code: built without CUDA"),
    ],
)
def test_gpu_code(architectures, capability, want):
    assert collect_env.gpu_code(architectures, capability).startswith(want)


@pytest.mark.parametrize("hopper_kernels", ["yes", "no", None])
def test_gpus(monkeypatch, hopper_kernels):
    hopper = SimpleNamespace(name="GPU H", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: hopper)
    info = {"cuda_architectures": "90-real"}
    if hopper_kernels:
        info["hopper_kernels"] = hopper_kernels
    ((name, fact),) = collect_env._gpu_facts(info)
    assert name == "GPU 0" and fact.startswith("GPU H, sm_90, 80 GiB; runs the code of sm_90")
    assert fact.endswith("without the Hopper kernels") == (hopper_kernels == "no")
    assert collect_env._gpu_facts(None) == [("GPU 0", "GPU H, sm_90, 80 GiB")]

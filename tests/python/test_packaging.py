"""A wheel built from the tree, installed and used away from it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in ("git", "cmake", "ninja", "readelf")),
        reason="needs git, cmake, ninja and readelf",
    ),
    pytest.mark.skipif(
        not all((ROOT / name).exists() for name in ("setup.py", "csrc", ".git")),
        reason="needs the source tree",
    ),
]

USE_IT = """
import torch, omni_moe
assert omni_moe.__file__.startswith({site!r}), omni_moe.__file__
config = omni_moe.OmniMoEConfig(
    hidden_size=16, intermediate_size=24, num_experts=36, num_experts_per_token=4
)
layer = omni_moe.OmniMoE(config)
x = torch.randn(2, 9, 16, requires_grad=True)
layer(x).square().sum().backward()
assert x.grad.isfinite().all() and x.grad.any()
assert all(parameter.grad.any() for parameter in layer.parameters())
print(omni_moe.build_info())
"""


def run_checked(command: list, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what git would commit, CPU only, which takes a minute or two."""
    source = tmp_path_factory.mktemp("source")
    listed = run_checked(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    run_checked(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
            *("--disable-pip-version-check", "-w", str(out), str(source)),
        ],
        env=os.environ | {"CMAKE_ARGS": "-DOMNI_MOE_CUDA=OFF"},
        cwd=out,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run_checked(
        [
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"),
            *("--disable-pip-version-check", "--target", str(target), str(wheel)),
        ]
    )
    return target


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    for wanted in (
        "omni_moe/__init__.py",
        "omni_moe/modules/omni_moe.py",
        "omni_moe/lib/libomni_moe.so",
        "omni_moe/include/omni_moe/expert.h",
    ):
        assert wanted in names
    assert any(re.fullmatch(r"omni_moe/_C\.cpython.*\.so", name) for name in names)
    packaged = {str(path.relative_to(ROOT)) for path in (ROOT / "omni_moe").rglob("*.py")}
    assert packaged <= set(names), "a module of the tree is not in the wheel"
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"omni_moe"}
    # The torch it was compiled against, in any patch release.
    major, minor = torch.__version__.split(".")[:2]
    assert f"Requires-Dist: torch=={major}.{minor}.*" in metadata.splitlines()


def test_installed_package_works_away_from_the_tree(site, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = USE_IT.format(site=str(site))
    out = run_checked(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
    )
    assert torch.__version__.split("+")[0] in out


def test_library_needs_no_python(site):
    """One libomni_moe.so for every Python version and for C++ programs."""
    library = str(site / "omni_moe" / "lib" / "libomni_moe.so")
    dynamic = run_checked(["readelf", "-d", library])
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed and "libc10.so" in needed
    assert not [name for name in needed if "python" in name]
    symbols = run_checked(["readelf", "--dyn-syms", "--wide", library])
    undefined = re.findall(r"UND (\S+)", symbols)
    assert undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]


def test_libraries_find_each_other_beside_torch(site):
    """Run paths relative to the file, none of the machine that built it."""
    libraries = list((site / "omni_moe").rglob("*.so"))
    assert len(libraries) == 2
    for library in libraries:
        dynamic = run_checked(["readelf", "-d", str(library)])
        (run_path,) = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic)
        entries = run_path.split(":")
        assert all(entry.startswith("$ORIGIN") for entry in entries), entries
        assert any(entry.endswith("torch/lib") for entry in entries), entries

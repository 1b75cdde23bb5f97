"""What import says when the library is missing, broken, or built for another torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import omni_moe

PACKAGE = Path(omni_moe.__file__).parent


@pytest.fixture
def copied_package(tmp_path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "include")
    return shutil.copytree(PACKAGE, tmp_path / "omni_moe", ignore=ignore)


def import_error(copied_package: Path, before: str = "") -> str:
    """Imports the copy in a process of its own and returns the message of its ImportError."""
    script = (
        f"{before}\n"
        "try:\n"
        "    import omni_moe\n"
        "except ImportError as error:\n"
        "    print('ImportError:', error)\n"
        "else:\n"
        "    print('imported', omni_moe.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copied_package.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_says_what_to_do(message: str) -> None:
    assert message.startswith("ImportError: omni_moe")
    assert "pip install --no-build-isolation --force-reinstall --no-deps ." in message


def test_the_copy_imports(copied_package):
    """Each test below breaks one thing in it."""
    assert import_error(copied_package) == f"imported {copied_package / '__init__.py'}\n"


def test_missing_library(copied_package):
    library = copied_package / "lib" / "libomni_moe.so"
    library.unlink()
    message = import_error(copied_package)
    assert_says_what_to_do(message)
    assert f"{library} is missing: the package was not built" in message


def test_broken_library(copied_package):
    library = copied_package / "lib" / "libomni_moe.so"
    library.write_bytes(b"not a library")
    message = import_error(copied_package)
    assert_says_what_to_do(message)
    assert f"{library} does not load with torch {torch.__version__}" in message
    assert "built for another version of torch or Python" in message


def test_missing_extension_module(copied_package):
    for module in copied_package.glob("_C*.so"):
        module.unlink()
    message = import_error(copied_package)
    assert_says_what_to_do(message)
    assert "does not load with torch" in message and "_C" in message


@pytest.mark.parametrize("version", ["2.999.0", "9.11.0+cu999"])
def test_other_torch(copied_package, version):
    message = import_error(copied_package, f"import torch; torch.__version__ = {version!r}")
    assert_says_what_to_do(message)
    built_for = omni_moe.build_info()["torch_version"]
    assert f"built for torch {built_for}, but torch {version} is installed" in message


def test_other_patch_release_of_torch(copied_package):
    minor = ".".join(torch.__version__.split(".")[:2])
    message = import_error(copied_package, f"import torch; torch.__version__ = '{minor}.99'")
    assert message.startswith("imported ")


def test_build_info():
    info = omni_moe.build_info()
    assert set(info) == {
        "version",
        "torch_version",
        "cuda_version",
        "cuda_architectures",
        "hopper_kernels",
        "compiler",
        "cpu_capability",
    }
    assert info["version"] == omni_moe.__version__
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")
    has_hopper = any(entry.startswith("90a") for entry in info["cuda_architectures"].split())
    assert info["hopper_kernels"] == ("yes" if has_hopper else "no")
    assert bool(info["cuda_version"]) == bool(info["cuda_architectures"])


def test_public_names():
    for name in omni_moe.__all__:
        assert hasattr(omni_moe, name), name

"""Drives CMake, the one build description, for pip; metadata lives in pyproject.toml.

The one exception is the dependency on torch: the library calls torch's C++ API, which changes with
each minor version, so a package requires the minor version that it was compiled against.
"""

import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / os.environ.get("OMNI_MOE_BUILD_DIR", "build/cmake")


def required_torch() -> str:
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:  # a source distribution is made without torch
        return "torch>=2.11,<2.16"
    return f"torch=={major}.{minor}.*"


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class BuildWithCMake(build_ext):
    """Configures, builds and installs libomni_moe.so and _C beside the package's Python files.

    The environment's CMAKE_ARGS are passed on, e.g. CMAKE_ARGS="-DOMNI_MOE_CUDA=OFF".
    """

    def build_extension(self, extension: Extension) -> None:
        package_dir = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(BUILD_DIR), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(BUILD_DIR), "--parallel", jobs], check=True)
        # pip copies only the extension module into the tree of an editable install.
        prefixes = [package_dir, ROOT / "omni_moe"] if self.editable_mode else [package_dir]
        for prefix in prefixes:
            install = ["cmake", "--install", str(BUILD_DIR), "--prefix", str(prefix)]
            subprocess.run(install, check=True)


setup(
    install_requires=[required_torch()],
    ext_modules=[CMakeExtension("omni_moe._C")],
    cmdclass={"build_ext": BuildWithCMake},
)

"""What the build chooses and refuses when CMake configures it, with a torch that is only a name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# That of this Python's environment first, as in a build: the system's may be too old.
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

pytestmark = [
    pytest.mark.skipif(
        CMAKE is None or any(shutil.which(tool) is None for tool in ("ninja", "c++")),
        reason="needs cmake, ninja and a compiler",
    ),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree"),
]


@pytest.fixture
def configure(tmp_path):
    """Runs CMake in one build directory and returns its output, errors included, on one line."""

    def run(*options: str, torch: str = "2.15.0", **environment: str) -> str:
        package = tmp_path / "site" / "torch"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(
            f"__version__ = {torch!r}\n"
            "class version:\n"
            "    cuda = '13.0'\n"
            "def compiled_with_cxx11_abi():\n"
            "    return True\n"
        )
        chosen_here = ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME")
        inherited = {k: v for k, v in os.environ.items() if k not in chosen_here}
        done = subprocess.run(
            [
                *(CMAKE, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                *options,
            ],
            env=inherited | {"PYTHONPATH": str(package.parent)} | environment,
            capture_output=True,
            text=True,
        )
        return " ".join((done.stdout + done.stderr).split())

    return run


def make_nvcc(path: Path, release: str) -> str:
    """A compiler that can only say its version, which does not match torch's CUDA."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    path.chmod(0o755)
    return str(path)


def test_cudacxx_is_the_path_of_the_compiler(configure, tmp_path):
    out = configure(CUDACXX=make_nvcc(tmp_path / "tools" / "my-nvcc", "99.1"))
    assert "CUDA backend OFF (nvcc 99.1 does not match torch's CUDA 13.0)" in out
    assert "Generating done" in out


def test_cudacxx_may_be_a_command(configure, tmp_path):
    nvcc = Path(make_nvcc(tmp_path / "tools" / "my-nvcc", "99.2"))
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    assert "CUDA backend OFF (nvcc 99.2 does not match" in configure(CUDACXX=nvcc.name, PATH=path)


def test_cudacxx_comes_before_cuda_home(configure, tmp_path):
    make_nvcc(tmp_path / "bin" / "nvcc", "99.3")
    assert "(nvcc 99.3 does not match" in configure(CUDA_HOME=str(tmp_path))
    shutil.rmtree(tmp_path / "build")
    chosen = make_nvcc(tmp_path / "tools" / "nvcc", "99.4")
    assert "(nvcc 99.4 does not match" in configure(CUDA_HOME=str(tmp_path), CUDACXX=chosen)


def test_cudacxx_without_a_program(configure, tmp_path):
    out = configure(CUDACXX=str(tmp_path / "absent"))
    assert f"CUDACXX={tmp_path / 'absent'}: there is no such program" in out
    # A build without CUDA does not ask for it.
    out = configure("-DOMNI_MOE_CUDA=OFF", CUDACXX=str(tmp_path / "absent"))
    assert "CUDA backend OFF (OMNI_MOE_CUDA=OFF)" in out and "Generating done" in out


def test_cudacxx_of_another_build(configure, tmp_path):
    first = make_nvcc(tmp_path / "tools" / "first", "99.1")
    second = make_nvcc(tmp_path / "tools" / "second", "99.2")
    for environment in ({"CUDACXX": first}, {}, {"CUDACXX": first}):
        assert "(nvcc 99.1 does not match" in configure(**environment)
    out = configure(CUDACXX=second)
    assert f"CUDACXX={second}, but {tmp_path / 'build'} was configured with {first}" in out


def test_cuda_on_needs_a_matching_compiler(configure, tmp_path):
    nvcc = make_nvcc(tmp_path / "tools" / "nvcc", "99.1")
    out = configure("-DOMNI_MOE_CUDA=ON", CUDACXX=nvcc)
    assert "OMNI_MOE_CUDA=ON, but nvcc 99.1 does not match torch's CUDA 13.0" in out


@pytest.mark.parametrize("variable", ["CXXFLAGS", "LDFLAGS", "CMAKE_SHARED_LINKER_FLAGS"])
def test_static_libstdcxx_is_refused(configure, tmp_path, variable):
    program = tmp_path / "program.cpp"
    program.write_text("#include <iostream>\nint main() { std::cout << 1; }\n")
    command = ["c++", "-static-libstdc++", str(program), "-o", str(tmp_path / "program")]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("the compiler has no static libstdc++")
    flag = "-static-libstdc++"
    if variable.startswith("CMAKE"):
        out = configure("-DOMNI_MOE_CUDA=OFF", f"-D{variable}={flag}")
    else:
        out = configure("-DOMNI_MOE_CUDA=OFF", **{variable: flag})
    assert "links libstdc++ statically" in out
    assert "CXX=/usr/bin/g++" in out and "Generating done" not in out


def test_torch_that_is_too_old(configure):
    out = configure("-DOMNI_MOE_CUDA=OFF", torch="2.10.1+cu130")
    assert "torch 2.11 or newer is needed, but" in out and "is 2.10.1" in out


def test_kernels_alone_need_no_torch(configure):
    out = configure("-DOMNI_MOE_CUDA=OFF", "-DOMNI_MOE_TORCH=OFF", torch="not a version")
    assert "Generating done" in out


def test_sanitizers_are_for_the_kernels_alone(configure):
    out = configure("-DOMNI_MOE_CUDA=OFF", "-DOMNI_MOE_SANITIZE=address")
    assert "set OMNI_MOE_TORCH=OFF and OMNI_MOE_CUDA=OFF as well" in out


def test_libraries_of_nvccs_host_compiler_are_not_linked(configure, tmp_path):
    """They may hold another libstdc++ than that of the compiler which was looked at."""
    libraries, wrapper = tmp_path / "other_lib", tmp_path / "host-c++"
    libraries.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec c++ -L{libraries} "$@"\n')
    wrapper.chmod(0o755)
    out = configure(CUDAHOSTCXX=str(wrapper))
    if "CUDA backend ON" not in out:
        pytest.skip("needs nvcc of CUDA 13")
    assert str(wrapper) in (tmp_path / "build" / "CMakeFiles" / "rules.ninja").read_text()
    assert str(libraries) not in (tmp_path / "build" / "build.ninja").read_text()

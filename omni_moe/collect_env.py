"""What to paste into a bug report: `python -m omni_moe.collect_env`.

Where `import omni_moe` fails, run this file by its path instead, `python omni_moe/collect_env.py`:
it then prints the error in place of what the library would say.
"""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("numpy", "triton", "transformers", "peft", "accelerate")
# They decide what is built, and what torch sees.
_VARIABLES = ("CMAKE_ARGS", "CUDA_HOME", "CUDACXX", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


def collect_env() -> str:
    """The report: one fact a line."""
    facts = [*_package_facts(), *_machine_facts()]
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name + ':':{width}}{value}" for name, value in facts)


def _package_facts() -> list[tuple[str, str]]:
    """Of the library, torch, and the GPUs that torch can use."""
    facts, build_info = [], None
    try:
        import omni_moe
    except Exception as error:  # whatever it is, it belongs in the report
        facts.append(("omni_moe", f"cannot be imported: {_one_line(error)}"))
    else:
        build_info = omni_moe.build_info()
        facts.append(("omni_moe", str(Path(omni_moe.__file__).parent)))
        facts += [(f"build {name}", value or "none") for name, value in build_info.items()]
    try:
        import torch
    except Exception as error:
        return [*facts, ("torch", f"cannot be imported: {_one_line(error)}")]
    return [
        *facts,
        ("torch", f"{torch.__version__}, {Path(torch.__file__).parent}"),
        ("torch CUDA", torch.version.cuda or "none: a CPU build"),
        *_gpu_facts(build_info),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("CPU threads", str(torch.get_num_threads())),
    ]


def _gpu_facts(build_info: dict[str, str] | None) -> list[tuple[str, str]]:
    import torch

    facts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        what = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        if build_info:
            capability = (properties.major, properties.minor)
            what += f"; {gpu_code(build_info['cuda_architectures'], capability)}"
            if properties.major == 9 and build_info.get("hopper_kernels") == "no":
                what += ", without the Hopper kernels"
        facts.append((f"GPU {index}", what))
    return facts or [("GPU", "none that torch can use")]


def gpu_code(architectures: str, capability: tuple[int, int]) -> str:
    """Which code of a build a GPU runs.

    Args:
        architectures: `build_info()["cuda_architectures"]`: CMake's names, separated by spaces.
            `90-real` is machine code, `90-virtual` PTX, `90` both. `90a` is for 9.0 alone, `100f`
            for 10.0 and later 10.x.
        capability: (major, minor) of the GPU.
    """
    if not architectures:
        return "no code: built without CUDA"
    machine_code, ptx, unknown = [], [], []
    for architecture in architectures.split():
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
        if not match:
            unknown.append(architecture)  # such as "native"
            continue
        major, minor, suffix, kind = match.groups()
        version = (int(major), int(minor))
        same_major = version[0] == capability[0] and version <= capability
        exact = version == capability
        if kind != "-virtual" and (exact if suffix == "a" else same_major):
            machine_code.append((version, suffix))
        fits = {"a": exact, "f": same_major, "": version <= capability}[suffix]
        if kind != "-real" and fits:
            ptx.append((version, suffix))
    for found, text in (
        (machine_code, "runs the code of sm_{}"),
        (ptx, "runs the PTX of compute_{}, compiled when first used"),
    ):
        if found:
            (major, minor), suffix = max(found)  # the closest
            return text.format(f"{major}{minor}{suffix}")
    if unknown:
        return f"unknown whether there is code for it (built for {' '.join(unknown)})"
    return "no code for it in this build"


def _machine_facts() -> list[tuple[str, str]]:
    """Of the machine and its programs; needs neither torch nor the library."""
    # A line for each GPU; most machines have several of one kind.
    gpus = _output("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    compiler = os.environ.get("CXX") or "c++"
    return [
        ("CUDA driver", "; ".join(dict.fromkeys(gpus.splitlines()))),
        ("nvcc", _last_match(r"release \S+, V(\S+)", _output("nvcc", "--version"))),
        (f"C++ compiler {compiler}", _output(compiler, "--version").partition("\n")[0]),
        ("CMake", _output("cmake", "--version").partition("\n")[0]),
        *((name, os.environ[name]) for name in _VARIABLES if name in os.environ),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("OS", f"{_distribution()}, {platform.platform()}"),
        *((name, _version(name)) for name in _PACKAGES),
    ]


def _output(*command: str) -> str:
    """What a program prints, or why there is nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "not found"
    except (OSError, subprocess.SubprocessError) as error:
        return _one_line(error)
    return done.stdout.strip() or f"exit status {done.returncode}: {done.stderr.strip()}"


def _last_match(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    return found[-1] if found else text


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    # Python puts the directory of a file run by its path first, where `omni_moe` is not to be found
    # and modules such as `ops` would hide others of that name.
    package = Path(__file__).resolve().parent
    sys.path = [
        str(package.parent),
        *(path for path in sys.path if not path or Path(path).resolve() != package),
    ]
    print(collect_env())

"""Loads libomni_moe.so and says what to do when it cannot be loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "lib" / "libomni_moe.so"
_REBUILD = (
    "Reinstall it against the torch of this environment: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)

if not _LIBRARY.exists():
    raise ImportError(
        f"omni_moe: {_LIBRARY} is missing: the package was not built, or Python found the source "
        f"tree before the installed package. {_REBUILD}"
    )
try:
    torch.ops.load_library(str(_LIBRARY))
    from omni_moe import _C
except (OSError, ImportError) as error:
    raise ImportError(
        f"omni_moe: {_LIBRARY} does not load with torch {torch.__version__}, most likely because "
        f"it was built for another version of torch or Python. {_REBUILD}\n{error}"
    ) from error


def _minor_version(version: str) -> str:
    return ".".join(version.split(".")[:2])


if _minor_version(_C.build_info()["torch_version"]) != _minor_version(torch.__version__):
    raise ImportError(
        f"omni_moe was built for torch {_C.build_info()['torch_version']}, but torch "
        f"{torch.__version__} is installed. {_REBUILD}"
    )


def build_info() -> dict[str, str]:
    """What the library was built with.

    Keys: ``version``, ``torch_version``, ``cuda_version`` and ``cuda_architectures`` (empty without
    CUDA), ``hopper_kernels`` (``yes`` if the build has the kernels of Hopper's own instructions,
    which need ``90a`` among the architectures; without them their fallbacks run), ``compiler``,
    ``cpu_capability`` (the CPU kernels this processor runs).
    """
    return _C.build_info()


@contextlib.contextmanager
def check_indices() -> Iterator[None]:
    """Within the context, expert ids on the GPU are checked on the host before each launch.

    An id outside ``[0, num_experts)`` then raises ``IndexError`` naming it, in place of a
    device-side assert. Each check waits for the GPU, so this is for debugging only. Ids on the CPU
    are always checked.

    The checks hold for all threads of the process, so that backward passes, which autograd runs on
    threads of its own, are checked too. They end when the last open context of any thread ends.
    """
    _C.begin_index_checks()
    try:
        yield
    finally:
        _C.end_index_checks()

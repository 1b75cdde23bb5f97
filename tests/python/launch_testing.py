"""Python's side of tests/cpp/launch_testing.cu, which says what it is for."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Where the C++ tests are; the Makefile says so for an environment of another name.
_BUILD = Path(__file__).parents[2] / os.environ.get("OMNI_MOE_BUILD_DIR", "build/cmake")
_LIBRARY = _BUILD / "tests" / "cpp" / "liblaunch_testing.so"
needs_launch_testing = pytest.mark.skipif(
    not _LIBRARY.exists(), reason="the C++ tests are not built"
)

# Longer than Python takes to launch an op, so that its kernels find the late one at work.
_MICROSECONDS = 3000

_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "late_copy": [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_uint],
    "late_check": [_POINTER, ctypes.c_int, ctypes.c_ubyte, ctypes.c_uint, _POINTER],
    "early_copy": [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_bool],
    "begin_failing_launches": [],
    "end_failing_launches": [],
}


def _call(name: str, *args) -> None:
    function = getattr(ctypes.CDLL(str(_LIBRARY)), name)
    function.argtypes = [*_SIGNATURES[name], _POINTER]
    status = function(*args, torch.cuda.current_stream().cuda_stream)
    assert status == 0, f"{name}: CUDA error {status}"


def _copy(name: str, to: Tensor, source: Tensor, argument) -> None:
    assert to.is_contiguous() and source.is_contiguous() and to.nbytes == source.nbytes
    _call(name, to.data_ptr(), source.data_ptr(), to.nbytes, argument)


def late_copy(to: Tensor, source: Tensor) -> None:
    """`to` becomes `source`, unseen by autograd, some time after the next kernel may have begun."""
    _copy("late_copy", to, source, _MICROSECONDS)


def early_copy(to: Tensor, source: Tensor, *, waits: bool) -> None:
    """By a kernel that may start before the one in front of it has ended."""
    _copy("early_copy", to, source, waits)


def late_check(blocks: list[Tensor], expected: int) -> Tensor:
    """How many bytes of the blocks are not `expected` when the next kernel may long have begun."""
    table = torch.tensor([[b.data_ptr(), b.nbytes] for b in blocks], device="cuda")
    num_changed = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    args = (table.data_ptr(), len(blocks), expected, _MICROSECONDS, num_changed.data_ptr())
    _call("late_check", *args)
    return num_changed


@contextlib.contextmanager
def failing_launches() -> Iterator[None]:
    """Within, the current stream refuses every launch."""
    _call("begin_failing_launches")
    try:
        yield
    finally:
        _call("end_failing_launches")

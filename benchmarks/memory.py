"""Peak memory of one call, beyond what was allocated before it."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@dataclass(frozen=True)
class PeakMemory:
    """Bytes in MiB. Results are what the call returns: any implementation must allocate them."""

    peak_mib: float
    without_results_mib: float | None  # CPU only


def peak_memory(call: Callable[[], list[Tensor]], device: torch.device) -> PeakMemory:
    """Runs the call once, after a warm-up by the caller."""
    return _cpu_peak(call) if device.type == "cpu" else _cuda_peak(call, device)


def _cuda_peak(call: Callable[[], list[Tensor]], device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del results
    return PeakMemory(peak / MIB, None)


def _cpu_peak(call: Callable[[], list[Tensor]]) -> PeakMemory:
    """Counts what passes PyTorch's CPU allocator, workspaces of operators included.

    Not seen: what a library takes from malloc itself (oneDNN's and MKL's scratch, this library's
    rows of accumulators, a few KB a thread).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = call()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = sorted(_allocations(tree))  # by time
    returned = {t.untyped_storage().data_ptr() for t in results}
    # An address may have been used before by something temporary: the last allocation at it counts.
    last = {pointer: time for time, pointer, size in events if size > 0 and pointer in returned}
    results_at = set(last.items())
    return PeakMemory(
        _peak(size for _, _, size in events) / MIB,
        _peak(size for time, pointer, size in events if (pointer, time) not in results_at) / MIB,
    )


def _allocations(tree: Iterable) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of each allocation, bytes negative where one is freed."""
    for event in tree:
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def _peak(sizes: Iterable[int]) -> int:
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return peak

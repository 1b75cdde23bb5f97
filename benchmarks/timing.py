"""Times calls: wall clock on a CPU, CUDA events or CUDA graphs on a GPU, behind one interface.

A timer turns the calls of one implementation into a sampler, a function that runs them once and
returns microseconds per call; `measure` alternates the samplers of all implementations (A B A B),
so that noise from outside meets all of them, and takes medians.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and range over the repetitions."""

    us: float
    us_min: float
    us_max: float
    repetitions: int


class Timer(Protocol):
    def sampler(self, calls: Sequence[Call]) -> Sampler: ...


def make_timer(method: str, device: torch.device) -> Timer:
    """The timer of a case: `wall`, `events` or `graph`."""
    if method == "wall":
        return WallTimer()
    return {"events": EventTimer, "graph": GraphTimer}[method](device)


def measure(
    samplers: Mapping[str, Sampler], seconds_each: float, repetitions: tuple[int, int]
) -> dict[str, Timing]:
    """Alternates the samplers until each has its repetitions.

    Args:
        samplers: one for each implementation, warmed up.
        seconds_each: an implementation repeats until about this much time is spent on it, within
            the bounds of `repetitions` (at least, at most).
    """
    least, most = repetitions
    counts = {}
    for name, sampler in samplers.items():
        start = time.perf_counter()
        sampler()
        seconds = time.perf_counter() - start
        counts[name] = max(least, min(most, int(seconds_each / max(seconds, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for repetition in range(max(counts.values(), default=0)):
        for name, sampler in samplers.items():
            if repetition < counts[name]:
                samples[name].append(sampler())
    return {
        name: Timing(statistics.median(values), min(values), max(values), len(values))
        for name, values in samples.items()
    }


class WallTimer:
    """time.perf_counter around a call that returns when it is done."""

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        (call,) = calls
        _warm_up(call)

        def sample() -> float:
            start = time.perf_counter_ns()
            result = call()
            elapsed = time.perf_counter_ns() - start
            del result  # freed outside the measured time
            return elapsed / 1e3

        return sample


class EventTimer:
    """GPU time between two events around the call, L2 flushed before.

    The GPU is kept busy with a spin kernel while the host enqueues the call, so that launch
    latency is not measured unless the call itself waits for the GPU. A sample in which the host
    took longer than the spin is taken again, with a longer one.
    """

    MOST_HOST_US = 5000.0
    MOST_TRIES = 4

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        # More than twice L2: what the call left there is evicted or written back.
        self.flush_buffer = torch.empty(
            3 * properties.L2_cache_size, dtype=torch.int8, device=device
        )
        # A spin cycle is one of the SM clock; 2 GHz is at or above it, so the spin is long enough.
        self.cycles_per_us = 2000

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        (call,) = calls
        _warm_up(call)
        spin_us = 50.0

        def sample() -> float:
            nonlocal spin_us
            for _ in range(self.MOST_TRIES):
                gpu_us, host_us = self._time(call, spin_us)
                if host_us <= spin_us or spin_us >= self.MOST_HOST_US:
                    break
                spin_us = min(1.5 * host_us, self.MOST_HOST_US)
            return gpu_us

        return sample

    def _time(self, call: Call, spin_us: float) -> tuple[float, float]:
        """Microseconds of the call on the GPU, and of the host to enqueue it."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self.flush_buffer.zero_()
        torch.cuda._sleep(int(spin_us * self.cycles_per_us))
        host_start = time.perf_counter()
        start.record()
        call()
        end.record()
        host_us = (time.perf_counter() - host_start) * 1e6
        end.synchronize()
        return start.elapsed_time(end) * 1e3, host_us


class GraphTimer(EventTimer):
    """GPU time of a CUDA graph that holds all the calls, divided by their number.

    Each call has inputs of its own, so that after the flush none finds in L2 what it reads.
    """

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        side_stream = torch.cuda.Stream(self.device)
        side_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side_stream):
            for call in calls:
                _warm_up(call)
        torch.cuda.current_stream(self.device).wait_stream(side_stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize(self.device)
        return lambda: self._time(graph.replay, spin_us=200)[0] / len(calls)


def _warm_up(call: Call, repetitions: int = 2) -> None:
    for _ in range(repetitions):
        call()

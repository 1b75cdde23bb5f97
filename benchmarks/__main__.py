"""Entry point: measures the selected cases and writes the record, the report and the plots."""

import argparse
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import floors, models, peers, results, upstream
from benchmarks.cases import OPS, PASSES, Case, cases_for
from benchmarks.memory import peak_memory
from benchmarks.problems import Problem, make_problem, relative_error
from benchmarks.timing import EventTimer, Timer, Timing, make_timer, measure

OURS = "omni_moe"
# Calls inside one CUDA graph, each with inputs of its own.
GRAPH_CALLS = 16
# Seconds to spend on each case and implementation: more on a CPU, where more disturbs the timing.
SECONDS = {"cpu": 2.0, "cuda": 0.4}
REPETITIONS = (3, 300)  # at least, at most
# Seconds of one call; a slower implementation is left out.
SLOWEST_CALL = 2.0


class TooSlow(Exception):
    """An implementation that would take most of the run's time."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--table", nargs="+", help="only these tables (see --list)")
    parser.add_argument("--op", nargs="+", choices=OPS, help="only these ops")
    parser.add_argument(
        "--pass", nargs="+", choices=PASSES, dest="passes", help="only these passes"
    )
    parser.add_argument("--impl", nargs="+", choices=peers.names(), help="only these")
    parser.add_argument("--dtype", nargs="+", help="only cases of these dtypes, e.g. float32")
    parser.add_argument("--quick", action="store_true", help="few cases, repetitions and peers")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--seconds", type=float, help=f"aim for each case and implementation, default {SECONDS}"
    )
    parser.add_argument(
        "--limit-seconds", type=int, default=60, help="give up preparing one implementation after"
    )
    parser.add_argument("--stop-after", type=float, help="begin no case after so many seconds")
    parser.add_argument("--upstream", type=Path, help="checkout of HKUSTDial/omni-moe")
    parser.add_argument("--ceilings", action="store_true", help="measure ceilings first (GPU)")
    parser.add_argument("--list", action="store_true", help="print the selected cases and stop")
    parser.add_argument("--report-only", action="store_true", help="rewrite report and plots")
    parser.add_argument("--no-report", action="store_true", help="write the record only")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, metavar="DIRECTORY")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.report_only:
        return _report(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = [case for case in cases_for(device.type) if _is_selected(case, args)]
    if args.list:
        for case in cases:
            print(_title(case))
        return 0
    if device.type == "cuda" and not args.upstream:
        print("upstream_triton is left out: --upstream names no checkout", file=sys.stderr)
    upstream.set_path(args.upstream)
    torch.set_num_threads(args.threads)

    record = results.open_record(device, args.results)
    ceilings = floors.ceilings_for(device)
    if args.ceilings and device.type == "cuda":
        timer = EventTimer(device)
        ceilings = floors.measure_ceilings(device, lambda call: _median(timer, call))
    if ceilings:
        record.header["ceilings"] = vars(ceilings).copy()

    failures, start = 0, time.monotonic()
    progress = tqdm(cases, unit="case")
    for case in progress:
        if args.stop_after and time.monotonic() - start > args.stop_after:
            progress.write(f"stopped after {args.stop_after:g} s, before {_title(case)}")
            break
        progress.set_description(f"{case.op} {case.pass_name}")
        failures += _run_case(
            case,
            device,
            args=args,
            record=record,
            ceilings=ceilings,
            write=progress.write,
        )
        record.save()
    print(f"{record.path}: {len(record.rows)} rows")
    if not args.no_report:
        _report(args)
    return 1 if failures else 0


def _is_selected(case: Case, args: argparse.Namespace) -> bool:
    return (
        (not args.quick or case.quick)
        and (args.table is None or case.table in args.table)
        and (args.op is None or case.op in args.op)
        and (args.passes is None or case.pass_name in args.passes)
        and (args.dtype is None or case.dtype in args.dtype)
    )


def _impls_of(case: Case, args: argparse.Namespace) -> list[str]:
    chosen = args.impl or case.impls or peers.names(case.op)
    if args.quick and not args.impl:
        chosen = (OURS, "eager")
    return [impl for impl in peers.names(case.op) if impl in chosen]


def _run_case(
    case: Case,
    device: torch.device,
    *,
    args: argparse.Namespace,
    record: results.Record,
    ceilings: floors.Ceilings | None,
    write: Callable[[str], None],
) -> int:
    """Measures one case; returns 1 if this library failed, and raises if the GPU is lost."""
    torch.compiler.reset()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    timer = make_timer(case.timing, device)
    num_inputs = GRAPH_CALLS if case.timing == "graph" else 1
    problems = [make_problem(case, device)]
    for seed in range(1, num_inputs):
        problems.append(make_problem(case, device, seed, problems[0]))

    samplers, facts, prepare_seconds, failed = {}, {}, {}, 0
    for impl in _impls_of(case, args):
        start = time.monotonic()
        try:
            with _time_limit(args.limit_seconds):
                samplers[impl], facts[impl] = _prepare(impl, problems, timer, device)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            record.skip(results.row_of(case, impl) | {"reason": reason})
            write(f"{_title(case)}: no {impl}: {reason}")
            failed |= impl == OURS
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if the error has cost us the device
        prepare_seconds[impl] = time.monotonic() - start

    seconds = args.seconds or SECONDS[device.type]
    timings = measure(samplers, seconds / 10 if args.quick else seconds, REPETITIONS)
    known = floors.floors(problems[0], ceilings) if ceilings else {}
    bound = floors.binding(case, known) if known else None
    for impl, timing in timings.items():
        row = results.row_of(case, impl) | _numbers(timing)
        row |= {"floor_us": _rounded(known.get(bound)), "floor": bound}
        row |= {"floors": {name: _rounded(us) for name, us in known.items()}}
        row |= facts[impl]
        if "flops" in row:
            row |= models.speed(row["flops"], case.shape["tokens"], timing.us, device)
        record.add(row)
    _write_summary(case, timings, prepare_seconds, write)
    del problems, samplers, timer
    _free(device, before)
    return int(failed)


def _prepare(impl: str, problems: list[Problem], timer: Timer, device: torch.device):
    """Warms an implementation up; returns its sampler, and its memory and error as parts of a row.

    The graph timer captures calls on streams of its own, so memory and error come first.
    """
    workloads = [peers.build(impl, problem) for problem in problems]
    first = workloads[0]
    first.run()  # while a kernel is being tuned, its outputs hold no results
    start = time.perf_counter()
    outputs = first.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if seconds > SLOWEST_CALL:
        raise TooSlow(f"one call takes {seconds:.2g} s, more than {SLOWEST_CALL:g} s")
    rel_err = relative_error(problems[0], outputs) if first.has_oracle else None
    del outputs  # whose memory the call below would not count
    memory = peak_memory(first.run, device)
    facts = {
        "peak_mib": _rounded(memory.peak_mib),
        "peak_mib_without_results": _rounded(memory.without_results_mib),
        "rel_err": None if rel_err is None else float(f"{rel_err:.3g}"),
        **first.facts,
    }
    if first.flops is not None:
        facts["flops"] = first.flops
    return timer.sampler([workload.run for workload in workloads]), facts


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def expire(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s to prepare")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _free(device: torch.device, allocated_before: int) -> None:
    """Hands memory back. Collects garbage only where cycles hold memory: with a compiler loaded, a
    collection takes longer than many a case.
    """
    if device.type == "cpu":
        gc.collect()
    else:
        if torch.cuda.memory_allocated(device) > allocated_before:
            gc.collect()
        torch.cuda.empty_cache()


def _median(timer: Timer, call) -> float:
    return measure({"call": timer.sampler([call])}, 1.0, (5, 20))["call"].us


def _numbers(timing: Timing) -> results.Row:
    return {
        "us": _rounded(timing.us),
        "us_min": _rounded(timing.us_min),
        "us_max": _rounded(timing.us_max),
        "repetitions": timing.repetitions,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _title(case: Case) -> str:
    shape = " ".join(f"{name}={size}" for name, size in case.shape.items())
    ids = f" {case.ids} ids" if case.ids else ""
    return f"{case.table}: {case.op} {case.pass_name} {shape}{ids} {case.dtype} {case.timing}"


def _write_summary(case: Case, timings: dict[str, Timing], prepare_seconds, write) -> None:
    parts = [f"{impl} {timing.us:.4g}" for impl, timing in timings.items()]
    if OURS in timings and case.goal_us:
        parts.append(f"goal {case.goal_us:g} {_verdict(timings[OURS].us <= case.goal_us)}")
    if OURS in timings and "eager" in timings:
        speedup = timings["eager"].us / timings[OURS].us
        best = timings["eager"].us_min / timings[OURS].us_min
        parts.append(f"{speedup:.2f}x eager ({best:.2f}x by the fastest repetitions)")
        if case.goal_speedup:
            parts.append(f"goal {case.goal_speedup:g}x {_verdict(speedup >= case.goal_speedup)}")
    slow = [f"{impl} {seconds:.0f} s" for impl, seconds in prepare_seconds.items() if seconds > 5]
    if slow:
        parts.append(f"prepared slowly: {', '.join(slow)}")
    write(f"{_title(case)}: {', '.join(parts)}")


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def _report(args: argparse.Namespace) -> int:
    from benchmarks import report  # needs matplotlib

    for path in report.write(args.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

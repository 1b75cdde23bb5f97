"""Which strategy of the expert forward is fastest where, and which one the plan takes.

    python -m benchmarks.crossover                measures; rewrites tables and picture
    python -m benchmarks.crossover --report-only  rewrites them from the record

Times every strategy on a grid of tokens, experts per token and expert grids, with ids that the
router chooses from normal logits. Needs a Hopper GPU and a build with the C++ tests, whose
libstrategies.so runs the strategy that it is told. The record is
benchmarks/results/<device>_crossover.json: a row for each shape, with `us` by strategy (the median)
and the `planned` strategy.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.timing import EventTimer, Sampler, measure
from omni_moe import GpuProperties, ops, plan

STRATEGIES = ("two_phase", "fused", "l2_tiled", "bands")
HIDDEN = 1024
TOKENS = tuple(2**i for i in range(8, 15))
K = tuple(2**i for i in range(3, 13))
SIDES = (64, 128, 256, 320)

SECONDS = 0.004  # for each strategy of a shape
REPETITIONS = (3, 20)  # at least, at most
LIBRARY = results.ROOT / os.environ.get("OMNI_MOE_BUILD_DIR", "build/cmake")
LIBRARY /= "tests/cpp/libstrategies.so"

# The samplers of the strategies that take a case, by name, given the case and its ids (T, K).
MakeSamplers = Callable[[Case, Tensor], dict[str, Sampler]]


def cases() -> Iterator[Case]:
    """Grid after grid, K after K, so that the ids of the most tokens serve all of them."""
    for side in SIDES:
        for k in K:
            for tokens in reversed(TOKENS):
                shape = {"tokens": tokens, "hidden": HIDDEN, "experts": side**2, "k": k}
                yield Case(
                    table="crossover", op="expert", pass_name="forward", dtype="bfloat16",
                    timing="events", ids="router", shape={**shape, "rows": side, "cols": side},
                )  # fmt: skip


def run(
    record: results.Record,
    device: torch.device,
    gpu: GpuProperties,
    make_samplers: MakeSamplers,
    write: Callable[[str], None],
) -> None:
    """Measures every case and saves the record behind each."""
    ids: dict[tuple[int, int], Tensor] = {}
    for case in cases():
        shape = case.shape
        key = (shape["rows"], shape["k"])
        if key not in ids:
            ids = {key: router_ids(shape["tokens"], *key, device)}
        indices = ids[key][: shape["tokens"]]
        timings = measure(make_samplers(case, indices), SECONDS, REPETITIONS)
        us = {name: round(timing.us, 2) for name, timing in timings.items()}
        planned = planned_strategy(case, gpu)
        record.add(results.row_of(case, "strategies") | {"us": us, "planned": planned})
        record.save()
        fastest = min(us, key=us.__getitem__)
        write(f"{shape}: {us}, fastest {fastest}, planned {planned}")


def router_ids(num_tokens: int, side: int, k: int, device: torch.device) -> Tensor:
    """(T, K): what this library's router chooses from normal logits on a square grid."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(2, num_tokens, side, device=device, generator=generator)
    return ops.omni_softmax_router(logits[0], logits[1], k)[1]


def planned_strategy(case: Case, gpu: GpuProperties) -> str:
    """What the op would run that is told of the grid."""
    shape = case.shape
    plans = plan(
        "omni_expert",
        num_tokens=shape["tokens"],
        hidden_size=shape["hidden"],
        num_experts=shape["experts"],
        num_experts_per_token=shape["k"],
        num_cols=shape["cols"],
        gpu=gpu,
    )
    return plans["expert_forward"]["strategy"]


class Calls:
    """Samplers of the strategies on a GPU, all on the same operands, of which the ids differ."""

    def __init__(self, library: Path, device: torch.device) -> None:
        if not library.exists():
            raise FileNotFoundError(
                f"{library}: expected the library of a CUDA build with the C++ tests "
                "(-DOMNI_MOE_BUILD_TESTS=ON); OMNI_MOE_BUILD_DIR names its directory"
            )
        self.library = ctypes.CDLL(str(library))
        self.library.strategy_workspace_bytes.restype = ctypes.c_int64
        self.timer = EventTimer(device)
        most_tokens, most_experts = max(TOKENS), max(SIDES) ** 2
        options = {"device": device, "dtype": torch.bfloat16}
        self.hidden_states = torch.randn(most_tokens, HIDDEN, **options)
        self.up_weights = torch.randn(most_experts, HIDDEN, **options).mul_(HIDDEN**-0.5)
        self.down_weights = torch.randn(most_experts, HIDDEN, **options)
        self.routing_weights = torch.rand(most_tokens * max(K), **options).div_(max(K))
        self.expert_states = torch.empty_like(self.hidden_states)

    def samplers(self, case: Case, indices: Tensor) -> dict[str, Sampler]:
        made = {name: self._call(name, case, indices) for name in STRATEGIES}
        return {name: self.timer.sampler([call]) for name, call in made.items() if call is not None}

    def _call(self, strategy: str, case: Case, indices: Tensor) -> Callable[[], None] | None:
        """None where the strategy does not take the case."""
        shape, name = case.shape, strategy.encode()
        sizes = [shape[size] for size in ("tokens", "hidden", "experts", "k", "cols")]
        operands = [self.hidden_states, self.up_weights, self.down_weights, self.routing_weights]
        pointers = [t.data_ptr() for t in (*operands, indices, self.expert_states)]
        arguments = _Call(*sizes, *pointers, None)
        num_bytes = self.library.strategy_workspace_bytes(ctypes.byref(arguments), name)
        if num_bytes < 0:
            return None
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=indices.device)
        arguments.workspace = workspace.data_ptr()

        def call(keeps_alive: Tensor = workspace) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            status = self.library.strategy_forward(ctypes.byref(arguments), name, stream)
            if status != 0:
                raise RuntimeError(f"{strategy}, {shape}: CUDA error {status}")

        return call


class _Call(ctypes.Structure):
    """`Call` of tests/cpp/strategies.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "experts", "k", "cols")),
        *(
            (name, ctypes.c_void_p)
            for name in ("hidden_states", "up_weights", "down_weights", "routing_weights",
                         "indices", "expert_states", "workspace")
        ),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report-only", action="store_true", help="rewrite table and picture")
    parser.add_argument("--no-report", action="store_true", help="write the record only")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="libstrategies.so")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, metavar="DIRECTORY")
    args = parser.parse_args(argv)
    if not args.report_only:
        device = torch.device("cuda")
        record = results.open_record(device, args.results, results.CROSSOVER)
        start = time.monotonic()
        run(record, device, GpuProperties.of(), Calls(args.library, device).samplers, print)
        print(f"{record.path}: {len(record.rows)} rows in {time.monotonic() - start:.0f} s")
    if not args.no_report:
        from benchmarks import crossover_report  # needs matplotlib

        for path in crossover_report.write(args.results):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

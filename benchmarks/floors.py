"""Floors: times that no implementation can beat, from its bytes or operations and measured rates.

Expert forward, for T tokens, H, E experts, K per token, b bytes an element:
- `hbm`: bytes that must cross device memory (each distinct expert's two rows, hidden states in,
  output out, ids and routing weights) over the copy bandwidth;
- `l2_gather`: each pair brings an `up` row and a `down` row to an SM, 2 T K H b, at the rate at
  which random rows are read from L2;
- `bands`: where ids lie on a grid, the grid rows and columns that cover a token's experts
  (`cover.py`) on tensor cores, 4 H operations for each of their experts, and the rest gathered;
- `dense`: all experts on tensor cores, 4 T E H operations.
The floor is `hbm` or the cheapest of the other three, whichever is larger. With a backward pass it
is `hbm` alone: weights are read in both passes and dense weight gradients written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.cover import cover
from benchmarks.problems import Problem
from omni_moe import ops


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, per second, and where they come from."""

    copy_bytes: float
    l2_gather_bytes: float
    bf16_flops: float
    source: str


# Measured on one NVIDIA H200 with torch 2.11.0+cu130, 2026-11: device-to-device copy counting bytes
# read and written; random 2 KB rows read from an 8 MB table; 8192^3 bf16 product of random data.
H200 = Ceilings(4.25e12, 8.5e12, 798e12, "measured on an H200, 2026-11")


def ceilings_for(device: torch.device) -> Ceilings | None:
    """Known ceilings of the device, None where there are none."""
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        return H200
    return None


def measure_ceilings(device: torch.device, timed: Callable[[Callable], float]) -> Ceilings:
    """Copy bandwidth and matrix product rate, measured now; the L2 rate is the H200's constant.

    Args:
        timed: function that runs a call and returns its GPU time in microseconds.
    """
    source = torch.empty(2**31, dtype=torch.int8, device=device).random_()
    copy_us = timed(partial(torch.empty_like(source).copy_, source))
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    product_us = timed(partial(torch.matmul, a, b))
    return Ceilings(
        2 * 2**31 / copy_us * 1e6,
        H200.l2_gather_bytes,
        2 * 8192**3 / product_us * 1e6,
        "copy and matrix product measured in this run, L2 gather rate of an H200",
    )


def floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    """All floors of a case, in microseconds."""
    seconds = _FLOORS.get(problem.case.op, _no_floors)(problem, ceilings)
    return {name: value * 1e6 for name, value in seconds.items()}


def binding(case: Case, floors_us: dict[str, float]) -> str:
    """The name of the floor that counts."""
    on_chip = [name for name in ("l2_gather", "bands", "dense") if name in floors_us]
    if case.op != "expert" or case.pass_name == "forward_backward" or not on_chip:
        return next(iter(floors_us))
    cheapest = min(on_chip, key=floors_us.__getitem__)
    return max("hbm", cheapest, key=floors_us.__getitem__)


def _expert_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    case = problem.case
    element = problem.tensors["hidden_states"].element_size()
    return expert_floors(case, problem.tensors["indices_long"], element, ceilings)


def expert_floors(
    case: Case, indices: Tensor, element: int, ceilings: Ceilings
) -> dict[str, float]:
    """Floors of the expert op in seconds, for the ids of a case and bytes of an element."""
    shape = case.shape
    num_tokens, hidden_size, num_experts, k = (
        shape[name] for name in ("tokens", "hidden", "experts", "k")
    )
    is_train = case.pass_name == "forward_backward"
    token_bytes = num_tokens * hidden_size * element
    row_bytes = 2 * hidden_size * element  # of up and of down
    read = indices.unique().numel() * row_bytes
    choice_bytes = num_tokens * k * (element + 4)
    moved = read + 2 * token_bytes + choice_bytes
    if is_train:
        # Reads the rows again and the output's gradient; writes those of hidden states, routing
        # weights and, whole, the tables.
        moved += read + 2 * token_bytes + choice_bytes + num_experts * row_bytes
    passes = 3 if is_train else 1  # the backward has twice the products of the forward
    seconds = {
        "hbm": moved / ceilings.copy_bytes,
        "l2_gather": passes * num_tokens * k * row_bytes / ceilings.l2_gather_bytes,
        "dense": passes * 4 * num_tokens * num_experts * hidden_size / ceilings.bf16_flops,
    }
    if "cols" in shape:
        covered = cover(indices, shape["rows"], shape["cols"])
        computed = covered.row_tasks * shape["cols"] + covered.col_tasks * shape["rows"]
        tail = covered.tail_pairs * row_bytes / ceilings.l2_gather_bytes
        seconds["bands"] = passes * (4 * computed * hidden_size / ceilings.bf16_flops + tail)
    return seconds


def _router_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    shape = problem.case.shape
    element = problem.tensors["router_logits_x"].element_size()
    logits_bytes = shape["tokens"] * (shape["rows"] + shape["cols"]) * element
    moved = logits_bytes + shape["tokens"] * shape["k"] * (element + 4)
    if problem.case.pass_name == "forward_backward":
        moved += 2 * logits_bytes + shape["tokens"] * shape["k"] * (element + 4)
    return {"hbm": moved / ceilings.copy_bytes}


def mlp_flops(case: Case) -> int:
    """Three matrix products forward, six backward."""
    shape = case.shape
    forward = 6 * shape["tokens"] * shape["hidden"] * shape["intermediate"]
    return forward * (3 if case.pass_name == "forward_backward" else 1)


def _mlp_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    """Tensor cores, or the weights' bytes where there are few tokens."""
    shape, is_train = problem.case.shape, problem.case.pass_name == "forward_backward"
    weights = 3 * shape["hidden"] * shape["intermediate"]
    moved = 2 * weights * (3 if is_train else 1)
    seconds = {
        "tensor_core": mlp_flops(problem.case) / ceilings.bf16_flops,
        "hbm": moved / ceilings.copy_bytes,
    }
    largest = max(seconds, key=seconds.__getitem__)
    return {largest: seconds[largest]}


def _layer_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    """The sum of the floors of MLP, experts and the router's projections, one after another.

    The ids are drawn as a router would choose them from normal logits, which BatchNorm makes.
    """
    case = problem.case
    shape, device = case.shape, problem.grad_output.device
    generator = torch.Generator(device).manual_seed(0)
    logits_x, logits_y = (
        torch.randn(shape["tokens"], shape[side], device=device, generator=generator)
        for side in ("rows", "cols")
    )
    ids = ops.omni_softmax_router(logits_x, logits_y, shape["k"])[1]
    expert_case = replace(case, op="expert")
    expert = expert_floors(expert_case, ids, problem.grad_output.element_size(), ceilings)
    projections = 2 * shape["tokens"] * shape["hidden"] * (shape["rows"] + shape["cols"])
    passes = 3 if case.pass_name == "forward_backward" else 1
    total = (
        next(iter(_mlp_floors(problem, ceilings).values()))
        + expert[binding(expert_case, expert)]
        + passes * projections / ceilings.bf16_flops
    )
    return {"sum": total}


def _no_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    """A peer's own layer and a whole model have none."""
    return {}


def _topk_router_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    shape = problem.case.shape
    element = problem.grad_output.element_size()
    logits_bytes = shape["tokens"] * shape["experts"] * element
    choice_bytes = shape["tokens"] * shape["k"] * (element + 4)
    moved = logits_bytes + choice_bytes
    if problem.case.pass_name == "forward_backward":
        moved += logits_bytes + choice_bytes  # of a sigmoid only chosen logits are read again
    return {"hbm": moved / ceilings.copy_bytes}


def _permute_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    """Tokens and rows once each way; the backward also reads the rows for the weights' gradient."""
    shape = problem.case.shape
    element = problem.grad_output.element_size()
    token_bytes = shape["tokens"] * shape["hidden"] * element
    row_bytes = token_bytes * shape["k"]
    moved = 2 * (token_bytes + row_bytes)
    if problem.case.pass_name == "forward_backward":
        moved += 2 * token_bytes + 3 * row_bytes
    return {"hbm": moved / ceilings.copy_bytes}


def _moe_floors(problem: Problem, ceilings: Ceilings) -> dict[str, float]:
    """Tensor cores, or the bytes of the experts where these have few tokens each."""
    shape, is_train = problem.case.shape, problem.case.pass_name == "forward_backward"
    per_expert = 3 * shape["hidden"] * shape["intermediate"]
    operations = 2 * shape["tokens"] * shape["k"] * per_expert * (3 if is_train else 1)
    element = problem.grad_output.element_size()
    moved = shape["experts"] * per_expert * element * (3 if is_train else 1)
    seconds = {
        "tensor_core": operations / ceilings.bf16_flops,
        "hbm": moved / ceilings.copy_bytes,
    }
    largest = max(seconds, key=seconds.__getitem__)
    return {largest: seconds[largest]}


_FLOORS = {
    "expert": _expert_floors,
    "router": _router_floors,
    "mlp": _mlp_floors,
    "layer": _layer_floors,
    "topk_router": _topk_router_floors,
    "permute": _permute_floors,
    "moe": _moe_floors,
}

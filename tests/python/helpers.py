"""Devices, tolerances, oracles and inputs shared by the tests."""

import copy
import io
import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import omni_moe

# ---- devices and dtypes --------------------------------------------------------------------------


def _why_no_gpu() -> str:
    if not omni_moe.build_info()["cuda_version"]:
        return "the library was built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU"
    return ""


NO_GPU = _why_no_gpu()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
CUDA = pytest.param("cuda", marks=needs_gpu)
on_devices = pytest.mark.parametrize("device", ["cpu", CUDA])

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def _device_dtypes() -> list:
    params = []
    for device, (name, dtype) in itertools.product(("cpu", "cuda"), DTYPES.items()):
        if device == "cuda" and dtype == torch.float64:
            continue  # fp64 has no CUDA kernels
        marks = [needs_gpu] if device == "cuda" else []
        params.append(pytest.param(device, dtype, marks=marks, id=f"{device}-{name}"))
    return params


on_dtypes = pytest.mark.parametrize(("device", "dtype"), _device_dtypes())


def environment() -> dict[str, str]:
    """The environment of a process that is to import the same omni_moe as this one."""
    found_in = str(Path(omni_moe.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [found_in, inherited]))}


# ---- tolerances ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """What one dtype allows between a result and the fp64 oracle.

    rounding: largest relative error of rounding once to the dtype.
    accumulation: the same of the accumulator, in which sums are carried before that.
    tiny: half the distance of subnormal numbers, where rounding stops being relative.
    """

    rounding: float
    accumulation: float
    tiny: float


TOLERANCES = {
    torch.float64: Tolerance(rounding=2.0**-53, accumulation=2.0**-53, tiny=0),
    torch.float32: Tolerance(rounding=2.0**-24, accumulation=2.0**-24, tiny=2.0**-150),
    torch.float16: Tolerance(rounding=2.0**-11, accumulation=2.0**-24, tiny=2.0**-25),
    torch.bfloat16: Tolerance(rounding=2.0**-8, accumulation=2.0**-24, tiny=2.0**-134),
}


def assert_close(
    got: Tensor,
    want: Tensor,
    name: str = "result",
    *,
    num_terms: int = 1,
    intermediate_roundings: int = 0,
    accumulation_factor: float = 1,
    terms: float = 0,
) -> None:
    """`got` is the fp64 `want` rounded once to the dtype of `got`, in norm and elementwise.

    Args:
        got: result of the library.
        want: fp64 oracle.
        name: for the message.
        num_terms: length of the sums; their errors grow like its square root, on top of a few units
            in the last place for the functions of one element.
        intermediate_roundings: how many roundings to the dtype precede the last one, for functions
            that keep intermediate tensors in it. In norm they add up like independent errors.
        accumulation_factor: multiplies the tolerance of sums, for functions that lose more digits.
        terms: size of what was summed, where sums cancel: errors scale with it.
    """
    tolerance = TOLERANCES[got.dtype]
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    finite = want.isfinite()
    torch.testing.assert_close(
        got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True, msg=f"{name}: NaN and inf"
    )
    got, want = got[finite], want[finite]
    if want.numel() == 0:
        return
    assert got.isfinite().all(), f"{name}: not finite where the oracle is"

    loss = accumulation_factor * (8 + num_terms**0.5) * tolerance.accumulation
    error = (got - want).abs()
    scale = max(want.abs().max().item(), terms)
    allowed = tolerance.rounding * want.abs() + tolerance.tiny
    allowed += (loss + intermediate_roundings * tolerance.rounding) * scale
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: expected {want[worst]:.9g}, got {got[worst]:.9g}, "
        f"error {error[worst]:.3g} > {allowed[worst]:.3g}"
    )

    mean = want.square().mean().item() ** 0.5
    norm_error = error.square().mean().item() ** 0.5
    norm_allowed = (1 + intermediate_roundings) ** 0.5 * tolerance.rounding * mean
    norm_allowed += loss * max(mean, terms) + tolerance.tiny
    assert norm_error <= norm_allowed, f"{name}: norm error {norm_error} > {norm_allowed}"


def assert_bitwise(got: Tensor, want: Tensor, name: str = "result") -> None:
    """Same shape, dtype and values; NaN equals NaN."""
    torch.testing.assert_close(
        got, want, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


# ---- runs and copies -----------------------------------------------------------------------------


def run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """function(*inputs) and the gradients of all inputs for the output gradient `grad`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad))


def run_in_double(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """`run` on the CPU in fp64: the oracle of inputs in any dtype."""
    return run(function, [tensor.detach().cpu().double() for tensor in inputs], grad.cpu().double())


def strided(tensor: Tensor) -> Tensor:
    """The same values, every dimension non-contiguous."""
    wide = torch.empty([2 * size for size in tensor.shape[::-1]], dtype=tensor.dtype)
    wide = wide.to(tensor.device).permute(*range(tensor.dim())[::-1])
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


on_copies = pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])


def copied(module: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---- router --------------------------------------------------------------------------------------


def brute_force_router(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (in the dtype of x) and int32 ids: a sort of the full grid, sums in fp32 or fp64."""
    wide = np.float64 if x.dtype == torch.float64 else np.float32
    rows, cols = (t.detach().cpu().double().numpy().astype(wide) for t in (x, y))
    half = wide(0.5)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, finite sums past the largest
        sums = rows[:, :, None] + cols[:, None, :]
        halves = half * rows[:, :, None] + half * cols[:, None, :]
    sums, halves = (s.reshape(len(rows), rows.shape[1] * cols.shape[1]) for s in (sums, halves))
    nan = np.isnan(sums)
    ids = np.broadcast_to(np.arange(sums.shape[1]), sums.shape)
    beyond = np.where(np.isinf(sums), halves, 0)
    order = np.lexsort((ids, -beyond, -np.where(nan, 0, sums), ~nan), axis=-1)[:, :k]
    scores = torch.from_numpy(np.take_along_axis(sums, order, axis=-1))
    return scores.to(x.dtype), torch.from_numpy(order.astype(np.int32))


def router_scores(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    """x[row] + y[col] of the chosen ids, differentiable."""
    rows, cols = indices.long() // y.shape[1], indices.long() % y.shape[1]
    return x.gather(1, rows) + y.gather(1, cols)


def softmax_router_weights(x: Tensor, y: Tensor, indices: Tensor, norm_topk_prob: bool) -> Tensor:
    """Routing weights of the chosen ids, differentiable."""
    weights = router_scores(x.log_softmax(-1), y.log_softmax(-1), indices).exp()
    return weights / weights.sum(-1, keepdim=True) if norm_topk_prob else weights


def random_logits(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype, scale: float = 1
) -> tuple[Tensor, Tensor]:
    num_tokens, num_rows, num_cols = shape
    return tuple(
        (scale * torch.randn(num_tokens, size, dtype=torch.float64)).to(device, dtype)
        for size in (num_rows, num_cols)
    )


# ---- experts and MLP -----------------------------------------------------------------------------

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "identity")
GRADIENTS = ("grad_hidden", "grad_up", "grad_down", "grad_routing")


@dataclass(frozen=True)
class ExpertShape:
    num_tokens: int
    hidden_size: int
    num_experts: int
    num_experts_per_token: int

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}-H{self.hidden_size}-E{self.num_experts}"
            f"-K{self.num_experts_per_token}"
        )


def choose_experts(shape: ExpertShape, pattern: str = "random") -> Tensor:
    """(T, K) int64 ids: random, of a few experts only, of a single one, or one a token repeated."""
    size = (shape.num_tokens, shape.num_experts_per_token)
    if pattern == "random":
        return torch.randint(shape.num_experts, size)
    if pattern == "idle":
        return torch.randint((shape.num_experts + 3) // 4, size) * 3 % shape.num_experts
    if pattern == "one":
        return torch.full(size, shape.num_experts - 1)
    assert pattern == "duplicates", pattern
    return torch.randint(shape.num_experts, (size[0], 1)).expand(size)


def expert_inputs(
    shape: ExpertShape, device: str, dtype: torch.dtype, pattern: str = "random"
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden, up, down, routing], indices and an output gradient; scores of about unit size."""
    num_tokens, hidden_size = shape.num_tokens, shape.hidden_size
    weight_shape = (shape.num_experts, hidden_size)
    hidden = torch.randn(num_tokens, hidden_size)
    up = torch.randn(weight_shape) / hidden_size**0.5
    down = torch.randn(weight_shape) / hidden_size**0.5
    routing = torch.rand(num_tokens, shape.num_experts_per_token)
    floats = [tensor.to(device, dtype) for tensor in (hidden, up, down, routing)]
    grad = torch.randn(num_tokens, hidden_size).to(device, dtype)
    return floats, choose_experts(shape, pattern).to(device), grad


def mlp_inputs(
    leading: tuple[int, ...], hidden_size: int, intermediate_size: int, device: str, dtype
) -> tuple[list[Tensor], Tensor]:
    """[x, gate_weight, up_weight, down_weight] and an output gradient, all of about unit size."""
    x = torch.randn(*leading, hidden_size)
    gate = torch.randn(intermediate_size, hidden_size) / hidden_size**0.5
    up = torch.randn(intermediate_size, hidden_size) / hidden_size**0.5
    down = torch.randn(hidden_size, intermediate_size) / intermediate_size**0.5
    floats = [tensor.to(device, dtype) for tensor in (x, gate, up, down)]
    return floats, torch.randn(*leading, hidden_size).to(device, dtype)

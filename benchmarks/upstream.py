"""The Triton kernels published with the paper (HKUSTDial/omni-moe), loaded from a checkout.

Their package is named omni_moe too, so its modules are loaded by path under another name, and its
`__init__` files, which import parts with further dependencies, are not run.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case

_PACKAGE = "upstream_omni_moe_triton"
# An expert is a block of the grid's z axis there, whose limit this is.
_MOST_EXPERTS = 65536


class NotApplicable(Exception):
    """An implementation that cannot run a case; the message says why."""


def set_path(checkout: Path | None) -> None:
    """Makes the checkout's kernels importable."""
    if checkout is None:
        return
    directory = checkout / "omni_moe" / "ops" / "triton"
    if not directory.is_dir():
        raise FileNotFoundError(f"--upstream: no omni_moe/ops/triton in {checkout}")
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(directory)]
    sys.modules[_PACKAGE] = package


def expert(case: Case) -> Callable[..., Tensor]:
    """Their expert op, with the arguments of `omni_moe.ops.omni_expert`."""
    if case.dtype == "float64" or case.shape["experts"] > _MOST_EXPERTS:
        raise NotApplicable(f"upstream cannot launch more than {_MOST_EXPERTS} experts")
    _allow_backward_without_groups(_load("omni_scheduler"))
    return _load("omni_expert").OmniExpertFunc.apply


def softmax_router(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    """Their router between log_softmax and exp, as their layer calls it."""
    side, k = case.shape["rows"], case.shape["k"]
    if side != case.shape["cols"] or k % 2 or k > 128:
        raise NotApplicable("upstream needs a square grid and an even K of at most 128")
    function = _load("omni_router").OmniRouterFunc.apply

    def route(logits_x: Tensor, logits_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, indices = function(
            F.log_softmax(logits_x, dim=-1), F.log_softmax(logits_y, dim=-1), side, k
        )
        return scores.exp(), indices

    return route


def mlp() -> Callable[..., Tensor]:
    """Their MLP: matrix products by cuBLAS around their activation."""
    function = _load("omni_mlp").TritonSwiGLUFunc.apply
    return lambda x, gate, up, down: function(x @ gate.t(), x @ up.t()) @ down.t()


def _load(name: str) -> ModuleType:
    if _PACKAGE not in sys.modules:
        raise NotApplicable("no checkout of the published kernels was given (--upstream)")
    try:
        module = importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise NotApplicable(f"upstream's {name} does not import: {error}") from error
    if not hasattr(module, "_tuned_faster"):
        module._tuned_faster = True
        for kernel in list(vars(module).values()):
            if hasattr(kernel, "prune_configs"):  # a triton Autotuner
                _tune_faster(kernel)
    return module


def _tune_faster(kernel: Any) -> None:
    """Makes an Autotuner compile its configurations on all cores and time each for 25 ms.

    It tries the same ones, up to 108 a kernel, which takes minutes for a call when they are
    compiled one after the other.
    """
    from triton import AsyncCompileMode
    from triton.testing import do_bench

    kernel._do_bench = partial(do_bench, warmup=5, rep=20)
    run, compiled = kernel.run, set()

    def compile_and_run(*args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        key = tuple(arguments[name] for name in kernel.keys if name in arguments)
        if key not in compiled:
            compiled.add(key)
            # A configuration that does not compile is left to the tuner, which discards it.
            with (
                ThreadPoolExecutor(os.cpu_count()) as executor,
                AsyncCompileMode(executor, ignore_errors=True),
            ):
                kernel.warmup(*args, grid=grid, **kwargs)
        return run(*args, grid=grid, warmup=warmup, **kwargs)

    kernel.run = compile_and_run


def _allow_backward_without_groups(scheduler: ModuleType) -> None:
    """Their backward needs the empty groups that their scheduler leaves out: hand them in."""
    if hasattr(scheduler, "_unpatched"):
        return
    scheduler._unpatched = schedule = scheduler.get_scheduling_info

    def with_groups(routing_weights: Tensor, indices: Tensor, *args: object, **kwargs: object):
        info = schedule(routing_weights, indices, *args, **kwargs)
        if info.group_offsets is not None:
            return info
        no_ids = torch.empty(0, dtype=torch.int32, device=indices.device)
        return dataclasses.replace(
            info,
            group_token_ids=no_ids,
            group_expert_ids=no_ids.view(0, 16),
            group_routing_weights=torch.empty(
                0, 16, dtype=routing_weights.dtype, device=indices.device
            ),
            group_offsets=torch.zeros(1, dtype=torch.int32, device=indices.device),
            group_sorted_pair_ids=no_ids.view(0, 16),
        )

    scheduler.get_scheduling_info = with_groups

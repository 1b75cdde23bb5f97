"""Buffers, logits and runs of BatchNorm of both axes, ours and PyTorch's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from helpers import assert_bitwise
from torch import Tensor

import omni_moe

MOMENTUM, EPS = 0.3, 1e-5
HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Buffers:
    """The running statistics and counters of both axes, in the order of the arguments."""

    running_mean_x: Tensor
    running_var_x: Tensor
    num_batches_tracked_x: Tensor
    running_mean_y: Tensor
    running_var_y: Tensor
    num_batches_tracked_y: Tensor

    @classmethod
    def make(cls, num_rows: int, num_cols: int, device: str, dtype: torch.dtype) -> "Buffers":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stats = [
            make(size).to(device, wide)
            for size in (num_rows, num_cols)
            for make in (torch.randn, torch.rand)
        ]
        counts = [torch.tensor(count, device=device) for count in (5, 2)]
        return cls(*stats[:2], counts[0], *stats[2:], counts[1])

    def args(self) -> list[Tensor]:
        return list(vars(self).values())

    def map(self, function) -> "Buffers":
        return Buffers(*map(function, self.args()))

    def clone(self) -> "Buffers":
        return self.map(torch.clone)

    def double(self) -> "Buffers":
        return self.map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu().clone())


def make_logits(num_tokens, num_rows, num_cols, device, dtype, offset=0.0):
    width = num_rows + num_cols
    scale = torch.linspace(0.5, 3, width, dtype=torch.float64)
    means = offset + torch.linspace(-2, 2, width, dtype=torch.float64)
    return (torch.randn(num_tokens, width).double() * scale + means).to(device, dtype)


def normalise(logits, num_rows, buffers, training=True):
    """The BatchNorm alone: gates that pick the logits out as they are."""
    width = logits.shape[1]
    gates = torch.eye(width, dtype=logits.dtype, device=logits.device).tensor_split([num_rows])
    return omni_moe.ops.omni_router_logits(
        logits,
        *gates,
        buffers.args() if buffers else [],
        training=training,
        momentum=MOMENTUM,
        eps=EPS,
    )


def run_op(logits, num_rows, grads, buffers, training=True):
    leaf = logits.detach().requires_grad_()
    normed = normalise(leaf, num_rows, buffers, training)
    (grad,) = torch.autograd.grad(normed, leaf, grads)
    return [out.detach() for out in normed], grad


def run_stock(logits, num_rows, grads, buffers, training=True):
    """F.batch_norm in fp64, one call for each axis. Updates `buffers` (fp64)."""
    leaf = logits.detach().cpu().double().requires_grad_()
    stats = buffers.args()
    normed = [
        F.batch_norm(part, *stats[i : i + 2], training=training, momentum=MOMENTUM, eps=EPS)
        for part, i in zip(leaf.tensor_split([num_rows], dim=1), (0, 3), strict=True)
    ]
    (grad,) = torch.autograd.grad(normed, leaf, [g.cpu().double() for g in grads])
    return [out.detach() for out in normed], grad


def random_grads(num_tokens, num_rows, num_cols, device, dtype):
    return [torch.randn(num_tokens, size).to(device, dtype) for size in (num_rows, num_cols)]


def assert_same_run(got, want):
    for one, other in zip([*got[0], got[1]], [*want[0], want[1]], strict=True):
        assert_bitwise(one, other)

"""BatchNorm modules that a layer calls, where a mask leaves tokens out of the batch.

The layer's own operator takes the mask. What has to be called, a BatchNorm behind gates with
adapters, with hooks, wrapped, or over several processes, knows none: here its arithmetic is that of
PyTorch's operators over the tokens that count, while hooks and wrappers run as ever.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@contextlib.contextmanager
def batch_of_counted(norm: nn.Module, token_mask: Tensor | None) -> Iterator[None]:
    """Inside the block every BatchNorm in `norm` leaves out of its batch what the mask leaves out.

    BatchNorms that normalise by running statistics are left alone, as are all other modules.

    Args:
        norm: any module, called inside the block with (T, N) logits.
        token_mask: (T,) bool, or None: nothing changes.

    Raises:
        ValueError: a BatchNorm has a `forward` of its own, whose statistics are unknown.
    """
    replaced = []
    for module in () if token_mask is None else norm.modules():
        if not isinstance(module, _BatchNorm) or not _uses_batch(module):
            continue
        if type(module).forward not in _FORWARDS:
            raise ValueError(
                "token_mask: expected norms of the router that are BatchNorm1d or SyncBatchNorm, "
                f"got {type(module).__name__} with a forward of its own in training"
            )
        replaced.append((module, module.__dict__.get("forward")))
    try:
        for module, _ in replaced:
            module.forward = functools.partial(_masked_batch_norm, module, token_mask)
        yield
    finally:
        for module, forward in replaced:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _uses_batch(norm: _BatchNorm) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _masked_batch_norm(norm: _BatchNorm, token_mask: Tensor, logits: Tensor) -> Tensor:
    """(T, N) `norm` of the logits that count; 0 for the others. Does not wait for the device."""
    left_out = ~token_mask.unsqueeze(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(left_out, 0)
    total = _total_of(norm)
    sums = total(torch.cat([wide.sum(0), token_mask.sum().to(wide.dtype).reshape(1)]))
    count = sums[-1].detach()
    mean = sums[:-1] / count.clamp(min=1)
    centred = (wide - mean).masked_fill(left_out, 0)
    var = total(centred.square().sum(0)) / count.clamp(min=1)
    if norm.training and norm.track_running_stats:
        _update(norm, mean.detach(), var.detach(), count)
    normed = centred * (var + norm.eps).rsqrt()
    if norm.weight is not None:
        normed = (normed * norm.weight + norm.bias).masked_fill(left_out, 0)
    return normed.to(logits.dtype)


@torch.no_grad()
def _update(norm: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the mean over all batches
        momentum = 1 / norm.num_batches_tracked.to(mean.dtype)
    unbiased = var * count / (count - 1).clamp(min=1)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            moved = running + momentum * (batch - running)
            running.copy_(torch.where(count > 1, moved, running))  # one token has no variance


def _total_of(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """The sum of a tensor over the processes whose tokens are one batch."""
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        return functools.partial(all_reduce, group=norm.process_group or dist.group.WORLD)
    return lambda sums: sums

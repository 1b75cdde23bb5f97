"""What the routers of layers did in a forward, for code around the layers.

Losses that a model computes itself, its `router_logits` and the statistics of a training run are
made of it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from omni_moe.modules.omni_moe import OmniMoE

WITHOUT_GRADIENTS = (
    "router_loss: expected layers that ran with gradients enabled, got one that ran under "
    "no_grad in training mode; with activation checkpointing use use_reentrant=False"
)


class RouterOutputs(NamedTuple):
    """What the router of one layer made of the tokens of one forward."""

    logits_x: Tensor  # (T, R)
    logits_y: Tensor  # (T, C)
    indices: Tensor  # (T, K), in no particular order; -1 for tokens that do not count
    had_grad_enabled: bool
    token_mask: Tensor | None  # (T,) bool, which tokens count; None: all


@contextlib.contextmanager
def recording(layers: Iterable["OmniMoE"], recorders: Iterable[Any]) -> Iterator[None]:
    """Inside the block every forward of a layer appends its `RouterOutputs` to a recorder.

    Forwards that activation checkpointing repeats are left out.

    Args:
        layers: any.
        recorders: one for each layer, a list or what has an `append` as lists have it.
    """
    pairs = list(zip(layers, recorders, strict=True))
    for layer, recorder in pairs:
        layer._recorders = (*layer._recorders, recorder)
    try:
        yield
    finally:
        for layer, recorder in pairs:
            layer._recorders = tuple(one for one in layer._recorders if one is not recorder)


@contextlib.contextmanager
def recorded_router_outputs(layers: list["OmniMoE"]) -> Iterator[list[list[RouterOutputs]]]:
    """For each layer the list of what its router made in the forwards inside the block.

    Raises:
        RuntimeError: at the end, if gradients are enabled, but a layer in training mode ran without
            them, as reentrant activation checkpointing does: no loss would have an effect.
    """
    recorded = [[] for _ in layers]
    with recording(layers, recorded):
        yield recorded
    if torch.is_grad_enabled():
        for layer, outputs in zip(layers, recorded, strict=True):
            if layer.training and not all(one.had_grad_enabled for one in outputs):
                raise RuntimeError(WITHOUT_GRADIENTS)


def is_recorded(layers: list["OmniMoE"]) -> bool:
    """Whether code further out is inside `recorded_router_outputs`."""
    return any(isinstance(one, list) for layer in layers for one in layer._recorders)

"""The attention mask of a model as the token mask of its OmniMoE layers."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from omni_moe import OmniMoE
from omni_moe.modules.omni_moe import counting_tokens

_CHECKPOINT = "_gradient_checkpointing_func"


def with_token_mask(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
    """The `forward` of a model class, whose layers leave padding out.

    Blocks call their MLP with the hidden states alone, so the layers get the mask beside the call:
    an attention mask of two dimensions, nonzero where a token counts, of which the last S columns
    are those of the input. Other masks, of four dimensions or a dict of them, say nothing about
    single tokens; then the layers keep that of a model around this one, or have none.
    """
    names = list(inspect.signature(forward).parameters)
    if "attention_mask" not in names:
        return forward
    position = names.index("attention_mask") - 1  # behind self

    @functools.wraps(forward)
    def forward_with_token_mask(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        mask = args[position] if position < len(args) else kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return forward(self, *args, **kwargs)
        mask = mask if mask.dtype == torch.bool else mask != 0
        layers = [module for module in self.modules() if isinstance(module, OmniMoE)]
        with counting_tokens(layers, mask), _in_repeated_forwards(self, layers, mask):
            return forward(self, *args, **kwargs)

    return forward_with_token_mask


@contextlib.contextmanager
def _in_repeated_forwards(
    model: PreTrainedModel, layers: list[OmniMoE], mask: Tensor
) -> Iterator[None]:
    """What gradient checkpointing repeats of this forward, it repeats with the mask.

    Other forwards may come before the backward pass, so the mask is part of what is repeated.
    Compiled code needs none of this: it repeats what it has traced.
    """
    checkpointing = []
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        checkpointing = [
            (module, getattr(module, _CHECKPOINT))
            for module in model.modules()
            if _CHECKPOINT in module.__dict__
        ]
    for module, checkpoint in checkpointing:
        setattr(module, _CHECKPOINT, functools.partial(_checkpoint, checkpoint, layers, mask))
    try:
        yield
    finally:
        for module, checkpoint in checkpointing:
            setattr(module, _CHECKPOINT, checkpoint)


def _checkpoint(
    checkpoint: Callable[..., Any],
    layers: list[OmniMoE],
    mask: Tensor,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    def with_mask(*inputs: Any, **options: Any) -> Any:
        with counting_tokens(layers, mask):
            return function(*inputs, **options)

    return checkpoint(with_mask, *args, **kwargs)

"""What the integrations share: activation names, a model's OmniMoE layers, losses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from omni_moe import OmniMoE, router_loss

# Names of Transformers' activations, by the name of the same function here. gelu_new, gelu_fast and
# gelu_accurate are the tanh approximation, written out.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "linear": "identity",
}
_ACTIVATION_OF_TYPE = {type(ACT2FN[name]): ours for name, ours in ACTIVATIONS.items()}


def activation_name(activation: str | nn.Module | None, where: str = "") -> str:
    """Our name of an activation of Transformers, given by its name or as a module.

    Args:
        activation: the name or the module.
        where: what the error shall name besides, as "layer 3: ".

    Raises:
        ValueError: there is no kernel for it.
    """
    is_name = isinstance(activation, str)
    ours = ACTIVATIONS.get(activation) if is_name else _ACTIVATION_OF_TYPE.get(type(activation))
    if ours is None:
        got = repr(activation) if is_name else type(activation).__name__
        raise ValueError(f"{where}activation: expected one of {', '.join(ACTIVATIONS)}, got {got}")
    return ours


def omni_moe_layers(model: nn.Module) -> dict[str, OmniMoE]:
    """The OmniMoE layers of a model by name, in the order of the model.

    Where PEFT trains a copy of a layer (`modules_to_save`), the copy is returned, not the original.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OmniMoE) and not name.endswith("original_module")
    }


def num_active_parameters(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Parameters that take part in one token's output.

    All of them, except that of each OmniMoE layer's experts only K pairs of rows do. The total is
    `model.num_parameters()`.

    Args:
        model: any model with OmniMoE layers.
        exclude_embeddings: leave the token embeddings out. `num_parameters` leaves out the expert
            tables as well, which it takes for embeddings.
    """
    active = sum(parameter.numel() for parameter in model.parameters())
    for layer in omni_moe_layers(model).values():
        config = layer.config
        active -= 2 * (config.num_experts - config.num_experts_per_token) * config.hidden_size
    if exclude_embeddings:
        active -= model.get_input_embeddings().weight.numel()
    return active


def add_causal_lm(name: str) -> None:
    """Makes the Trainer shift the labels for models of this class under `label_smoothing_factor`.

    It then computes the loss itself, and tells causal language models by the names of classes.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = name


class ModelMixin:
    """What models with OmniMoE layers add to a `PreTrainedModel`."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """A class of this package counts as custom code only if the class underneath does.

        Transformers does not initialise those modules of custom code that have no weights of their
        own, although some of them fill the buffers of other modules.
        """
        base = next(base for base in cls.__mro__ if not base.__module__.startswith(__package__))
        if base is cls or cls.is_remote_code():
            return super().is_custom_code()
        return base.is_custom_code()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # The load counters are in no checkpoint, so loading leaves them uninitialised.
        for layer in omni_moe_layers(self).values():
            layer.reset_expert_load()

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """Parameters that take part in one token's output; all are `num_parameters()`."""
        return num_active_parameters(self, exclude_embeddings)


def with_router_loss(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
    """The `forward` of a model class, which adds the router losses of its layers to its loss.

    It does so in training, where `labels` make the model compute a loss. Signature and outputs stay
    those of `forward`; a forward without `labels` is returned as it is. A forward hook would not
    do, since PEFT calls the model's forward directly.
    """
    if "labels" not in inspect.signature(forward).parameters:
        return forward

    @can_return_tuple
    @functools.wraps(forward)
    def forward_with_router_loss(self: PreTrainedModel, *args: Any, **kwargs: Any) -> ModelOutput:
        outputs = forward(self, *args, return_dict=True, **kwargs)
        is_training = self.training and torch.is_grad_enabled()
        if outputs.loss is not None and is_training and _have_router_loss(self):
            share = _share_of_batch(self, **kwargs)
            outputs.loss = outputs.loss + (share * router_loss(self)).to(outputs.loss)
        return outputs

    return forward_with_router_loss


def _have_router_loss(model: nn.Module) -> bool:
    return any(layer.config.has_router_loss for layer in omni_moe_layers(model).values())


def _share_of_batch(
    model: PreTrainedModel,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor | float:
    """This forward's share of the items over which the Trainer averages the loss.

    Under gradient accumulation the model divides the loss of a micro-batch by the number of items
    in all micro-batches; the router's loss is a mean over its own micro-batch.
    """
    if num_items_in_batch is None or labels is None:
        return 1.0
    if shift_labels is not None:
        items = shift_labels
    else:
        is_shifted = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss  # as the Trainer has it
        items = labels[..., 1:] if is_shifted else labels
    return items.ne(-100).sum() / num_items_in_batch

"""What the integrations share: activation names, the OmniMoE layers of a model, their adapters."""

from torch import nn
from transformers.activations import ACT2FN

from omni_moe import OmniMoE

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


def activation_name(activation: str | nn.Module | None) -> str:
    """Our name of an activation of Transformers, given by its name or as a module.

    Raises:
        ValueError: there is no kernel for it.
    """
    is_name = isinstance(activation, str)
    ours = ACTIVATIONS.get(activation) if is_name else _ACTIVATION_OF_TYPE.get(type(activation))
    if ours is None:
        got = repr(activation) if is_name else type(activation).__name__
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {got}")
    return ours


def omni_moe_layers(model: nn.Module) -> dict[str, OmniMoE]:
    """The OmniMoE layers of a model by name, in the order of the model.

    Where PEFT trains a copy of a layer (`modules_to_save`), the copy.
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
        exclude_embeddings: leave the token embeddings out (other than `num_parameters`, which takes
            expert tables for embeddings too).
    """
    active = sum(parameter.numel() for parameter in model.parameters())
    for layer in omni_moe_layers(model).values():
        config = layer.config
        active -= 2 * (config.num_experts - config.num_experts_per_token) * config.hidden_size
    if exclude_embeddings:
        active -= model.get_input_embeddings().weight.numel()
    return active


class ModelMixin:
    """What models with OmniMoE layers add to a `PreTrainedModel`."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # The load counters are in no checkpoint, so loading leaves them uninitialised.
        for layer in omni_moe_layers(self).values():
            layer.reset_expert_load()

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """Parameters that take part in one token's output; all are `num_parameters()`."""
        return num_active_parameters(self, exclude_embeddings)


def refuse_ignored_adapters(layer: OmniMoE) -> None:
    """Makes the forward of `layer` raise where an adapter would be ignored.

    The layer's kernels read the expert tables without calling their modules, so what LoRA wraps
    around one would have no effect.
    """
    layer.register_forward_pre_hook(_raise_on_adapters)


def _raise_on_adapters(layer: OmniMoE, args: tuple) -> None:
    for name in ("up_embed", "down_embed"):
        if hasattr(getattr(layer, name), "base_layer"):
            raise RuntimeError(
                f"{name}: an adapter on this module of an OmniMoE layer would have no effect; "
                "leave it out of target_modules (every Linear works); to train the experts "
                'themselves use modules_to_save=["mlp"]'
            )

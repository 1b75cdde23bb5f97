"""What the integrations share: activation names, a model's OmniMoE layers, losses."""

import dataclasses
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from omni_moe import OmniMoE, load_balancing_loss, router_loss
from omni_moe.modules.omni_moe import weighted_router_loss
from omni_moe.modules.recording import RouterOutputs, is_recorded, recorded_router_outputs

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


class ConfigMixin:
    """What configs of models with OmniMoE layers add to a `PreTrainedConfig`."""

    # Names of model classes by those of the Auto classes that make them.
    _model_names: ClassVar[dict[str, str]] = {}

    @property
    def auto_map(self) -> dict[str, str]:
        """By its keys TRL chooses the Auto class that loads a checkpoint.

        It asks so where `transformers` has no class of the checkpoint's name. Transformers itself
        goes on using the classes of this package, which are registered, whatever stands here.
        """
        return self.__dict__.get("auto_map") or _AutoMap(self)

    @auto_map.setter
    def auto_map(self, value: dict[str, str]) -> None:
        self.__dict__["auto_map"] = value


class _AutoMap(dict):
    """Not saved with the config, except what is added: custom code that registers itself."""

    def __init__(self, config: ConfigMixin) -> None:
        super().__init__(config._model_names)
        self._config = config

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name, value)
        self._config.auto_map = {name: value}


def register(auto_class: type, config_class: type, model_class: Any) -> None:
    """Lets an Auto class make `model_class`, or one of several, for configs of `config_class`."""
    auto_class.register(config_class, model_class)
    first = model_class[0] if isinstance(model_class, tuple) else model_class
    name = f"{first.__module__}.{first.__name__}"
    config_class._model_names = config_class._model_names | {auto_class.__name__: name}


class ModelMixin:
    """What models with OmniMoE layers add to a `PreTrainedModel`."""

    # Quantisers leave these modules alone. A model loaded in fp16 has them in fp32, and one in bf16
    # those of the second list, the running statistics.
    _keep_in_fp32_modules: ClassVar[Any] = ["router_gate_x", "router_gate_y"]
    _keep_in_fp32_modules_strict: ClassVar[Any] = ["router_norm_[xy].running"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """A class of this package counts as custom code only if the class underneath does.

        Transformers does not initialise those modules of custom code that have no weights of their
        own, although some of them fill the buffers of other modules.
        """
        base = next(
            base
            for base in cls.__mro__
            if issubclass(base, PreTrainedModel) and not base.__module__.startswith(__package__)
        )
        if base is cls or cls.is_remote_code():
            return super().is_custom_code()
        return base.is_custom_code()

    def initialize_weights(self) -> None:
        fresh = [layer for layer in omni_moe_layers(self).values() if not is_initialized(layer)]
        super().initialize_weights()
        # The load counters are in no checkpoint, so loading leaves them uninitialised.
        for layer in fresh:
            layer.reset_expert_load()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # PEFT takes from it what an adapter is saved with; its prefix tells that a PeftModel asks.
        is_of_adapter = getattr(self, "_hf_peft_config_loaded", False) and not kwargs.get("prefix")
        if is_of_adapter or kwargs.get("prefix") in ("base_model.", "base_model.model."):
            _warn_of_unsaved_statistics(self)
        return super().state_dict(*args, **kwargs)

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """Parameters that take part in one token's output; all are `num_parameters()`."""
        return num_active_parameters(self, exclude_embeddings)

    def _follow_config(self) -> None:
        """Gives the layers the coefficients of the config, which trainers set between forwards."""
        config = self.config.get_text_config()
        for layer in self.modules():
            if isinstance(layer, OmniMoE):
                set_coefficients(layer, config.router_aux_loss_coef, config.router_z_loss_coef)


def _warn_of_unsaved_statistics(model: nn.Module) -> None:
    """Warns where an adapter leaves out running statistics, which its training has moved."""
    for name, layer in omni_moe_layers(model).items():
        norms = (layer.router_norm_x, layer.router_norm_y)
        are_plain = all(isinstance(norm, nn.modules.batchnorm._BatchNorm) for norm in norms)
        # A layer that is saved as a whole has plain norms, too.
        if are_plain and "modules_to_save" not in name and _has_moved(norms[0]):
            warnings.warn(
                "router_norm_x and router_norm_y: the adapter is saved without the running "
                "statistics of the routers, which training moves, and will compute something else "
                "when it is loaded; give its config "
                'modules_to_save=["router_norm_x", "router_norm_y"]',
                stacklevel=3,
            )
            return


def _has_moved(norm: nn.Module) -> bool:
    count = norm.num_batches_tracked
    return count is not None and not count.is_meta and bool(count > 0)


def is_initialized(module: nn.Module) -> bool:
    """Whether Transformers takes the module's own weights for initialised, and lets them be."""
    return getattr(module, "_is_hf_initialized", False)


def mark_initialized(modules: Iterable[nn.Module]) -> None:
    """Keeps `init_weights` of a model that holds the modules from drawing their weights anew."""
    for module in modules:
        module._is_hf_initialized = True


def set_coefficients(layer: OmniMoE, aux_loss: float, z_loss: float) -> None:
    """Changes the weights of a layer's router losses."""
    config = layer.config
    if (config.router_aux_loss_coef, config.router_z_loss_coef) != (aux_loss, z_loss):
        layer.config = dataclasses.replace(
            config, router_aux_loss_coef=aux_loss, router_z_loss_coef=z_loss
        )


# ---- router losses and logits --------------------------------------------------------------------


def with_router_outputs(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
    """The `forward` of a model class, with the losses and the logits of its layers' routers.

    In training the losses are part of `loss`. With `output_router_logits`, an argument or a field
    of the config, outputs have `router_logits` as Transformers' mixtures of experts have them, a
    tensor (T, E) for each layer; and those of a class with a loss have `aux_loss`, the sum of the
    load balancing losses, which then is part of `loss` in evaluation, too.

    The signature stays that of `forward`, and so do the outputs without `output_router_logits`. A
    forward hook would not do, since PEFT calls the model's forward directly.
    """
    parameters = inspect.signature(forward).parameters
    has_loss = "labels" in parameters

    @functools.wraps(forward)
    def forward_with_router_outputs(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        config = self.config.get_text_config()
        is_asked = not has_own_experts(config) and _is_asked(config, kwargs)
        if is_asked or (has_loss and _is_training(self)):
            return answer(self, *args, is_asked=is_asked, **kwargs)
        return forward(self, *args, **kwargs)

    @can_return_tuple
    def answer(self: PreTrainedModel, *args: Any, is_asked: bool, **kwargs: Any) -> ModelOutput:
        config = self.config.get_text_config()
        # All of them: without its adapter PEFT runs the layer of which it trains a copy.
        layers = [module for module in self.modules() if isinstance(module, OmniMoE)]
        # A model around this one asks the layers already, and answers.
        is_inner = is_recorded(layers)
        if has_loss and not is_inner:
            self._follow_config()
        if not is_asked or is_inner:
            outputs = forward(self, *args, return_dict=True, **kwargs)
            has_router_loss = any(layer.config.has_router_loss for layer in layers)
            if has_loss and not is_inner and has_router_loss and outputs.loss is not None:
                _add_to_loss(self, outputs, kwargs, router_loss(self))
            return outputs

        with recorded_router_outputs(layers) as recorded:
            outputs = forward(self, *args, return_dict=True, **kwargs)
        added = {"router_logits": dense_router_logits(recorded, config.num_experts)}
        if has_loss:
            added["aux_loss"], total = _losses(layers, recorded)
            _add_to_loss(self, outputs, kwargs, total)
        elif _is_training(self) and any(layer.config.router_z_loss_coef for layer in layers):
            warnings.warn(
                "router_z_loss_coef: router_logits are asked of a model without a loss, and who "
                "computes the loss from them leaves the z-loss out",
                stacklevel=2,
            )
        return moe_output_class(type(outputs))(**outputs, **added)

    return forward_with_router_outputs


def has_own_experts(config: PreTrainedConfig) -> bool:
    """Whether the config is that of a mixture of experts of Transformers.

    Those among its MLPs that are dense may have been replaced. The router logits and their loss are
    then those of its own experts.
    """
    return any(
        "output_router_logits" in vars(kind)
        for kind in type(config).__mro__
        if not kind.__module__.startswith(__package__)
    )


def _is_asked(config: PreTrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Takes `output_router_logits` out of the arguments; by default it is the config's."""
    value = kwargs.pop("output_router_logits", None)
    return getattr(config, "output_router_logits", False) if value is None else value


def _add_to_loss(
    model: PreTrainedModel, outputs: ModelOutput, kwargs: dict[str, Any], total: Tensor | None
) -> None:
    if outputs.loss is not None and total is not None:
        share = _share_of_batch(model, **kwargs)
        outputs.loss = outputs.loss + (share * total).to(outputs.loss)


def dense_router_logits(
    recorded: list[list[RouterOutputs]], num_experts: int
) -> tuple[Tensor, ...]:
    """For each layer the scores of all experts, (T, E), in the order of their ids, fp32 or wider.

    Experts that a smaller layer lacks score -inf.
    """
    logits = []
    for x, y, *_ in itertools.chain.from_iterable(recorded):
        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = (x.to(dtype).unsqueeze(2) + y.to(dtype).unsqueeze(1)).flatten(1)
        missing = num_experts - scores.shape[1]
        logits.append(nn.functional.pad(scores, (0, missing), value=-torch.inf))
    return tuple(logits)


_MOE_OUTPUT_CLASSES: dict[type[ModelOutput], type[ModelOutput]] = {
    BaseModelOutputWithPast: MoeModelOutputWithPast,
    CausalLMOutputWithPast: MoeCausalLMOutputWithPast,
}


def moe_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    """The class of outputs that are those of `base` with those of routers beside them."""
    if base not in _MOE_OUTPUT_CLASSES:
        fields = {"aux_loss": Tensor | None, "router_logits": tuple[Tensor, ...] | None}
        new = {name: kind for name, kind in fields.items() if not hasattr(base, name)}
        namespace = dict.fromkeys(new) | {"__annotations__": new, "__module__": __name__}
        made = dataclasses.dataclass(type(f"Moe{base.__name__}", (base,), namespace))
        _MOE_OUTPUT_CLASSES[base] = made
    return _MOE_OUTPUT_CLASSES[base]


def _is_training(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _losses(
    layers: list[OmniMoE], recorded: list[list[RouterOutputs]]
) -> tuple[Tensor, Tensor | None]:
    """The sum of the load balancing losses, and all losses in the weights of the layers."""
    balances, totals = [], []
    for layer, outputs in zip(layers, recorded, strict=True):
        for x, y, indices, _, token_mask in outputs:
            balances.append(load_balancing_loss(x, y, indices, token_mask))
            totals.append(weighted_router_loss(layer.config, x, y, indices, token_mask))
    # Layers of a model may lie on several devices.
    device = balances[0].device
    balance = sum(loss.to(device) for loss in balances)
    totals = [loss.to(device) for loss in totals if loss is not None]
    return balance, sum(totals) if totals else None


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

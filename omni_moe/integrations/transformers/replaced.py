"""Classes of models changed by `replace_mlp`, made on demand from those of Transformers.

A replaced `LlamaForCausalLM` is an `OmniMoeLlamaForCausalLM`, a subclass that builds the recorded
layers, and its config an `OmniMoeLlamaConfig`. On disk the config's model type is
"omni_moe_replaced", which Auto classes know once this package is imported. Before that they refuse
the checkpoint, and so do not load a model that lacks its experts. In memory `model_type` stays that
of the base, since other libraries decide by it.
"""

import copy
import functools
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import output_capturing

from omni_moe import OmniMoE
from omni_moe.integrations.transformers.layers import (
    ConfigMixin,
    ModelMixin,
    add_causal_lm,
    has_own_experts,
    mark_initialized,
    omni_moe_layers,
    register,
    set_coefficients,
    with_router_outputs,
)
from omni_moe.integrations.transformers.surgery import build_layers, decoder_blocks, put_in_place
from omni_moe.integrations.transformers.token_mask import with_token_mask

MODEL_TYPE = "omni_moe_replaced"
_PREFIX = "OmniMoe"
# All that make a model from its config alone.
_AUTO_CLASSES = [
    getattr(transformers, name)
    for name in sorted(modeling_auto.__all__)
    if name.startswith("AutoModel") and hasattr(getattr(transformers, name), "_model_mapping")
]


class _ReplacedConfigMixin(ConfigMixin):
    """`omni_moe["replaced"]` holds the arguments of each `replace_mlp`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), "model_type": MODEL_TYPE}


class _ReplacedModelMixin(ModelMixin):
    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _declare_experts(config)
        _adopt(self.base_model, type(config))
        if not omni_moe_layers(self):  # classifiers get their decoder from AutoModel, replaced
            blocks = decoder_blocks(self)
            for arguments in config.omni_moe["replaced"]:
                put_in_place(blocks, build_layers(blocks, **arguments))
            self.post_init()

    def _follow_config(self) -> None:
        text_config = self.config.get_text_config()
        if has_own_experts(text_config):
            return
        aux_loss = text_config.router_aux_loss_coef
        recorded = _largest(self.config.omni_moe["replaced"], "router_aux_loss_coef")
        for layer in self.modules():
            if isinstance(layer, OmniMoE) and hasattr(layer, "given_coefficients"):
                # Each call of `replace_mlp` has its own coefficients, until somebody sets one.
                own, z_loss = layer.given_coefficients
                set_coefficients(layer, own if aux_loss == recorded else aux_loss, z_loss)


@functools.cache
def replaced_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The subclass of a config class that records replaced layers, registered with Auto classes."""
    namespace = {"__module__": __name__}
    if base.base_model_tp_plan:
        # No tensor parallelism in the MLPs: the layer's kernels take whole weights.
        namespace["base_model_tp_plan"] = {
            name: plan
            for name, plan in base.base_model_tp_plan.items()
            if not name.endswith(("gate_proj", "up_proj", "down_proj"))
        }
    replaced = type(_PREFIX + base.__name__, (_ReplacedConfigMixin, base), namespace)
    for auto_class in _AUTO_CLASSES:
        found = auto_class._model_mapping.get(base, None)
        classes = found if isinstance(found, tuple) else (found,)
        # Where the class is that of a part of the model, the part's config would be a dense one.
        whole = [one for one in classes if getattr(one, "config_class", None) is base]
        made = tuple(replaced_model_class(one, replaced) for one in whole)
        if made:
            register(auto_class, replaced, made if isinstance(found, tuple) else made[0])
    return replaced


@functools.cache
def replaced_model_class(
    base: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """The subclass of a model class that builds the layers recorded in its config.

    Its loss includes those of the routers.
    """
    namespace = {
        "__module__": __name__,
        "config_class": config_class,
        "forward": with_token_mask(with_router_outputs(base.forward)),
    }
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        namespace[name] = {*(getattr(base, name) or ()), *getattr(ModelMixin, name)}
    replaced = type(_PREFIX + base.__name__, (_ReplacedModelMixin, base), namespace)
    if base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        add_causal_lm(replaced.__name__)
    return replaced


def mark_replaced(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Records one `replace_mlp` in a config of the model's own, and changes the model's class."""
    if not isinstance(model, _ReplacedModelMixin):
        old_config = model.config
        config = copy.deepcopy(old_config)
        config.omni_moe = {"base_model_type": config.model_type, "replaced": []}
        if not isinstance(config, _ReplacedConfigMixin):
            config.__class__ = replaced_config_class(type(config))
        for module in model.modules():
            if getattr(module, "config", None) is old_config:
                module.config = config
        _adopt(model, type(config))
        _adopt(model.base_model, type(config))
    replaced, text_config = model.config.omni_moe["replaced"], model.config.get_text_config()
    if not has_own_experts(text_config):
        # Unless somebody has changed the coefficient, it follows the calls.
        if vars(text_config).get("router_aux_loss_coef") == _largest(
            replaced, "router_aux_loss_coef"
        ):
            del text_config.router_aux_loss_coef
    replaced.append(arguments)
    _declare_experts(model.config)
    # As those of a loaded model, the layers' weights are there to stay.
    for layer in omni_moe_layers(model).values():
        mark_initialized(layer.modules())


def _adopt(model: PreTrainedModel, config_class: type[PreTrainedConfig]) -> None:
    """Changes the class of a model, or of the decoder inside it, to the replaced one.

    The decoder answers for its routers as well: trainers that compute losses from hidden states
    call it alone.
    """
    if isinstance(model, _ReplacedModelMixin) or type(model.config) is not config_class:
        return
    model.__class__ = replaced_model_class(type(model), config_class)
    _let_outputs_be_recorded(model)
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        setattr(model, name, {*(getattr(model, name) or ()), *getattr(ModelMixin, name)})


def _let_outputs_be_recorded(model: PreTrainedModel) -> None:
    """Registers the model's new class, as PreTrainedModel.__init__ does, for `hidden_states`."""
    # Transformers keys this table by the class's name, and has changed how it passes the key.
    dict.__setitem__(
        output_capturing._CAN_RECORD_REGISTRY, str(model.__class__), model._can_record_outputs
    )


def _largest(replaced: list[dict[str, Any]], name: str) -> Any:
    return max([0, *(arguments.get(name, 0) for arguments in replaced)])


def _declare_experts(config: PreTrainedConfig) -> None:
    """Gives the config the fields by which trainers know a mixture of experts, where it has none.

    After several calls of `replace_mlp` they are the largest of each.
    """
    text_config, replaced = config.get_text_config(), config.omni_moe["replaced"]
    if has_own_experts(text_config):
        return
    fields = vars(text_config)
    fields.setdefault("router_aux_loss_coef", _largest(replaced, "router_aux_loss_coef"))
    fields.setdefault("output_router_logits", False)
    text_config.num_experts = _largest(replaced, "num_experts")
    text_config.num_experts_per_tok = _largest(replaced, "num_experts_per_token")


class ReplacedConfig(PreTrainedConfig):
    """Stands for all replaced configs with `AutoConfig`, which then makes the right one."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        base_type = config_dict["omni_moe"]["base_model_type"]
        if base_type not in CONFIG_MAPPING:
            raise ValueError(
                f"config: expected a base_model_type that AutoConfig knows, got {base_type!r}; "
                "import the package that registers it"
            )
        return replaced_config_class(CONFIG_MAPPING[base_type]).from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, ReplacedConfig)


def __getattr__(name: str) -> type:
    """Classes by name, which pickle needs: `OmniMoeLlamaForCausalLM` and so on."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None)
    if name.startswith(_PREFIX) and isinstance(base, type):
        if issubclass(base, PreTrainedConfig):
            return replaced_config_class(base)
        if issubclass(base, PreTrainedModel):
            return replaced_model_class(base, replaced_config_class(base.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import output_capturing

from omni_moe.integrations.transformers.layers import (
    ModelMixin,
    add_causal_lm,
    omni_moe_layers,
    with_router_loss,
)
from omni_moe.integrations.transformers.surgery import build_layers, decoder_blocks, put_in_place

MODEL_TYPE = "omni_moe_replaced"
_PREFIX = "OmniMoe"
_AUTO_CLASSES = (
    transformers.AutoModel,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForImageTextToText,
)


class _ReplacedConfigMixin:
    """`omni_moe["replaced"]` holds the arguments of each `replace_mlp`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), "model_type": MODEL_TYPE}


class _ReplacedModelMixin(ModelMixin):
    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not omni_moe_layers(self):  # classifiers get their decoder from AutoModel, replaced
            blocks = decoder_blocks(self)
            for arguments in config.omni_moe["replaced"]:
                put_in_place(blocks, build_layers(blocks, **arguments))
            self.post_init()


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
        model_class = auto_class._model_mapping.get(base, None)
        if isinstance(model_class, type):
            auto_class.register(replaced, replaced_model_class(model_class, replaced))
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
        "forward": with_router_loss(base.forward),
    }
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
        model.__class__ = replaced_model_class(type(model), type(config))
        _let_outputs_be_recorded(model)
    model.config.omni_moe["replaced"].append(arguments)


def _let_outputs_be_recorded(model: PreTrainedModel) -> None:
    """Registers the model's new class, as PreTrainedModel.__init__ does, for `hidden_states`."""
    # Transformers keys this table by the class's name, and has changed how it passes the key.
    dict.__setitem__(
        output_capturing._CAN_RECORD_REGISTRY, str(model.__class__), model._can_record_outputs
    )


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

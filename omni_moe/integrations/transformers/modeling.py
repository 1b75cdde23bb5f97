"""The OmniMoE language model: Transformers' Qwen3 decoder with OmniMoE layers for MLPs."""

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    Qwen3PreTrainedModel,
)
from transformers.modeling_layers import GenericForQuestionAnswering

from omni_moe import OmniMoE
from omni_moe.integrations.transformers.configuration import OmniMoeConfig
from omni_moe.integrations.transformers.layers import (
    ModelMixin,
    add_causal_lm,
    register,
    with_router_outputs,
)
from omni_moe.integrations.transformers.token_mask import with_token_mask


class OmniMoeModel(ModelMixin, Qwen3Model):
    """The decoder without a head: `input_ids` (B, S) to `last_hidden_state` (B, S, H).

    Arguments, outputs and caches are those of `transformers.Qwen3Model`.
    """

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    forward = with_token_mask(with_router_outputs(Qwen3Model.forward))

    def __init__(self, config: OmniMoeConfig) -> None:
        super().__init__(config)
        layer_config = config.layer_config()
        for block in self.layers:
            block.mlp = OmniMoE(layer_config)
        self.post_init()


class OmniMoeForCausalLM(ModelMixin, Qwen3ForCausalLM):
    """The language model: `input_ids` (B, S) to `logits` (B, S, vocab_size).

    Arguments, outputs, generation and caches are those of `transformers.Qwen3ForCausalLM`. In
    training the losses of the routers, if the config has any, are part of `loss`. With
    `output_router_logits=True`, here or in the config, outputs are those of Transformers' mixtures
    of experts: `router_logits`, for each layer a tensor (B * S, E) in fp32, and `aux_loss`, the sum
    of the layers' load balancing losses, which then is part of `loss` in evaluation, too.
    """

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    forward = with_token_mask(with_router_outputs(Qwen3ForCausalLM.forward))

    def __init__(self, config: OmniMoeConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # past the one that makes a Qwen3Model
        self.model = OmniMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class OmniMoeForSequenceClassification(ModelMixin, Qwen3ForSequenceClassification):
    """`OmniMoeModel` with a linear head on the last token, for classes or a reward."""

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    forward = with_token_mask(with_router_outputs(Qwen3ForSequenceClassification.forward))


class OmniMoeForTokenClassification(ModelMixin, Qwen3ForTokenClassification):
    """`OmniMoeModel` with a linear head on every token."""

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    forward = with_token_mask(with_router_outputs(Qwen3ForTokenClassification.forward))


class OmniMoeForQuestionAnswering(ModelMixin, GenericForQuestionAnswering, Qwen3PreTrainedModel):
    """`OmniMoeModel` with logits for the first and the last token of an answer."""

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    forward = with_token_mask(with_router_outputs(GenericForQuestionAnswering.forward))


AutoConfig.register("omni_moe", OmniMoeConfig)
for auto_class, model_class in (
    (AutoModel, OmniMoeModel),
    (AutoModelForCausalLM, OmniMoeForCausalLM),
    (AutoModelForSequenceClassification, OmniMoeForSequenceClassification),
    (AutoModelForTokenClassification, OmniMoeForTokenClassification),
    (AutoModelForQuestionAnswering, OmniMoeForQuestionAnswering),
):
    register(auto_class, OmniMoeConfig, model_class)
add_causal_lm(OmniMoeForCausalLM.__name__)

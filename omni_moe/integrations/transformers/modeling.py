"""The OmniMoE language model: Transformers' Qwen3 decoder with OmniMoE layers for MLPs."""

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from omni_moe import OmniMoE
from omni_moe.integrations.transformers.configuration import OmniMoeConfig
from omni_moe.integrations.transformers.layers import ModelMixin, add_causal_lm, with_router_loss


class OmniMoeModel(ModelMixin, Qwen3Model):
    """The decoder without a head: `input_ids` (B, S) to `last_hidden_state` (B, S, H).

    Arguments, outputs and caches are those of `transformers.Qwen3Model`.
    """

    config: OmniMoeConfig
    config_class = OmniMoeConfig

    def __init__(self, config: OmniMoeConfig) -> None:
        super().__init__(config)
        layer_config = config.layer_config()
        for block in self.layers:
            block.mlp = OmniMoE(layer_config)
        self.post_init()


class OmniMoeForCausalLM(ModelMixin, Qwen3ForCausalLM):
    """The language model: `input_ids` (B, S) to `logits` (B, S, vocab_size).

    Arguments, outputs, generation and caches are those of `transformers.Qwen3ForCausalLM`. In
    training the losses of the routers, if the config has any, are part of `loss`.
    """

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    forward = with_router_loss(Qwen3ForCausalLM.forward)

    def __init__(self, config: OmniMoeConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # past the one that makes a Qwen3Model
        self.model = OmniMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("omni_moe", OmniMoeConfig)
AutoModel.register(OmniMoeConfig, OmniMoeModel)
AutoModelForCausalLM.register(OmniMoeConfig, OmniMoeForCausalLM)
add_causal_lm(OmniMoeForCausalLM.__name__)

"""Small random models of Transformers' own classes."""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    SmolLM3Config,
)

from omni_moe.integrations.transformers import OmniMoeConfig, omni_moe_layers, replace_mlp

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 64, "num_experts_per_token": 4}

FAMILIES = {
    config_class.__name__.removesuffix("Config"): config_class
    for config_class in (
        *(LlamaConfig, Qwen3Config, MistralConfig, Gemma2Config, Gemma3TextConfig, SmolLM3Config),
    )
}


def family_config(family: str, **options) -> PreTrainedConfig:
    return FAMILIES[family](**(SIZES | options))


def dense_model(family: str = "Llama", **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(family_config(family, **options)).eval()


def omni_config(**options) -> OmniMoeConfig:
    return OmniMoeConfig(**(SIZES | EXPERTS | options))


def omni_model(**options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(omni_config(**options)).eval()


def replaced_model(family: str = "Llama", **options) -> PreTrainedModel:
    """A model whose replaced layers have experts with outputs other than zero."""
    return wake_experts(replace_mlp(dense_model(family), **EXPERTS, **options))


def vision_language_model(family: str = "Qwen2_5_VL") -> PreTrainedModel:
    text = {name: size for name, size in SIZES.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"intermediate_size": 16, "depth": 2, "num_heads": 2}
    if family == "Qwen2VL":
        config_class, model_class = Qwen2VLConfig, Qwen2VLForConditionalGeneration
        vision |= {"embed_dim": 16, "hidden_size": 32}
    else:
        config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        vision |= {"hidden_size": 16, "out_hidden_size": 32}
    config = config_class(text_config=text | {"rope_parameters": rope}, vision_config=vision)
    return model_class(config)


def audio_language_model() -> PreTrainedModel:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 8}
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2"} | SIZES,
        audio_config=audio | {"encoder_ffn_dim": 16, "max_source_positions": 8},
    )
    return Qwen2AudioForConditionalGeneration(config)


def wake_experts(model: PreTrainedModel) -> PreTrainedModel:
    for layer in omni_moe_layers(model).values():
        nn.init.normal_(layer.down_embed.weight)
        nn.init.normal_(layer.router_norm_x.running_mean)
    return model


def random_ids(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(3, VOCAB, shape or (2, 11)).to(device)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits

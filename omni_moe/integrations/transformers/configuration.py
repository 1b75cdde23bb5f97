"""Configuration of the OmniMoE language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from omni_moe.config import OmniMoEConfig
from omni_moe.integrations.transformers.layers import ConfigMixin, activation_name


@strict
class OmniMoeConfig(ConfigMixin, Qwen3Config):
    """A decoder with grouped-query attention, rotary positions, RMSNorm and OmniMoE layers.

    The fields of `Qwen3Config`, of which `intermediate_size` is the width of the shared MLP and
    `hidden_act` (Transformers' name) the activation of MLP and experts, and those of an OmniMoE
    layer, `omni_moe.OmniMoEConfig`: `num_experts`, `num_experts_per_token` (`num_experts_per_tok`
    means the same), `norm_topk_prob`, `expert_grid`, `router_norm`, `track_expert_load`,
    `router_aux_loss_coef`, `router_z_loss_coef` and `router_jitter_noise`. With
    `output_router_logits` models return `router_logits` and `aux_loss`, see `OmniMoeForCausalLM`.

    Raises:
        ValueError: a field of the layer has a value it cannot have.
    """

    model_type = "omni_moe"
    attribute_map = {"num_experts_per_tok": "num_experts_per_token"}  # noqa: RUF012
    # Attention only: the layer's kernels take whole weights.
    base_model_tp_plan = {  # noqa: RUF012
        name: plan for name, plan in Qwen3Config.base_model_tp_plan.items() if ".mlp." not in name
    }

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 4
    head_dim: int = 64
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True
    num_experts: int = 102400
    num_experts_per_token: int = 512
    norm_topk_prob: bool = False
    expert_grid: list[int] | tuple[int, ...] | None = None
    router_norm: str = "batch_norm"
    track_expert_load: bool = False
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_jitter_noise: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.layer_config()  # checks the values

    def layer_config(self) -> OmniMoEConfig:
        """Configuration of one OmniMoE layer."""
        return OmniMoEConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            hidden_act=activation_name(self.hidden_act),
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
            norm_topk_prob=self.norm_topk_prob,
            expert_grid=None if self.expert_grid is None else tuple(self.expert_grid),
            router_norm=self.router_norm,
            initializer_range=self.initializer_range,
            track_expert_load=self.track_expert_load,
            router_aux_loss_coef=self.router_aux_loss_coef,
            router_z_loss_coef=self.router_z_loss_coef,
            router_jitter_noise=self.router_jitter_noise,
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "OmniMoeConfig":
        """One of `PRESETS`, with any field overridden.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**(PRESETS[name] | overrides))


def _preset(layers: int, hidden_size: int, heads: int, key_value_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 64,
        "num_experts": 320 * 320,
        "num_experts_per_token": 512,
    }


# Layers x hidden size of the paper's four models. The grid, K and a shared MLP as wide as the model
# are those of its latency setup (Table A); the attention heads are this library's choice.
PRESETS = {
    "12x768": _preset(12, 768, heads=12, key_value_heads=4),
    "16x1024": _preset(16, 1024, heads=16, key_value_heads=4),
    "24x1536": _preset(24, 1536, heads=24, key_value_heads=8),
    "28x2048": _preset(28, 2048, heads=32, key_value_heads=8),
}

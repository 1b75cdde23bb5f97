"""The mixture of experts of Doge on this library's kernels, with its parameters as they are.

`DogeCDMoE` names the expert tables the other way round: `down_embed` scores, `up_embed` projects
back. One Linear, `router_gate` (2n, H), makes the logits of rows and columns; the routing weights
are the softmax of the K selected scores.
"""

import math

from torch import Tensor, nn
from transformers import DogeConfig
from transformers.models.doge.modeling_doge import DogeCDMoE

from omni_moe.integrations.transformers.layers import activation_name
from omni_moe.ops import flash_expert, omni_router

ROUTER_LAYOUTS = ("hf_view", "split")


class OmniDogeCDMoE(DogeCDMoE):
    """`transformers` `DogeCDMoE` with the same parameters, outputs and state dict.

    Args:
        config: of the Doge model; `num_experts` must be a square, since the stock module never
            reaches the experts past the largest square.
        router_layout: how the router's (T, 2n) logits split into those of rows and columns.
            "hf_view" is the stock module's: the buffer is read as (2, T, n), so that a token is
            routed by logits of other tokens. "split" gives each token its own: the first n for rows
            and the others for columns.

    Shape:
        Input (B, S, H); output (B, S, H) and the logits (2, B * S, n), as the stock module returns
        them.

    Raises:
        ValueError: `num_experts` is no square, an unknown layout, or an activation without kernels.
    """

    def __init__(self, config: DogeConfig, router_layout: str = "hf_view") -> None:
        _check(config.num_experts, config.hidden_act, router_layout)
        super().__init__(config)
        self.router_layout = router_layout

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.flatten(0, 1)
        router_logits = self._router_logits(tokens)
        scores, indices = omni_router(*router_logits, self.num_keys, self.top_k)
        expert_states = flash_expert(
            tokens,
            down_weights=self.down_embed.weight,
            up_weights=self.up_embed.weight,
            indices=indices,
            routing_weights=scores.softmax(-1),
            activation=activation_name(self.act_fn),
        )
        # Called as modules, since Doge may have biases here; adapters work for the same reason.
        shared_states = self.down_proj(self.act_fn(self.gate_proj(tokens)) * self.up_proj(tokens))
        return (shared_states + expert_states).view_as(hidden_states), router_logits

    def _router_logits(self, tokens: Tensor) -> Tensor:
        """(2, T, n): logits of rows and of columns."""
        logits = self.router_gate(tokens)
        if self.router_layout == "hf_view":
            return logits.view(2, len(tokens), self.num_keys)
        return logits.view(len(tokens), 2, self.num_keys).transpose(0, 1)

    def extra_repr(self) -> str:
        return f"router_layout={self.router_layout}"


def replace_doge_moe(model: nn.Module, router_layout: str = "hf_view") -> nn.Module:
    """Puts `OmniDogeCDMoE` in place of every `DogeCDMoE` of `model`, keeping its parameters.

    The model stays a Doge model: checkpoints are those of the stock classes.

    Args:
        model: a Doge model with `config.is_moe`; changed in place.
        router_layout: see `OmniDogeCDMoE`.

    Returns:
        `model`.

    Raises:
        ValueError: there is no `DogeCDMoE`, or one that `OmniDogeCDMoE` cannot be.
    """
    modules = {n: module for n, module in model.named_modules() if isinstance(module, DogeCDMoE)}
    if not modules:
        raise ValueError(
            f"model: expected a Doge model with config.is_moe=True, got {type(model).__name__} "
            "without a DogeCDMoE"
        )
    for name, module in modules.items():
        _check(module.num_experts, module.act_fn, router_layout, where=f"{name}: ")
    for module in modules.values():
        # Only the forward differs, so the module is kept, with its hooks and parameters.
        module.__class__ = OmniDogeCDMoE
        module.router_layout = router_layout
    return model


def _check(
    num_experts: int, activation: str | nn.Module, router_layout: str, where: str = ""
) -> None:
    if math.isqrt(num_experts) ** 2 != num_experts:
        raise ValueError(f"{where}num_experts: expected a square, got {num_experts}")
    if router_layout not in ROUTER_LAYOUTS:
        raise ValueError(
            f"router_layout: expected one of {', '.join(ROUTER_LAYOUTS)}, got {router_layout!r}"
        )
    activation_name(activation, where)

"""Experts that are MLPs, as those of Mixtral, Qwen3-MoE and DeepSeek-V3, for the experts interface.

The model keeps its modules and weights, and its experts run this library's kernels.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.integrations import moe

from omni_moe.integrations.transformers.layers import activation_name
from omni_moe.modules.mixture_of_experts import gated_activation, grouped_experts


def omni_moe_grouped_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`out[t] = sum_k weight[t,k] * E_idx[t,k](hidden[t])`, see `grouped_experts`.

    Registered as "omni_moe_grouped": `from_pretrained(..., experts_implementation=...)` or
    `model.set_experts_implementation("omni_moe_grouped")`. Gates and activations that have no
    kernel here run as the module defines them.

    Args:
        self: the experts module, with `gate_up_proj` (E, 2I, H) or `up_proj` (E, I, H) and
            `down_proj` (E, H, I), or the last two dimensions of each exchanged where
            `is_transposed`; biases where `has_bias`.
        hidden_states: (T, H).
        top_k_index: (T, K) integers >= 0. Ids >= E, which mark experts of other processes and
            masked tokens, contribute nothing.
        top_k_weights: (T, K).

    Returns:
        (T, H) in the dtype of `hidden_states`.

    Raises:
        ValueError: the experts have a norm after each of them.
    """
    if getattr(self, "has_post_expert_norm", False):
        raise ValueError(
            f"experts_implementation='omni_moe_grouped': expected {type(self).__name__} to have "
            "no norm after each expert, got has_post_expert_norm=True"
        )
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up_proj, down_proj = getattr(self, up_name), self.down_proj
    if self.is_transposed:
        up_proj, down_proj = up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    output = grouped_experts(
        hidden_states.to(up_proj.dtype),
        top_k_index.where(top_k_index < len(down_proj), -1),
        top_k_weights,
        up_proj=up_proj,
        down_proj=down_proj,
        activate=_activation(self),
        up_bias=getattr(self, f"{up_name}_bias") if self.has_bias else None,
        down_bias=self.down_proj_bias if self.has_bias else None,
    )
    return output.to(hidden_states.dtype)


def _activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """What is between the two layers: our kernel where it computes the same."""
    if not experts.has_gate:
        return experts.act_fn
    if type(experts)._apply_gate is not moe._default_apply_gate:  # of the model's own
        return experts._apply_gate
    try:
        name = activation_name(experts.act_fn)
    except ValueError:  # there is no kernel for it
        return experts._apply_gate
    return lambda gate_up: gated_activation(gate_up, name)


moe.ALL_EXPERTS_FUNCTIONS.register("omni_moe_grouped", omni_moe_grouped_experts_forward)

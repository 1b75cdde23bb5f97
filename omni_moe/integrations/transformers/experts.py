"""Atomic experts of other models: an experts implementation for Transformers' experts interface."""

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from omni_moe.integrations.transformers.layers import activation_name
from omni_moe.ops import omni_expert


def omni_moe_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`out[t] = sum_k act(hidden[t] . up[idx[t,k]]) * weight[t,k] * down[idx[t,k]]`.

    Registered as "omni_moe": `from_pretrained(..., experts_implementation="omni_moe")` or
    `model.set_experts_implementation("omni_moe")`.

    Args:
        self: the experts module, without gate and bias, of width 1: `up_proj` (E, 1, H) and
            `down_proj` (E, H, 1), or (E, H, 1) and (E, 1, H) where `is_transposed`; `act_fn` one of
            `layers.ACTIVATIONS`.
        hidden_states: (T, H).
        top_k_index: (T, K) integers >= 0. Ids >= E, which mark experts of other processes and
            masked tokens, contribute nothing.
        top_k_weights: (T, K); rounded to the dtype of `hidden_states`.

    Returns:
        (T, H) in the dtype of `hidden_states`.

    Raises:
        ValueError: the experts have a gate, a bias, a width other than 1, another activation or a
            norm of their own.
    """
    up_weights, down_weights, activation = _atomic_weights(self)
    is_here = top_k_index < len(up_weights)
    # Rows without any expert may hold anything, NaN too, and must not reach the experts' gradients.
    hidden_states = hidden_states.masked_fill(~is_here.any(-1, keepdim=True), 0)
    return omni_expert(
        hidden_states,
        up_weights=up_weights,
        down_weights=down_weights,
        routing_weights=top_k_weights.to(hidden_states.dtype).masked_fill(~is_here, 0),
        indices=top_k_index.where(is_here, 0),
        activation=activation,
    )


def _atomic_weights(experts: nn.Module) -> tuple[Tensor, Tensor, str]:
    """(E, H) up and down vectors and the name of the activation."""
    kind = f"experts_implementation='omni_moe': expected {type(experts).__name__} to have"
    if experts.has_gate:
        raise ValueError(f"{kind} no gate, got has_gate=True")
    if experts.has_bias:
        raise ValueError(f"{kind} no bias, got has_bias=True")
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"{kind} no norm after each expert, got has_post_expert_norm=True")
    width_dim = 2 if experts.is_transposed else 1
    if experts.up_proj.shape[width_dim] != 1:
        raise ValueError(f"{kind} width 1, got {experts.up_proj.shape[width_dim]}")
    up_weights = experts.up_proj.squeeze(width_dim)
    down_weights = experts.down_proj.squeeze(3 - width_dim)
    return up_weights, down_weights, activation_name(experts.act_fn, f"{type(experts).__name__}: ")


ALL_EXPERTS_FUNCTIONS.register("omni_moe", omni_moe_experts_forward)

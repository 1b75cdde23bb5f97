"""Turning the MLPs of a pretrained decoder into OmniMoE layers."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from omni_moe.integrations.transformers.replaced import mark_replaced
from omni_moe.integrations.transformers.surgery import (
    build_layers,
    check_layers,
    decoder_blocks,
    put_in_place,
)


def replace_mlp(
    model: PreTrainedModel,
    *,
    num_experts: int,
    num_experts_per_token: int,
    layers: Iterable[int] | None = None,
    norm_topk_prob: bool = False,
    expert_grid: tuple[int, int] | None = None,
    router_norm: str = "batch_norm",
    initializer_range: float = 0.02,
    track_expert_load: bool = False,
    router_aux_loss_coef: float = 0.0,
    router_z_loss_coef: float = 0.0,
    router_jitter_noise: float = 0.0,
) -> PreTrainedModel:
    """Turns MLPs of a decoder into OmniMoE layers that start as the same function.

    The MLP goes on as the shared branch, with its own weights; `down_embed` starts at zero, so the
    experts add nothing until they are trained. Works for blocks whose MLP is
    `down_proj(act_fn(gate_proj(x)) * up_proj(x))`: Llama, Qwen, Mistral, Gemma, SmolLM and others.

    The class of `model` becomes a subclass (`LlamaForCausalLM` to `OmniMoeLlamaForCausalLM`), its
    config a copy that records the layers: `save_pretrained` and the Auto classes' `from_pretrained`
    work, in another process once `omni_moe.integrations.transformers` is imported. May be called
    again for further layers.

    Args:
        model: changed in place, the language model of one with a vision tower; nothing is changed
            when an error is raised. The outermost model, whose `save_pretrained` will be called.
            New parameters get device and dtype of the MLP they belong to.
        num_experts: E, see `omni_moe.OmniMoEConfig`, as all that follow except `layers`.
        num_experts_per_token: K.
        layers: indices of the blocks to change; all by default.
        norm_topk_prob: divide a token's K routing weights by their sum.
        expert_grid: (R, C) with R * C = E.
        router_norm: "batch_norm", "layer_norm", "rms_norm" or "none".
        initializer_range: standard deviation of the initial router gates and `up_embed`.
        track_expert_load: count how often each expert is chosen.
        router_aux_loss_coef: weight of the load balancing loss, which becomes part of the model's
            loss in training, as the next.
        router_z_loss_coef: weight of the router's z-loss.
        router_jitter_noise: multiply the router's input by uniform(1 - eps, 1 + eps) in training.

    Returns:
        `model`.

    Raises:
        ValueError: `model` is no `PreTrainedModel`, has an encoder as well or no such MLPs; a
            chosen one has a bias, an activation without kernels, offloaded weights or computes
            something else; an index is out of range; an option has a value it cannot have.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    blocks = decoder_blocks(model)
    arguments = {
        "layers": check_layers(layers, len(blocks)),
        "num_experts": num_experts,
        "num_experts_per_token": num_experts_per_token,
        "norm_topk_prob": norm_topk_prob,
        "expert_grid": expert_grid,
        "router_norm": router_norm,
        "initializer_range": initializer_range,
        "track_expert_load": track_expert_load,
        "router_aux_loss_coef": router_aux_loss_coef,
        "router_z_loss_coef": router_z_loss_coef,
        "router_jitter_noise": router_jitter_noise,
    }
    put_in_place(blocks, build_layers(blocks, **arguments))
    mark_replaced(model, arguments)
    return model

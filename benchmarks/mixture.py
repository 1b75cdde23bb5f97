"""The classic mixture of experts with stock operators, and the layers of other libraries."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.upstream import NotApplicable
from omni_moe.modules import MixtureOfExperts

# ---- stock operators ----------------------------------------------------------------------------


def topk_router(
    router_logits: Tensor,
    bias: Tensor,
    num_experts_per_token: int,
    n_group: int,
    topk_group: int,
) -> Tensor:
    """DeepSeek-V3's gate: routing weights of `reference.omni_topk_router` with sigmoid scores,
    normalised.
    """
    scores = router_logits.float().sigmoid()
    values = scores + bias
    groups = values.view(len(values), n_group, -1)
    best = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1, sorted=False).indices
    is_kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
    kept = groups.masked_fill(~is_kept.unsqueeze(-1), -torch.inf).flatten(1)
    indices = kept.topk(num_experts_per_token, dim=-1).indices
    weights = scores.gather(1, indices)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-20)).to(router_logits.dtype)


def permute_and_unpermute(tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Tokens in expert order by a sort, and their weighted sum."""
    num_tokens, k = indices.shape
    order = indices.flatten().argsort(stable=True)
    rows = tokens[order // k]
    places = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    return (rows[places].view(num_tokens, k, -1) * weights.unsqueeze(-1)).sum(1)


def topk_softmax(module: MixtureOfExperts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids (T, k) of a gate whose weights are normalised, as Mixtral's."""
    logits = F.linear(hidden_states, module.gate.weight)
    weights, indices = logits.float().softmax(-1).topk(module.gate.k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype), indices


def mixture_of_experts(module: MixtureOfExperts, hidden_states: Tensor) -> Tensor:
    """A loop over the experts, each of which gathers its tokens and adds to them."""
    weights, indices = topk_softmax(module, hidden_states)
    output = torch.zeros_like(hidden_states)
    for expert in range(module.experts.num_experts):
        tokens, choices = torch.where(indices == expert)
        gate_up = F.linear(hidden_states[tokens], module.experts.gate_up_proj[expert])
        gate, up = gate_up.chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, module.experts.down_proj[expert])
        output = output.index_add(0, tokens, rows * weights[tokens, choices, None])
    return output


# ---- other libraries ----------------------------------------------------------------------------


def hf_experts(case: Case, module: MixtureOfExperts, implementation: str) -> Callable:
    """Mixtral's experts of Transformers with the module's own parameters."""
    try:
        from transformers import MixtralConfig
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        raise NotApplicable(f"transformers 5 is not installed: {error}") from error
    if implementation not in ALL_EXPERTS_FUNCTIONS:
        raise NotApplicable(f"this version of transformers has no {implementation}")
    config = MixtralConfig(
        hidden_size=case.shape["hidden"],
        intermediate_size=case.shape["intermediate"],
        num_local_experts=case.shape["experts"],
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = module.experts.gate_up_proj, module.experts.down_proj

    def forward(x: Tensor) -> Tensor:
        weights, indices = topk_softmax(module, x)
        return experts(x, indices, weights)

    return forward


def scattermoe_experts(case: Case) -> nn.Module:
    """Called with tokens, weights and ids."""
    try:
        from scattermoe.mlp import GLUMLP
    except ImportError as error:
        raise NotApplicable(f"scattermoe is not installed: {error}") from error
    shape = case.shape
    return GLUMLP(shape["hidden"], shape["intermediate"], shape["experts"], shape["k"])


def megablocks_layer(case: Case, device: torch.device) -> nn.Module:
    """Called with tokens (T, 1, H)."""
    try:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE
    except ImportError as error:
        raise NotApplicable(f"megablocks is not installed: {error}") from error
    arguments = Arguments(
        hidden_size=case.shape["hidden"],
        ffn_hidden_size=case.shape["intermediate"],
        moe_num_experts=case.shape["experts"],
        moe_top_k=case.shape["k"],
        moe_normalize_expert_weights=1,
        moe_loss_weight=0,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=device,
    )
    return dMoE(arguments)

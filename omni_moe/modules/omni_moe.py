"""The OmniMoE layer: a token's K atomic experts, assembled on the fly, beside a shared MLP.

`y = sum_k g_k act(x . up_k) down_k + MLP(x)`, the layer of "OmniMoE: An Efficient MoE by
Orchestrating Atomic Experts at Scale" (arXiv 2602.05711).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from omni_moe.config import OmniMoEConfig
from omni_moe.ops import omni_expert, omni_expert_mlp, omni_softmax_router
from omni_moe.reference import ACTIVATION_FUNCTIONS

__all__ = ["ExpertLoad", "OmniMoE", "OmniMoEConfig"]


class ExpertLoad(NamedTuple):
    """How evenly the experts of one layer were chosen."""

    usage: float  # share of experts chosen at least once, in [0, 1]
    unevenness: float  # KL(z || uniform) in nats, z the normalised retrieval frequency
    counts: Tensor  # (E,) int64, how often each expert was chosen


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to read its tensors does as much as to call it: no adapter around it, no hooks."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and not any(hooks) and getattr(module, "bias", None) is None


class OmniMoE(nn.Module):
    """Router, atomic experts and shared MLP; replaces the MLP of a transformer block.

    Parameters: `gate_proj`, `up_proj` (H -> I), `down_proj` (I -> H), `router_gate_x` (H -> R) and
    `router_gate_y` (H -> C), all without bias; `up_embed` and `down_embed`, (E, H) each.
    `router_norm_x` and `router_norm_y` are BatchNorm1d without affine parameters (or Identity) and
    keep PyTorch's behaviour: batch statistics in training, running ones in eval; a layer passed
    through `nn.SyncBatchNorm.convert_sync_batchnorm` works.

    Args:
        config: sizes and options, see `OmniMoEConfig`.

    Shape:
        Input (B, S, H) or (T, H), output the same shape and dtype; T = 0 gives an empty output.

    Raises:
        ValueError: in forward, the input has another shape; or BatchNorm is in training mode and
            there is a single token, which has no variance (PyTorch's own error).

    With `config.track_expert_load` each forward adds its choices to a counter on the device,
    without synchronising; `expert_load()` reads it. Under activation checkpointing the recomputed
    forward counts again.
    """

    def __init__(self, config: OmniMoEConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        num_rows, num_cols = config.grid

        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

        self.router_gate_x = nn.Linear(hidden_size, num_rows, bias=False)
        self.router_gate_y = nn.Linear(hidden_size, num_cols, bias=False)
        if config.router_norm == "batch_norm":
            self.router_norm_x = nn.BatchNorm1d(num_rows, affine=False)
            self.router_norm_y = nn.BatchNorm1d(num_cols, affine=False)
        else:
            self.router_norm_x = nn.Identity()
            self.router_norm_y = nn.Identity()

        self.up_embed = nn.Embedding(config.num_experts, hidden_size)
        self.down_embed = nn.Embedding(config.num_experts, hidden_size)

        counts = torch.zeros(config.num_experts, dtype=torch.int64)
        self.register_buffer(
            "expert_counts", counts if config.track_expert_load else None, persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, initializer_range), clear BatchNorm and load statistics."""
        for module in self.children():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        self.reset_expert_load()

    def forward(self, hidden_states: Tensor) -> Tensor:
        config = self.config
        if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states: expected shape (B, S, H) or (T, H) with H = {config.hidden_size}, "
                f"got {tuple(hidden_states.shape)}"
            )
        tokens = hidden_states.flatten(0, -2)

        routing_weights, indices = omni_softmax_router(
            self.router_norm_x(self.router_gate_x(tokens)),
            self.router_norm_y(self.router_gate_y(tokens)),
            config.num_experts_per_token,
            config.norm_topk_prob,
        )
        if config.track_expert_load:
            self._count_experts(indices)

        outputs = self._experts_and_mlp(tokens, routing_weights, indices)
        return outputs.view_as(hidden_states)

    def _experts_and_mlp(self, tokens: Tensor, routing_weights: Tensor, indices: Tensor) -> Tensor:
        experts = (self.up_embed.weight, self.down_embed.weight, routing_weights, indices)
        activation = self.config.hidden_act
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if all(_is_plain(projection, nn.Linear) for projection in projections):
            weights = [projection.weight for projection in projections]
            return omni_expert_mlp(tokens, *experts, *weights, activation)
        gate = ACTIVATION_FUNCTIONS[activation](self.gate_proj(tokens))
        shared_states = self.down_proj(gate * self.up_proj(tokens))
        return omni_expert(tokens, *experts, activation, addend=shared_states)

    @torch.no_grad()
    def _count_experts(self, indices: Tensor) -> None:
        chosen = indices.flatten().long()
        self.expert_counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    def expert_load(self) -> ExpertLoad:
        """Expert usage and unevenness (as the paper defines them) since the last reset.

        Counts are those of this process. Waits for the device. Before any token was routed usage
        is 0 and unevenness NaN.

        Raises:
            RuntimeError: `config.track_expert_load` is off.
        """
        if not self.config.track_expert_load:
            raise RuntimeError(
                "expert_load: expected track_expert_load=True in the config, got False"
            )
        counts = self.expert_counts.clone()
        frequency = counts.double() / counts.sum()
        unevenness = torch.special.xlogy(frequency, frequency * counts.numel()).sum()
        usage = (counts > 0).double().mean()
        return ExpertLoad(usage.item(), unevenness.item(), counts)

    def reset_expert_load(self) -> None:
        """Forget all choices counted so far."""
        if self.expert_counts is not None:
            self.expert_counts.zero_()

    def extra_repr(self) -> str:
        config = self.config
        num_rows, num_cols = config.grid
        return (
            f"num_experts={config.num_experts} ({num_rows} x {num_cols}), "
            f"num_experts_per_token={config.num_experts_per_token}, "
            f"hidden_act={config.hidden_act}, norm_topk_prob={config.norm_topk_prob}"
        )

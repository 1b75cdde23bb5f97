"""The OmniMoE layer: a token's K atomic experts, assembled on the fly, beside a shared MLP.

`y = sum_k g_k act(x . up_k) down_k + MLP(x)`, the layer of "OmniMoE: An Efficient MoE by
Orchestrating Atomic Experts at Scale" (arXiv 2602.05711).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni_moe.config import OmniMoEConfig
from omni_moe.losses import add_expert_counts, load_balancing_loss, router_z_loss
from omni_moe.ops import omni_expert, omni_expert_mlp, omni_router_logits, omni_softmax_router
from omni_moe.reference import ACTIVATION_FUNCTIONS

__all__ = ["ExpertLoad", "OmniMoE", "OmniMoEConfig", "router_loss"]


class ExpertLoad(NamedTuple):
    """How evenly the experts of one layer were chosen."""

    usage: float  # share of experts chosen at least once, in [0, 1]
    unevenness: float  # KL(z || uniform) in nats, z the normalised retrieval frequency
    counts: Tensor  # (E,) int64, how often each expert was chosen


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
        Input (B, S, H) or (T, H), output the same shape and dtype (under autocast its dtype); T = 0
        gives an empty output.

    Raises:
        ValueError: in forward, the input has another shape; or BatchNorm is in training mode and
            there is a single token, which has no variance (PyTorch's own error).

    With `config.track_expert_load` each forward adds its choices to a counter on the device,
    without synchronising; `expert_load()` reads it. A forward that activation checkpointing
    recomputes does not count again, unless the layer itself is compiled within.

    With `config.router_aux_loss_coef` or `router_z_loss_coef` each forward in training mode with
    gradients enabled leaves the weighted sum of these losses, over its own tokens, in `aux_loss`, a
    differentiable scalar in fp32 (fp64 for fp64). `router_loss(model)` sums those of a model; they
    act only where they are added to the training loss. Any other forward leaves None. `aux_loss` is
    not part of a copied or pickled layer.
    """

    aux_loss: Tensor | None = None
    # The last forward in training mode was without gradients, and so without `aux_loss`.
    _aux_loss_is_missing: bool = False

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

        logits_x, logits_y = self._router_logits(tokens)
        routing_weights, indices = omni_softmax_router(
            logits_x, logits_y, config.num_experts_per_token, config.norm_topk_prob
        )
        if config.has_router_loss:
            self._router_losses(logits_x, logits_y, indices)
        if config.track_expert_load and not _is_recomputing():
            add_expert_counts(self.expert_counts, indices)

        outputs = self._experts_and_mlp(tokens, routing_weights, indices)
        return outputs.view_as(hidden_states)

    def _router_logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, R) and (T, C): the logits of the grid's rows and columns."""
        noise = self.config.router_jitter_noise
        if self.training and noise > 0:
            # In fp32: bf16 has four numbers from 0.99 to 1.01.
            factors = torch.empty_like(tokens, dtype=torch.float32).uniform_(1 - noise, 1 + noise)
            tokens = (tokens * factors).to(tokens.dtype)
        if not self._has_plain_router():
            return (
                self.router_norm_x(self.router_gate_x(tokens)),
                self.router_norm_y(self.router_gate_y(tokens)),
            )
        norm_x, norm_y = self.router_norm_x, self.router_norm_y
        return omni_router_logits(
            tokens,
            self.router_gate_x.weight,
            self.router_gate_y.weight,
            batch_norm_buffers=[
                buffer
                for norm in (norm_x, norm_y)
                for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            ],
            training=norm_x.training,
            momentum=norm_x.momentum,
            eps=norm_x.eps,
        )

    def _has_plain_router(self) -> bool:
        """Whether nothing has been done to gates and norms, such as adapters or SyncBatchNorm."""
        gates = (self.router_gate_x, self.router_gate_y)
        norms = (self.router_norm_x, self.router_norm_y)
        if not all(_is_plain(gate, nn.Linear) for gate in gates):
            return False
        if norms[0] is norms[1] or not all(_is_plain(norm, nn.BatchNorm1d) for norm in norms):
            return False
        if gates[0].weight.dtype != gates[1].weight.dtype:
            return False
        return all(
            norm.weight is None and norm.momentum is not None and norm.running_mean is not None
            for norm in norms
        ) and 1 == len(
            {(norm.training, norm.momentum, norm.eps, norm.running_mean.dtype) for norm in norms}
        )

    def _router_losses(self, logits_x: Tensor, logits_y: Tensor, indices: Tensor) -> None:
        """Sets `aux_loss`."""
        config = self.config
        is_recomputing = _is_recomputing()
        has_grad = torch.is_grad_enabled()
        if not is_recomputing:
            self._aux_loss_is_missing = self.training and not has_grad
            self.aux_loss = None
        if not (self.training and has_grad):
            return
        losses = []
        if config.router_aux_loss_coef > 0:
            balance = load_balancing_loss(logits_x, logits_y, indices)
            losses.append(config.router_aux_loss_coef * balance)
        if config.router_z_loss_coef > 0:
            losses.append(config.router_z_loss_coef * router_z_loss(logits_x, logits_y))
        if not is_recomputing:  # whose graph would keep the activations of all layers
            self.aux_loss = sum(losses)

    def _experts_and_mlp(self, tokens: Tensor, routing_weights: Tensor, indices: Tensor) -> Tensor:
        tables = [self._table(module, tokens.device) for module in (self.up_embed, self.down_embed)]
        experts = (*tables, routing_weights, indices)
        activation = self.config.hidden_act
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if all(_is_plain(projection, nn.Linear) for projection in projections):
            weights = [projection.weight for projection in projections]
            return omni_expert_mlp(tokens, *experts, *weights, activation)
        gate = ACTIVATION_FUNCTIONS[activation](self.gate_proj(tokens))
        shared_states = self.down_proj(gate * self.up_proj(tokens))
        return omni_expert(tokens, *experts, activation, addend=shared_states)

    def _table(self, embedding: nn.Module, device: torch.device) -> Tensor:
        """(E, H): the rows of `up_embed` or `down_embed`; a copy if the module must be called."""
        if _is_plain(embedding, nn.Embedding):
            return embedding.weight
        return embedding(torch.arange(self.config.num_experts, device=device))

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

    def __getstate__(self) -> dict[str, Any]:
        # For copy and pickle, which refuse tensors that are part of a graph.
        return {**super().__getstate__(), "aux_loss": None, "_aux_loss_is_missing": False}

    def extra_repr(self) -> str:
        config = self.config
        num_rows, num_cols = config.grid
        return (
            f"num_experts={config.num_experts} ({num_rows} x {num_cols}), "
            f"num_experts_per_token={config.num_experts_per_token}, "
            f"hidden_act={config.hidden_act}, norm_topk_prob={config.norm_topk_prob}"
        )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to read its tensors does as much as to call it: no adapter around it, no hooks."""
    has_hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return (
        type(module) is kind
        and not has_hooks
        and ("forward" not in module.__dict__ or _is_forward_of_kind(module, kind))
        and module._parameters.get("bias") is None
        and _is_ordinary(module.weight)
    )


def _is_forward_of_kind(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the `forward` of this instance is that of its class.

    accelerate's hooks leave it there when they are removed; those that it puts on every module for
    a `device_map`, without offload, only bring inputs to the device where the weights are.
    """
    forward = module.__dict__["forward"]
    hook = module.__dict__.get("_hf_hook")
    if (
        getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
        and f"{type(hook).__module__}.{type(hook).__name__}" == "accelerate.hooks.AlignDevicesHook"
        and not hook.offload
    ):
        forward = module._old_forward
    function, instance = (getattr(forward, name, None) for name in ("__func__", "__self__"))
    return function is kind.forward and instance is module


def _is_ordinary(weight: Tensor | None) -> bool:
    """Whether it is no subclass with functions of its own, as quantised weights are."""
    kind = type(weight)
    return (
        weight is None
        or kind is Tensor
        or kind.__torch_function__ is torch._C._disabled_torch_function_impl  # as Parameter's
    )


def _is_recomputing() -> bool:
    """Whether this forward is part of a backward pass, as under activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def router_loss(model: nn.Module) -> Tensor:
    """The sum of `aux_loss` over the OmniMoE layers of a model, to be added to its training loss.

    Losses are those of each layer's last forward: of one micro-batch under gradient accumulation,
    of this process's tokens under data parallelism.

    Args:
        model: any module, wrapped by DDP, FSDP2 or torch.compile as well; call it first.

    Returns:
        A scalar; 0 without gradient where no layer has a loss, as in eval mode.

    Raises:
        RuntimeError: gradients are enabled, but a layer ran its last forward in training mode
            without them, as reentrant activation checkpointing does: the loss would have no effect.
    """
    layers = [module for module in model.modules() if isinstance(module, OmniMoE)]
    if torch.is_grad_enabled() and any(layer._aux_loss_is_missing for layer in layers):
        raise RuntimeError(
            "router_loss: expected layers that ran with gradients enabled, got one that ran under "
            "no_grad in training mode; with activation checkpointing use use_reentrant=False"
        )
    losses = [layer.aux_loss for layer in layers if layer.aux_loss is not None]
    if not losses:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    # Layers of a model may lie on several devices.
    return sum(loss.to(losses[0].device) for loss in losses)

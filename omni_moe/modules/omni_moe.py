"""The OmniMoE layer: a token's K atomic experts, assembled on the fly, beside a shared MLP.

`y = sum_k g_k act(x . up_k) down_k + MLP(x)`, the layer of "OmniMoE: An Efficient MoE by
Orchestrating Atomic Experts at Scale" (arXiv 2602.05711).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni_moe.activations import ACTIVATION_FUNCTIONS
from omni_moe.config import OmniMoEConfig
from omni_moe.losses import add_expert_counts, load_balancing_loss, router_z_loss
from omni_moe.modules.jitter import jittered
from omni_moe.modules.plain import (
    call_norm,
    floating_dtype,
    plain_batch_norm_buffers,
    plain_token_norm,
    plain_weight,
)
from omni_moe.modules.recomputing import is_recomputing
from omni_moe.modules.recording import WITHOUT_GRADIENTS, RouterOutputs
from omni_moe.ops import (
    omni_expert,
    omni_expert_mlp,
    omni_router_logits,
    omni_router_logits_per_token,
    omni_softmax_router,
)

__all__ = ["ExpertLoad", "OmniMoE", "OmniMoEConfig", "router_loss"]

_HALVES = (torch.float16, torch.bfloat16)
_NORM_EPS = 1e-5  # BatchNorm's and LayerNorm's default; RMSNorm's depends on the dtype


class ExpertLoad(NamedTuple):
    """How evenly the experts of one layer were chosen."""

    usage: float  # share of experts chosen at least once, in [0, 1]
    unevenness: float  # KL(z || uniform) in nats, z the normalised retrieval frequency
    counts: Tensor  # (E,) int64, how often each expert was chosen

    @classmethod
    def of(cls, counts: Tensor) -> "ExpertLoad":
        """Waits for the device of the counts."""
        frequency = counts.double() / counts.sum()
        unevenness = torch.special.xlogy(frequency, frequency * counts.numel()).sum()
        usage = (counts > 0).double().mean()
        return cls(usage.item(), unevenness.item(), counts)


class OmniMoE(nn.Module):
    """Router, atomic experts and shared MLP; replaces the MLP of a transformer block.

    Parameters: `gate_proj`, `up_proj` (H -> I), `down_proj` (I -> H), `router_gate_x` (H -> R) and
    `router_gate_y` (H -> C), all without bias; `up_embed` and `down_embed`, (E, H) each.
    `router_norm_x` and `router_norm_y` are BatchNorm1d without affine parameters and keep PyTorch's
    behaviour: batch statistics in training, running ones in eval; a layer passed through
    `nn.SyncBatchNorm.convert_sync_batchnorm` works. With another `router_norm` they are LayerNorm
    or RMSNorm without affine parameters, or Identity.

    Args:
        config: sizes and options, see `OmniMoEConfig`.
        device: of parameters and buffers, as in the modules of torch.nn.
        dtype: of parameters, as in the modules of torch.nn; running statistics are never narrower
            than fp32.

    Shape:
        Input (B, S, H) or (T, H), output the same shape and dtype (under autocast its dtype); T = 0
        gives an empty output. `token_mask` (B, S) or (T,) bool, False for tokens that do not count,
        as padding.

    Raises:
        ValueError: in forward, input or mask have another shape, the mask another dtype; BatchNorm
            is in training mode and there is a single token, which has no variance (PyTorch's own
            error, not with a mask); or there is a mask, and a BatchNorm in training mode whose
            `forward` is not PyTorch's.

    Tokens that a mask leaves out get the shared MLP's output alone: no experts, so no gradient to
    tables or gates, no part in the batch of a BatchNorm, in losses or load. Hidden states of theirs
    must be finite.

    With `config.track_expert_load` each forward adds its choices to a counter on the device,
    without synchronising; `expert_load()` reads it. A forward that activation checkpointing
    repeats is not counted again, unless it is that of a layer which is compiled by itself. The
    counter is in no state dict, and there is none as long as the layer is on the meta device: it
    starts from zero where the layer gets its memory.

    With `config.router_aux_loss_coef` or `router_z_loss_coef` each forward in training mode with
    gradients enabled leaves the weighted sum of these losses, over its own tokens, in `aux_loss`, a
    differentiable scalar in fp32 (fp64 for fp64). `router_loss(model)` sums those of a model; they
    act only where they are added to the training loss. Any other forward leaves None. `aux_loss` is
    not part of a copied or pickled layer.
    """

    aux_loss: Tensor | None = None
    # Who wants the router's outputs gets them here: lists, or what can be appended to as a list.
    _recorders: tuple[Any, ...] = ()
    # The last forward was in training mode, but without gradients, so that it left no `aux_loss`.
    _aux_loss_is_missing: bool = False
    # Which tokens of the model around the layer count, see `counting_tokens`, now and in the last
    # forward: one that activation checkpointing repeats may find itself outside of the model's.
    _model_mask: Tensor | None = None
    _last_model_mask: Tensor | None = None

    def __init__(
        self,
        config: OmniMoEConfig,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        num_rows, num_cols = config.grid

        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, **factory)

        self.router_gate_x = nn.Linear(hidden_size, num_rows, bias=False, **factory)
        self.router_gate_y = nn.Linear(hidden_size, num_cols, bias=False, **factory)
        if config.router_norm == "batch_norm":
            # Statistics in bf16 would stand still: a tenth of a small change rounds to nothing.
            stats_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            norm = {"affine": False, "device": device, "dtype": stats_dtype}
            self.router_norm_x = nn.BatchNorm1d(num_rows, **norm)
            self.router_norm_y = nn.BatchNorm1d(num_cols, **norm)
        elif config.router_norm == "none":
            self.router_norm_x = nn.Identity()
            self.router_norm_y = nn.Identity()
        else:
            kind = nn.LayerNorm if config.router_norm == "layer_norm" else nn.RMSNorm
            self.router_norm_x = kind(num_rows, eps=_NORM_EPS, elementwise_affine=False)
            self.router_norm_y = kind(num_cols, eps=_NORM_EPS, elementwise_affine=False)

        self.up_embed = nn.Embedding(config.num_experts, hidden_size, **factory)
        self.down_embed = nn.Embedding(config.num_experts, hidden_size, **factory)

        self.register_buffer("expert_counts", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, initializer_range), clear BatchNorm and load statistics."""
        for module in self.children():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        self.reset_expert_load()

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        config = self.config
        if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states: expected shape (B, S, H) or (T, H) with H = {config.hidden_size}, "
                f"got {tuple(hidden_states.shape)}"
            )
        is_batch = hidden_states.dim() == 3
        tokens = hidden_states.flatten(0, 1) if is_batch else hidden_states

        mask = self._flat_mask(hidden_states, token_mask)

        logits_x, logits_y = self._router_logits(tokens, mask)
        # Nothing that follows depends on the order of a token's experts.
        routing_weights, indices = omni_softmax_router(
            logits_x,
            logits_y,
            config.num_experts_per_token,
            norm_topk_prob=config.norm_topk_prob,
            token_mask=mask,
            sorted=False,
        )
        if logits_x.dtype != tokens.dtype and not _is_autocast(tokens):
            routing_weights = routing_weights.to(tokens.dtype)
        if self._recorders and not is_recomputing():
            has_grad = torch.is_grad_enabled()
            recorded = RouterOutputs(logits_x, logits_y, indices, has_grad, mask)
            for recorder in self._recorders:
                recorder.append(recorded)
        if config.has_router_loss:
            self._router_losses(logits_x, logits_y, indices, mask)
        if config.track_expert_load and not is_recomputing():
            self._count(indices, mask)
        if mask is not None:
            # Experts with the weight 0, spread over several so that no row has all the pairs.
            some = torch.arange(indices.shape[1], dtype=indices.dtype, device=indices.device)
            indices = indices.where(mask.unsqueeze(-1), some)

        outputs = self._experts_and_mlp(tokens, routing_weights, indices)
        return outputs.view_as(hidden_states) if is_batch else outputs

    def _flat_mask(self, hidden_states: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """(T,) bool: the mask that is given, or that of the model around the layer."""
        leading = hidden_states.shape[:-1]
        if token_mask is not None:
            if token_mask.dtype != torch.bool or (
                token_mask.shape != leading and token_mask.shape != (leading.numel(),)
            ):
                raise ValueError(
                    f"token_mask: expected bool of shape {tuple(leading)} or "
                    f"{(leading.numel(),)}, got {token_mask.dtype} of shape "
                    f"{tuple(token_mask.shape)}"
                )
            return token_mask.flatten()
        mask = self._model_mask
        if mask is None and is_recomputing():
            mask = self._last_model_mask
        elif self._last_model_mask is not mask and not torch.compiler.is_compiling():
            self._last_model_mask = mask  # compiled code repeats what it has traced
        if mask is None or hidden_states.dim() != 3:
            return None
        num_sequences, num_tokens = leading
        # Longer than the input where a cache has the tokens before it.
        if mask.shape[0] != num_sequences or mask.shape[1] < num_tokens:
            return None
        return mask[:, mask.shape[1] - num_tokens :].flatten().to(hidden_states.device)

    def _router_logits(
        self, tokens: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(T, R) and (T, C): the logits of the grid's rows and columns."""
        if self.training and self.config.router_jitter_noise > 0:
            tokens = jittered(tokens, self.config.router_jitter_noise)
        modules = self._modules  # from which they come several times as fast as from `self`
        gate_x, gate_y = modules["router_gate_x"], modules["router_gate_y"]
        norm_x, norm_y = modules["router_norm_x"], modules["router_norm_y"]
        weight_x, weight_y = plain_weight(gate_x, nn.Linear), plain_weight(gate_y, nn.Linear)
        # A router in fp32 beside experts in fp16 is common: Transformers keeps gates so.
        gate_dtype = floating_dtype(gate_x) if weight_x is None else weight_x.dtype
        if gate_dtype == torch.float32 and tokens.dtype in _HALVES and not _is_autocast(tokens):
            tokens = tokens.float()
        if weight_x is not None and weight_y is not None and weight_x.dtype == weight_y.dtype:
            buffers = plain_batch_norm_buffers(norm_x, norm_y)
            if buffers is not None:
                return omni_router_logits(
                    tokens,
                    gate_x=weight_x,
                    gate_y=weight_y,
                    batch_norm_buffers=buffers,
                    training=norm_x.training,
                    momentum=norm_x.momentum,
                    eps=norm_x.eps,
                    token_mask=token_mask,
                )
            token_norm = plain_token_norm(norm_x, norm_y, len(weight_x), len(weight_y))
            if token_norm is not None:
                name, eps = token_norm
                return omni_router_logits_per_token(
                    tokens, gate_x=weight_x, gate_y=weight_y, norm=name, eps=eps
                )
        with _named_range("omni_moe.router"):
            logits_x = call_norm(norm_x, gate_x(tokens), token_mask)
            return logits_x, call_norm(norm_y, gate_y(tokens), token_mask)

    def _router_losses(
        self, logits_x: Tensor, logits_y: Tensor, indices: Tensor, token_mask: Tensor | None
    ) -> None:
        """Sets `aux_loss`."""
        config = self.config
        recomputing = is_recomputing()
        has_grad = torch.is_grad_enabled()
        if not recomputing:
            self._aux_loss_is_missing = self.training and not has_grad
            self.aux_loss = None
        if not (self.training and has_grad):
            return
        loss = weighted_router_loss(config, logits_x, logits_y, indices, token_mask)
        # The loss of a recomputed forward would keep its graph, and with it the activations.
        if not recomputing:
            self.aux_loss = loss

    def _experts_and_mlp(self, tokens: Tensor, routing_weights: Tensor, indices: Tensor) -> Tensor:
        modules, activation = self._modules, self.config.hidden_act
        up_embed = self._table(modules["up_embed"], tokens.device)
        down_embed = self._table(modules["down_embed"], tokens.device)
        gate_weight = plain_weight(modules["gate_proj"], nn.Linear)
        up_weight = plain_weight(modules["up_proj"], nn.Linear)
        down_weight = plain_weight(modules["down_proj"], nn.Linear)
        if gate_weight is not None and up_weight is not None and down_weight is not None:
            return omni_expert_mlp(
                tokens,
                up_embed=up_embed,
                down_embed=down_embed,
                routing_weights=routing_weights,
                indices=indices,
                gate_weight=gate_weight,
                up_weight=up_weight,
                down_weight=down_weight,
                activation=activation,
                num_cols=self.config.grid[1],
            )
        with _named_range("omni_moe.mlp"):
            gate = ACTIVATION_FUNCTIONS[activation](self.gate_proj(tokens))
            shared_states = self.down_proj(gate * self.up_proj(tokens))
        return omni_expert(
            tokens,
            up_weights=up_embed,
            down_weights=down_embed,
            routing_weights=routing_weights,
            indices=indices,
            activation=activation,
            addend=shared_states,
            num_cols=self.config.grid[1],
        )

    def _table(self, embedding: nn.Module, device: torch.device) -> Tensor:
        """(E, H): the weight of `up_embed` or `down_embed`, a copy if it has to be called."""
        weight = plain_weight(embedding, nn.Embedding)
        if weight is not None:
            return weight
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
        if self.expert_counts is None:
            weight = self.up_embed.weight
            counts = self._zero_counts("cpu" if weight.is_meta else weight.device)
        else:
            counts = self.expert_counts.clone()
        return ExpertLoad.of(counts)

    def reset_expert_load(self) -> None:
        """Forget all choices counted so far."""
        if self.expert_counts is not None:
            self.expert_counts.zero_()
        elif self.config.track_expert_load and not self.up_embed.weight.is_meta:
            self.expert_counts = self._zero_counts(self.up_embed.weight.device)

    def _count(self, indices: Tensor, token_mask: Tensor | None) -> None:
        # A layer built on the meta device may get its parameters one by one, by assignment.
        if self.expert_counts is None or self.expert_counts.device != indices.device:
            if indices.is_meta:
                return
            zeros = self._zero_counts(indices.device)
            counts = self.expert_counts
            self.expert_counts = zeros if counts is None else zeros.copy_(counts)
        add_expert_counts(self.expert_counts, indices, token_mask)

    def _zero_counts(self, device: torch.device | str) -> Tensor:
        # A tensor of inference mode could not be written to outside it.
        with torch.inference_mode(False):
            return torch.zeros(self.config.num_experts, dtype=torch.int64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OmniMoE":
        # `to_empty` would leave in the counter what memory held, and no state dict has it.
        counts = self.expert_counts
        super()._apply(fn, recurse)
        moved = self.expert_counts
        if moved is None:
            self.reset_expert_load()
        elif moved is not counts:
            self.expert_counts = None if moved.is_meta else moved.copy_(counts)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # For copy and pickle, which refuse tensors that are part of a graph.
        return {
            **super().__getstate__(),
            "aux_loss": None,
            "_aux_loss_is_missing": False,
            "_recorders": (),
            "_model_mask": None,
            "_last_model_mask": None,
        }

    def extra_repr(self) -> str:
        config = self.config
        num_rows, num_cols = config.grid
        return (
            f"num_experts={config.num_experts} ({num_rows} x {num_cols}), "
            f"num_experts_per_token={config.num_experts_per_token}, "
            f"hidden_act={config.hidden_act}, norm_topk_prob={config.norm_topk_prob}"
        )


def _is_autocast(tokens: Tensor) -> bool:
    return not tokens.is_meta and torch.is_autocast_enabled(tokens.device.type)


def _named_range(name: str) -> contextlib.AbstractContextManager[object]:
    """For profilers, as the ops have them for themselves; nothing without one."""
    if not torch.compiler.is_compiling() and torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return contextlib.nullcontext()


def weighted_router_loss(
    config: OmniMoEConfig,
    logits_x: Tensor,
    logits_y: Tensor,
    indices: Tensor,
    token_mask: Tensor | None = None,
) -> Tensor | None:
    """The sum of the losses that the config asks for, in its weights; None if there are none."""
    losses = []
    if config.router_aux_loss_coef > 0:
        balance = load_balancing_loss(logits_x, logits_y, indices, token_mask)
        losses.append(config.router_aux_loss_coef * balance)
    if config.router_z_loss_coef > 0:
        z_loss = router_z_loss(logits_x, logits_y, token_mask)
        losses.append(config.router_z_loss_coef * z_loss)
    return sum(losses) if losses else None


@contextlib.contextmanager
def counting_tokens(layers: Iterable[OmniMoE], token_mask: Tensor) -> Iterator[None]:
    """Inside the block forwards of the layers without a mask of their own take this one.

    Args:
        layers: any.
        token_mask: (B, S') bool, of which the last S columns are those of an input (B, S, H);
            inputs that it does not fit are without mask.
    """
    before = [(layer, layer._model_mask) for layer in layers]
    for layer, _ in before:
        layer._model_mask = token_mask
    try:
        yield
    finally:
        for layer, mask in before:
            layer._model_mask = mask


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
        raise RuntimeError(WITHOUT_GRADIENTS)
    losses = [layer.aux_loss for layer in layers if layer.aux_loss is not None]
    if not losses:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    # Layers of a model may lie on several devices.
    return sum(loss.to(losses[0].device) for loss in losses)

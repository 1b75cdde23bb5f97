"""The classic router: a linear gate over E experts, of which each token gets the k best.

Mixtral, Qwen3-MoE and DeepSeek-V3 are options of it, and its parameters have the names of theirs in
Transformers. What it computes behind the gate is `omni_moe.ops.omni_topk_router`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from omni_moe.modules.jitter import jittered
from omni_moe.modules.recomputing import is_recomputing
from omni_moe.ops import omni_expert_slots, omni_topk_router

__all__ = ["RouterStatistics", "TopKRouter", "TopKRouterOutput"]

TOKEN_DROP_POLICIES = ("position", "probs")


@dataclass
class RouterStatistics:
    """How a router spread the tokens of one forward, as tensors on its device.

    counts: (E,) int64, tokens that chose each expert.
    dropped_pairs: () int64, choices past an expert's capacity; 0 without one.
    dropped_tokens: () int64, tokens all of whose choices were dropped.
    dead_experts: () int64, experts that no token chose.
    load_entropy: () fp32, of the experts' shares of the choices, in nats: ln E for an even load, 0
        where one expert has all; NaN where there are no choices.
    """

    counts: Tensor
    dropped_pairs: Tensor
    dropped_tokens: Tensor
    dead_experts: Tensor
    load_entropy: Tensor


@dataclass
class TopKRouterOutput:
    """What a router decided. T tokens, E experts, k experts per token, C places per expert.

    indices: (T, k) int32, the chosen experts; -1 for masked tokens. Dropped pairs keep theirs.
    weights: (T, k) routing weights; 0 for masked tokens and dropped pairs; differentiable.
    counts: (E,) int64, tokens that chose each expert, those past its capacity among them.
    slots: (T, k) int32, the place of each pair in its expert's queue, -1 if dropped or masked; None
        without a capacity.
    logits: (T, E), the gate's output, for the losses; differentiable.
    capacity: C, or None.
    """

    indices: Tensor
    weights: Tensor
    counts: Tensor
    slots: Tensor | None
    logits: Tensor
    capacity: int | None

    def dispatch(self) -> Tensor:
        """(T, E, C) in the dtype of the weights: 1 where a token has a place of an expert.

        Takes T * (E * C + k * (E + C)) elements: for code that wants dense tensors (GShard, arXiv
        2006.16668), not for speed.

        Raises:
            ValueError: the router has no capacity.
        """
        return self._dense(torch.ones_like(self.weights))

    def combine(self) -> Tensor:
        """(T, E, C): the same with the routing weights in place of 1; differentiable."""
        return self._dense(self.weights)

    def _dense(self, values: Tensor) -> Tensor:
        if self.slots is None:
            raise ValueError(
                "TopKRouterOutput: expected a router with a capacity_factor for tensors of shape "
                "(T, E, C), got None"
            )
        experts = torch.arange(self.counts.numel(), device=values.device)
        places = torch.arange(self.capacity, device=values.device)
        # Neither has a 1 for -1.
        to_expert = (self.indices.unsqueeze(-1) == experts).to(values.dtype)
        to_place = (self.slots.unsqueeze(-1) == places).to(values.dtype)
        # An expert is chosen once by a token: of the sum over k one term is not zero.
        return torch.einsum("tke,tkc->tec", to_expert * values.unsqueeze(-1), to_place)

    @torch.no_grad()
    def statistics(self) -> RouterStatistics:
        """Counts, drops, dead experts and entropy; does not wait for the device."""
        chosen = self.indices >= 0
        kept = chosen if self.slots is None else self.slots >= 0
        shares = self.counts.double() / self.counts.sum()
        return RouterStatistics(
            counts=self.counts,
            dropped_pairs=(chosen & ~kept).sum(),
            dropped_tokens=(chosen.any(-1) & ~kept.any(-1)).sum(),
            dead_experts=(self.counts == 0).sum(),
            load_entropy=-torch.special.xlogy(shares, shares).sum().float(),
        )


class TopKRouter(nn.Module):
    """Linear gate and top-k choice, with capacity, jitter and balancing by bias.

    Parameters: `weight` (E, D) and, with `bias`, `bias` (E,), drawn as those of `nn.Linear`; with
    `score_correction` the buffer `e_score_correction_bias` (E,), which stays in fp32 whatever the
    module is cast to. The state dicts of Transformers' `MixtralTopKRouter`, `Qwen3MoeTopKRouter`
    and `DeepseekV3TopkRouter` load.

    Args:
        input_dim: D, width of the tokens.
        num_experts: E, at most 4096.
        k: experts per token, 1 <= k <= E * topk_group / n_group.
        capacity_factor: each expert takes ceil(capacity_factor * T * k / E) of the pairs of a
            forward with T tokens (masked ones included, so that the number is known beforehand);
            the others are dropped. None: no limit, no dropped pairs.
        bias: the gate has one.
        scoring_func: softmax, sigmoid or sqrtsoftplus.
        norm_topk_prob: divide a token's k weights by their sum. Not for k = 1, whose weight would
            always be 1. Dropped pairs do not raise the weights of the others.
        routed_scaling_factor: multiplies all weights.
        n_group: of neighbouring experts; must divide E.
        topk_group: groups that a token's experts may come from.
        group_score: top2_sum or max, see `omni_moe.ops.omni_topk_router`.
        score_correction: balance the load by a bias on the scores that changes the choice alone,
            see `update_score_correction`.
        token_drop_policy: which pairs of a full expert are dropped: position, those of the last
            tokens, or probs, those of the smallest weights.
        jitter_noise: eps in [0, 1); in training the gate sees its input multiplied elementwise by
            random numbers of uniform(1 - eps, 1 + eps), drawn by PyTorch's generator of the device.
        router_dtype: compute the gate in this dtype (torch.float32 is usual beside bf16 experts),
            under autocast too; weights and logits come in it. None: in that of the input.
        force_load_balancing: for debugging and benchmarks: token t gets the experts
            (t k, ..., t k + k - 1) mod E, whatever its scores; its weights are theirs.

    Shape:
        hidden_states (..., D), token_mask (...), replay_indices (T, k) with T the product of the
        leading sizes; all outputs are over T.

    Raises:
        ValueError: an option has a value that it cannot have.

    With `score_correction`, forwards in training mode add their counts to `tokens_per_expert`, on
    the device and without synchronising. A forward that activation checkpointing repeats is not
    counted again.
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        k: int,
        capacity_factor: float | None = None,
        *,
        bias: bool = False,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2_sum",
        score_correction: bool = False,
        token_drop_policy: str = "position",
        jitter_noise: float = 0.0,
        router_dtype: torch.dtype | None = None,
        force_load_balancing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= n_group <= num_experts or num_experts % n_group:
            raise ValueError(f"n_group: expected a divisor of {num_experts}, got {n_group}")
        if not 1 <= topk_group <= n_group:
            raise ValueError(f"topk_group: expected 1 to {n_group}, got {topk_group}")
        most = num_experts // n_group * topk_group
        if not 1 <= k <= most:
            raise ValueError(f"k: expected 1 to {most}, the experts of topk_group groups, got {k}")
        if capacity_factor is not None and not 0 <= capacity_factor < math.inf:
            raise ValueError(f"capacity_factor: expected None or >= 0, got {capacity_factor}")
        if token_drop_policy not in TOKEN_DROP_POLICIES:
            raise ValueError(
                f"token_drop_policy: expected one of {', '.join(TOKEN_DROP_POLICIES)}, "
                f"got {token_drop_policy!r}"
            )
        if not 0 <= jitter_noise < 1:
            raise ValueError(f"jitter_noise: expected a number in [0, 1), got {jitter_noise}")
        self.input_dim, self.num_experts, self.k = input_dim, num_experts, k
        self.capacity_factor = capacity_factor
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.token_drop_policy = token_drop_policy
        self.jitter_noise = jitter_noise
        self.router_dtype = router_dtype
        self.force_load_balancing = force_load_balancing

        self.weight = nn.Parameter(torch.empty(num_experts, input_dim, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None,
        )
        correction = torch.zeros(num_experts, device=device) if score_correction else None
        counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.register_buffer("e_score_correction_bias", correction)
        self.register_buffer(
            "tokens_per_expert", counts if score_correction else None, persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate as `nn.Linear` does, and forget correction and counts."""
        bound = 1 / math.sqrt(self.input_dim) if self.input_dim > 0 else 0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()
            self.tokens_per_expert.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        replay_indices: Tensor | None = None,
    ) -> TopKRouterOutput:
        """Route tokens.

        Args:
            hidden_states: (..., D); floating point.
            token_mask: (...) bool, False for tokens that choose nothing, as padding.
            replay_indices: (T, k) int32 or int64 in [-1, E), a recorded choice to be used again:
                its weights come from the gate as it is now, with gradients.

        Raises:
            ValueError: shapes, dtypes or devices disagree.
            IndexError: a replayed id is outside [-1, E) (CPU; a device-side assert on CUDA).
        """
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != self.input_dim:
            raise ValueError(
                f"hidden_states: expected shape (..., {self.input_dim}), "
                f"got {tuple(hidden_states.shape)}"
            )
        if token_mask is not None and token_mask.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"token_mask: expected shape {tuple(hidden_states.shape[:-1])}, "
                f"got {tuple(token_mask.shape)}"
            )
        tokens = hidden_states.reshape(-1, self.input_dim)
        logits = self._logits(tokens)
        if replay_indices is None and self.force_load_balancing:
            replay_indices = self._even_indices(tokens)
        correction = self.e_score_correction_bias
        if correction is not None:
            correction = correction.to(torch.promote_types(logits.dtype, torch.float32))
        weights, indices, counts = omni_topk_router(
            logits,
            self.k,
            scoring_func=self.scoring_func,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            e_score_correction_bias=correction,
            token_mask=None if token_mask is None else token_mask.flatten(),
            replay_indices=replay_indices,
        )
        if self.tokens_per_expert is not None and self.training and not is_recomputing():
            with torch.no_grad():
                self.tokens_per_expert.add_(counts)
        slots, capacity = None, None
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * tokens.shape[0] * self.k / self.num_experts)
            priorities = weights if self.token_drop_policy == "probs" else None
            slots = omni_expert_slots(indices, self.num_experts, capacity, priorities)
            weights = weights.masked_fill(slots < 0, 0)
        return TopKRouterOutput(indices, weights, counts, slots, logits, capacity)

    def _logits(self, tokens: Tensor) -> Tensor:
        """(T, E)"""
        if self.training and self.jitter_noise > 0:
            tokens = jittered(tokens, self.jitter_noise)
        if self.router_dtype is None:
            return F.linear(tokens, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.router_dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(self.router_dtype), self.weight.to(self.router_dtype), bias)

    def _even_indices(self, tokens: Tensor) -> Tensor:
        pairs = torch.arange(tokens.shape[0] * self.k, device=tokens.device, dtype=torch.int32)
        return (pairs % self.num_experts).view(-1, self.k)

    @torch.no_grad()
    def update_score_correction(
        self, update_rate: float = 1e-3, process_group: "dist.ProcessGroup | None" = None
    ) -> None:
        """Moves the bias against the load since the last call: balance without a loss.

        `bias += update_rate * sign(mean load - load)`, DeepSeek-V3's way (arXiv 2408.15664, Alg.
        1), and the counts start again. To be called after each optimizer step, so that under
        gradient accumulation it sees the load of all micro-batches. Does not wait for the device.

        Args:
            update_rate: how far each bias moves.
            process_group: add up the load of its ranks first. By default that of all ranks where
                torch.distributed is initialised: the ranks' biases must stay the same.

        Raises:
            RuntimeError: the router was made without `score_correction`.
        """
        if self.e_score_correction_bias is None:
            raise RuntimeError(
                "update_score_correction: expected a router with score_correction=True, got False"
            )
        counts = self.tokens_per_expert.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=process_group)
        # In integers: E * load and the sum of all loads say which is the larger.
        direction = (counts.sum() - counts * self.num_experts).sign()
        self.e_score_correction_bias.add_(direction.to(torch.float32), alpha=update_rate)
        self.tokens_per_expert.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # A rate of 0.001 is below what bf16 can add to a bias near 1.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after is not None and after.dtype != torch.float32:
            exact = before.to(after.device) if not before.is_meta else after.to(torch.float32)
            self.e_score_correction_bias = exact
        return self

    def extra_repr(self) -> str:
        return (
            f"input_dim={self.input_dim}, num_experts={self.num_experts}, k={self.k}, "
            f"capacity_factor={self.capacity_factor}, scoring_func={self.scoring_func}, "
            f"norm_topk_prob={self.norm_topk_prob}, bias={self.bias is not None}"
        )

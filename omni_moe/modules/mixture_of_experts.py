"""The classic mixture of experts: a top-k router, experts that are MLPs, and a shared expert.

Modules and parameters have the names and shapes of the sparse blocks of Transformers' Mixtral,
Qwen3-MoE and DeepSeek-V3, whose state dicts load.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_moe.activations import ACTIVATION_FUNCTIONS
from omni_moe.distributed.expert_parallel import run_at_experts
from omni_moe.modules.plain import plain_weight
from omni_moe.modules.topk_router import TopKRouter, TopKRouterOutput
from omni_moe.ops import omni_expert_rows, omni_mlp, omni_permute, omni_unpermute

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Experts", "MixtureOfExperts", "SharedExpert", "gated_activation", "grouped_experts"]


# ---- functions -----------------------------------------------------------------------------------


def gated_activation(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """`act(gate) * up` of rows (N, 2I) whose first half is the gate, in one kernel: (N, I)."""
    return torch.ops.omni_moe._omni_gated_activation.default(gate_up, activation)


def _unquantised(weight: Tensor) -> Tensor:
    """One quantised by torchao in the dtype that it stands for; others as they are."""
    is_quantised = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if is_quantised else weight


def _weights_for(rows: Tensor, routing_weights: Tensor | None) -> Tensor | None:
    """In the dtype of the rows, or in that of their sums."""
    if routing_weights is None or routing_weights.dtype == rows.dtype:
        return routing_weights
    return routing_weights.to(torch.promote_types(rows.dtype, torch.float32))


def _grouped_linear(
    rows: Tensor, weight: Tensor, expert_ends: Tensor, bias: Tensor | None
) -> Tensor:
    """(N, O): the rows of each expert through its own linear layer, weight (E, O, H), bias (E, O).

    Rows behind the last end hold anything, and so do their gradients.
    """
    linear = torch.ops.omni_moe._omni_grouped_linear.default
    output = linear(rows, _unquantised(weight), expert_ends)
    if bias is None:
        return output
    # As a product with ones, so that the bias has the gradient of a weight: summed by expert in
    # fp32, without atomics, and without the rows behind the last end. The grouped GEMM wants eight
    # columns.
    ones = F.pad(rows.new_ones(rows.shape[0], 1), (0, 7))
    return output + linear(ones, F.pad(bias.unsqueeze(-1), (0, 7)), expert_ends)


def grouped_experts(
    hidden_states: Tensor,
    indices: Tensor,
    routing_weights: Tensor | None,
    *,
    up_proj: Tensor,
    down_proj: Tensor,
    activate: Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    slots: Tensor | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """`out[t] = sum_k weight[t, k] * E_idx[t, k](hidden[t])`, `E(x) = down activate(up x)`.

    Tokens are put in expert order, go through one grouped GEMM for all experts and back. In bf16 on
    a GPU nothing waits for the device, if H and the widths are multiples of 8; in other dtypes a
    loop over the experts reads where each of them ends.

    Args:
        hidden_states: (T, H); fp32, fp16, bf16 (fp64 on CPU).
        indices: (T, K) int32 or int64 in [-1, E); pairs of -1 add nothing.
        routing_weights: (T, K), or None for ones.
        up_proj: (E, O, H), the same dtype as `hidden_states`, unless under autocast; or quantised
            by torchao.
        down_proj: (E, H, I), the same.
        activate: from (N, O) to (N, I), row by row: some of the rows may hold anything.
        up_bias: (E, O).
        down_bias: (E, H).
        slots: (T, K) int32 as of `omni_expert_slots`; pairs of -1 add nothing. None: all take part.
        num_rows: at least as many as pairs take part; T * K by default.

    Returns:
        (T, H) in the dtype of `hidden_states`, or of autocast; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        IndexError: an index is outside [-1, E) (CPU; a device-side assert on CUDA).
    """
    row_id_map, expert_ends = omni_expert_rows(indices, len(down_proj), slots)
    if num_rows is None:
        num_rows = indices.shape[0] * indices.shape[1]
    rows = omni_permute(hidden_states, row_id_map, expert_ends, num_rows)
    rows = activate(_grouped_linear(rows, up_proj, expert_ends, up_bias))
    rows = _grouped_linear(rows, down_proj, expert_ends, down_bias)
    return omni_unpermute(rows, row_id_map, expert_ends, _weights_for(rows, routing_weights))


# ---- modules -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """E MLPs of one shape, `down(act(gate x) * (up x))` or, without a gate, `down act(up x)`.

    `omni_moe.distributed.shard_experts` splits them over processes.

    Parameters are those of Transformers' fused experts, so that weights carry over by assignment:
    `gate_up_proj` (E, 2I, H), gate before up, or `up_proj` (E, I, H) without a gate; `down_proj`
    (E, H, I); with `bias` also `gate_up_proj_bias` (E, 2I) or `up_proj_bias` (E, I), and
    `down_proj_bias` (E, H). Each expert is drawn as `nn.Linear` draws.

    Args:
        hidden_size: H.
        intermediate_size: I, of one expert.
        num_experts: E, at most 4096.
        hidden_act: silu, gelu, gelu_tanh, relu or identity.
        gated: SwiGLU and its kin; else a plain feed-forward network.
        bias: of both layers.

    Raises:
        ValueError: the activation is unknown or a size is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        hidden_act: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in {**sizes, "num_experts": num_experts}.items():
            if size < 1:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if hidden_act not in ACTIVATION_FUNCTIONS:
            raise ValueError(
                f"hidden_act: expected one of {', '.join(ACTIVATION_FUNCTIONS)}, got {hidden_act!r}"
            )
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts = num_experts
        self.hidden_act, self.gated = hidden_act, gated
        self.mesh: DeviceMesh | None = None  # over which `shard_experts` has split them
        up_size = 2 * intermediate_size if gated else intermediate_size
        self._up_name = "gate_up_proj" if gated else "up_proj"
        for name, rows, cols in (
            (self._up_name, up_size, hidden_size),
            ("down_proj", hidden_size, intermediate_size),
        ):
            weight = torch.empty(num_experts, rows, cols, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
            of_rows = torch.empty(num_experts, rows, device=device, dtype=dtype) if bias else None
            self.register_parameter(f"{name}_bias", nn.Parameter(of_rows) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's layers as `nn.Linear` does."""
        for name in (self._up_name, "down_proj"):
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            bound = 1 / math.sqrt(weight.shape[2])
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        hidden_states: Tensor,
        indices: Tensor,
        routing_weights: Tensor,
        slots: Tensor | None = None,
        num_rows: int | None = None,
    ) -> Tensor:
        """(T, H) from tokens (T, H); arguments as of `grouped_experts`."""
        if self.mesh is None:
            return self._run(hidden_states, indices, routing_weights, slots, num_rows)
        return run_at_experts(
            hidden_states,
            indices,
            _weights_for(hidden_states, routing_weights),
            slots,
            mesh=self.mesh,
            num_experts=self.num_experts,
            run_local=self._run,
        )

    def _run(
        self,
        hidden_states: Tensor,
        indices: Tensor,
        routing_weights: Tensor | None = None,
        slots: Tensor | None = None,
        num_rows: int | None = None,
    ) -> Tensor:
        """By the experts of this process."""
        return grouped_experts(
            hidden_states,
            indices,
            routing_weights,
            up_proj=self._local(self._up_name),
            down_proj=self._local("down_proj"),
            activate=self._activate,
            up_bias=self._local(f"{self._up_name}_bias"),
            down_bias=self._local("down_proj_bias"),
            slots=slots,
            num_rows=num_rows,
        )

    def _local(self, name: str) -> Tensor | None:
        """The part of a parameter that this process has."""
        parameter = getattr(self, name)
        return parameter if self.mesh is None or parameter is None else parameter.to_local()

    def _activate(self, rows: Tensor) -> Tensor:
        if self.gated:
            return gated_activation(rows, self.hidden_act)
        return ACTIVATION_FUNCTIONS[self.hidden_act](rows)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, hidden_act={self.hidden_act!r}, gated={self.gated}, "
            f"bias={self.down_proj_bias is not None}"
        )


class SharedExpert(nn.Module):
    """The MLP that every token goes through: `gate_proj` (if gated), `up_proj` and `down_proj`.

    Linear layers without bias, (I, H), (I, H) and (H, I). Arguments as of `Experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "silu",
        gated: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.hidden_act = hidden_act
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) from (..., H)."""
        activate = ACTIVATION_FUNCTIONS[self.hidden_act]
        if self.gate_proj is None:
            return self.down_proj(activate(self.up_proj(hidden_states)))
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        weights = [plain_weight(layer, nn.Linear) for layer in layers]
        if all(weight is not None for weight in weights):
            return omni_mlp(hidden_states, *weights, activation=self.hidden_act)
        # With a hook, an adapter or a quantised weight they have to be called.
        return self.down_proj(activate(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MixtureOfExperts(nn.Module):
    """Top-k router, routed experts, and optionally a shared expert.

    `y = sum_k w_k E_k(x) + g S(x)`, with the k experts and weights of `TopKRouter`; g is 1, or
    `sigmoid(shared_expert_gate x)`. Modules: `gate` (`TopKRouter`), `experts` (`Experts`),
    `shared_experts` (`SharedExpert`) and `shared_expert_gate` (`nn.Linear(H, 1)`, no bias), the
    latter two None where there are none.

    Args:
        hidden_size: H.
        intermediate_size: I, of one routed expert.
        num_experts: E, at most 4096.
        k: experts per token.
        capacity_factor: of `TopKRouter`: pairs past an expert's capacity are dropped.
        hidden_act: silu, gelu, gelu_tanh, relu or identity; of all experts.
        gated: experts are `down(act(gate x) * (up x))`, else `down act(up x)`.
        bias: of the routed experts' layers.
        shared_intermediate_size: of the shared expert; 0: there is none.
        shared_expert_gate: the shared expert's output is multiplied by a sigmoid gate.
        router_options: further options of `TopKRouter`, by name: `scoring_func`, `norm_topk_prob`,
            `jitter_noise`, ...

    Shape:
        hidden_states (..., H), token_mask (...), replay_indices (T, k) with T the product of the
        leading sizes; the output is (..., H).

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        k: int,
        capacity_factor: float | None = None,
        *,
        hidden_act: str = "silu",
        gated: bool = True,
        bias: bool = False,
        shared_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
        router_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared_intermediate_size < 0:
            raise ValueError(
                f"shared_intermediate_size: expected >= 0, got {shared_intermediate_size}"
            )
        if shared_expert_gate and not shared_intermediate_size:
            raise ValueError(
                "shared_expert_gate: expected False without a shared expert, got True with "
                "shared_intermediate_size=0"
            )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        kind: dict[str, Any] = {"hidden_act": hidden_act, "gated": gated, **place}
        self.experts = Experts(hidden_size, intermediate_size, num_experts, bias=bias, **kind)
        self.gate = TopKRouter(
            hidden_size, num_experts, k, capacity_factor, **{**place, **(router_options or {})}
        )
        self.shared_experts = (
            SharedExpert(hidden_size, shared_intermediate_size, **kind)
            if shared_intermediate_size
            else None
        )
        self.shared_expert_gate = (
            nn.Linear(hidden_size, 1, bias=False, **place) if shared_expert_gate else None
        )

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        replay_indices: Tensor | None = None,
    ) -> tuple[Tensor, TopKRouterOutput]:
        """Output of the layer, and what the router decided, from which losses are computed.

        Args:
            hidden_states: (..., H); floating point.
            token_mask: (...) bool, False for tokens that choose no experts, as padding; the shared
                expert sees them.
            replay_indices: (T, k), a recorded choice; see `TopKRouter`.

        Returns:
            (..., H) in the dtype of `hidden_states` (or of autocast), and the `TopKRouterOutput`
            over T tokens.

        Raises:
            ValueError: shapes, dtypes or devices disagree.
        """
        router = self.gate(hidden_states, token_mask, replay_indices)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        num_rows = None
        if router.capacity is not None:
            num_rows = min(router.indices.numel(), self.experts.num_experts * router.capacity)
        output = self.experts(tokens, router.indices, router.weights, router.slots, num_rows)
        output = output.view(hidden_states.shape)
        if self.shared_experts is not None:
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
            output = output + shared
        return output, router

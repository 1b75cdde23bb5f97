"""The implementations: for each op and name, how to call it on a problem.

A builder returns a `Workload`, or raises `NotApplicable` with the reason. Names:
`omni_moe` (this library), `eager` (stock PyTorch operators, `eager.py`),
`compile` (torch.compile of those), `gathers` (this library not told of the grid, so that it gathers
the rows of every pair), `dense_masked` (all experts by matrix products, masked; in a layer, router
and MLP are this library's), `gemms_only` (the bare matrix products of the MLP: a floor, not the
function), `upstream_triton` (the paper's published kernels), `hf_doge` (DogeCDMoE of Hugging Face
Transformers, whose router differs, so that it has no error), `peer` (`peer_layer.py`),
`hf_grouped_mm` and `hf_batched_mm` (Transformers' experts implementations behind a gate of stock
operators), `scattermoe` and `megablocks` (those libraries' layers with weights of their own, so
that they have no error), from `mixture.py`. Language models (`models.py`): `omni_moe`, `dense`, and
both under torch.compile.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager, mixture, models, upstream
from benchmarks.peer_layer import PeerLayer
from benchmarks.problems import Problem
from benchmarks.upstream import NotApplicable
from omni_moe import ops

# Bytes of a copy of rows (tokens, K, H), or of an array (tokens, E), that a peer makes at a time:
# 8 GiB, of which two or four and their results fit in 80. More tokens than that go in chunks.
COPY_BYTES = 2**33


@dataclass(frozen=True)
class Workload:
    """`forward` computes the output; gradients are asked for `leaves`.

    `facts` are parts of the row that a result is recorded in; `flops` counts a whole run.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    grad_output: Tensor
    has_oracle: bool = True
    facts: dict[str, int] = field(default_factory=dict)
    flops: int | None = None

    def run(self) -> list[Tensor]:
        """Output and, if there are leaves that need them, gradients."""
        if not self.leaves:
            with torch.no_grad():
                return [self.forward()]
        output = self.forward()
        gradients = torch.autograd.grad(output, self.leaves, self.grad_output)
        return [output.detach(), *gradients]


def build(impl: str, problem: Problem) -> Workload:
    """The workload of an implementation.

    Raises:
        NotApplicable: it does not exist for this op, cannot run this shape, or is not installed.
    """
    builders = _BUILDERS[problem.case.op]
    if impl not in builders:
        raise NotApplicable(f"{impl} has no {problem.case.op}")
    made = builders[impl](problem)
    if isinstance(made, Workload):
        return made
    return Workload(made, problem.leaves, problem.grad_output)


def names(op: str | None = None) -> list[str]:
    """Names of all implementations, or of those of an op, in the order of the tables."""
    chosen = [op] if op else list(_BUILDERS)
    return list(dict.fromkeys(name for op in chosen for name in _BUILDERS[op]))


def _compiled(function: Callable) -> Callable:
    # The caller resets the compiler between cases, so that no limit on recompilations is met.
    return torch.compile(function, fullgraph=True, dynamic=False)


# ---- expert -------------------------------------------------------------------------------------


def _expert_args(problem: Problem, indices: str) -> dict[str, Tensor]:
    """By the names, and in the order, of the arguments of `omni_moe.ops.omni_expert`."""
    names = ("hidden_states", "up_weights", "down_weights", "routing_weights")
    return {name: problem.tensors[name] for name in names} | {"indices": problem.tensors[indices]}


def _expert_omni_moe(problem: Problem) -> Callable:
    args = _expert_args(problem, "indices")
    num_cols = problem.case.shape.get("cols", 0)
    return lambda: ops.omni_expert(**args, num_cols=num_cols)


def _expert_gathers(problem: Problem) -> Callable:
    if "cols" not in problem.case.shape:
        raise NotApplicable("without a grid there are only gathers")
    args = _expert_args(problem, "indices")
    return lambda: ops.omni_expert(**args)


def _expert_eager(problem: Problem) -> Callable:
    args = _expert_args(problem, "indices_long")
    return lambda: eager.expert(**args)


def _expert_compile(problem: Problem) -> Callable:
    args, function = _expert_args(problem, "indices_long"), _compiled(eager.expert)
    return lambda: function(**args)


def _dense_masked(
    hidden_states: Tensor,
    up_weights: Tensor,
    down_weights: Tensor,
    routing_weights: Tensor,
    indices: Tensor,
) -> Tensor:
    mask = routing_weights.new_zeros(len(hidden_states), len(up_weights))
    mask = mask.scatter_add(1, indices.long(), routing_weights)
    return (F.silu(hidden_states @ up_weights.t()) * mask) @ down_weights


def _expert_dense_masked(problem: Problem) -> Callable:
    args = _expert_args(problem, "indices_long")
    return lambda: _dense_masked(**args)


def _expert_upstream(problem: Problem) -> Callable:
    function = upstream.expert(problem.case)
    args = list(_expert_args(problem, "indices").values())  # which autograd takes by position only
    return lambda: function(*args)


# ---- router -------------------------------------------------------------------------------------


def _router(problem: Problem, function: Callable) -> Callable:
    x, y = problem.tensors["router_logits_x"], problem.tensors["router_logits_y"]
    k = problem.case.shape["k"]
    return lambda: function(x, y, k)[0]


def _router_omni_moe(problem: Problem) -> Callable:
    return _router(problem, ops.omni_softmax_router)


def _router_eager(problem: Problem) -> Callable:
    return _router(problem, eager.router)


def _router_compile(problem: Problem) -> Callable:
    return _router(problem, _compiled(eager.router))


def _router_upstream(problem: Problem) -> Callable:
    return _router(problem, upstream.softmax_router(problem.case))


# ---- MLP ----------------------------------------------------------------------------------------


def _mlp(problem: Problem, function: Callable) -> Callable:
    args = list(problem.tensors.values())
    return lambda: function(*args)


def _mlp_omni_moe(problem: Problem) -> Callable:
    return _mlp(problem, ops.omni_mlp)


def _mlp_eager(problem: Problem) -> Callable:
    return _mlp(problem, eager.mlp)


def _mlp_compile(problem: Problem) -> Callable:
    return _mlp(problem, _compiled(eager.mlp))


def _mlp_gemms_only(problem: Problem) -> Workload:
    if problem.leaves:
        raise NotApplicable("gemms_only is a forward pass")
    x, gate_weight, up_weight, down_weight = problem.tensors.values()

    def forward() -> Tensor:
        gate = F.linear(x, gate_weight)
        F.linear(x, up_weight)
        return F.linear(gate, down_weight)

    return Workload(forward, [], problem.grad_output, has_oracle=False)


def _mlp_upstream(problem: Problem) -> Callable:
    return _mlp(problem, upstream.mlp())


# ---- layer --------------------------------------------------------------------------------------


def _layer_omni_moe(problem: Problem) -> Callable:
    x = problem.tensors["hidden_states"]
    return lambda: problem.module(x)


def _layer_eager(problem: Problem) -> Workload:
    chunk = _chunk(problem, problem.case.shape["k"] * problem.case.shape["hidden"])
    x = problem.tensors["hidden_states"]
    return _in_chunks(problem, lambda: eager.layer(problem.module, x, chunk), problem.leaves, chunk)


def _chunk(problem: Problem, elements_per_token: int) -> int:
    """Tokens whose copies stay within COPY_BYTES; all of them in training, which keeps copies."""
    shape, x = problem.case.shape, problem.tensors["hidden_states"]
    if problem.leaves:
        return shape["tokens"]
    most = COPY_BYTES // (elements_per_token * x.element_size())
    return max(1, min(most, shape["tokens"]))


def _in_chunks(
    problem: Problem,
    forward: Callable,
    leaves: list[Tensor],
    chunk: int,
    has_oracle: bool = True,
) -> Workload:
    """The workload of a layer; its row says how many tokens a chunk has."""
    facts = {"chunk_tokens": chunk} if chunk < problem.case.shape["tokens"] else {}
    return Workload(forward, leaves, problem.grad_output, has_oracle, facts)


def _layer_dense_masked(problem: Problem) -> Workload:
    module, k = problem.module, problem.case.shape["k"]
    chunk = _chunk(problem, problem.case.shape["experts"])
    x = problem.tensors["hidden_states"]

    def forward() -> Tensor:
        logits_x, logits_y = module._router_logits(x)
        routing_weights, indices = ops.omni_softmax_router(logits_x, logits_y, k)
        up, down = module.up_embed.weight, module.down_embed.weight
        shared = [p.weight for p in (module.gate_proj, module.up_proj, module.down_proj)]
        parts = zip(x.split(chunk), routing_weights.split(chunk), indices.split(chunk), strict=True)
        outputs = [_dense_masked(t, up, down, weights, ids) for t, weights, ids in parts]
        routed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return routed + ops.omni_mlp(x, *shared)

    return _in_chunks(problem, forward, problem.leaves, chunk)


def _layer_compile(problem: Problem) -> Callable:
    x, function = problem.tensors["hidden_states"], _compiled(eager.layer)
    return lambda: function(problem.module, x)


def _layer_upstream(problem: Problem) -> Callable:
    x = problem.tensors["hidden_states"]
    router = upstream.softmax_router(problem.case)
    expert, mlp = upstream.expert(problem.case), upstream.mlp()
    module, k = problem.module, problem.case.shape["k"]

    def forward() -> Tensor:
        logits_x = module.router_norm_x(module.router_gate_x(x))
        logits_y = module.router_norm_y(module.router_gate_y(x))
        routing_weights, indices = router(logits_x, logits_y, k)
        up, down = module.up_embed.weight, module.down_embed.weight
        shared = [p.weight for p in (module.gate_proj, module.up_proj, module.down_proj)]
        return mlp(x, *shared) + expert(x, up, down, routing_weights, indices)

    return forward


def _layer_hf_doge(problem: Problem) -> Workload:
    try:
        from transformers import DogeConfig
        from transformers.models.doge.modeling_doge import DogeCDMoE
    except ImportError as error:
        raise NotApplicable(f"transformers with DogeCDMoE is not installed: {error}") from error
    shape = problem.case.shape
    config = DogeConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["k"],
        is_moe=True,
    )
    x = problem.tensors["hidden_states"]
    with torch.device(x.device):
        layer = DogeCDMoE(config).to(x.dtype).requires_grad_(x.requires_grad)
    leaves = [x, *layer.parameters()] if x.requires_grad else []
    batch = x.unsqueeze(0)
    return Workload(
        lambda: layer(batch)[0].squeeze(0), leaves, problem.grad_output, has_oracle=False
    )


# ---- PEER ---------------------------------------------------------------------------------------


def _peer(problem: Problem) -> Workload:
    shape, x = problem.case.shape, problem.tensors["hidden_states"]
    torch.manual_seed(0)
    with torch.device(x.device):
        layer = PeerLayer(shape["hidden"], shape["rows"], shape["heads"], shape["k"])
    layer = layer.to(x.dtype).requires_grad_(x.requires_grad)
    leaves = [x, *layer.parameters()] if x.requires_grad else []
    chunk = _chunk(problem, shape["k"] * shape["hidden"])
    return _in_chunks(problem, lambda: layer(x, chunk), leaves, chunk, has_oracle=False)


# ---- language model -----------------------------------------------------------------------------


def _model(problem: Problem, make: Callable, is_compiled: bool) -> Workload:
    ids = problem.tensors["input_ids"]
    model = make(problem.case, ids.device)
    called = torch.compile(model, dynamic=False) if is_compiled else model
    return Workload(
        lambda: models.loss_of(called, ids), list(model.parameters()), problem.grad_output,
        has_oracle=False, flops=models.training_flops(model, ids),
    )  # fmt: skip


# ---- top-k router -------------------------------------------------------------------------------


def _topk_router_omni_moe(problem: Problem) -> Callable:
    shape, logits = problem.case.shape, problem.tensors["router_logits"]
    return lambda: ops.omni_topk_router(
        logits,
        shape["k"],
        scoring_func="sigmoid",
        norm_topk_prob=True,
        n_group=shape["groups"],
        topk_group=shape["topk_groups"],
        e_score_correction_bias=problem.tensors["bias"],
    )[0]


def _topk_router(problem: Problem, function: Callable) -> Callable:
    args = [
        *problem.tensors.values(),
        *(problem.case.shape[n] for n in ("k", "groups", "topk_groups")),
    ]
    return lambda: function(*args)


def _topk_router_eager(problem: Problem) -> Callable:
    return _topk_router(problem, mixture.topk_router)


def _topk_router_compile(problem: Problem) -> Callable:
    return _topk_router(problem, _compiled(mixture.topk_router))


# ---- permutation --------------------------------------------------------------------------------


def _permute_omni_moe(problem: Problem) -> Callable:
    tokens, weights, indices = problem.tensors.values()
    # Known beforehand: the kernels that move the rows are measured.
    maps = ops.omni_expert_rows(indices, problem.case.shape["experts"])
    return lambda: ops.omni_unpermute(
        ops.omni_permute(tokens, *maps, indices.numel()), *maps, weights
    )


def _permute_eager(problem: Problem) -> Callable:
    args = list(problem.tensors.values())
    return lambda: mixture.permute_and_unpermute(*args)


# ---- mixture of experts -------------------------------------------------------------------------


def _moe_omni_moe(problem: Problem) -> Callable:
    x = problem.tensors["hidden_states"]
    return lambda: problem.module(x)[0]


def _moe_eager(problem: Problem) -> Callable:
    x = problem.tensors["hidden_states"]
    return lambda: mixture.mixture_of_experts(problem.module, x)


def _moe_hf(problem: Problem, implementation: str) -> Callable:
    x = problem.tensors["hidden_states"]
    forward = mixture.hf_experts(problem.case, problem.module, implementation)
    return lambda: forward(x)


def _moe_hf_grouped_mm(problem: Problem) -> Callable:
    return _moe_hf(problem, "grouped_mm")


def _moe_hf_batched_mm(problem: Problem) -> Callable:
    shape, element = problem.case.shape, problem.grad_output.element_size()
    pair_bytes = 3 * shape["hidden"] * shape["intermediate"] * element
    copied = shape["tokens"] * shape["k"] * pair_bytes
    if copied > 4 * COPY_BYTES:
        raise NotApplicable(f"hf_batched_mm copies the experts of each pair, {copied >> 30} GiB")
    return _moe_hf(problem, "batched_mm")


def _moe_scattermoe(problem: Problem) -> Workload:
    module, x = problem.module, problem.tensors["hidden_states"]
    with torch.device(x.device):
        experts = mixture.scattermoe_experts(problem.case)
    experts = experts.to(x.dtype).requires_grad_(x.requires_grad)
    leaves = [x, module.gate.weight, *experts.parameters()] if x.requires_grad else []
    return Workload(
        lambda: experts(x, *mixture.topk_softmax(module, x)), leaves, problem.grad_output,
        has_oracle=False,
    )  # fmt: skip


def _moe_megablocks(problem: Problem) -> Workload:
    x = problem.tensors["hidden_states"]
    layer = mixture.megablocks_layer(problem.case, x.device)
    layer = layer.to(x.dtype).requires_grad_(x.requires_grad)
    leaves = [x, *layer.parameters()] if x.requires_grad else []
    batch = x.unsqueeze(1)

    def forward() -> Tensor:
        output = layer(batch)
        return (output[0] if isinstance(output, tuple) else output).squeeze(1)

    return Workload(forward, leaves, problem.grad_output, has_oracle=False)


_BUILDERS: dict[str, dict[str, Callable[[Problem], Callable | Workload]]] = {
    "expert": {
        "omni_moe": _expert_omni_moe,
        "eager": _expert_eager,
        "compile": _expert_compile,
        "gathers": _expert_gathers,
        "dense_masked": _expert_dense_masked,
        "upstream_triton": _expert_upstream,
    },
    "router": {
        "omni_moe": _router_omni_moe,
        "eager": _router_eager,
        "compile": _router_compile,
        "upstream_triton": _router_upstream,
    },
    "mlp": {
        "omni_moe": _mlp_omni_moe,
        "eager": _mlp_eager,
        "compile": _mlp_compile,
        "gemms_only": _mlp_gemms_only,
        "upstream_triton": _mlp_upstream,
    },
    "layer": {
        "omni_moe": _layer_omni_moe,
        "eager": _layer_eager,
        "compile": _layer_compile,
        "dense_masked": _layer_dense_masked,
        "upstream_triton": _layer_upstream,
        "hf_doge": _layer_hf_doge,
    },
    "peer_layer": {"peer": _peer},
    "model": {
        "omni_moe": partial(_model, make=models.omni_moe, is_compiled=False),
        "omni_moe_compile": partial(_model, make=models.omni_moe, is_compiled=True),
        "dense": partial(_model, make=models.dense, is_compiled=False),
        "dense_compile": partial(_model, make=models.dense, is_compiled=True),
    },
    "topk_router": {
        "omni_moe": _topk_router_omni_moe,
        "eager": _topk_router_eager,
        "compile": _topk_router_compile,
    },
    "permute": {
        "omni_moe": _permute_omni_moe,
        "eager": _permute_eager,
    },
    "moe": {
        "omni_moe": _moe_omni_moe,
        "eager": _moe_eager,
        "hf_grouped_mm": _moe_hf_grouped_mm,
        "hf_batched_mm": _moe_hf_batched_mm,
        "scattermoe": _moe_scattermoe,
        "megablocks": _moe_megablocks,
    },
}

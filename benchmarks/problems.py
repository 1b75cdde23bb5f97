"""The tensors of a case, drawn from a seed, and the error of a result against the fp64 oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import eager, models
from benchmarks.cases import Case
from omni_moe import OmniMoE, OmniMoEConfig, reference
from omni_moe.modules import MixtureOfExperts

# Elements of one (tokens, K, H) or (tokens, R, C) array of the oracle: 512 MiB in fp64.
ORACLE_ELEMENTS = 2**26


@dataclass
class Problem:
    """Inputs of one call. Differentiable ones require grad if the case has a backward pass."""

    case: Case
    tensors: dict[str, Tensor]
    grad_output: Tensor
    module: nn.Module | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are asked for, in the order of the results."""
        parameters = list(self.module.parameters()) if self.module else []
        return [t for t in [*self.tensors.values(), *parameters] if t.requires_grad]


def make_problem(
    case: Case, device: torch.device, seed: int = 0, base: Problem | None = None
) -> Problem:
    """Draws the inputs; large expert tables are taken from `base` where it is given."""
    generator = torch.Generator(device).manual_seed(seed)
    return _MAKERS[case.op](case, device, generator, base)


class _Draw:
    """Random tensors of a case's dtype, device and generator."""

    def __init__(self, case: Case, device: torch.device, generator: torch.Generator) -> None:
        self.options = {"device": device, "dtype": getattr(torch, case.dtype)}
        self.generator = generator
        self.requires_grad = case.pass_name == "forward_backward"

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=self.generator, **self.options).mul_(std)
        return t.requires_grad_(self.requires_grad)

    def grad(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, **self.options)


def _make_expert(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    num_tokens, hidden_size, k = shape["tokens"], shape["hidden"], shape["k"]
    if case.ids == "router":
        logits = torch.randn(
            2, num_tokens, shape["rows"], device=device, generator=generator
        )  # fp32, and a square grid
        routing_weights, indices = eager.router(logits[0], logits[1], k)
    else:
        indices = torch.randint(
            shape["experts"], (num_tokens, k), device=device, generator=generator
        )
        routing_weights = torch.rand(num_tokens, k, device=device, generator=generator).div_(k)
    if base:
        up_weights, down_weights = base.tensors["up_weights"], base.tensors["down_weights"]
    else:
        up_weights = draw.normal(shape["experts"], hidden_size, std=hidden_size**-0.5)
        down_weights = draw.normal(shape["experts"], hidden_size)
    tensors = {
        "hidden_states": draw.normal(num_tokens, hidden_size),
        "up_weights": up_weights,
        "down_weights": down_weights,
        "routing_weights": routing_weights.to(draw.options["dtype"]).requires_grad_(
            draw.requires_grad
        ),
        # Each implementation gets the index type that its own router makes.
        "indices": indices.int(),
        "indices_long": indices,
    }
    return Problem(case, tensors, draw.grad(num_tokens, hidden_size))


def _make_router(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    tensors = {
        "router_logits_x": draw.normal(shape["tokens"], shape["rows"]),
        "router_logits_y": draw.normal(shape["tokens"], shape["cols"]),
    }
    return Problem(case, tensors, draw.grad(shape["tokens"], shape["k"]))


def _make_mlp(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    hidden_size, intermediate_size = shape["hidden"], shape["intermediate"]
    tensors = {
        "x": draw.normal(shape["tokens"], hidden_size),
        "gate_weight": draw.normal(intermediate_size, hidden_size, std=hidden_size**-0.5),
        "up_weight": draw.normal(intermediate_size, hidden_size, std=hidden_size**-0.5),
        "down_weight": draw.normal(hidden_size, intermediate_size, std=intermediate_size**-0.5),
    }
    return Problem(case, tensors, draw.grad(shape["tokens"], hidden_size))


def _make_layer(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    tensors = {"hidden_states": draw.normal(shape["tokens"], shape["hidden"])}
    # A module of its own: within a graph, the call before leaves the MLP of `base` in L2.
    module = _make_module(case, device).to(draw.options["dtype"])
    module.requires_grad_(draw.requires_grad)
    return Problem(case, tensors, draw.grad(shape["tokens"], shape["hidden"]), module)


def _make_peer_layer(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    """The tokens; the layer is the peer's own."""
    shape, draw = case.shape, _Draw(case, device, generator)
    tensors = {"hidden_states": draw.normal(shape["tokens"], shape["hidden"])}
    return Problem(case, tensors, draw.grad(shape["tokens"], shape["hidden"]))


def _make_model(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    """Ids of one batch (B, S), whose loss is differentiated; the models are the peers' own."""
    tokens = case.shape["tokens"]
    length = min(tokens, models.SEQUENCE_LENGTH)
    ids = torch.randint(
        models.VOCAB_SIZE, (tokens // length, length), device=device, generator=generator
    )
    return Problem(case, {"input_ids": ids}, torch.ones((), device=device))


def _make_module(case: Case, device: torch.device) -> OmniMoE:
    shape = case.shape
    config = OmniMoEConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_experts=shape["experts"],
        num_experts_per_token=shape["k"],
        expert_grid=(shape["rows"], shape["cols"]),
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = OmniMoE(config)
    return module.train(case.timing != "graph")


def _make_topk_router(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    bias = torch.randn(shape["experts"], device=device, generator=generator).div_(10)
    tensors = {"router_logits": draw.normal(shape["tokens"], shape["experts"]), "bias": bias}
    return Problem(case, tensors, draw.grad(shape["tokens"], shape["k"]))


def _make_permute(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    sizes = (shape["tokens"], shape["experts"])
    scores = torch.rand(sizes, device=device, generator=generator)
    tensors = {
        "tokens": draw.normal(shape["tokens"], shape["hidden"]),
        "weights": draw.normal(shape["tokens"], shape["k"]),
        "indices": scores.topk(shape["k"], dim=-1).indices,
    }
    return Problem(case, tensors, draw.grad(shape["tokens"], shape["hidden"]))


def _make_moe(
    case: Case, device: torch.device, generator: torch.Generator, base: Problem | None
) -> Problem:
    shape, draw = case.shape, _Draw(case, device, generator)
    torch.manual_seed(0)
    module = MixtureOfExperts(
        shape["hidden"], shape["intermediate"], shape["experts"], shape["k"],
        router_options={"norm_topk_prob": True}, **draw.options,
    )  # fmt: skip
    module.requires_grad_(draw.requires_grad)
    tensors = {"hidden_states": draw.normal(shape["tokens"], shape["hidden"])}
    return Problem(case, tensors, draw.grad(shape["tokens"], shape["hidden"]), module)


_MAKERS = {
    "expert": _make_expert,
    "router": _make_router,
    "mlp": _make_mlp,
    "layer": _make_layer,
    "peer_layer": _make_peer_layer,
    "model": _make_model,
    "topk_router": _make_topk_router,
    "permute": _make_permute,
    "moe": _make_moe,
}


# ---- error --------------------------------------------------------------------------------------


def relative_error(problem: Problem, results: list[Tensor]) -> float:
    """Largest ||result - oracle|| / ||oracle|| over the results, in fp64.

    Results are the output and, with a backward pass, the gradients of `problem.leaves`. Big shapes
    are compared on a sample: some tokens, and of the weight gradients the rows of some experts. Of
    a layer only the output is compared, with the oracle starting at the layer's own router logits,
    so that the rounding of those does not count as a difference in the choice of experts.
    """
    pairs = _ORACLES[problem.case.op](problem, results)
    return max(_difference(got, expected) for got, expected in pairs)


def _difference(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _with_grads(problem: Problem, output: Tensor, leaves: list[Tensor], grad: Tensor) -> list:
    if problem.case.pass_name == "forward":
        return [output]
    return [output, *torch.autograd.grad(output, leaves, grad.double())]


def _sample(problem: Problem) -> tuple[Tensor, Tensor]:
    """Experts and tokens to compare; a forward pass only needs tokens."""
    indices = problem.tensors["indices_long"]
    num_tokens, k = indices.shape
    hidden_size = problem.tensors["hidden_states"].shape[1]
    if problem.case.pass_name == "forward":
        step = max(1, num_tokens * k * hidden_size // ORACLE_ELEMENTS)
        tokens = torch.arange(0, num_tokens, step, device=indices.device)
        return indices[:1, 0], tokens
    return _sampled_experts(indices, hidden_size)


def _sampled_experts(indices: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Some experts and all tokens that chose one of them, as many as the oracle's arrays hold."""
    num_tokens, k = indices.shape
    most_tokens = max(1, ORACLE_ELEMENTS // (k * hidden_size))
    step = max(1, num_tokens // 16)
    candidates = indices[::step, -1].unique()  # a router's last choice: seldom a popular expert
    for count in range(len(candidates), 0, -1):
        chosen = torch.isin(indices, candidates[:count]).any(dim=1)
        if chosen.sum() <= most_tokens or count == 1:
            return candidates[:count], chosen.nonzero().squeeze(1)
    raise ValueError("relative_error: no tokens to sample")


def _expert_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    inputs = problem.tensors
    experts, tokens = _sample(problem)
    rows, ids = inputs["indices_long"][tokens].unique(return_inverse=True)
    picks = {
        "hidden_states": tokens, "up_weights": rows, "down_weights": rows,
        "routing_weights": tokens,
    }  # fmt: skip
    leaves = [
        inputs[name].detach()[pick].double().requires_grad_(inputs[name].requires_grad)
        for name, pick in picks.items()
    ]
    expected = _with_grads(
        problem, reference.omni_expert(*leaves, indices=ids), leaves, problem.grad_output[tokens]
    )
    # Only the sampled experts have all of their tokens in the sample, and so whole gradients.
    positions = torch.searchsorted(rows, experts)
    pairs = [(results[0][tokens], expected[0])]
    for name, got, want in zip(picks, results[1:], expected[1:], strict=False):
        is_table = name in ("up_weights", "down_weights")
        pairs.append((got[experts], want[positions]) if is_table else (got[tokens], want))
    return pairs


def _router_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    x, y = problem.tensors.values()
    step = max(1, x.shape[0] * x.shape[1] * y.shape[1] // ORACLE_ELEMENTS)
    leaves = [t.detach()[::step].double().requires_grad_(t.requires_grad) for t in (x, y)]
    weights, _ = reference.omni_softmax_router(*leaves, problem.case.shape["k"])
    expected = _with_grads(problem, weights, leaves, problem.grad_output[::step])
    return [(got[::step], want) for got, want in zip(results, expected, strict=True)]


def _mlp_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    leaves = [_double(t) for t in problem.tensors.values()]
    expected = _with_grads(problem, reference.omni_mlp(*leaves), leaves, problem.grad_output)
    return list(zip(results, expected, strict=True))


@torch.no_grad()
def _layer_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    module, shape = problem.module, problem.case.shape
    tokens = problem.tensors["hidden_states"]
    logits_x = module.router_norm_x(module.router_gate_x(tokens))
    logits_y = module.router_norm_y(module.router_gate_y(tokens))
    per_token = max(shape["k"] * shape["hidden"], shape["rows"] * shape["cols"])
    step = max(1, shape["tokens"] * per_token // ORACLE_ELEMENTS)
    x = tokens[::step].double()
    routing_weights, ids = reference.omni_softmax_router(
        logits_x[::step].double(), logits_y[::step].double(), shape["k"]
    )
    rows, ids = ids.unique(return_inverse=True)
    rows = rows.long()
    expert_states = reference.omni_expert(
        x,
        up_weights=module.up_embed.weight[rows].double(),
        down_weights=module.down_embed.weight[rows].double(),
        routing_weights=routing_weights,
        indices=ids,
    )
    shared = [p.weight.double() for p in (module.gate_proj, module.up_proj, module.down_proj)]
    return [(results[0][::step], expert_states + reference.omni_mlp(x, *shared))]


def _topk_router_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """In descending order: the order of the choice is that of scores with their bias."""
    shape = problem.case.shape
    logits, bias = problem.tensors["router_logits"], problem.tensors["bias"]
    leaf = _double(logits)
    weights, *_ = reference.omni_topk_router(
        leaf,
        shape["k"],
        scoring_func="sigmoid",
        norm_topk_prob=True,
        n_group=shape["groups"],
        topk_group=shape["topk_groups"],
        e_score_correction_bias=bias.double(),
    )
    expected = _with_grads(problem, weights, [leaf], problem.grad_output)
    in_order = [results[0].sort(-1).values, *results[1:]]
    return list(zip(in_order, [expected[0].sort(-1).values, *expected[1:]], strict=True))


def _permute_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    leaves = [_double(problem.tensors[name]) for name in ("tokens", "weights")]
    expected = _with_grads(
        problem, leaves[0] * leaves[1].sum(1, keepdim=True), leaves, problem.grad_output
    )
    return list(zip(results, expected, strict=True))


class _InDouble:
    """A stack of matrices, of which one at a time is in fp64."""

    def __init__(self, stack: Tensor) -> None:
        self.stack = stack

    def __len__(self) -> int:
        return len(self.stack)

    def __getitem__(self, i: int) -> Tensor:
        return self.stack[i].double()


@torch.no_grad()
def _moe_oracle(problem: Problem, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of tokens whose choice does not hang on a tie, which implementations break as they like."""
    module, k = problem.module, problem.case.shape["k"]
    hidden = problem.tensors["hidden_states"]
    logits = module.gate(hidden).logits.double()
    best = logits.sort(-1, descending=True).values
    is_clear = torch.ones_like(best[:, 0], dtype=torch.bool)
    if k < logits.shape[1]:
        is_clear = best[:, k - 1] > best[:, k]
    tokens = is_clear.nonzero().flatten()[:: max(1, len(logits) // 256)]
    weights, ids, _ = reference.omni_topk_router(logits[tokens], k, norm_topk_prob=True)
    expected = reference.mixture_of_experts(
        hidden[tokens].double(),
        routing_weights=weights,
        indices=ids,
        up_proj=_InDouble(module.experts.gate_up_proj),
        down_proj=_InDouble(module.experts.down_proj),
    )
    return [(results[0][tokens], expected)]


_ORACLES = {
    "expert": _expert_oracle,
    "router": _router_oracle,
    "mlp": _mlp_oracle,
    "layer": _layer_oracle,
    "topk_router": _topk_router_oracle,
    "permute": _permute_oracle,
    "moe": _moe_oracle,
}

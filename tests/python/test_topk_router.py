"""The top-k router forward and backward, against fp64: choice, weights, counts, gradients."""

import itertools

import pytest
import torch
from helpers import (
    assert_bitwise,
    assert_close,
    on_devices,
    on_dtypes,
    run,
    run_in_double,
    strided,
)

from omni_moe import reference
from omni_moe.ops import omni_topk_router

INF, NAN = float("inf"), float("nan")
SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
on_scores = pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
on_norms = pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["plain", "norm"])

# (T, E, K): empty, one expert, odd sizes, all experts, one token, many experts, and on a GPU both
# kernels at their borders.
SHAPES = [
    (0, 8, 2),
    (1, 1, 1),
    (37, 8, 0),
    (37, 8, 2),
    (37, 7, 7),
    (199, 60, 4),
    (37, 64, 64),
    (37, 100, 33),
    (199, 256, 8),
    (1, 256, 8),
    (37, 1000, 32),
    (5, 1025, 3),
    (3, 4096, 37),
    (2, 4096, 4096),
]
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-E{}-K{}".format(*s))

# (T, E, K, n_group, topk_group): DeepSeek-V3's, sizes that are no powers of two, one group kept,
# one expert a group, as many experts as the groups have, more groups than lanes of a warp.
GROUPS = [
    (199, 256, 8, 8, 4),
    (37, 60, 5, 12, 5),
    (37, 64, 16, 4, 1),
    (37, 12, 3, 12, 5),
    (37, 90, 20, 9, 2),
    (5, 4096, 9, 64, 3),
    (37, 1000, 40, 8, 2),
]
on_groups = pytest.mark.parametrize("shape", GROUPS, ids=lambda s: "T{}-E{}-K{}-{}of{}".format(*s))


def random_logits(num_tokens, num_experts, device, dtype, scale=2):
    return (scale * torch.randn(num_tokens, num_experts, dtype=torch.float64)).to(device, dtype)


def bias_for(logits, scale=0.1):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (scale * torch.randn(logits.shape[1])).to(logits.device, wide)


def on_cpu(options):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def score_error(logits):
    """exp makes the rounding of its argument, which grows with the logits, a relative error."""
    finite = logits.detach().double()
    finite = finite[finite.isfinite()].abs()
    return 8 * max(1, finite.max().item() if finite.numel() else 0)


def assert_weights_and_gradients(logits, k, indices, **options):
    """Those of the given choice, as the fp64 oracle has them."""
    options = options | {"replay_indices": indices, "e_score_correction_bias": None}
    grad = torch.randn(len(logits), k).to(logits)
    weights, grads = run(lambda x: omni_topk_router(x, k, **options)[0], (logits,), grad)
    options = on_cpu(options)
    want, want_grads = run_in_double(
        lambda x: reference.omni_topk_router(x, k, **options)[0], (logits,), grad
    )
    factor = score_error(logits)
    scaling = options.get("routed_scaling_factor", 1)
    assert_close(weights, want, "weights", num_terms=k, accumulation_factor=factor)
    terms = scaling * grad.double().abs().sum(1).max().item() if grad.numel() else 0
    assert_close(
        grads[0], want_grads[0], "gradient", num_terms=k, accumulation_factor=factor, terms=terms
    )


def assert_router(logits, k, **options):
    """Choice by logits: exactly the oracle's."""
    wide = logits.cpu() if logits.dtype == torch.float64 else logits.cpu().float()
    _, want_indices, want_counts = reference.omni_topk_router(wide, k, **on_cpu(options))
    weights, indices, counts = omni_topk_router(logits, k, **options)
    assert weights.dtype == logits.dtype and indices.dtype == torch.int32
    assert_bitwise(indices.cpu(), want_indices, "indices")
    assert_bitwise(counts.cpu(), want_counts, "counts")
    assert_weights_and_gradients(logits, k, indices, **options)


# ---- choice by logits ----------------------------------------------------------------------------


@on_norms
@on_scores
@on_shapes
@on_dtypes
def test_against_the_oracle(device, dtype, shape, scoring_func, norm_topk_prob):
    *sizes, k = shape
    assert_router(
        random_logits(*sizes, device, dtype),
        k,
        scoring_func=scoring_func,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )


@on_groups
@on_dtypes
def test_groups_by_their_best_expert(device, dtype, shape):
    num_tokens, num_experts, k, n_group, topk_group = shape
    assert_router(
        random_logits(num_tokens, num_experts, device, dtype),
        k,
        n_group=n_group,
        topk_group=topk_group,
        group_score="max",
    )


@pytest.mark.parametrize("k", [1, 5, 32, 40, 64])
@on_dtypes
def test_equal_logits_give_ascending_ids(device, dtype, k):
    logits = torch.full((3, 64), 0.5).to(device, dtype)
    _, indices, _ = omni_topk_router(logits, k)
    assert_bitwise(indices.cpu(), torch.arange(k, dtype=torch.int32).expand(3, k))
    coarse = (torch.randint(-3, 4, (37, 64)) / 4).to(device, dtype)
    zeros = torch.where(torch.rand(37, 64) < 0.5, -0.0, 0.0).to(device, dtype)
    for tied in (coarse, zeros):
        assert_router(tied, k)
        assert_router(tied, min(k, 16), n_group=8, topk_group=2, group_score="max")
    # Scores that are equal in fp32 although their logits are not do not tie.
    saturated = torch.linspace(20, 60, 64).to(device, dtype).expand(3, 64)
    assert_router(saturated, k, scoring_func="sigmoid")


@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("k", [1, 5, 40])
@on_dtypes
def test_nan_is_first(device, dtype, k, scoring_func):
    logits = random_logits(9, 60, device, dtype)
    logits[0, 3], logits[1, 4], logits[2, 7:20], logits[3] = NAN, -NAN, NAN, NAN
    _, indices, _ = omni_topk_router(logits, k, scoring_func=scoring_func)
    assert_router(logits, k, scoring_func=scoring_func)
    assert indices[0, 0] == 3 and indices[1, 0] == 4 and indices[2, 0] == 7


@on_norms
@pytest.mark.parametrize("k", [1, 5, 40])
@on_dtypes
def test_undefined_softmax(device, dtype, k, norm_topk_prob):
    """All of such a token is NaN, and its ids are the first; the others do not see it."""
    logits = random_logits(5, 60, device, dtype)
    logits[0, 3], logits[1, 4], logits[2] = NAN, INF, -INF
    leaf = logits.clone().requires_grad_()
    weights, indices, _ = omni_topk_router(leaf, k, norm_topk_prob=norm_topk_prob)
    weights.sum().backward()
    assert weights[:3].isnan().all() and leaf.grad[:3].isnan().all()
    assert_bitwise(indices[:3].cpu(), torch.arange(k, dtype=torch.int32).expand(3, k))
    assert weights[3:].isfinite().all() and leaf.grad[3:].isfinite().all()
    assert_router(logits[3:], k, norm_topk_prob=norm_topk_prob)


@on_norms
@on_scores
@on_dtypes
def test_masked_logits(device, dtype, scoring_func, norm_topk_prob):
    """-inf hides experts; chosen last, by id, with weight 0."""
    logits = random_logits(37, 12, device, dtype)
    logits[:, ::2] = -INF
    options = {"scoring_func": scoring_func, "norm_topk_prob": norm_topk_prob}
    weights, indices, _ = omni_topk_router(logits, 8, **options)
    assert_bitwise(indices[:, 6:].cpu(), torch.tensor([[0, 2]], dtype=torch.int32).expand(37, 2))
    assert (weights[:, 6:] == 0).all() and (weights[:, :6] > 0).all()
    assert_router(logits, 8, **options)


# ---- choice by scores ----------------------------------------------------------------------------


def is_clear(logits, k, **options):
    """(T,) whether no two scores that the choice compares are so near that fp32 decides."""
    options = on_cpu(options)
    scores = reference._topk_scores(logits.cpu().double(), options["scoring_func"])
    bias, n_group = options.get("e_score_correction_bias"), options.get("n_group", 1)
    if bias is not None:
        scores = scores + bias
    margin = 4e-6 * scores.abs().amax(-1)

    def gaps(values, count):
        ordered = values.sort(-1, descending=True).values
        return (ordered[:, :-1] - ordered[:, 1:])[:, :count]

    clear = torch.ones(len(logits), dtype=torch.bool)
    groups = scores.view(len(logits), n_group, logits.shape[1] // n_group)
    if options.get("topk_group", 1) < n_group:
        sums = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        clear &= gaps(sums, n_group)[:, options["topk_group"] - 1] > 2 * margin
        kept = torch.zeros_like(sums).scatter_(1, sums.topk(options["topk_group"], -1).indices, 1)
        groups = groups.masked_fill(kept.unsqueeze(-1) == 0, -INF)
    if bias is not None:
        clear &= (gaps(groups.flatten(1), k) > margin.unsqueeze(-1)).all(-1)
    return clear


def assert_router_by_scores(logits, k, **options):
    clear = is_clear(logits, k, **options)
    assert clear.double().mean() >= 0.5 or len(logits) < 20
    _, want, _ = reference.omni_topk_router(logits.cpu().double(), k, **on_cpu(options))
    weights, indices, counts = omni_topk_router(logits, k, **options)
    assert_bitwise(indices.cpu()[clear], want[clear], "indices")
    ids = indices[indices >= 0]
    assert_bitwise(counts.cpu(), torch.bincount(ids.cpu(), minlength=logits.shape[1]), "counts")
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "an expert was chosen twice"
    replayed, _, _ = omni_topk_router(logits, k, **options, replay_indices=indices)
    assert_bitwise(weights, replayed)
    assert_weights_and_gradients(logits, k, indices, **options)


@on_scores
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] < 60], ids=str)
@on_dtypes
def test_bias(device, dtype, shape, scoring_func):
    """It changes the choice, not the weights."""
    *sizes, k = shape
    logits = random_logits(*sizes, device, dtype)
    assert_router_by_scores(
        logits, k, scoring_func=scoring_func, e_score_correction_bias=bias_for(logits)
    )


@on_norms
@on_scores
@on_groups
@on_dtypes
def test_groups_by_their_two_best(device, dtype, shape, scoring_func, norm_topk_prob):
    num_tokens, num_experts, k, n_group, topk_group = shape
    logits = random_logits(num_tokens, num_experts, device, dtype)
    for bias in (None, bias_for(logits, 0.02)):
        assert_router_by_scores(
            logits,
            k,
            scoring_func=scoring_func,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=2.5,
            n_group=n_group,
            topk_group=topk_group,
            e_score_correction_bias=bias,
        )


@on_devices
def test_a_bias_can_make_the_choice_alone(device):
    logits = random_logits(37, 60, device, torch.float32)
    bias = torch.zeros(60, device=device)
    bias[[3, 50, 17]] = torch.tensor([30.0, 20, 10], device=device)
    for scoring_func in SCORING_FUNCS:
        _, indices, counts = omni_topk_router(
            logits, 3, scoring_func=scoring_func, e_score_correction_bias=bias
        )
        assert (indices == torch.tensor([3, 50, 17], device=device)).all()
        assert counts.sum() == 3 * 37 and counts[50] == 37
        # Equal scores, and equal sums with the bias, go by id.
        _, indices, _ = omni_topk_router(
            torch.zeros_like(logits), 4, scoring_func=scoring_func, e_score_correction_bias=bias
        )
        assert (indices == torch.tensor([3, 50, 17, 0], device=device)).all()


# ---- masks and replay ----------------------------------------------------------------------------


@on_scores
@pytest.mark.parametrize("shape", [(37, 60, 4), (37, 100, 40), (0, 8, 2)], ids=str)
@on_dtypes
def test_token_mask(device, dtype, shape, scoring_func):
    """As if the masked tokens were not there, whatever stands in their logits."""
    *sizes, k = shape
    logits = random_logits(*sizes, device, dtype)
    mask = (torch.arange(sizes[0]) % 3 > 0).to(device)
    logits[~mask] = NAN
    leaf = logits.clone().requires_grad_()
    options = {"scoring_func": scoring_func, "norm_topk_prob": True}
    weights, indices, counts = omni_topk_router(leaf, k, **options, token_mask=mask)
    weights.sum().backward()
    assert (weights[~mask] == 0).all() and (indices[~mask] == -1).all()
    assert (leaf.grad[~mask] == 0).all()

    rest = logits[mask].requires_grad_()
    want, want_indices, want_counts = omni_topk_router(rest, k, **options)
    want.sum().backward()
    assert_bitwise(weights[mask], want)
    assert_bitwise(indices[mask], want_indices)
    assert_bitwise(counts, want_counts)
    assert_bitwise(leaf.grad[mask], rest.grad)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@on_norms
@on_scores
@pytest.mark.parametrize("k", [3, 40])
@on_dtypes
def test_replay(device, dtype, k, scoring_func, norm_topk_prob, index_dtype):
    """Any ids: none, an expert twice, not the best; groups and bias are not looked at."""
    logits = random_logits(37, 60, device, dtype)
    ids = torch.randint(-1, 60, (37, k), dtype=index_dtype)
    ids[0], ids[1] = -1, 7
    ids = ids.to(device)
    options = {"scoring_func": scoring_func, "norm_topk_prob": norm_topk_prob}
    _, indices, counts = omni_topk_router(
        logits, k, **options, replay_indices=ids, n_group=60, topk_group=60,
        e_score_correction_bias=bias_for(logits),
    )  # fmt: skip
    assert_bitwise(indices, ids.int())
    assert_bitwise(counts.cpu(), torch.bincount(ids[ids >= 0].cpu(), minlength=60))
    assert_weights_and_gradients(logits, k, ids, **options)


# ---- layout, gradcheck, transforms ---------------------------------------------------------------


@on_dtypes
def test_non_contiguous_inputs(device, dtype):
    logits = random_logits(37, 60, device, dtype)
    bias, mask = bias_for(logits), (torch.arange(37) % 5 > 0).to(device)
    grad = torch.randn(37, 5).to(logits)

    def route(of):
        options = {"e_score_correction_bias": of(bias), "token_mask": of(mask)}
        return lambda x: omni_topk_router(x, 5, scoring_func="sigmoid", **options)[0]

    want, (want_grad,) = run(route(lambda x: x), (logits,), grad)
    got, (got_grad,) = run(route(strided), (strided(logits),), strided(grad))
    assert_bitwise(got, want)
    assert_bitwise(got_grad, want_grad)


@pytest.mark.parametrize("offset", [1, 2])
@on_dtypes
def test_unaligned_inputs(device, dtype, offset):
    """Rows that no vector load may read."""
    for k, num_experts in itertools.product((8, 40), (256, 251)):
        logits = random_logits(37, num_experts, device, dtype)
        shifted = torch.empty(logits.numel() + offset, device=device, dtype=dtype)[offset:]
        assert_router(shifted.view_as(logits).copy_(logits), k)


@on_norms
@on_scores
@pytest.mark.parametrize("k", [1, 3, 8])
def test_gradcheck(k, scoring_func, norm_topk_prob):
    # Logits so far apart that a finite difference changes no choice.
    logits = torch.stack([torch.randperm(8) for _ in range(4)]).double() * 0.37 - 1
    mask = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(
        lambda x: omni_topk_router(
            x, k, scoring_func=scoring_func, norm_topk_prob=norm_topk_prob, token_mask=mask,
            routed_scaling_factor=1.7,
        )[0],
        logits.requires_grad_(),
    )  # fmt: skip


@on_devices
def test_only_the_weights_have_a_gradient(device):
    logits = random_logits(5, 8, device, torch.float32).requires_grad_()
    bias = torch.zeros(8, device=device, requires_grad=True)
    weights, indices, counts = omni_topk_router(logits, 2, e_score_correction_bias=bias)
    assert weights.requires_grad and not indices.requires_grad and not counts.requires_grad
    grads = torch.autograd.grad(weights.sum(), (logits, bias), allow_unused=True)
    assert grads[0] is not None and grads[1] is None
    # Nor has the bias where it alone asks for one.
    weights, _, _ = omni_topk_router(logits.detach(), 2, e_score_correction_bias=bias)
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])
@on_devices
def test_far_from_zero(device, scoring_func):
    """Scores and slopes keep their digits where exp underflows or saturates."""
    logits = torch.linspace(-160, 80, 64, device=device).expand(2, 64).contiguous()
    for columns in (slice(None), slice(0, 20), slice(20, 40), slice(44, 64)):
        part = logits[:, columns].contiguous()
        k = part.shape[1]
        ids = torch.arange(k, dtype=torch.int32, device=device).expand(2, k).contiguous()
        grad = torch.ones(2, k, device=device)
        weights, grads = run(
            lambda x, k=k, ids=ids: omni_topk_router(
                x, k, scoring_func=scoring_func, replay_indices=ids
            )[0],
            (part,),
            grad,
        )

        def scores(x):
            return reference._topk_scores(x, scoring_func)

        want, want_grads = run_in_double(scores, (part,), grad)
        if scoring_func == "sigmoid":  # whose slope is even, and in fp64 exact only below zero
            _, want_grads = run_in_double(scores, (-part.abs(),), grad)
        # Relative to each: exp of 80 loses 80 units. Subnormal numbers have fewer digits.
        for got, oracle in ((weights, want), (grads[0], want_grads[0])):
            error = (got.double().cpu() - oracle).abs()
            assert (error <= 2.0**-24 * 100 * oracle + 2.0**-126).all()

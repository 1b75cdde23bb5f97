"""Routers forward and backward: exact choice against a sort of the full grid, gradients, ties."""

import itertools

import pytest
import torch
from helpers import (
    assert_bitwise,
    assert_close,
    brute_force_router,
    on_devices,
    on_dtypes,
    random_logits,
    router_scores,
    run,
    run_in_double,
    softmax_router_weights,
    strided,
)

import omni_moe
from omni_moe import reference

ops = torch.ops.omni_moe
INF, NAN = float("inf"), float("nan")

# (T, R, C, K): empty, one pair, odd and rectangular grids, K past R, past C and up to R * C.
SHAPES = [
    (0, 8, 8, 3),
    (1, 1, 1, 1),
    (1, 64, 64, 16),
    (37, 7, 11, 0),
    (37, 7, 11, 1),
    (37, 7, 11, 77),
    (37, 3, 100, 16),
    (37, 100, 3, 17),
    (199, 64, 64, 16),
    (199, 17, 5, 3),
    (37, 1, 40, 33),
    (37, 40, 1, 33),
    (3, 320, 320, 512),
    (2, 320, 320, 4096),
]
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}-K{}".format(*s))

# x + y of fp32 logits of very different size: the sum's ulp swallows the gaps of one axis.
SWALLOWED = 2.0**-22


def exp_error(x, y):
    """exp makes the rounding of its argument, which grows with the logits, a relative error."""
    finite = torch.cat([x.flatten(), y.flatten()]).double()
    finite = finite[finite.isfinite()].abs()
    return 8 * max(1, finite.max().item() if finite.numel() else 0)


def assert_exact_choice(x, y, k):
    """All three routers choose exactly the ids of brute force; the plain one also its scores."""
    want_scores, want_indices = brute_force_router(x, y, k)
    scores, indices = ops.omni_router(x, y, k)
    assert indices.dtype == torch.int32
    assert_bitwise(indices.cpu(), want_indices, "indices")
    assert_bitwise(scores.cpu(), want_scores, "scores")

    defined = x.isfinite() | (x == -INF)
    defined = defined.all(1) & (x > -INF).any(1)
    defined_y = y.isfinite() | (y == -INF)
    defined = (defined & defined_y.all(1) & (y > -INF).any(1)).cpu()
    first_ids = torch.arange(k, dtype=torch.int32).expand_as(want_indices)
    want_indices = torch.where(defined[:, None], want_indices, first_ids)
    for norm_topk_prob in (False, True):
        weights, indices = ops.omni_softmax_router(x, y, k, norm_topk_prob)
        assert_bitwise(indices.cpu(), want_indices, f"indices, norm_topk_prob={norm_topk_prob}")
        assert weights[~defined].isnan().all()
        want = softmax_router_weights(
            x.cpu().double(), y.cpu().double(), want_indices, norm_topk_prob
        )
        assert_close(
            weights.cpu()[defined], want[defined], "weights", accumulation_factor=exp_error(x, y)
        )


def assert_softmax_gradients(x, y, grad, norm_topk_prob):
    k = grad.shape[1]
    weights, indices = ops.omni_softmax_router(x, y, k, norm_topk_prob)
    _, grads = run(lambda x, y: ops.omni_softmax_router(x, y, k, norm_topk_prob)[0], (x, y), grad)
    _, want = run_in_double(
        lambda x, y: softmax_router_weights(x, y, indices.cpu(), norm_topk_prob), (x, y), grad
    )
    terms = (grad * weights).double().abs().sum(1)
    terms = terms.max().item() if terms.numel() else 0
    for name, got, oracle in zip(("grad_x", "grad_y"), grads, want, strict=True):
        assert oracle.isfinite().all()
        assert_close(got, oracle, name, accumulation_factor=exp_error(x, y), terms=terms)


@on_shapes
@on_dtypes
def test_choice_is_exact(device, dtype, shape):
    *sizes, k = shape
    x, y = random_logits(sizes, device, dtype)
    assert_exact_choice(x, y, k)


@on_shapes
@on_dtypes
def test_router_backward(device, dtype, shape):
    *sizes, k = shape
    x, y = random_logits(sizes, device, dtype)
    grad = torch.randn(sizes[0], k).to(device, dtype)
    _, indices = ops.omni_router(x, y, k)

    _, grads = run(lambda x, y: ops.omni_router(x, y, k)[0], (x, y), grad)
    _, want = run_in_double(lambda x, y: router_scores(x, y, indices.cpu()), (x, y), grad)
    for name, got, oracle in zip(("grad_x", "grad_y"), grads, want, strict=True):
        assert_close(got, oracle, name)


@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["softmax", "softmax-topk"])
@on_shapes
@on_dtypes
def test_softmax_router_backward(device, dtype, shape, norm_topk_prob):
    *sizes, k = shape
    x, y = random_logits(sizes, device, dtype)
    grad = torch.randn(sizes[0], k).to(device, dtype)
    assert_softmax_gradients(x, y, grad, norm_topk_prob)


@on_dtypes
def test_reference_agrees_with_brute_force(device, dtype):
    """The published oracle itself, in the dtype of the logits."""
    x, y = random_logits((37, 9, 14), device, dtype)
    scores, indices = reference.omni_router(x, y, 20)
    want_scores, want_indices = brute_force_router(x, y, 20)
    assert_bitwise(indices.cpu(), want_indices)
    assert_bitwise(scores.cpu(), want_scores)


# ---- ties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 16, 100, 37 * 29])
@on_dtypes
def test_equal_logits_give_ascending_ids(device, dtype, k):
    x, y = torch.full((3, 37), 0.5), torch.full((3, 29), -1.25)
    x, y = x.to(device, dtype), y.to(device, dtype)
    scores, indices = ops.omni_router(x, y, k)
    assert_bitwise(indices.cpu(), torch.arange(k, dtype=torch.int32).expand(3, k))
    assert (scores == -0.75).all()
    assert_exact_choice(x, y, k)


@pytest.mark.parametrize("k", [1, 3, 16, 65, 400])
@pytest.mark.parametrize("big_axis", ["x", "y"])
@on_dtypes
def test_gaps_below_the_ulp_of_the_sum(device, dtype, k, big_axis):
    """Distinct logits of one axis vanish in the sum: ties that only the sum shows."""
    small = torch.randn(37, 24) * SWALLOWED
    big = torch.randint(2, (37, 20)) * 4.0 + 1024
    x, y = (big, small) if big_axis == "x" else (small, big)
    assert_exact_choice(x.to(device, dtype), y.to(device, dtype), k)


@pytest.mark.parametrize("k", [1, 7, 33, 300])
@on_devices
def test_partial_collapse(device, k):
    """Gaps about the size of the sum's ulp: some sums round together, others do not."""
    x = 1 + torch.randint(8, (37, 20)) * 2.0**-23
    y = 3 + torch.randint(8, (37, 30)) * 2.0**-22
    assert_exact_choice(x.to(device), y.to(device), k)


@pytest.mark.parametrize("k", [1, 2, 9, 36])
@on_dtypes
def test_signed_zeros_are_equal(device, dtype, k):
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0, 0.0, -0.0]).expand(3, 6)
    x, y = zeros.to(device, dtype), zeros.flip(1).to(device, dtype)
    _, indices = ops.omni_router(x, y, k)
    assert_bitwise(indices.cpu(), torch.arange(k, dtype=torch.int32).expand(3, k))
    assert_exact_choice(x, y, k)


@pytest.mark.parametrize("k", [1, 6, 16, 200])
@on_dtypes
def test_coarse_logits_tie_often(device, dtype, k):
    x = torch.randint(-3, 4, (37, 19)) / 4
    y = torch.randint(-3, 4, (37, 23)) / 4
    assert_exact_choice(x.to(device, dtype), y.to(device, dtype), k)


@pytest.mark.parametrize("k", [512, 4096])
@on_devices
def test_ties_on_the_papers_grid(device, k):
    x = torch.randint(-8, 9, (3, 320)) / 8
    y = torch.randint(-8, 9, (3, 320)) / 8
    assert_exact_choice(x.to(device, torch.bfloat16), y.to(device, torch.bfloat16), k)


# ---- NaN and infinity ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 40, 63])
@on_dtypes
def test_masked_logits(device, dtype, k):
    """-inf hides rows and columns; chosen last, with weight 0."""
    x, y = random_logits((37, 7, 9), device, dtype)
    x[:, ::2], y[:, 1::3] = -INF, -INF
    x[5, 2:], y[6, :-1] = -INF, -INF
    assert_exact_choice(x, y, k)
    weights, _ = ops.omni_softmax_router(x, y, k)
    assert not weights.isnan().any()


@pytest.mark.parametrize("k", [1, 5, 9, 63])
@pytest.mark.parametrize("value", [NAN, -NAN, INF], ids=["nan", "negative-nan", "inf"])
@on_dtypes
def test_nan_and_infinity(device, dtype, value, k):
    x, y = random_logits((37, 7, 9), device, dtype)
    x[0, 3], y[1, 4], x[2, 2], y[2, 8] = value, value, value, value
    x[3], y[4] = value, value
    # More of them than K, or than an axis keeps, and finite logits behind.
    x[5, :5], y[6, 1:8], x[7, ::2], y[7, ::3] = value, value, value, value
    assert_exact_choice(x, y, k)


@pytest.mark.parametrize("k", [1, 3, 5, 20, 63])
@on_dtypes
def test_infinities_that_cancel(device, dtype, k):
    """+inf + -inf is NaN and sorts first, though neither term is NaN."""
    x, y = random_logits((9, 7, 9), device, dtype)
    x[0, 2], y[0, 5] = INF, -INF
    x[1, 4], y[1, 3] = -INF, INF
    x[2, :2], y[2, 1:3] = INF, -INF
    x[3], y[3, 0] = INF, -INF
    x[4], y[4] = INF, -INF
    x[5, 1], x[5, 2], y[5, 6], y[5, 7] = INF, -INF, INF, -INF
    x[6, 6], x[6, 0], y[6, 1] = NAN, INF, -INF
    x[7], y[7] = -INF, -INF
    assert_exact_choice(x, y, k)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@on_devices
def test_backward_of_masked_logits(device, norm_topk_prob):
    x, y = random_logits((37, 7, 9), device, torch.float32)
    x[:, ::2], y[:, 1::3] = -INF, -INF
    grad = torch.randn(37, 40).to(device)
    assert_softmax_gradients(x, y, grad, norm_topk_prob)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@on_devices
def test_backward_of_undefined_tokens_is_nan(device, norm_topk_prob):
    """A token whose softmax is NaN gets NaN gradients; the others are not touched by it."""
    x, y = random_logits((4, 7, 9), device, torch.float32)
    clean_x, clean_y = x.clone(), y.clone()
    x[0, 3], y[1, 2], x[2] = NAN, INF, -INF
    grad = torch.randn(4, 5).to(device)

    def route(x, y):
        return ops.omni_softmax_router(x, y, 5, norm_topk_prob)[0]

    _, (grad_x, grad_y) = run(route, (x, y), grad)
    _, (want_x, want_y) = run(route, (clean_x, clean_y), grad)
    # Both axes: all weights of such a token are NaN, and each logit has a part in them.
    assert grad_x[:3].isnan().all() and grad_y[:3].isnan().all()
    assert_bitwise(grad_x[3], want_x[3])
    assert_bitwise(grad_y[3], want_y[3])


@on_dtypes
def test_large_logits_keep_their_digits(device, dtype):
    """A constant added to the logits cancels in the softmax and must not cost digits."""
    x, y = random_logits((37, 12, 10), device, dtype)
    x, y = x + 200, y - 300
    for norm_topk_prob in (False, True):
        weights, indices = ops.omni_softmax_router(x, y, 12, norm_topk_prob)
        want = softmax_router_weights(
            x.cpu().double(), y.cpu().double(), indices.cpu(), norm_topk_prob
        )
        assert_close(weights, want, accumulation_factor=4)


# ---- sums past the largest number ----------------------------------------------------------------


def huge_logits(num_rows, num_cols, device, dtype):
    """(T, R) and (T, C) of finite logits whose sums overflow upwards, downwards or both."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if torch.finfo(dtype).max < torch.finfo(wide).max / 4:
        pytest.skip(f"no sum of {dtype} overflows {wide}")
    num_tokens = 40
    logits = []
    for size in (num_rows, num_cols):
        shares = 2 * torch.rand(num_tokens, size, dtype=torch.float64) - 1
        shares[4:8] = shares[4:8].abs()  # no sum is finite for most of them
        shares[8:12] = -shares[8:12].abs()
        shares[12:20] = (4 * shares[12:20]).round() / 4  # ties, and the largest number itself
        shares[20:24, 1::2] *= 1e-30
        shares[24:28, 1:] *= 1e-30  # a single one
        logits.append((shares * torch.finfo(wide).max).to(dtype))
    largest = torch.finfo(dtype).max
    x, y = (tensor.clamp(-largest, largest).to(device) for tensor in logits)
    x[28:32, ::2], y[30:34, 1::3] = -INF, -INF
    x[34:36], y[34:36] = -largest, -largest  # as attention masks are made
    x[34, 1], y[34, 2] = 3, 1
    return x, y


@pytest.mark.parametrize(("num_rows", "num_cols"), [(7, 9), (70, 90)])
@pytest.mark.parametrize("k", [1, 2, 5, 20, 63, 200, 6300])
@on_dtypes
def test_sums_that_overflow(device, dtype, k, num_rows, num_cols):
    """Their order is that of the sums without a largest number."""
    if k > num_rows * num_cols:
        pytest.skip("more than there are")
    x, y = huge_logits(num_rows, num_cols, device, dtype)
    want_scores, want_indices = brute_force_router(x, y, k)
    scores, indices = ops.omni_router(x, y, k)
    assert_bitwise(indices.cpu(), want_indices, "indices")
    assert_bitwise(scores.cpu(), want_scores, "scores")
    _, indices = reference.omni_router(x, y, k)
    assert_bitwise(indices.cpu(), want_indices, "indices of the reference")
    for norm_topk_prob in (False, True):
        weights, indices = ops.omni_softmax_router(x, y, k, norm_topk_prob)
        assert_bitwise(indices.cpu(), want_indices, f"indices, norm_topk_prob={norm_topk_prob}")
        want = softmax_router_weights(
            x.cpu().double(), y.cpu().double(), want_indices, norm_topk_prob
        )
        assert_close(weights, want, "weights", num_terms=k)


@pytest.mark.parametrize("k", [1, 5, 40])
@on_dtypes
def test_sums_that_overflow_beside_infinities(device, dtype, k):
    x, y = huge_logits(7, 9, device, dtype)
    x[::2, 3], y[1::3, 4], x[::5, 5], y[::4, 6] = INF, INF, NAN, -INF
    want_scores, want_indices = brute_force_router(x, y, k)
    scores, indices = ops.omni_router(x, y, k)
    assert_bitwise(indices.cpu(), want_indices, "indices")
    assert_bitwise(scores.cpu(), want_scores, "scores")


@on_devices
def test_example_of_sums_that_overflow(device):
    logits = torch.tensor([[1e38, 2e38, 3e38]], device=device)
    weights, indices = ops.omni_softmax_router(logits, logits, 2, True)
    assert indices.tolist() == [[8, 5]] and weights.tolist() == [[1, 0]]


@pytest.mark.parametrize("score", ["logit", "softmax", "softmax-topk"])
@pytest.mark.parametrize(("num_rows", "num_cols", "k"), [(7, 9, 20), (70, 90, 200)])
@on_dtypes
def test_gradients_of_sums_that_overflow(device, dtype, num_rows, num_cols, k, score):
    x, y = huge_logits(num_rows, num_cols, device, dtype)
    _, indices = brute_force_router(x, y, k)
    grad = torch.randn(len(x), k).to(device, dtype)
    is_topk = score == "softmax-topk"

    def route(x, y):
        if score == "logit":
            return ops.omni_router(x, y, k)[0]
        return ops.omni_softmax_router(x, y, k, is_topk)[0]

    def want_route(x, y):
        if score == "logit":
            return router_scores(x, y, indices)
        return softmax_router_weights(x, y, indices, is_topk)

    _, grads = run(route, (x, y), grad)
    _, want = run_in_double(want_route, (x, y), grad)
    for name, got, oracle in zip(("grad_x", "grad_y"), grads, want, strict=True):
        terms = grad.double().abs().sum(1).max().item()
        assert_close(got, oracle, name, terms=terms)


# ---- layout, partial gradients, gradcheck --------------------------------------------------------


@on_dtypes
def test_non_contiguous_inputs(device, dtype):
    x, y = random_logits((37, 12, 10), device, dtype)
    grad = torch.randn(37, 11).to(device, dtype)
    for route in (
        lambda x, y: ops.omni_router(x, y, 11)[0],
        lambda x, y: ops.omni_softmax_router(x, y, 11, True)[0],
    ):
        want, want_grads = run(route, (x, y), grad)
        got, grads = run(route, (strided(x), strided(y)), strided(grad))
        assert_bitwise(got, want)
        for one, other in zip(grads, want_grads, strict=True):
            assert_bitwise(one, other)


@pytest.mark.parametrize("op", ["omni_router", "omni_softmax_router"])
@on_devices
def test_gradient_of_one_axis_only(device, op):
    x, y = random_logits((37, 12, 10), device, torch.float32)
    grad = torch.randn(37, 11).to(device)
    _, want = run(lambda x, y: getattr(ops, op)(x, y, 11)[0], (x, y), grad)
    for wanted in ((True, False), (False, True)):
        leaves = [t.detach().requires_grad_(on) for t, on in zip((x, y), wanted, strict=True)]
        scores, indices = getattr(ops, op)(*leaves, 11)
        assert scores.requires_grad and not indices.requires_grad
        scores.backward(grad)
        for leaf, oracle, on in zip(leaves, want, wanted, strict=True):
            assert (leaf.grad is not None) == on
            if on:
                assert_bitwise(leaf.grad, oracle)


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("score", ["logit", "softmax", "softmax-topk"])
def test_gradcheck(score, k):
    # Logits on a grid of their own, far enough apart that a finite difference changes no choice.
    x = torch.stack([torch.randperm(5) for _ in range(4)]) * 0.37
    y = torch.stack([torch.randperm(6) for _ in range(4)]) * 0.41
    x, y = (t.double().requires_grad_() for t in (x, y))
    if score == "logit":
        assert torch.autograd.gradcheck(lambda x, y: ops.omni_router(x, y, k)[0], (x, y))
    else:
        norm = score == "softmax-topk"
        assert torch.autograd.gradcheck(
            lambda x, y: ops.omni_softmax_router(x, y, k, norm)[0], (x, y)
        )


def test_normalised_weights_sum_to_one():
    x, y = random_logits((37, 12, 10), "cpu", torch.float64, scale=3)
    weights, _ = ops.omni_softmax_router(x, y, 11, True)
    assert_close(weights.sum(1), torch.ones(37, dtype=torch.float64))
    assert (weights.diff(dim=1) <= 0).all()


@on_devices
def test_python_functions(device):
    """The typed functions hand everything on to the ops."""
    x, y = random_logits((37, 8, 8), device, torch.float32)
    for got, want in itertools.chain(
        zip(omni_moe.ops.omni_router(x, y, 8, 5), ops.omni_router(x, y, 5), strict=True),
        zip(
            omni_moe.ops.omni_softmax_router(x, y, 5, norm_topk_prob=True),
            ops.omni_softmax_router(x, y, 5, True),
            strict=True,
        ),
    ):
        assert_bitwise(got, want)

"""Both gates of the router and the BatchNorm of their logits, against the reference in fp64."""

import pytest
import torch
from batch_norm_helpers import EPS, HALVES, MOMENTUM, Buffers, normalise
from helpers import assert_bitwise, assert_close, needs_gpu, on_devices, on_dtypes, strided
from router_logits_helpers import apply, make_inputs, run, run_op

import omni_moe
from omni_moe import reference

ops = torch.ops.omni_moe

# Tokens, hidden size, rows, columns. First what Hopper's one kernel takes: one block and several,
# all its block shapes, parts of tiles in every dimension. Then what it does not.
FUSED = [
    (2, 8, 8, 8),
    (5, 64, 64, 64),
    (37, 200, 40, 72),
    (129, 64, 256, 8),
    (199, 264, 136, 64),
    (700, 328, 200, 256),
    (4096, 128, 64, 64),
    (4096, 64, 128, 128),
    (4095, 72, 256, 256),
    (4090, 72, 320, 328),
]
OTHERS = [(37, 20, 5, 7), (2, 1, 1, 1), (67, 64, 63, 64), (5000, 24, 320, 328)]
SHAPES = FUSED + OTHERS
COARSEST_FIRST = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def check_against_reference(inputs, grads, training=True, stats_dtype=None):
    hidden, gate_x, gate_y = inputs
    dtype, device = hidden.dtype, hidden.device.type
    num_tokens, hidden_size = hidden.shape
    buffers = Buffers.make(len(gate_x), len(gate_y), device, dtype)
    if stats_dtype is not None:
        buffers = buffers.map(lambda t: t.to(stats_dtype) if t.is_floating_point() else t)
    want_buffers = buffers.double()
    wide = [tensor.cpu().double() for tensor in inputs]
    wide_grads = [grad.cpu().double() for grad in grads]
    want = run(reference.omni_router_logits, wide, wide_grads, want_buffers, training)
    got = run_op(inputs, grads, buffers, training)

    # What cancels, and how often something is rounded on the way: products and their gradient.
    products = wide[0] @ torch.cat(wide[1:]).T
    if training:
        mean, var = products.mean(0), products.var(0, correction=0)
    else:
        mean = torch.cat([want_buffers.running_mean_x, want_buffers.running_mean_y])
        var = torch.cat([want_buffers.running_var_x, want_buffers.running_var_y])
    inv_std = (var + EPS).rsqrt()
    roundings = 1 if dtype in HALVES else 0
    offset = (products.abs().amax(0).maximum(mean.abs()) * inv_std).max().item()
    for name, one, other in zip(("logits_x", "logits_y"), got, want, strict=False):
        assert one.dtype == dtype and one.is_contiguous()
        assert_close(
            one,
            other,
            name,
            num_terms=num_tokens + hidden_size,
            terms=offset,
            intermediate_roundings=roundings,
        )
    # The gradient of the products, and with it all others, has lost what a few tokens cancel.
    if num_tokens >= 37 or not training:
        grad_products = (inv_std * torch.cat(wide_grads, 1).abs().amax(0)).max().item()
        for name, one, other, factor in (
            ("grad_hidden", got[2], want[2], torch.cat(wide[1:]).abs().sum(0).max().item()),
            ("grad_gate_x", got[3], want[3], wide[0].square().sum(0).sqrt().max().item()),
            ("grad_gate_y", got[4], want[4], wide[0].square().sum(0).sqrt().max().item()),
        ):
            assert one.dtype == dtype
            assert_close(
                one,
                other,
                name,
                num_terms=num_tokens + hidden_size,
                terms=grad_products * (1 + offset) * factor,
                intermediate_roundings=4 * roundings,
            )
    for name in vars(buffers):
        one, other = getattr(buffers, name), getattr(want_buffers, name)
        if "num_batches" in name:
            assert one.item() == other.item()  # the reference counts, too
        else:
            assert one.dtype == (stats_dtype or one.dtype)
            assert_close(
                one.to(min(dtype, one.dtype, key=COARSEST_FIRST.index)),  # of products rounded so
                other,
                name,
                num_terms=num_tokens + hidden_size,
                terms=max(products.square().amax().item(), 1.0),
                intermediate_roundings=roundings,
            )


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_training(device, dtype, shape):
    check_against_reference(*make_inputs(*shape, device, dtype))


@pytest.mark.parametrize("shape", [(1, 64, 64, 64), (1, 9, 3, 2), *SHAPES], ids=str)
@on_dtypes
def test_eval(device, dtype, shape):
    check_against_reference(*make_inputs(*shape, device, dtype), training=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stats_dtype", [*HALVES, torch.float32, torch.float64])
@on_dtypes
def test_running_statistics_of_every_dtype(device, dtype, stats_dtype, training):
    """Updated from what they hold in a wider type, and rounded once where they are halves."""
    inputs, grads = make_inputs(199, 72, 64, 104, device, dtype)
    check_against_reference(inputs, grads, training, stats_dtype=stats_dtype)


@pytest.mark.parametrize("shape", [(199, 264, 136, 64), (4096, 1024, 256, 256)], ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@needs_gpu
def test_products_are_not_rounded(dtype, shape):
    """In the one kernel: closer to the truth than the two steps."""
    (hidden, *gates), _ = make_inputs(*shape, "cuda", dtype)
    buffers = Buffers.make(*shape[2:], "cuda", dtype)
    wide = [tensor.double() for tensor in (hidden, *gates)]
    want = torch.cat(reference.omni_router_logits(*wide, [], True, MOMENTUM, EPS), 1)
    got = torch.cat(apply((hidden, *gates), buffers), 1)
    products = torch.nn.functional.linear(hidden, torch.cat(gates))
    two_steps = torch.cat(normalise(products, shape[2], buffers), 1)
    rounded_once = want.to(dtype).double()
    assert (got.double() - want).norm() < 1.05 * (rounded_once - want).norm()
    assert (two_steps.double() - want).norm() > 1.2 * (rounded_once - want).norm()


@on_dtypes
def test_constant_columns(device, dtype):
    """A variance of zero: outputs of exactly zero, finite gradients."""
    inputs, grads = make_inputs(199, 72, 8, 24, device, dtype)
    for gate in inputs[1:]:
        gate[::3] = 0
    *logits, _, _, _ = got = run_op(inputs, grads, Buffers.make(8, 24, device, dtype))
    assert not any(part[:, ::3].any() for part in logits)
    assert all(tensor.isfinite().all() for tensor in got)


@on_dtypes
def test_non_finite_values_stay_in_their_column(device, dtype):
    inputs, _ = make_inputs(199, 72, 8, 16, device, dtype)
    clean = torch.cat(apply(inputs, Buffers.make(8, 16, device, dtype)), 1)
    inputs[1][2, 5], inputs[2][3, 0] = float("nan"), float("inf")
    got = torch.cat(apply(inputs, Buffers.make(8, 16, device, dtype)), 1)
    bad = [2, 11]
    others = [i for i in range(24) if i not in bad]
    assert got[:, bad].isnan().all()
    assert_bitwise(got[:, others], clean[:, others])


@on_dtypes
def test_no_tokens(device, dtype):
    """As nn.BatchNorm1d: empty outputs, the running statistics stay, the counter does not."""
    buffers = Buffers.make(8, 16, device, dtype)
    before = buffers.clone()
    for training in (True, False):
        inputs, grads = make_inputs(0, 72, 8, 16, device, dtype)
        *logits, grad_hidden, grad_x, grad_y = run_op(inputs, grads, buffers, training)
        assert [out.shape for out in logits] == [(0, 8), (0, 16)]
        assert grad_hidden.shape == (0, 72) and not grad_x.any() and not grad_y.any()
    for name in vars(buffers):
        counted = 1 if "num_batches" in name else 0
        assert_bitwise(getattr(buffers, name), getattr(before, name) + counted, name)


@on_dtypes
def test_strided_inputs(device, dtype):
    inputs, grads = make_inputs(37, 72, 64, 32, device, dtype)
    buffers = Buffers.make(64, 32, device, dtype)
    want = run_op(inputs, grads, buffers.clone())
    got = run_op([strided(t) for t in inputs], [strided(g) for g in grads], buffers.clone())
    for one, other in zip(got, want, strict=True):
        roundings = 4 if dtype in HALVES else 0
        scale = other.abs().max().item()
        assert_close(
            one, other.double(), num_terms=109, terms=20 * scale, intermediate_roundings=roundings
        )


@on_dtypes
def test_without_buffers(device, dtype):
    inputs, _ = make_inputs(37, 72, 16, 24, device, dtype)
    buffers = Buffers.make(16, 24, device, dtype)
    want = apply(inputs, buffers)
    got = omni_moe.ops.omni_router_logits(*inputs, [], True, MOMENTUM, EPS)
    for one, other in zip(got, want, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("wanted", range(1, 7))
@on_devices
def test_gradients_of_some_inputs(device, wanted):
    inputs, grads = make_inputs(37, 72, 16, 24, device, torch.float32)
    want = run_op(inputs, grads, Buffers.make(16, 24, device, torch.float32))[2:]
    leaves = [
        tensor.clone().requires_grad_(bool(wanted >> i & 1)) for i, tensor in enumerate(inputs)
    ]
    torch.autograd.backward(apply(leaves, Buffers.make(16, 24, device, torch.float32)), grads)
    for leaf, grad in zip(leaves, want, strict=True):
        if leaf.requires_grad:
            assert_bitwise(leaf.grad, grad)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float64)
    buffers = Buffers.make(3, 4, "cpu", torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *x: apply(x, buffers.clone(), training), leaves)


@on_dtypes
def test_backward_op(device, dtype):
    """The formula on what the forward returns for it."""
    (hidden, *gates), grads = make_inputs(199, 72, 64, 100, device, dtype)
    buffers = Buffers.make(64, 100, device, dtype)
    x, y, inv_std = ops.omni_router_logits(hidden, *gates, buffers.args(), MOMENTUM, EPS)
    products = hidden.double() @ torch.cat(gates).double().T
    want_inv_std = (products.var(0, correction=0) + EPS).rsqrt()
    roundings = 1 if dtype in HALVES else 0
    assert_close(
        inv_std.to(dtype), want_inv_std, "inv_std", num_terms=271, intermediate_roundings=roundings
    )
    n, g = torch.cat([x, y], 1).double(), torch.cat(grads, 1).double()
    for training in (True, False):
        got_hidden, got_gates = ops._omni_router_logits_backward(
            *grads, hidden, *gates, x, y, inv_std, training, [True, True]
        )
        want = g - g.mean(0) - n * (g * n).mean(0) if training else g
        want = inv_std.double() * want
        for got, product in (
            (got_hidden, want @ torch.cat(gates).double()),
            (got_gates, want.T @ hidden.double()),
        ):
            assert_close(
                got,
                product,
                num_terms=271,
                terms=20 * product.abs().max().item(),
                intermediate_roundings=roundings,
            )

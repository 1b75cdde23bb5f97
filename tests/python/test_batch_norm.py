"""The BatchNorm of the router's logits against F.batch_norm in fp64."""

import pytest
import torch
from batch_norm_helpers import (
    EPS,
    HALVES,
    Buffers,
    assert_same_run,
    make_logits,
    normalise,
    random_grads,
    run_op,
    run_stock,
)
from helpers import (
    assert_bitwise,
    assert_close,
    needs_gpu,
    on_devices,
    on_dtypes,
    strided,
)
from torch import nn

import omni_moe

AXES = [(1, 7), (7, 256), (64, 64), (64, 100), (100, 1), (256, 256)]
TOKENS = [2, 3, 37, 199, 4096]


def check_against_stock(logits, num_rows, training=True, stats_dtype=None):
    num_tokens, width = logits.shape
    shape = (num_rows, width - num_rows, logits.device.type, logits.dtype)
    buffers = Buffers.make(*shape)
    if stats_dtype is not None:
        buffers = buffers.map(lambda t: t.to(stats_dtype) if t.is_floating_point() else t)
    grads = random_grads(num_tokens, *shape)
    want_buffers = buffers.double()
    want, want_grad = run_stock(logits, num_rows, grads, want_buffers, training)
    normed, grad = run_op(logits, num_rows, grads, buffers, training)

    # What cancels: logits against their mean, and the terms of the gradient.
    wide = logits.detach().cpu().double()
    if training:
        mean, var = wide.mean(0), wide.var(0, correction=0)
    else:
        mean = torch.cat([want_buffers.running_mean_x, want_buffers.running_mean_y])
        var = torch.cat([want_buffers.running_var_x, want_buffers.running_var_y])
    inv_std = (var + EPS).rsqrt()
    offset = (wide.abs().amax(0).maximum(mean.abs()) * inv_std).max().item()
    for name, got, want_normed in zip(("normed_x", "normed_y"), normed, want, strict=True):
        assert got.dtype == logits.dtype and got.is_contiguous()
        assert_close(got, want_normed, name, num_terms=num_tokens, terms=offset)

    grad_terms = (inv_std * torch.cat(grads, 1).double().cpu().abs().amax(0)).max().item()
    rounded = logits.dtype in HALVES and training  # the backward has the rounded outputs
    assert grad.dtype == logits.dtype and grad.is_contiguous()
    if not rounded or num_tokens >= 37:  # else hardly anything is left of the terms
        assert_close(
            grad,
            want_grad,
            "grad",
            num_terms=num_tokens,
            terms=grad_terms * (1 + offset),
            intermediate_roundings=3 if rounded else 0,
        )

    for name in vars(buffers):
        got, want_buffer = getattr(buffers, name), getattr(want_buffers, name)
        if "num_batches" in name:
            assert got.item() == want_buffer.item() + training
        else:
            terms = wide.square().amax().item() ** 0.5
            assert_close(got, want_buffer, name, num_terms=num_tokens, terms=terms)


# ---- against F.batch_norm ------------------------------------------------------------------------


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
@on_dtypes
def test_training(device, dtype, num_tokens, axes):
    check_against_stock(make_logits(num_tokens, *axes, device, dtype), axes[0])


@pytest.mark.parametrize("num_tokens", [1, 37, 4096])
@on_dtypes
def test_eval(device, dtype, num_tokens):
    check_against_stock(make_logits(num_tokens, 64, 100, device, dtype), 64, training=False)


@on_dtypes
def test_eval_changes_nothing(device, dtype):
    buffers = Buffers.make(12, 20, device, dtype)
    before = buffers.clone()
    versions = [tensor._version for tensor in buffers.args()]
    logits = make_logits(37, 12, 20, device, dtype)
    run_op(logits, 12, random_grads(37, 12, 20, device, dtype), buffers, training=False)
    for tensor, copied in zip(buffers.args(), before.args(), strict=True):
        assert_bitwise(tensor, copied)
    assert [tensor._version for tensor in buffers.args()] == versions


@on_devices
def test_training_raises_the_versions_of_the_buffers(device):
    for grad in (False, True):
        buffers = Buffers.make(4, 6, device, torch.float32)
        versions = [tensor._version for tensor in buffers.args()]
        normalise(make_logits(5, 4, 6, device, torch.float32).requires_grad_(grad), 4, buffers)
        assert [tensor._version for tensor in buffers.args()] == [v + 1 for v in versions]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@on_devices
def test_running_statistics_in_the_dtype_of_the_logits(device, dtype, training):
    logits = make_logits(199, 64, 100, device, dtype)
    check_against_stock(logits, 64, training, stats_dtype=dtype)


@pytest.mark.parametrize("num_tokens", [2, 37, 4096, 20000])
@on_devices
def test_large_mean(device, num_tokens):
    check_against_stock(make_logits(num_tokens, 64, 7, device, torch.float32, offset=1e4), 64)


@on_devices
def test_one_large_value_first(device):
    """Nothing is measured from the first token alone."""
    logits = make_logits(4096, 64, 7, device, torch.float32)
    logits[0] += 1e3
    check_against_stock(logits, 64)


@on_dtypes
def test_constant_columns(device, dtype):
    """A variance of zero: outputs of exactly zero, finite gradients."""
    logits = make_logits(199, 8, 24, device, dtype)
    logits[:, ::3] = 3.14159
    normed, grad = run_op(
        logits,
        8,
        random_grads(199, 8, 24, device, dtype),
        Buffers.make(8, 24, device, dtype),
    )
    assert not torch.cat(normed, 1)[:, ::3].any()
    assert grad.isfinite().all()
    check_against_stock(logits, 8)


@pytest.mark.parametrize("axes", [(2048, 4096), (4096, 33)], ids=str)
@on_devices
def test_wide_grids(device, axes):
    check_against_stock(make_logits(70, *axes, device, torch.float32), axes[0])


@pytest.mark.parametrize("num_tokens", [2**17 + 3])
@pytest.mark.parametrize("axes", [(64, 64), (7, 9)], ids=str)
@needs_gpu
def test_many_tokens(num_tokens, axes):
    """More than the registers of all blocks hold."""
    check_against_stock(make_logits(num_tokens, *axes, "cuda", torch.float32), axes[0])


@on_dtypes
def test_several_batches_as_batch_norm_modules(device, dtype):
    """The course of training: buffers of two modules, then eval with what they have become."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stock = [nn.BatchNorm1d(size, affine=False).to(device, wide) for size in (12, 20)]
    ours = [nn.BatchNorm1d(size, affine=False).to(device, wide) for size in (12, 20)]
    buffers = [
        getattr(norm, name)
        for norm in ours
        for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    for num_tokens in (37, 64, 5):
        logits = make_logits(num_tokens, 12, 20, device, dtype)
        gates = torch.eye(32, dtype=dtype, device=device).split([12, 20])
        omni_moe.ops.omni_router_logits(logits, *gates, buffers, training=True)
        for norm, part in zip(stock, logits.to(wide).tensor_split([12], dim=1), strict=True):
            norm(part)
    for norm, own in zip(stock, ours, strict=True):
        assert_close(own.running_mean, norm.running_mean.double(), num_terms=37, terms=5)
        assert_close(own.running_var, norm.running_var.double(), num_terms=37, terms=20)
        assert own.num_batches_tracked == 3


@on_dtypes
def test_without_buffers(device, dtype):
    logits = make_logits(37, 12, 20, device, dtype)
    want = normalise(logits, 12, Buffers.make(12, 20, device, dtype))
    for got, other in zip(normalise(logits, 12, None), want, strict=True):
        assert_bitwise(got, other)


@on_dtypes
def test_no_tokens(device, dtype):
    """As nn.BatchNorm1d: empty outputs, the running statistics stay, the counter does not."""
    buffers = Buffers.make(4, 6, device, dtype)
    before = buffers.clone()
    logits = torch.empty(0, 10, device=device, dtype=dtype)
    for training in (True, False):
        grads = random_grads(0, 4, 6, device, dtype)
        normed, grad = run_op(logits, 4, grads, buffers, training)
        assert [out.shape for out in normed] == [(0, 4), (0, 6)] and grad.shape == (0, 10)
    for name in vars(buffers):
        counted = 1 if "num_batches" in name else 0
        assert_bitwise(getattr(buffers, name), getattr(before, name) + counted, name)


@on_dtypes
def test_strided_logits(device, dtype):
    logits = make_logits(37, 64, 32, device, dtype)
    wide = torch.zeros(37, 104, device=device, dtype=dtype)
    # Aligned rows, others, columns one after the other, every second element.
    for view in (wide[:, 8:104], wide[:, 3:99], torch.empty_like(logits.t()).t(), strided(logits)):
        view.copy_(logits)
        check_against_stock(view, 64)


@on_dtypes
def test_strided_gradients(device, dtype):
    logits = make_logits(37, 64, 32, device, dtype)
    grads = random_grads(37, 64, 32, device, dtype)
    buffers = Buffers.make(64, 32, device, dtype)
    want = run_op(logits, 64, grads, buffers.clone())
    got = run_op(logits, 64, [strided(grad) for grad in grads], buffers.clone())
    assert_same_run(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    logits = make_logits(5, 3, 4, "cpu", torch.float64).requires_grad_()
    buffers = Buffers.make(3, 4, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x: normalise(x, 3, buffers.clone(), training), logits)


@on_devices
def test_gradient_of_one_output(device):
    logits = make_logits(37, 8, 8, device, torch.float32).requires_grad_()
    buffers = Buffers.make(8, 8, device, torch.float32)
    x, _ = normalise(logits, 8, buffers)
    (got,) = torch.autograd.grad(x.square().sum() + x[:, 0].sum(), logits)
    assert not got[:, 8:].any() and got[:, :8].isfinite().all()

"""BatchNorm of both axes' router logits: against F.batch_norm in fp64, and all it is used under."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers import (
    CUDA,
    assert_bitwise,
    assert_close,
    needs_gpu,
    on_devices,
    on_dtypes,
    strided,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import omni_moe
from omni_moe import reference

ops = torch.ops.omni_moe

MOMENTUM, EPS = 0.3, 1e-5
HALVES = (torch.float16, torch.bfloat16)
AXES = [(1, 7), (7, 256), (64, 64), (64, 100), (100, 1), (256, 256)]
TOKENS = [2, 3, 37, 199, 4096]


@dataclass
class Buffers:
    """The running statistics and counters of both axes, in the order of the arguments."""

    running_mean_x: Tensor
    running_var_x: Tensor
    num_batches_tracked_x: Tensor
    running_mean_y: Tensor
    running_var_y: Tensor
    num_batches_tracked_y: Tensor

    @classmethod
    def make(cls, num_rows: int, num_cols: int, device: str, dtype: torch.dtype) -> "Buffers":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stats = [
            make(size).to(device, wide)
            for size in (num_rows, num_cols)
            for make in (torch.randn, torch.rand)
        ]
        counts = [torch.tensor(count, device=device) for count in (5, 2)]
        return cls(*stats[:2], counts[0], *stats[2:], counts[1])

    def args(self) -> list[Tensor]:
        return list(vars(self).values())

    def map(self, function) -> "Buffers":
        return Buffers(*map(function, self.args()))

    def clone(self) -> "Buffers":
        return self.map(torch.clone)

    def double(self) -> "Buffers":
        return self.map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu().clone())


def make_logits(num_tokens, num_rows, num_cols, device, dtype, offset=0.0):
    width = num_rows + num_cols
    scale = torch.linspace(0.5, 3, width, dtype=torch.float64)
    means = offset + torch.linspace(-2, 2, width, dtype=torch.float64)
    return (torch.randn(num_tokens, width).double() * scale + means).to(device, dtype)


def normalise(logits, num_rows, buffers, training=True):
    return ops.omni_batch_norm(logits, num_rows, *buffers.args(), training, MOMENTUM, EPS)


def run_op(logits, num_rows, grads, buffers, training=True):
    leaf = logits.detach().requires_grad_()
    normed = normalise(leaf, num_rows, buffers, training)
    (grad,) = torch.autograd.grad(normed, leaf, grads)
    return [out.detach() for out in normed], grad


def run_stock(logits, num_rows, grads, buffers, training=True):
    """F.batch_norm in fp64, one call for each axis. Updates `buffers` (fp64)."""
    leaf = logits.detach().cpu().double().requires_grad_()
    stats = buffers.args()
    normed = [
        F.batch_norm(part, *stats[i : i + 2], training=training, momentum=MOMENTUM, eps=EPS)
        for part, i in zip(leaf.tensor_split([num_rows], dim=1), (0, 3), strict=True)
    ]
    (grad,) = torch.autograd.grad(normed, leaf, [g.cpu().double() for g in grads])
    return [out.detach() for out in normed], grad


def assert_close_or_equal(got, want, **options):
    if got.is_floating_point():
        assert_close(got, want.double(), num_terms=37, terms=10, **options)
    else:
        assert_bitwise(got, want)


def random_grads(num_tokens, num_rows, num_cols, device, dtype):
    return [torch.randn(num_tokens, size).to(device, dtype) for size in (num_rows, num_cols)]


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
        ops.omni_batch_norm(logits, 12, *buffers, True)
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
    got = ops.omni_batch_norm(logits, 12, *[None] * 6, True, MOMENTUM, EPS)
    counts = torch.tensor(3, device=device), torch.tensor(4, device=device)
    one = Buffers.make(12, 20, device, dtype)
    got_one = ops.omni_batch_norm(
        logits, 12, one.running_mean_x, one.running_var_x, None, None, None, counts[1], True, 0.1
    )
    for i in range(2):
        assert_bitwise(got[i], want[i])
        assert_bitwise(got_one[i], want[i])
    assert counts[1] == 5


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
    grads = random_grads(37, 64, 32, device, dtype)
    buffers = Buffers.make(64, 32, device, dtype)
    want, want_grad = run_op(logits, 64, grads, buffers.clone())
    wide = torch.zeros(37, 104, device=device, dtype=dtype)
    views = [wide[:, 8:], wide[:, 3:99]]  # aligned rows, and others
    for view in (views[0][:, :96], views[1], torch.empty_like(logits.t()).t()):
        view.copy_(logits)
        got, grad = run_op(view, 64, grads, buffers.clone())
        for one, other in zip([*got, grad], [*want, want_grad], strict=True):
            assert_close(one, other.double(), num_terms=37, terms=5)
    got, grad = run_op(strided(logits), 64, [strided(g) for g in grads], buffers.clone())
    for one, other in zip([*got, grad], [*want, want_grad], strict=True):
        assert_bitwise(one, other)


@on_devices
def test_non_finite_values_stay_in_their_column(device):
    logits = make_logits(37, 8, 8, device, torch.float32)
    clean = torch.cat(normalise(logits, 8, Buffers.make(8, 8, device, torch.float32)), 1)
    logits[3, 2], logits[5, 11], logits[0, 13] = float("nan"), float("inf"), -float("inf")
    got = torch.cat(normalise(logits, 8, Buffers.make(8, 8, device, torch.float32)), 1)
    bad = [2, 11, 13]
    others = [i for i in range(16) if i not in bad]
    assert got[:, bad].isnan().all()
    assert_bitwise(got[:, others], clean[:, others])


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    logits = make_logits(5, 3, 4, "cpu", torch.float64).requires_grad_()
    buffers = Buffers.make(3, 4, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x: normalise(x, 3, buffers.clone(), training), logits)


@on_dtypes
def test_backward_op(device, dtype):
    """The formula on what the forward saved."""
    logits = make_logits(199, 64, 100, device, dtype)
    buffers = Buffers.make(64, 100, device, dtype)
    x, y, inv_std = ops.omni_batch_norm_save_stats(logits, 64, *buffers.args(), True, 0.1, EPS)
    grads = random_grads(199, 64, 100, device, dtype)
    want_inv_std = (logits.double().var(0, correction=0) + EPS).rsqrt()
    assert_close(inv_std, want_inv_std, "inv_std", num_terms=199)
    n, g = torch.cat([x, y], 1).double(), torch.cat(grads, 1).double()
    for training in (True, False):
        got = ops.omni_batch_norm_backward(*grads, x, y, inv_std, training)
        want = g - g.mean(0) - n * (g * n).mean(0) if training else g
        assert_close(got, inv_std.double() * want, num_terms=199, terms=20)


@on_devices
def test_gradient_of_one_output(device):
    logits = make_logits(37, 8, 8, device, torch.float32).requires_grad_()
    buffers = Buffers.make(8, 8, device, torch.float32)
    x, _ = normalise(logits, 8, buffers)
    (got,) = torch.autograd.grad(x.square().sum() + x[:, 0].sum(), logits)
    assert not got[:, 8:].any() and got[:, :8].isfinite().all()


@on_dtypes
def test_reference(device, dtype):
    logits = make_logits(37, 12, 20, device, dtype)
    ours, theirs = (Buffers.make(12, 20, device, dtype) for _ in range(2))
    theirs = ours.clone()
    for training in (True, False):
        args = (training, MOMENTUM, EPS)
        got = omni_moe.ops.omni_batch_norm(logits, 12, *ours.args(), *args)
        want = reference.omni_batch_norm(logits, 12, *theirs.args(), *args)
        for one, other in zip([*got, *ours.args()], [*want, *theirs.args()], strict=True):
            assert_close_or_equal(one, other, intermediate_roundings=1 if dtype in HALVES else 0)


# ---- modes ---------------------------------------------------------------------------------------


def assert_same_run(got, want):
    for one, other in zip([*got[0], got[1]], [*want[0], want[1]], strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("training", [True, False])
@on_dtypes
def test_repeats_bitwise(device, dtype, training, deterministic_memory):
    """On memory that starts as NaN, too."""
    logits = make_logits(4096, 64, 100, device, dtype)
    grads = random_grads(4096, 64, 100, device, dtype)
    start = Buffers.make(64, 100, device, dtype)
    runs = []
    for turn in range(3):
        torch.use_deterministic_algorithms(turn == 0)
        buffers = start.clone()
        runs.append((run_op(logits, 64, grads, buffers, training), buffers))
    for got, buffers in runs[1:]:
        assert_same_run(got, runs[0][0])
        for one, other in zip(buffers.args(), runs[0][1].args(), strict=True):
            assert_bitwise(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_show(dtype):
    logits = make_logits(1000, 64, 100, "cpu", dtype)
    grads = random_grads(1000, 64, 100, "cpu", dtype)
    buffers = Buffers.make(64, 100, "cpu", dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run_op(logits, 64, grads, buffers.clone())
        for count in (2, 5):
            torch.set_num_threads(count)
            assert_same_run(run_op(logits, 64, grads, buffers.clone()), want)
    finally:
        torch.set_num_threads(threads)


@on_devices
def test_inference_mode(device):
    logits = make_logits(37, 12, 20, device, torch.float32).requires_grad_()
    buffers = Buffers.make(12, 20, device, torch.float32)
    want_buffers = buffers.clone()
    want = normalise(logits, 12, want_buffers)
    with torch.inference_mode():
        got = normalise(logits, 12, buffers)
        of_inference = want_buffers.clone()
        assert all(out.is_inference() for out in got)
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one.clone(), other)
    for one, other in zip(buffers.args(), want_buffers.args(), strict=True):
        assert_bitwise(one, other)
    # Buffers that were made in inference mode can be read outside, not written.
    normalise(logits, 12, of_inference, training=False)
    with pytest.raises(RuntimeError, match="inference tensor"):
        normalise(logits, 12, of_inference, training=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_devices
def test_activation_checkpointing(device, use_reentrant):
    logits = make_logits(37, 12, 20, device, torch.float32)
    grads = random_grads(37, 12, 20, device, torch.float32)
    buffers = Buffers.make(12, 20, device, torch.float32)
    want = run_op(logits, 12, grads, buffers.clone())
    leaf = logits.requires_grad_()
    normed = checkpoint(lambda x: normalise(x, 12, buffers), leaf, use_reentrant=use_reentrant)
    torch.autograd.backward(normed, grads)
    assert_same_run(([out.detach() for out in normed], leaf.grad), want)


@on_devices
def test_autocast_leaves_the_dtype(device):
    logits = make_logits(37, 12, 20, device, torch.float32)
    buffers = Buffers.make(12, 20, device, torch.float32)
    want = normalise(logits, 12, buffers.clone())
    with torch.autocast(device, dtype=torch.bfloat16):
        got = normalise(logits, 12, buffers.clone())
        narrow = normalise(logits.bfloat16(), 12, buffers.clone())
    for one, other, half in zip(got, want, narrow, strict=True):
        assert_bitwise(one, other)
        assert half.dtype == torch.bfloat16


@on_devices
def test_writing_an_output_before_backward_is_seen(device):
    logits = make_logits(5, 3, 4, device, torch.float32).requires_grad_()
    x, y = normalise(logits, 3, Buffers.make(3, 4, device, torch.float32))
    loss = x.sum() + y.sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward():
    logits = make_logits(5, 3, 4, "cpu", torch.float32).requires_grad_()
    x, y = normalise(logits, 3, Buffers.make(3, 4, "cpu", torch.float32))
    loss = x.pow(3).sum() + y.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="omni_batch_norm_backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("has_grad", [False, True])
def test_forward_mode(has_grad):
    buffers = Buffers.make(3, 4, "cpu", torch.float32)
    logits = make_logits(5, 3, 4, "cpu", torch.float32)
    with torch.set_grad_enabled(has_grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            normalise(dual, 3, buffers)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
@on_devices
def test_compiled(device, training, backend):
    """One graph, dynamic T, forward, backward and the buffers' updates."""
    torch._dynamo.reset()

    def function(logits, *buffers):
        x, y = ops.omni_batch_norm(logits * 1.5, 12, *buffers, training, MOMENTUM, EPS)
        return x + 1, y.square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    start = Buffers.make(12, 20, device, torch.float32)
    eager_buffers, compiled_buffers = start.clone(), start.clone()
    for num_tokens in (37, 13):
        logits = make_logits(num_tokens, 12, 20, device, torch.float32)
        grads = random_grads(num_tokens, 12, 20, device, torch.float32)
        results = []
        for run, buffers in ((function, eager_buffers), (compiled, compiled_buffers)):
            leaf = logits.clone().requires_grad_()
            outputs = run(leaf, *buffers.args())
            (grad,) = torch.autograd.grad(outputs, leaf, grads)
            results.append([*(out.detach() for out in outputs), grad, *buffers.args()])
        for one, other in zip(*results, strict=True):
            assert_close_or_equal(one, other)
    assert compiled_buffers.num_batches_tracked_x == 5 + 2 * training
    torch._dynamo.reset()


@needs_gpu
def test_graph_replays():
    """Captured once; each replay normalises what is there then, and counts."""
    static = make_logits(67, 64, 48, "cuda", torch.bfloat16).requires_grad_()
    grads = random_grads(67, 64, 48, "cuda", torch.bfloat16)
    buffers = Buffers.make(64, 48, "cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(normalise(static, 64, buffers), static, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed = normalise(static, 64, buffers)
        (grad,) = torch.autograd.grad(normed, static, grads)
    for _ in range(2):
        fresh = make_logits(67, 64, 48, "cuda", torch.bfloat16)
        with torch.no_grad():
            static.copy_(fresh)
        want_buffers = buffers.clone()
        graph.replay()
        want = run_op(fresh, 64, grads, want_buffers)
        assert_same_run(([out.detach() for out in normed], grad), want)
        for one, other in zip(buffers.args(), want_buffers.args(), strict=True):
            assert_bitwise(one, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@needs_gpu
def test_no_synchronisation():
    logits = make_logits(67, 64, 48, "cuda", torch.bfloat16)
    grads = random_grads(67, 64, 48, "cuda", torch.bfloat16)
    buffers = Buffers.make(64, 48, "cuda", torch.bfloat16)
    run_op(logits, 64, grads, buffers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_op(logits, 64, grads, buffers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_concurrent_streams():
    """Grids that wait for all their blocks, from four streams at once."""
    logits = make_logits(4096, 256, 256, "cuda", torch.bfloat16)
    grads = random_grads(4096, 256, 256, "cuda", torch.bfloat16)
    start = Buffers.make(256, 256, "cuda", torch.bfloat16)
    want = run_op(logits, 256, grads, start.clone())
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 4]):
            results.append(run_op(logits, 256, grads, start.clone()))
    torch.cuda.synchronize()
    for got in results:
        assert_same_run(got, want)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_one_token_in_training(device):
    logits = torch.zeros(1, 7, device=device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.omni_batch_norm(logits, 3, *[None] * 6, True)


def bad_buffers(device):
    good = Buffers.make(3, 4, "cpu", torch.float32).map(lambda t: t.to(device))
    half, double = good.running_mean_x.half(), good.running_var_y.double()
    wide = torch.zeros(8, device=device)
    return [
        (
            replace(good, running_mean_x=torch.zeros(4, device=device)),
            "expected running_mean_x.size(0) to equal the number of logits of its axis (3), but",
        ),
        (
            replace(good, running_var_y=torch.zeros(1, 4, device=device)),
            "expected running_var_y to have 1 dimensions, but got shape [1, 4]",
        ),
        (
            replace(good, running_mean_x=half),
            "expected running_mean_x to be Float or in the dtype of router_logits (Float), but",
        ),
        (
            replace(good, running_var_y=double),
            "expected running_var_y to be Float or in the dtype of router_logits (Float), but",
        ),
        (
            replace(good, running_mean_y=None),
            "expected running_mean_y and running_var_y both or neither, but got only running_var_y",
        ),
        (
            replace(good, num_batches_tracked_x=torch.tensor(0, device=device).int()),
            "expected num_batches_tracked_x to be int64, but got Int",
        ),
        (
            replace(good, num_batches_tracked_y=torch.zeros(1, device=device).long()),
            "expected num_batches_tracked_y to have 0 dimensions, but got shape [1]",
        ),
        (replace(good, running_mean_y=wide[::2]), "expected running_mean_y to be contiguous, but"),
    ]


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_buffers(device, case):
    buffers, message = bad_buffers(device)[case]
    if device == "meta" and "contiguous" in message:
        pytest.skip("memory has no layout there that matters")
    with pytest.raises(ValueError, match=re.escape(message)):
        normalise(torch.zeros(5, 7, device=device), 3, buffers)


def test_running_statistics_of_two_dtypes():
    buffers = Buffers.make(3, 4, "cpu", torch.float32)
    buffers.running_var_y = buffers.running_var_y.bfloat16()
    with pytest.raises(ValueError, match=r"in one dtype \(Float\), but got BFloat16 for running_v"):
        normalise(torch.zeros(5, 7).bfloat16(), 3, buffers)


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_values(device):
    logits = torch.zeros(5, 7, device=device)
    none = [None] * 6
    for num_rows in (-1, 0, 7, 8):
        message = f"expected num_rows between 1 and 6.* but got {num_rows}"
        with pytest.raises(ValueError, match=message):
            ops.omni_batch_norm(logits, num_rows, *none, True)
    with pytest.raises(ValueError, match="expected eps to be positive, but got 0"):
        ops.omni_batch_norm(logits, 3, *none, True, 0.1, 0.0)
    with pytest.raises(ValueError, match="expected running_mean_x and running_var_x unless trai"):
        ops.omni_batch_norm(logits, 3, *none, False)
    with pytest.raises(ValueError, match="expected router_logits to have 2 dimensions"):
        ops.omni_batch_norm(logits[None], 3, *none, True)
    with pytest.raises(ValueError, match="expected router_logits to be float32, float16 or bfloat"):
        ops.omni_batch_norm(logits.int(), 3, *none, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (5, 4)}, "expected grad_normed_x.size(1) to equal the number of rows of normed_x (3)"),
        ({1: (6, 4)}, "expected grad_normed_y.size(0) to equal the number of tokens of normed_x"),
        ({3: (5,)}, "expected normed_y to have 2 dimensions, but got shape [5]"),
        ({4: (6,)}, "expected inv_std.size(0) to equal the width of both axes (7), but got"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_shapes_in_backward(device, change, message):
    shapes = dict(enumerate([(5, 3), (5, 4), (5, 3), (5, 4), (7,)])) | change
    tensors = [torch.zeros(shape, device=device) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape("omni_batch_norm_backward: " + message)):
        ops.omni_batch_norm_backward(*tensors, True)


def test_bad_dtypes_in_backward():
    shapes = [(5, 3), (5, 4), (5, 3), (5, 4), (7,)]
    for i, message in ((0, "in the dtype of normed_x"), (4, "expected inv_std to be Float")):
        tensors = [torch.zeros(shape) for shape in shapes]
        tensors[i] = tensors[i].half()
        with pytest.raises(ValueError, match=message):
            ops.omni_batch_norm_backward(*tensors, True)

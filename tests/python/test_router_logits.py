"""Both gates of the router and the BatchNorm of their logits, against the reference in fp64."""

import re

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from batch_norm_helpers import (
    EPS,
    HALVES,
    MOMENTUM,
    Buffers,
    make_logits,
    normalise,
    random_grads,
)
from helpers import (
    CUDA,
    assert_bitwise,
    assert_close,
    needs_gpu,
    on_devices,
    on_dtypes,
    strided,
)
from torch.utils.checkpoint import checkpoint

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


def make_inputs(num_tokens, hidden_size, num_rows, num_cols, device, dtype):
    """Hidden states and gates, and gradients of both outputs."""
    scale = hidden_size**-0.5
    inputs = [
        torch.randn(num_tokens, hidden_size),
        torch.randn(num_rows, hidden_size) * scale,
        torch.randn(num_cols, hidden_size) * scale,
    ]
    grads = random_grads(num_tokens, num_rows, num_cols, device, dtype)
    return [tensor.to(device, dtype) for tensor in inputs], grads


def apply(inputs, buffers, training=True):
    return ops.omni_router_logits(*inputs, *buffers.args(), training, MOMENTUM, EPS)


def run(function, inputs, grads, buffers, training=True):
    """Outputs, then gradients of hidden states and gates. Updates `buffers`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    logits = function(*leaves, *buffers.args(), training, MOMENTUM, EPS)
    return [*(out.detach() for out in logits), *torch.autograd.grad(logits, leaves, grads)]


def run_op(inputs, grads, buffers, training=True):
    return run(ops.omni_router_logits, inputs, grads, buffers, training)


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
            assert_close(
                one.to(dtype) if dtype in HALVES else one,  # of products rounded to that
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
@pytest.mark.parametrize("dtype", HALVES)
@on_devices
def test_running_statistics_in_the_dtype_of_the_inputs(device, dtype, training):
    inputs, grads = make_inputs(199, 72, 64, 104, device, dtype)
    check_against_reference(inputs, grads, training, stats_dtype=dtype)


@pytest.mark.parametrize("shape", [(199, 264, 136, 64), (4096, 1024, 256, 256)], ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@needs_gpu
def test_products_are_not_rounded(dtype, shape):
    """In the one kernel: closer to the truth than the two steps."""
    (hidden, *gates), _ = make_inputs(*shape, "cuda", dtype)
    buffers = Buffers.make(*shape[2:], "cuda", dtype)
    wide = [tensor.double() for tensor in (hidden, *gates)]
    want = torch.cat(reference.omni_router_logits(*wide, *[None] * 6, True, MOMENTUM, EPS), 1)
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
    got = ops.omni_router_logits(*inputs, *[None] * 6, True, MOMENTUM, EPS)
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


def test_typed_function():
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float32)
    ours = Buffers.make(3, 4, "cpu", torch.float32)
    theirs = ours.clone()
    got = omni_moe.ops.omni_router_logits(*inputs, *ours.args(), True, MOMENTUM, EPS)
    for one, other in zip(
        [*got, *ours.args()], [*apply(inputs, theirs), *theirs.args()], strict=True
    ):
        assert_bitwise(one, other)


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@on_dtypes
def test_repeats_bitwise(device, dtype, training, deterministic_memory):
    """On memory that starts as NaN, too."""
    inputs, grads = make_inputs(4096, 128, 64, 104, device, dtype)
    start = Buffers.make(64, 104, device, dtype)
    runs = []
    for turn in range(3):
        torch.use_deterministic_algorithms(turn == 0)
        buffers = start.clone()
        runs.append([*run_op(inputs, grads, buffers, training), *buffers.args()])
    for got in runs[1:]:
        for one, other in zip(got, runs[0], strict=True):
            assert_bitwise(one, other)


@on_devices
def test_training_raises_the_versions_of_the_buffers(device):
    for grad in (False, True):
        inputs, _ = make_inputs(5, 8, 8, 16, device, torch.bfloat16)
        buffers = Buffers.make(8, 16, device, torch.bfloat16)
        versions = [tensor._version for tensor in buffers.args()]
        apply([tensor.requires_grad_(grad) for tensor in inputs], buffers)
        assert [tensor._version for tensor in buffers.args()] == [v + 1 for v in versions]
        apply(inputs, buffers, training=False)
        assert [tensor._version for tensor in buffers.args()] == [v + 1 for v in versions]


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_devices
def test_activation_checkpointing(device, use_reentrant):
    inputs, grads = make_inputs(37, 72, 16, 24, device, torch.bfloat16)
    buffers = Buffers.make(16, 24, device, torch.bfloat16)
    want = run_op(inputs, grads, buffers.clone())
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    logits = checkpoint(lambda *x: apply(x, buffers), *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward(logits, grads)
    got = [*(out.detach() for out in logits), *(leaf.grad for leaf in leaves)]
    for one, other in zip(got, want, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("backward_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@on_devices
def test_autocast(device, dtype, backward_dtype):
    """The autocast dtype whatever the inputs', whichever autocast the backward runs under."""
    inputs, grads = make_inputs(37, 72, 16, 24, device, dtype)
    buffers = Buffers.make(16, 24, device, dtype)
    want = run_op(
        [tensor.bfloat16() for tensor in inputs], [g.bfloat16() for g in grads], buffers.clone()
    )
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = apply(leaves, buffers)
    with torch.autocast(device, dtype=backward_dtype, enabled=backward_dtype is not None):
        torch.autograd.backward(logits, [g.bfloat16() for g in grads])
    got = [*(out.detach() for out in logits), *(leaf.grad for leaf in leaves)]
    assert all(out.dtype == torch.bfloat16 for out in logits)
    for one, other in zip(got, want, strict=True):
        assert_bitwise(one, other.to(one.dtype))


def test_double_backward():
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float32)
    inputs[0].requires_grad_()
    x, y = apply(inputs, Buffers.make(3, 4, "cpu", torch.float32))
    loss = x.pow(3).sum() + y.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="omni_router_logits_backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_forward_mode(which, has_grad):
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float32)
    with torch.set_grad_enabled(has_grad), forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            apply(inputs, Buffers.make(3, 4, "cpu", torch.float32))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
@on_devices
def test_compiled(device, training, backend):
    """One graph, dynamic T, forward, backward and the buffers' updates."""
    torch._dynamo.reset()

    def function(hidden, gate_x, gate_y, *buffers_and_options):
        x, y = ops.omni_router_logits(hidden * 2, gate_x, gate_y, *buffers_and_options)
        return x + 1, y * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    start = Buffers.make(16, 24, device, torch.bfloat16)
    eager_buffers, compiled_buffers = start.clone(), start.clone()
    for num_tokens in (37, 13):
        inputs, grads = make_inputs(num_tokens, 72, 16, 24, device, torch.bfloat16)
        want = run(function, inputs, grads, eager_buffers, training)
        got = run(compiled, inputs, grads, compiled_buffers, training)
        for one, other in zip(
            [*got, *compiled_buffers.args()], [*want, *eager_buffers.args()], strict=True
        ):
            assert_bitwise(one, other)
    assert compiled_buffers.num_batches_tracked_x == 5 + 2 * training
    torch._dynamo.reset()


@needs_gpu
def test_graph_replays():
    """Captured once; each replay normalises what is there then, and counts."""
    static, grads = make_inputs(67, 72, 64, 48, "cuda", torch.bfloat16)
    buffers = Buffers.make(64, 48, "cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_op(static, grads, buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_op(static, grads, buffers)
    for _ in range(2):
        fresh, _ = make_inputs(67, 72, 64, 48, "cuda", torch.bfloat16)
        for tensor, value in zip(static, fresh, strict=True):
            tensor.copy_(value)
        want_buffers = buffers.clone()
        graph.replay()
        want = run_op(fresh, grads, want_buffers)
        for one, other in zip([*got, *buffers.args()], [*want, *want_buffers.args()], strict=True):
            assert_bitwise(one, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@needs_gpu
def test_no_synchronisation():
    inputs, grads = make_inputs(67, 72, 64, 48, "cuda", torch.bfloat16)
    buffers = Buffers.make(64, 48, "cuda", torch.bfloat16)
    run_op(inputs, grads, buffers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_op(inputs, grads, buffers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_concurrent_streams():
    """Grids that wait for all their blocks, from four streams at once, beside BatchNorm's."""
    inputs, grads = make_inputs(4096, 128, 256, 256, "cuda", torch.bfloat16)
    logits = make_logits(4096, 256, 256, "cuda", torch.bfloat16)
    start = Buffers.make(256, 256, "cuda", torch.bfloat16)
    want = run_op(inputs, grads, start.clone())
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            results.append(run_op(inputs, grads, start.clone()))
            normalise(logits, 256, start.clone())
    torch.cuda.synchronize()
    for got in results:
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one, other)


@needs_gpu
def test_right_behind_what_it_reads():
    """It starts before the kernels before it have ended, and waits; so does what follows."""
    shape = (4096, 1024, 64, 64)
    inputs, _ = make_inputs(*shape, "cuda", torch.bfloat16)
    start = Buffers.make(*shape[2:], "cuda", torch.bfloat16)
    want = ops.omni_softmax_router(*apply(inputs, start.clone()), 16, False)
    torch.cuda.synchronize()
    copies = [torch.zeros_like(tensor) for tensor in inputs]
    for _ in range(20):
        buffers = start.clone()
        for copy, tensor in zip(copies, inputs, strict=True):
            copy.zero_()
            copy.copy_(tensor)
        got = ops.omni_softmax_router(*apply(copies, buffers), 16, False)
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one, other)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_one_token_in_training(device):
    inputs = [torch.zeros(size, 8, device=device) for size in (1, 3, 4)]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.omni_router_logits(*inputs, *[None] * 6, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (5, 1, 8)}, "expected hidden_states to have 2 dimensions, but got shape [5, 1, 8]"),
        ({0: (5, 9)}, "expected gate_x.size(1) to equal the hidden_size of hidden_states (9), but"),
        ({2: (4, 7)}, "expected gate_y.size(1) to equal the hidden_size of hidden_states (8), but"),
        ({1: (3,)}, "expected gate_x to have 2 dimensions, but got shape [3]"),
        ({1: (0, 8)}, "expected gate_x to have rows, but got shape [0, 8]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_shapes(device, change, message):
    shapes = dict(enumerate([(5, 8), (3, 8), (4, 8)])) | change
    inputs = [torch.zeros(shape, device=device) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape("omni_router_logits: " + message)):
        ops.omni_router_logits(*inputs, *[None] * 6, True)


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_values(device):
    hidden, gate_x, gate_y = (torch.zeros(size, 8, device=device) for size in (5, 3, 4))
    none = [None] * 6
    with pytest.raises(ValueError, match="expected eps to be positive, but got 0"):
        ops.omni_router_logits(hidden, gate_x, gate_y, *none, True, 0.1, 0.0)
    with pytest.raises(ValueError, match="expected running_mean_x and running_var_x unless trai"):
        ops.omni_router_logits(hidden, gate_x, gate_y, *none, False)
    with pytest.raises(ValueError, match="expected hidden_states to be float32, float16 or bfloat"):
        ops.omni_router_logits(hidden.int(), gate_x, gate_y, *none, True)
    with pytest.raises(ValueError, match="gate_y"):
        ops.omni_router_logits(hidden, gate_x, gate_y.bfloat16(), *none, True)
    mean = torch.zeros(5, device=device)
    message = re.escape("running_mean_y.size(0) to equal the number of logits of its axis (4)")
    with pytest.raises(ValueError, match=message):
        ops.omni_router_logits(hidden, gate_x, gate_y, None, None, None, mean, mean, None, True)
    if device != "meta":
        wide = torch.zeros(8, device=device)[::2]
        with pytest.raises(ValueError, match="running_var_y to be contiguous"):
            ops.omni_router_logits(
                hidden, gate_x, gate_y, None, None, None, torch.zeros_like(wide), wide, None, True
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: (5, 4)},
            "grad_router_logits_x.size(1) to equal the number of rows of router_logits_x",
        ),
        ({2: (6, 8)}, "router_logits_x.size(0) to equal the number of tokens of hidden_states (6)"),
        ({4: (5, 8)}, "router_logits_y.size(1) to equal the number of rows of gate_y (5)"),
        ({7: (6,)}, "inv_std.size(0) to equal the width of both axes (7), but got"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_shapes_in_backward(device, change, message):
    good = [(5, 3), (5, 4), (5, 8), (3, 8), (4, 8), (5, 3), (5, 4), (7,)]
    shapes = dict(enumerate(good)) | change
    tensors = [torch.zeros(shape, device=device) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.omni_router_logits_backward(*tensors, True, [True, True])

"""The router's logits: repeatability, autograd, autocast, compile, graphs, streams, bad input."""

import re
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from batch_norm_helpers import Buffers, assert_same_run, make_logits, normalise, random_grads
from batch_norm_helpers import run_op as run_norm
from helpers import CUDA, assert_bitwise, assert_close, needs_gpu, on_devices, on_dtypes
from router_logits_helpers import apply, make_inputs, run, run_op
from torch.utils.checkpoint import checkpoint

from omni_moe.ops import omni_router_logits

ops = torch.ops.omni_moe

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@on_devices
def test_training_raises_the_versions_of_the_buffers(device, dtype):
    for grad in (False, True):
        inputs, _ = make_inputs(5, 8, 8, 16, device, torch.bfloat16)
        buffers = Buffers.make(8, 16, device, torch.bfloat16)
        buffers = buffers.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        versions = [tensor._version for tensor in buffers.args()]
        apply([tensor.requires_grad_(grad) for tensor in inputs], buffers)
        assert [tensor._version for tensor in buffers.args()] == [v + 1 for v in versions]
        apply(inputs, buffers, training=False)
        assert [tensor._version for tensor in buffers.args()] == [v + 1 for v in versions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_show_in_the_norm(dtype):
    logits = make_logits(1000, 64, 100, "cpu", dtype)
    grads = random_grads(1000, 64, 100, "cpu", dtype)
    buffers = Buffers.make(64, 100, "cpu", dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run_norm(logits, 64, grads, buffers.clone())
        for count in (2, 5):
            torch.set_num_threads(count)
            assert_same_run(run_norm(logits, 64, grads, buffers.clone()), want)
    finally:
        torch.set_num_threads(threads)


@on_devices
def test_inference_mode(device):
    inputs, _ = make_inputs(37, 72, 16, 24, device, torch.float32)
    inputs[0].requires_grad_()
    buffers = Buffers.make(16, 24, device, torch.float32)
    want_buffers = buffers.clone()
    want = apply(inputs, want_buffers)
    with torch.inference_mode():
        got = apply(inputs, buffers)
        of_inference = want_buffers.clone()
        assert all(out.is_inference() for out in got)
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one.clone(), other)
    for one, other in zip(buffers.args(), want_buffers.args(), strict=True):
        assert_bitwise(one, other)
    # Buffers that were made in inference mode can be read outside, not written.
    apply(inputs, of_inference, training=False)
    with pytest.raises(RuntimeError, match="inference tensor"):
        apply(inputs, of_inference, training=True)


@on_devices
def test_writing_an_output_before_backward_is_seen(device):
    inputs, _ = make_inputs(5, 6, 3, 4, device, torch.float32)
    inputs[0].requires_grad_()
    x, y = apply(inputs, Buffers.make(3, 4, device, torch.float32))
    loss = x.sum() + y.sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_devices
def test_evaluation_under_vmap(device):
    """The op of an evaluation pass mutates nothing, so that torch.func can batch it."""
    inputs, _ = make_inputs(3 * 37, 72, 16, 24, device, torch.float32)
    hidden, *gates = inputs
    buffers = Buffers.make(16, 24, device, torch.float32)
    batched = torch.vmap(lambda tokens: apply([tokens, *gates], buffers, training=False))
    want = apply(inputs, buffers, training=False)
    for got, other in zip(batched(hidden.view(3, 37, 72)), want, strict=True):
        assert_close(got.flatten(0, 1), other.double(), num_terms=72, terms=10)


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


@pytest.mark.parametrize("stats_dtype", [torch.float16, torch.float32])
@on_devices
def test_autocast_leaves_running_statistics_alone(device, stats_dtype):
    inputs, _ = make_inputs(37, 72, 16, 24, device, torch.float32)
    buffers = Buffers.make(16, 24, device, torch.float32)
    buffers = buffers.map(lambda t: t.to(stats_dtype) if t.is_floating_point() else t)
    for training in (False, True):
        want_buffers = buffers.clone()
        want = apply([tensor.bfloat16() for tensor in inputs], want_buffers, training)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = apply(inputs, buffers, training)
        for one, other in zip([*got, *buffers.args()], [*want, *want_buffers.args()], strict=True):
            assert_bitwise(one, other)


def test_double_backward():
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float32)
    inputs[0].requires_grad_()
    x, y = apply(inputs, Buffers.make(3, 4, "cpu", torch.float32))
    loss = x.pow(3).sum() + y.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="_omni_router_logits_backward is not implemented"):
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
        x, y = omni_router_logits(hidden * 2, gate_x, gate_y, *buffers_and_options)
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
        omni_router_logits(*inputs, [], training=True)


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
        omni_router_logits(*inputs, [], training=True)


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_values(device):
    hidden, gate_x, gate_y = (torch.zeros(size, 8, device=device) for size in (5, 3, 4))
    with pytest.raises(ValueError, match="expected eps to be positive, but got 0"):
        omni_router_logits(hidden, gate_x, gate_y, [], training=True, eps=0.0)
    with pytest.raises(
        ValueError, match="expected the 6 batch_norm_buffers unless training, but got 0"
    ):
        omni_router_logits(hidden, gate_x, gate_y, [], training=False)
    with pytest.raises(ValueError, match="expected hidden_states to be float32, float16 or bfloat"):
        omni_router_logits(hidden.int(), gate_x, gate_y, [], training=True)
    with pytest.raises(ValueError, match="gate_y"):
        omni_router_logits(hidden, gate_x, gate_y.bfloat16(), [], training=True)
    with pytest.raises(ValueError, match=r"batch_norm_buffers to be none or 6 .*got 5"):
        omni_router_logits(hidden, gate_x, gate_y, [hidden] * 5, training=True)


def bad_buffers(device):
    good = Buffers.make(3, 4, "cpu", torch.float32).map(lambda t: t.to(device))
    half = good.running_mean_y.half()
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
            replace(good, running_mean_y=half),
            "expected the running statistics in one dtype (Float), but got Half for running_mean_y",
        ),
        (
            replace(good, running_var_y=good.running_var_y.int()),
            "expected running_var_y to be of floating point, but got Int",
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


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_buffers(device, case):
    buffers, message = bad_buffers(device)[case]
    if device == "meta" and "contiguous" in message:
        pytest.skip("memory has no layout there that matters")
    inputs = [torch.zeros(size, 8, device=device) for size in (5, 3, 4)]
    with pytest.raises(ValueError, match=re.escape(message)):
        apply(inputs, buffers)


def test_running_statistics_of_two_dtypes():
    buffers = Buffers.make(3, 4, "cpu", torch.float32)
    buffers.running_var_y = buffers.running_var_y.bfloat16()
    inputs = [torch.zeros(size, 8, dtype=torch.bfloat16) for size in (5, 3, 4)]
    with pytest.raises(ValueError, match=r"in one dtype \(Float\), but got BFloat16 for running_v"):
        apply(inputs, buffers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: (5, 4)},
            "grad_router_logits_x.size(1) to equal the number of rows of gate_x (3)",
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
        ops._omni_router_logits_backward(*tensors, True, [True, True])

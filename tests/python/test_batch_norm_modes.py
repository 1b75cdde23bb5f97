"""BatchNorm of both axes' router logits: repeatability, autograd, compile, graphs, bad input."""

import re
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from batch_norm_helpers import (
    EPS,
    MOMENTUM,
    Buffers,
    assert_close_or_equal,
    assert_same_run,
    make_logits,
    normalise,
    ops,
    random_grads,
    run_op,
)
from helpers import (
    CUDA,
    assert_bitwise,
    needs_gpu,
    on_devices,
    on_dtypes,
)
from torch.utils.checkpoint import checkpoint

# ---- modes ---------------------------------------------------------------------------------------


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

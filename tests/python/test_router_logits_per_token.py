"""The router's logits with a norm of each token: values, gradients, modes, errors."""

import re

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
from router_logits_helpers import make_inputs
from torch.utils.checkpoint import checkpoint

import omni_moe
from omni_moe import reference
from omni_moe.ops import omni_router_logits_per_token

ops = torch.ops.omni_moe

NORMS = ("layer_norm", "rms_norm")
EPS = 1e-5
HALVES = (torch.float16, torch.bfloat16)
on_norms = pytest.mark.parametrize("norm", NORMS)

# Tokens, hidden size, rows, columns: axes that a warp holds, that it does not, odd ones.
SHAPES = [
    (1, 8, 3, 2),
    (2, 1, 1, 1),
    (37, 20, 5, 7),
    (199, 72, 64, 104),
    (67, 64, 63, 1030),
    (1000, 100, 320, 328),
    (5, 24, 2048, 4100),
]


def apply(inputs, norm, function=omni_router_logits_per_token):
    return function(*inputs, norm, EPS)


def run(inputs, grads, norm, function=omni_router_logits_per_token):
    """Outputs, then gradients of hidden states and gates."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    logits = apply(leaves, norm, function)
    return [*(out.detach() for out in logits), *torch.autograd.grad(logits, leaves, grads)]


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_is_pytorch(norm):
    inputs, _ = make_inputs(37, 20, 5, 7, "cpu", torch.float64)
    hidden, *gates = inputs
    stock = F.layer_norm if norm == "layer_norm" else F.rms_norm
    for got, gate in zip(
        apply(inputs, norm, reference.omni_router_logits_per_token), gates, strict=True
    ):
        want = stock(F.linear(hidden, gate), (len(gate),), eps=EPS)
        torch.testing.assert_close(got, want)


@on_norms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_against_the_reference(device, dtype, shape, norm):
    num_tokens, hidden_size, *widths = shape
    inputs, grads = make_inputs(*shape, device, dtype)
    wide = [tensor.cpu().double() for tensor in inputs]
    wide_grads = [grad.cpu().double() for grad in grads]
    want = run(wide, wide_grads, norm, reference.omni_router_logits_per_token)
    got = run(inputs, grads, norm)

    # What cancels, and how often something is rounded on the way: products and their gradient.
    roundings = 1 if dtype in HALVES else 0
    scales = []
    for name, one, other, gate in zip("xy", got, want, wide[1:], strict=False):
        products = wide[0] @ gate.T
        centre = products.mean(-1, keepdim=True) if norm == "layer_norm" else 0
        inv_std = ((products - centre).square().mean(-1) + EPS).rsqrt()
        offset = (products.abs().amax(-1) * inv_std).max().item()
        scales.append((inv_std.max().item(), offset))
        assert one.dtype == dtype and one.is_contiguous()
        assert_close(
            one,
            other,
            f"logits_{name}",
            num_terms=len(gate) + hidden_size,
            terms=offset,
            intermediate_roundings=roundings,
        )
    # An axis of one logit has nothing to normalise, and one of a few loses what these cancel.
    if min(widths) < 63:
        return
    grad_products = max(inv_std * (1 + offset) for inv_std, offset in scales)
    grad_products *= torch.cat(wide_grads, 1).abs().max().item()
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
            num_terms=sum(widths) + num_tokens + hidden_size,
            terms=grad_products * factor,
            intermediate_roundings=4 * roundings,
        )


@on_norms
def test_gradcheck(norm):
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *x: apply(x, norm), leaves)


@on_norms
@on_dtypes
def test_backward_op(device, dtype, norm):
    """The formula on what the forward returns for it."""
    (hidden, *gates), grads = make_inputs(199, 72, 64, 100, device, dtype)
    x, y, inv_std = ops.omni_router_logits_per_token(hidden, *gates, norm, EPS)
    got = ops._omni_router_logits_per_token_backward(
        *grads, hidden, *gates, x, y, inv_std, norm, [True, True]
    )
    grad_products = []
    for i, (n, g) in enumerate(zip((x.double(), y.double()), grads, strict=True)):
        g = g.double()
        mean = g.mean(-1, keepdim=True) if norm == "layer_norm" else 0
        centred = g - mean - n * (g * n).mean(-1, keepdim=True)
        grad_products.append(centred * inv_std[:, i, None].double())
    want = torch.cat(grad_products, 1)
    for one, product in zip(
        got, (want @ torch.cat(gates).double(), want.T @ hidden.double()), strict=True
    ):
        assert_close(
            one,
            product,
            num_terms=271,
            terms=20 * product.abs().max().item(),
            intermediate_roundings=1 if dtype in HALVES else 0,
        )


@on_norms
@on_dtypes
def test_constant_tokens(device, dtype, norm):
    """A variance of zero: outputs of exactly zero, finite gradients."""
    inputs, grads = make_inputs(37, 72, 8, 24, device, dtype)
    inputs[0][::3] = 0
    *logits, _, _, _ = got = run(inputs, grads, norm)
    assert not any(part[::3].any() for part in logits)
    assert all(tensor.isfinite().all() for tensor in got)


@on_norms
@on_dtypes
def test_non_finite_values_stay_in_their_token(device, dtype, norm):
    if device == "cpu" and dtype in HALVES:
        pytest.skip("PyTorch's matrix product spreads them")
    inputs, _ = make_inputs(199, 72, 8, 16, device, dtype)
    clean = torch.cat(apply(inputs, norm), 1)
    inputs[0][[0, 70], 5] = torch.tensor([torch.nan, torch.inf], device=device, dtype=dtype)
    got = torch.cat(apply(inputs, norm), 1)
    others = torch.ones(199, dtype=torch.bool)
    others[[0, 70]] = False
    assert got[~others].isnan().all()
    assert_bitwise(got[others], clean[others])


@on_norms
@on_dtypes
def test_no_tokens(device, dtype, norm):
    inputs, grads = make_inputs(0, 72, 8, 16, device, dtype)
    *logits, grad_hidden, grad_x, grad_y = run(inputs, grads, norm)
    assert [out.shape for out in logits] == [(0, 8), (0, 16)]
    assert grad_hidden.shape == (0, 72) and not grad_x.any() and not grad_y.any()


@on_norms
@on_dtypes
def test_strided_inputs(device, dtype, norm):
    inputs, grads = make_inputs(37, 72, 64, 32, device, dtype)
    want = run(inputs, grads, norm)
    got = run([strided(t) for t in inputs], [strided(g) for g in grads], norm)
    for one, other in zip(got, want, strict=True):
        assert_close(
            one,
            other.double(),
            num_terms=109,
            terms=20 * other.abs().max().item(),
            intermediate_roundings=4 if dtype in HALVES else 0,
        )


@pytest.mark.parametrize("wanted", range(1, 7))
@on_devices
def test_gradients_of_some_inputs(device, wanted):
    inputs, grads = make_inputs(37, 72, 16, 24, device, torch.float32)
    want = run(inputs, grads, "layer_norm")[2:]
    leaves = [
        tensor.clone().requires_grad_(bool(wanted >> i & 1)) for i, tensor in enumerate(inputs)
    ]
    torch.autograd.backward(apply(leaves, "layer_norm"), grads)
    for leaf, grad in zip(leaves, want, strict=True):
        if leaf.requires_grad:
            assert_bitwise(leaf.grad, grad)
        else:
            assert leaf.grad is None


# ---- modes ---------------------------------------------------------------------------------------


@on_norms
@on_dtypes
def test_repeats_bitwise(device, dtype, norm, deterministic_memory):
    """On memory that starts as NaN, too."""
    inputs, grads = make_inputs(1000, 128, 64, 104, device, dtype)
    runs = []
    for turn in range(3):
        torch.use_deterministic_algorithms(turn == 0)
        runs.append(run(inputs, grads, norm))
    for got in runs[1:]:
        for one, other in zip(got, runs[0], strict=True):
            assert_bitwise(one, other)


@on_norms
@on_devices
def test_vmap(device, norm):
    inputs, _ = make_inputs(3 * 37, 72, 16, 24, device, torch.float32)
    hidden, *gates = inputs
    batched = torch.vmap(lambda tokens: apply([tokens, *gates], norm))
    for got, want in zip(batched(hidden.view(3, 37, 72)), apply(inputs, norm), strict=True):
        assert_close(got.flatten(0, 1), want.double(), num_terms=72, terms=10)


@on_devices
def test_inference_mode(device):
    inputs, _ = make_inputs(37, 72, 16, 24, device, torch.float32)
    want = apply(inputs, "rms_norm")
    with torch.inference_mode():
        got = apply(inputs, "rms_norm")
        assert all(out.is_inference() for out in got)
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one.clone(), other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_devices
def test_activation_checkpointing(device, use_reentrant):
    inputs, grads = make_inputs(37, 72, 16, 24, device, torch.bfloat16)
    want = run(inputs, grads, "layer_norm")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    logits = checkpoint(lambda *x: apply(x, "layer_norm"), *leaves, use_reentrant=use_reentrant)
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
    grads = [g.bfloat16() for g in grads]
    want = run([tensor.bfloat16() for tensor in inputs], grads, "layer_norm")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = apply(leaves, "layer_norm")
    with torch.autocast(device, dtype=backward_dtype, enabled=backward_dtype is not None):
        torch.autograd.backward(logits, grads)
    got = [*(out.detach() for out in logits), *(leaf.grad for leaf in leaves)]
    assert all(out.dtype == torch.bfloat16 for out in logits)
    for one, other in zip(got, want, strict=True):
        assert_bitwise(one, other.to(one.dtype))


def test_double_backward():
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float32)
    inputs[0].requires_grad_()
    x, y = apply(inputs, "layer_norm")
    (grad,) = torch.autograd.grad(
        (x.pow(3) + 1).sum() + y.pow(3).sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="per_token_backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("which", range(3))
def test_forward_mode(which):
    inputs, _ = make_inputs(5, 6, 3, 4, "cpu", torch.float32)
    with forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            apply(inputs, "layer_norm")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@on_norms
@on_devices
def test_compiled(device, norm, backend):
    """One graph, dynamic T, forward and backward."""
    torch._dynamo.reset()

    def function(hidden, gate_x, gate_y, *options):
        x, y = omni_router_logits_per_token(hidden * 2, gate_x, gate_y, *options)
        return x + 1, y * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for num_tokens in (37, 13):
        inputs, grads = make_inputs(num_tokens, 72, 16, 24, device, torch.bfloat16)
        want = run(inputs, grads, norm, function)
        for one, other in zip(run(inputs, grads, norm, compiled), want, strict=True):
            assert_bitwise(one, other)
    torch._dynamo.reset()


@needs_gpu
def test_graph_replays():
    static, grads = make_inputs(67, 72, 64, 48, "cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static, grads, "layer_norm")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(static, grads, "layer_norm")
    for _ in range(2):
        fresh, _ = make_inputs(67, 72, 64, 48, "cuda", torch.bfloat16)
        for tensor, value in zip(static, fresh, strict=True):
            tensor.copy_(value)
        graph.replay()
        for one, other in zip(got, run(fresh, grads, "layer_norm"), strict=True):
            assert_bitwise(one, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@needs_gpu
def test_no_synchronisation():
    inputs, grads = make_inputs(67, 72, 64, 48, "cuda", torch.bfloat16)
    run(inputs, grads, "rms_norm")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, grads, "rms_norm")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (5, 1, 8)}, "expected hidden_states to have 2 dimensions, but got shape [5, 1, 8]"),
        ({0: (5, 9)}, "expected gate_x.size(1) to equal the hidden_size of hidden_states (9), but"),
        ({2: (4, 7)}, "expected gate_y.size(1) to equal the hidden_size of hidden_states (8), but"),
        ({1: (0, 8)}, "expected gate_x to have rows, but got shape [0, 8]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_shapes(device, change, message):
    shapes = dict(enumerate([(5, 8), (3, 8), (4, 8)])) | change
    inputs = [torch.zeros(shape, device=device) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape("omni_router_logits_per_token: " + message)):
        omni_router_logits_per_token(*inputs)


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_values(device):
    hidden, gate_x, gate_y = (torch.zeros(size, 8, device=device) for size in (5, 3, 4))
    with pytest.raises(ValueError, match="expected eps to be positive, but got 0"):
        omni_router_logits_per_token(hidden, gate_x, gate_y, eps=0.0)
    with pytest.raises(ValueError, match="norm to be one of layer_norm, rms_norm, but got 'batch"):
        omni_router_logits_per_token(hidden, gate_x, gate_y, "batch_norm")
    with pytest.raises(ValueError, match="expected hidden_states to be float32, float16 or bfloat"):
        omni_router_logits_per_token(hidden.int(), gate_x, gate_y)
    with pytest.raises(ValueError, match="gate_y"):
        omni_router_logits_per_token(hidden, gate_x, gate_y.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (5, 4)}, "grad_router_logits_x.size(1) to equal the number of rows of gate_x (3)"),
        ({4: (5, 8)}, "router_logits_y.size(1) to equal the number of rows of gate_y (5)"),
        ({7: (4, 2)}, "inv_std.size(0) to equal the number of tokens of hidden_states (5), but"),
        ({7: (5, 1)}, "inv_std.size(1) to equal the number of axes (2), but got"),
        ({7: (5,)}, "inv_std to have 2 dimensions, but got"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_shapes_in_backward(device, change, message):
    good = [(5, 3), (5, 4), (5, 8), (3, 8), (4, 8), (5, 3), (5, 4), (5, 2)]
    shapes = dict(enumerate(good)) | change
    tensors = [torch.zeros(shape, device=device) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops._omni_router_logits_per_token_backward(*tensors, "layer_norm", [True, True])


# ---- plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "num_cols", "dtype", "uses_vectors"),
    [
        (64, 320, torch.bfloat16, True),
        (64, 12, torch.bfloat16, False),
        (64, 12, torch.float32, True),
        (7, 8, torch.float32, False),
    ],
)
def test_plan(num_rows, num_cols, dtype, uses_vectors):
    """16 bytes a load where rows of both axes start at multiples of it."""
    gpu = omni_moe.GpuProperties(num_sms=132, l2_bytes=50 << 20, shared_bytes_per_block=227 << 10)
    plans = omni_moe.plan(
        "omni_router_logits_per_token",
        num_tokens=37,
        num_rows=num_rows,
        num_cols=num_cols,
        dtype=dtype,
        gpu=gpu,
    )
    want = {"uses_vectors": uses_vectors, "workspace_bytes": 0}
    assert plans == {"token_norm_forward": want, "token_norm_backward": want}

"""Shared MLP forward and backward against the fp64 oracle."""

import itertools

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    assert_bitwise,
    assert_close,
    mlp_inputs,
    on_devices,
    on_dtypes,
    run,
    run_in_double,
    strided,
)

import omni_moe
from omni_moe import reference

ops = torch.ops.omni_moe
GRADIENTS = ("grad_x", "grad_gate_weight", "grad_up_weight", "grad_down_weight")

# The products and their activation are kept in the dtype of x; so are the gradients of both.
FORWARD_ROUNDINGS, BACKWARD_ROUNDINGS = 2, 3

# (leading sizes of x, H, I)
SHAPES = [
    ((0,), 8, 12),
    ((1,), 8, 1),
    ((37,), 100, 36),
    ((37,), 1000, 257),
    ((199,), 1024, 100),
    ((199,), 8, 1024),
    ((199,), 1000, 136),
    ((5, 0, 3), 100, 36),
    ((2, 3, 5), 100, 36),
    ((), 100, 36),
]


def check_against_oracle(inputs, grad, activation="silu"):
    out, grads = run(lambda *args: omni_moe.ops.omni_mlp(*args, activation), inputs, grad)
    want, want_grads = run_in_double(
        lambda *args: reference.omni_mlp(*args, activation), inputs, grad
    )
    assert out.dtype == inputs[0].dtype and out.is_contiguous()
    (num_intermediate, hidden_size), num_tokens = inputs[1].shape, grad.numel() // grad.shape[-1]
    lengths = {"num_terms": hidden_size + num_intermediate + num_tokens}
    assert_close(out, want, "out", intermediate_roundings=FORWARD_ROUNDINGS, **lengths)
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name, intermediate_roundings=BACKWARD_ROUNDINGS, **lengths)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_against_oracle(device, dtype, shape):
    check_against_oracle(*mlp_inputs(*shape, device, dtype))


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(8, 0), (0, 4), (0, 0)])
@on_devices
def test_empty_features(device, hidden_size, intermediate_size):
    """As F.linear has it: sums of nothing are 0, outputs of no elements are empty."""
    inputs = [
        torch.randn(shape, device=device)
        for shape in (
            (3, hidden_size),
            (intermediate_size, hidden_size),
            (intermediate_size, hidden_size),
            (hidden_size, intermediate_size),
        )
    ]
    grad = torch.randn(3, hidden_size, device=device)
    out, grads = run(omni_moe.ops.omni_mlp, inputs, grad)
    assert out.shape == (3, hidden_size) and not out.any()
    for got, like in zip(grads, inputs, strict=True):
        assert got.shape == like.shape and not got.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_dtypes
def test_activations(device, dtype, activation):
    inputs, grad = mlp_inputs((37,), 100, 52, device, dtype)
    inputs[1] *= 3  # beyond the linear part of every activation
    check_against_oracle(inputs, grad, activation)


@on_dtypes
def test_non_contiguous_inputs(device, dtype):
    inputs, grad = mlp_inputs((3, 7), 100, 36, device, dtype)
    check_against_oracle([strided(tensor) for tensor in inputs], strided(grad))
    transposed = [inputs[0].transpose(0, 1), *(t.t().contiguous().t() for t in inputs[1:])]
    check_against_oracle(transposed, grad.transpose(0, 1))


@on_devices
def test_fused_weights(device):
    """gate and up as the two halves of one matrix, as some checkpoints keep them."""
    (x, gate, up, down), grad = mlp_inputs((37,), 100, 36, device, torch.float32)
    both = torch.cat([gate, up]).requires_grad_()
    omni_moe.ops.omni_mlp(x, *both.chunk(2), down).backward(grad)
    _, grads = run(omni_moe.ops.omni_mlp, (x, gate, up, down), grad)
    assert_bitwise(both.grad, torch.cat(grads[1:3]))


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([False, True], repeat=4) if any(w)], ids=str
)
@on_devices
def test_gradients_of_some_inputs(device, wanted):
    inputs, grad = mlp_inputs((37,), 100, 36, device, torch.float32)
    _, want = run(omni_moe.ops.omni_mlp, inputs, grad)
    leaves = [t.detach().requires_grad_(on) for t, on in zip(inputs, wanted, strict=True)]
    omni_moe.ops.omni_mlp(*leaves).backward(grad)
    for leaf, want_grad, on, name in zip(leaves, want, wanted, GRADIENTS, strict=True):
        assert (leaf.grad is not None) == on, name
        if on:
            assert_bitwise(leaf.grad, want_grad, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs, _ = mlp_inputs((2, 2), 5, 4, "cpu", torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: omni_moe.ops.omni_mlp(*args, activation), inputs)


@on_devices
def test_save_for_backward(device):
    """What the backward takes: the two products; the output is the same without them."""
    (x, gate_weight, up_weight, down_weight), _ = mlp_inputs((2, 9), 100, 36, device, torch.float32)
    args = (x, gate_weight, up_weight, down_weight, "silu")
    out, gate, up = ops.omni_mlp(*args, save_for_backward=True)
    assert_close(gate, x.double() @ gate_weight.double().t(), "gate", num_terms=100)
    assert_close(up, x.double() @ up_weight.double().t(), "up", num_terms=100)
    alone, *nothing = ops.omni_mlp(*args)
    assert_bitwise(out, alone)
    assert [tensor.shape for tensor in nothing] == [(0,), (0,)]


@on_devices
def test_non_finite_inputs_stay_in_their_token(device):
    inputs, _ = mlp_inputs((37,), 100, 36, device, torch.float32)
    clean = omni_moe.ops.omni_mlp(*inputs)
    inputs[0][3, 5], inputs[0][4, 6] = float("nan"), float("inf")
    got = omni_moe.ops.omni_mlp(*inputs)
    want = reference.omni_mlp(*(tensor.double() for tensor in inputs))
    assert_close(got, want)
    assert got[3].isnan().all()
    others = [t for t in range(37) if t not in (3, 4)]
    assert_close(got[others], clean[others].double())


@on_devices
def test_python_function(device):
    inputs, _ = mlp_inputs((37,), 100, 36, device, torch.float32)
    got = omni_moe.ops.omni_mlp(*inputs, activation="gelu")
    assert_bitwise(got, ops.omni_mlp(*inputs, "gelu")[0])

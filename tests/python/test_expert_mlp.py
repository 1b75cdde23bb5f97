"""Experts and MLP as one op: its two parts, its memory, and who may see the products it keeps."""

import itertools
from functools import partial

import pytest
import torch
from helpers import (
    ExpertShape,
    assert_bitwise,
    assert_close,
    expert_inputs,
    mlp_inputs,
    needs_gpu,
    on_devices,
    on_dtypes,
    run,
    run_in_double,
    strided,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import omni_moe
from omni_moe import reference

ops = torch.ops.omni_moe
GRADIENTS = ("hidden", "up_embed", "down_embed", "routing", "gate", "up", "down")
# The products, their activation, the experts' states that the MLP is added onto, and the gradients
# of all of these.
ROUNDINGS = 4

# (T, H, E, K, I)
SHAPES = [
    (0, 8, 5, 3, 12),
    (1, 8, 5, 3, 1),
    (37, 100, 40, 7, 36),
    (67, 256, 300, 8, 512),
    (199, 1000, 90, 5, 136),
]


def layer_inputs(shape, intermediate_size, device, dtype):
    experts, indices, grad = expert_inputs(shape, device, dtype)
    (_, *weights), _ = mlp_inputs((shape.num_tokens,), shape.hidden_size, intermediate_size, device,
                                  dtype)  # fmt: skip
    return [*experts, *weights], indices, grad


def function_of(indices, *options):
    return lambda *args: omni_moe.ops.omni_expert_mlp(*args[:4], indices, *args[4:], *options)


def oracle_of(indices, activation="silu"):
    def function(hidden, up_embed, down_embed, routing, *weights):
        experts = reference.omni_expert(
            hidden, up_embed, down_embed, routing, indices.cpu(), activation
        )
        return experts + reference.omni_mlp(hidden, *weights, activation)

    return function


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_against_oracle(device, dtype, shape):
    *sizes, intermediate_size = shape
    shape = ExpertShape(*sizes)
    inputs, indices, grad = layer_inputs(shape, intermediate_size, device, dtype)
    out, grads = run(function_of(indices), inputs, grad)
    want, want_grads = run_in_double(oracle_of(indices), inputs, grad)
    pairs = shape.num_tokens * shape.num_experts_per_token
    lengths = {"num_terms": shape.hidden_size + intermediate_size + shape.num_tokens + pairs}
    assert_close(out, want, "out", intermediate_roundings=ROUNDINGS, **lengths)
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name, intermediate_roundings=ROUNDINGS, **lengths)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "identity"])
@on_devices
def test_activations(device, activation):
    shape = ExpertShape(37, 100, 40, 7)
    inputs, indices, grad = layer_inputs(shape, 36, device, torch.float32)
    out, grads = run(function_of(indices, activation), inputs, grad)
    want, want_grads = run_in_double(oracle_of(indices, activation), inputs, grad)
    assert_close(out, want, num_terms=500)
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name, num_terms=500)


@on_devices
def test_strided_inputs(device):
    inputs, indices, grad = layer_inputs(ExpertShape(37, 100, 40, 7), 36, device, torch.bfloat16)
    want, want_grads = run(function_of(indices), inputs, grad)
    got, grads = run(function_of(strided(indices)), [strided(t) for t in inputs], strided(grad))
    assert_bitwise(got, want)
    for name, one, other in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_bitwise(one, other, name)


@on_devices
def test_gradients_of_some_inputs(device):
    inputs, indices, grad = layer_inputs(ExpertShape(9, 20, 12, 3), 16, device, torch.float32)
    _, want = run_in_double(oracle_of(indices), inputs, grad)
    for wanted in itertools.product([False, True], repeat=7):
        if not any(wanted):
            continue
        leaves = [t.detach().requires_grad_(on) for t, on in zip(inputs, wanted, strict=True)]
        function_of(indices)(*leaves).backward(grad)
        for leaf, want_grad, on, name in zip(leaves, want, wanted, GRADIENTS, strict=True):
            assert (leaf.grad is not None) == on, name
            if on:
                assert_close(leaf.grad, want_grad, name, num_terms=100)


def test_gradcheck():
    inputs, indices, _ = layer_inputs(ExpertShape(3, 5, 6, 2), 4, "cpu", torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    for activation in ("silu", "gelu"):
        assert torch.autograd.gradcheck(function_of(indices, activation), inputs)


@on_devices
def test_python_function(device):
    inputs, indices, _ = layer_inputs(ExpertShape(9, 20, 12, 3), 16, device, torch.float32)
    got = omni_moe.ops.omni_expert_mlp(*inputs[:4], indices, *inputs[4:], activation="gelu")
    assert_bitwise(got, function_of(indices, "gelu")(*inputs))


# ---- the products kept for the backward, whose memory it may take --------------------------------


@pytest.fixture(params=["omni_expert_mlp", "omni_mlp"])
def leaves_and_run(request, device):
    """(leaves, function, gradient): of both ops that keep products of the MLP."""
    inputs, indices, grad = layer_inputs(ExpertShape(67, 256, 90, 5), 512, device, torch.bfloat16)
    function = function_of(indices)
    if request.param == "omni_mlp":
        function = omni_moe.ops.omni_mlp
        inputs = [inputs[0], *inputs[4:]]
    return [tensor.requires_grad_() for tensor in inputs], function, grad


@on_devices
def test_a_graph_that_is_kept_repeats(device, leaves_and_run):
    leaves, function, grad = leaves_and_run
    out = function(*leaves)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    last = torch.autograd.grad(out, leaves, grad)
    for one, *others in zip(first, again, last, strict=True):
        for other in others:
            assert_bitwise(other, one)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)


@on_devices
def test_tensors_of_saved_tensors_hooks_stay(device, leaves_and_run):
    """A hook may hand back a tensor of its owner's."""
    leaves, function, grad = leaves_and_run
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor
    ):
        out = function(*leaves)
    before = [tensor.clone() for tensor in seen]
    torch.autograd.grad(out, leaves, grad)
    assert len(seen) > len(leaves)
    for tensor, value in zip(seen, before, strict=True):
        assert_bitwise(tensor, value)


class Watch(TorchDispatchMode):
    """Keeps the results of all operators, and their names."""

    def __init__(self):
        super().__init__()
        self.names, self.results = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        self.results.append(result)
        return result


def operators_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return {event.name for event in profiler.events()}


@pytest.mark.parametrize("retain_graph", [False, True])
@on_devices
def test_the_last_pass_takes_their_memory(device, leaves_and_run, retain_graph):
    leaves, function, grad = leaves_and_run
    out = function(*leaves)
    names = operators_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=retain_graph))
    assert ("omni_moe::_omni_mlp_backward_consume" in names) != retain_graph
    assert ("omni_moe::_omni_mlp_backward" in names) == retain_graph


@on_devices
def test_a_dispatch_mode_in_the_backward_may_keep_arguments(device, leaves_and_run):
    leaves, function, grad = leaves_and_run
    out = function(*leaves)
    want = torch.autograd.grad(function(*leaves), leaves, grad)
    with Watch() as watch:
        got = torch.autograd.grad(out, leaves, grad)
    assert "omni_moe::_omni_mlp_backward" in watch.names
    for one, other in zip(got, want, strict=True):
        assert_bitwise(one, other)


@on_devices
def test_batched_gradients(device, leaves_and_run):
    leaves, function, grad = leaves_and_run
    grads = torch.stack([grad, 2 * grad])
    got = torch.autograd.grad(function(*leaves), leaves, grads, is_grads_batched=True)
    for i in range(2):
        want = torch.autograd.grad(function(*leaves), leaves, grads[i])
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one[i], other)


def test_a_backward_that_failed_cannot_be_tried_again():
    """What it had saved is gone: an error, not a read of what is no longer there."""
    inputs, indices, grad = layer_inputs(ExpertShape(9, 20, 12, 3), 16, "cpu", torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = function_of(indices)(*leaves)
    right = indices.data[0, 0].item()
    indices.data[0, 0] = 999
    with pytest.raises(IndexError, match="but got 999"):
        torch.autograd.grad(out, leaves, grad)
    indices.data[0, 0] = right
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, grad)


@on_dtypes
def test_save_for_backward(device, dtype):
    """What the backward takes is that of the two ops, bit for bit."""
    inputs, indices, _ = layer_inputs(ExpertShape(67, 256, 90, 5), 136, device, dtype)
    experts, weights = [*inputs[:4], indices], inputs[4:]
    _, pre_activations = ops.omni_expert(*experts, save_for_backward=True)
    _, *products = ops.omni_mlp(inputs[0], *weights, save_for_backward=True)
    output, *saved = ops.omni_expert_mlp(*experts, *weights, save_for_backward=True)
    for one, other in zip(saved, [pre_activations, *products], strict=True):
        assert_bitwise(one, other)
    alone, *nothing = ops.omni_expert_mlp(*experts, *weights)
    assert_bitwise(alone, output)
    assert [tensor.shape for tensor in nothing] == [(0,)] * 3


@on_devices
def test_what_autograd_saves_is_its_own(device):
    """With a gradient to come, the op shows its output alone."""
    inputs, indices, _ = layer_inputs(ExpertShape(9, 20, 12, 3), 16, device, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    for save_for_backward in (False, True):
        _, *nothing = ops.omni_expert_mlp(
            *leaves[:4], indices, *leaves[4:], save_for_backward=save_for_backward
        )
        assert [tensor.shape for tensor in nothing] == [(0,)] * 3


def save_own_ops(context, op, *args, **kwargs):
    saves = op.namespace == "omni_moe"
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


@on_devices
def test_selective_checkpointing(device, leaves_and_run):
    """Nothing that a policy keeps is written to afterwards."""
    leaves, function, grad = leaves_and_run
    want = torch.autograd.grad(function(*leaves), leaves, grad)
    contexts = partial(create_selective_checkpoint_contexts, save_own_ops)
    out = checkpoint(function, *leaves, use_reentrant=False, context_fn=contexts)
    for one, other in zip(torch.autograd.grad(out, leaves, grad), want, strict=True):
        assert_bitwise(one, other)


@on_devices
def test_consuming_counts_as_a_change(device):
    inputs, grad = mlp_inputs((2, 9), 100, 36, device, torch.float32)
    _, gate, up = ops.omni_mlp(*inputs, save_for_backward=True)
    ops._omni_mlp_backward_consume(grad, *inputs, gate, up, "silu", [True] * 4)
    assert gate._version == up._version == 1


@on_devices
def test_tensors_of_a_dispatch_mode_stay(device, leaves_and_run):
    leaves, function, grad = leaves_and_run
    with Watch() as watch:
        out = function(*leaves)
    (products,) = [
        result[-2:]
        for name, result in zip(watch.names, watch.results, strict=True)
        if name in ("omni_moe::omni_mlp", "omni_moe::omni_expert_mlp")
    ]
    before = [product.clone() for product in products]
    torch.autograd.grad(out, leaves, grad)
    for product, value in zip(products, before, strict=True):
        assert_bitwise(product, value)


@needs_gpu
def test_memory_of_a_training_step():
    """Beside its results: the MLP's products and, while they last, act(gate) * up."""
    tokens, hidden, intermediate = 1024, 256, 2048
    inputs, indices, grad = layer_inputs(
        ExpertShape(tokens, hidden, 512, 8), intermediate, "cuda", torch.bfloat16
    )
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def step():
        out = function_of(indices)(*leaves)
        return out, torch.autograd.grad(out, leaves, grad)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, grads = step()
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(tensor.nbytes for tensor in (out, *grads))
    product = 2 * tokens * intermediate
    assert peak < results + 3 * product


@on_devices
def test_consuming_backward(device):
    inputs, grad = mlp_inputs((2, 9), 100, 36, device, torch.float32)
    _, gate, up = ops.omni_mlp(*inputs, save_for_backward=True)
    for mask in itertools.product([False, True], repeat=4):
        want = ops._omni_mlp_backward(grad, *inputs, gate, up, "silu", mask)
        got = ops._omni_mlp_backward_consume(grad, *inputs, gate.clone(), up.clone(), "silu", mask)
        for name, one, other in zip("x gate up down".split(), got, want, strict=True):
            assert_bitwise(one, other, name)


@on_devices
def test_checkpointing(device, leaves_and_run):
    leaves, function, grad = leaves_and_run
    want = torch.autograd.grad(function(*leaves), leaves, grad)
    out = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(out, leaves, grad), want, strict=True):
        assert_bitwise(one, other)

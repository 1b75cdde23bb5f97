"""Atomic experts forward and backward against the fp64 oracle."""

import itertools

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    CUDA,
    GRADIENTS,
    ExpertShape,
    assert_bitwise,
    assert_close,
    expert_inputs,
    on_devices,
    on_dtypes,
    run,
    run_in_double,
    strided,
)

import omni_moe
from omni_moe import reference
from omni_moe.activations import ACTIVATION_FUNCTIONS

ops = torch.ops.omni_moe

SHAPES = [
    ExpertShape(0, 8, 4, 3),
    ExpertShape(1, 8, 1, 1),
    ExpertShape(1, 1024, 1024, 33),
    ExpertShape(37, 8, 16, 0),
    ExpertShape(37, 100, 36, 3),
    ExpertShape(37, 1000, 64, 16),
    ExpertShape(37, 1024, 289, 16),
    ExpertShape(37, 100, 12, 144),
    ExpertShape(199, 8, 16, 1),
    ExpertShape(199, 100, 2000, 5),
    ExpertShape(199, 1024, 64, 16),
    ExpertShape(3, 100, 1024, 512),
]


def check_against_oracle(inputs, indices, grad, activation="silu", op=None, oracle=None):
    op, oracle = op or omni_moe.ops.omni_expert, oracle or reference.omni_expert
    out, grads = run(lambda *args: op(*args, indices, activation), inputs, grad)
    want, want_grads = run_in_double(
        lambda *args: oracle(*args, indices.cpu(), activation), inputs, grad
    )
    assert out.dtype == inputs[0].dtype and out.is_contiguous()
    num_terms = longest_sum(inputs, indices)
    assert_close(out, want, "out", num_terms=num_terms)
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name, num_terms=num_terms)


def longest_sum(inputs, indices):
    """H products in a score, then the K experts of a token or all the pairs of one expert."""
    counts = indices.flatten().long().bincount()
    largest_count = counts.max().item() if counts.numel() else 0
    return inputs[0].shape[1] + max(indices.shape[1], largest_count)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_against_oracle(device, dtype, shape):
    check_against_oracle(*expert_inputs(shape, device, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_addend(device, dtype, shape):
    """The sum starts from the addend; its gradient is that of the output."""
    inputs, indices, grad = expert_inputs(shape, device, dtype)
    addend = torch.randn(grad.shape).to(device, dtype)
    out, grads = run(
        lambda *args: omni_moe.ops.omni_expert(*args[:4], indices, "silu", args[4]),
        (*inputs, addend),
        grad,
    )
    want, want_grads = run_in_double(
        lambda *args: reference.omni_expert(*args[:4], indices.cpu()) + args[4],
        (*inputs, addend),
        grad,
    )
    num_terms = longest_sum(inputs, indices)
    assert_close(out, want, "out", num_terms=num_terms)
    for name, got, want_grad in zip((*GRADIENTS, "grad_addend"), grads, want_grads, strict=True):
        assert_close(got, want_grad, name, num_terms=num_terms)
    assert_bitwise(grads[4], grad)


@on_devices
def test_gradient_of_the_addend_alone(device):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 3), device, torch.float32)
    addend = torch.randn(grad.shape, device=device, requires_grad=True)
    omni_moe.ops.omni_expert(*inputs, indices, "silu", addend).backward(grad)
    assert_bitwise(addend.grad, grad)


@on_devices
def test_a_constant_addend_leaves_the_gradients(device):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 3), device, torch.float32)
    addend = torch.randn(grad.shape, device=device)
    _, got = run(
        lambda *args: omni_moe.ops.omni_expert(*args, indices, "silu", addend), inputs, grad
    )
    _, want = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    for name, one, other in zip(GRADIENTS, got, want, strict=True):
        assert_bitwise(one, other, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_dtypes
def test_activations(device, dtype, activation):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, dtype)
    inputs[1] *= 3  # scores beyond the linear part of every activation
    check_against_oracle(inputs, indices, grad, activation)


@pytest.mark.parametrize("pattern", ["idle", "one", "duplicates"])
@pytest.mark.parametrize(
    "shape", [ExpertShape(199, 100, 36, 5), ExpertShape(37, 1024, 300, 16)], ids=str
)
@on_dtypes
def test_index_patterns(device, dtype, shape, pattern):
    check_against_oracle(*expert_inputs(shape, device, dtype, pattern))


@pytest.mark.parametrize("hidden_size", [1, 2, 3, 7, 31, 33, 65, 130, 257, 2056, 4100])
@on_dtypes
def test_odd_hidden_sizes(device, dtype, hidden_size):
    check_against_oracle(*expert_inputs(ExpertShape(9, hidden_size, 11, 4), device, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_dtypes
def test_save_for_backward(device, dtype, shape):
    """What the backward takes is hidden . up; the output is the same without it."""
    inputs, indices, _ = expert_inputs(shape, device, dtype)
    out, saved = ops.omni_expert(*inputs, indices, save_for_backward=True)
    alone, nothing = ops.omni_expert(*inputs, indices)
    assert_bitwise(out, alone)
    assert nothing.shape == (0,)
    hidden, up = inputs[0].cpu().double(), inputs[1].cpu().double()
    want = (hidden[:, None] * up[indices.cpu().long()]).sum(-1)
    assert saved.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(saved, want, "pre_activations", num_terms=shape.hidden_size)


@on_dtypes
def test_idle_experts_get_zero_gradients(device, dtype):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 50, 4), device, dtype, "idle")
    _, grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    idle = torch.ones(50, dtype=torch.bool, device=device)
    idle[indices.flatten()] = False
    assert idle.sum() > 30
    for weight_grad in grads[1:3]:
        assert (weight_grad[idle] == 0).all()
        assert (weight_grad[~idle] != 0).any(dim=1).all()


@on_dtypes
def test_no_experts_give_zeros(device, dtype):
    """K = 0: the empty sum, and zero gradients for everything."""
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 16, 0), device, dtype)
    out, grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    assert out.shape == (37, 100) and (out == 0).all()
    for got, like in zip(grads, inputs, strict=True):
        assert got.shape == like.shape and (got == 0).all()


@on_dtypes
def test_no_tokens_give_zero_gradients(device, dtype):
    inputs, indices, grad = expert_inputs(ExpertShape(0, 100, 16, 3), device, dtype)
    out, grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    assert out.shape == (0, 100)
    for got, like in zip(grads, inputs, strict=True):
        assert got.shape == like.shape and (got == 0).all()


@on_dtypes
def test_no_columns_give_zeros(device, dtype, deterministic_memory):
    """H = 0: products with rows are empty sums, as are the gradients of the routing weights."""
    inputs, indices, grad = expert_inputs(ExpertShape(37, 0, 16, 3), device, dtype)
    out, grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    assert out.shape == (37, 0)
    for got, like in zip(grads, inputs, strict=True):
        assert got.shape == like.shape and (got == 0).all()
    _, saved = ops.omni_expert(*inputs, indices, save_for_backward=True)
    assert saved.shape == (37, 3) and (saved == 0).all()


@on_dtypes
def test_int32_and_int64_indices_agree(device, dtype):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, dtype)
    want, want_grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    got, grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices.int()), inputs, grad)
    for one, other in zip([got, *grads], [want, *want_grads], strict=True):
        assert_bitwise(one, other)


@on_dtypes
def test_non_contiguous_inputs(device, dtype):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, dtype)
    want, want_grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    got, grads = run(
        lambda *args: omni_moe.ops.omni_expert(*args, strided(indices)),
        [strided(tensor) for tensor in inputs],
        strided(grad),
    )
    for one, other in zip([got, *grads], [want, *want_grads], strict=True):
        assert_bitwise(one, other)


@on_devices
def test_expanded_inputs(device):
    """One row for all tokens, and the gradient of a sum: strides of 0."""
    inputs, indices, _ = expert_inputs(ExpertShape(37, 100, 36, 5), device, torch.float32)
    row = inputs[0][:1].requires_grad_()
    omni_moe.ops.omni_expert(row.expand(37, 100), *inputs[1:], indices).sum().backward()
    got, row.grad = row.grad, None
    omni_moe.ops.omni_expert(row.repeat(37, 1), *inputs[1:], indices).backward(
        torch.ones(37, 100).to(device)
    )
    assert_bitwise(got, row.grad)


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([False, True], repeat=4) if any(w)], ids=str
)
@on_devices
def test_gradients_of_some_inputs(device, wanted):
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, torch.float32)
    _, want = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    leaves = [t.detach().requires_grad_(on) for t, on in zip(inputs, wanted, strict=True)]
    omni_moe.ops.omni_expert(*leaves, indices).backward(grad)
    for leaf, want_grad, on, name in zip(leaves, want, wanted, GRADIENTS, strict=True):
        assert (leaf.grad is not None) == on, name
        if on:
            assert_bitwise(leaf.grad, want_grad, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs, indices, _ = expert_inputs(ExpertShape(4, 5, 6, 3), "cpu", torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(
        lambda *args: omni_moe.ops.omni_expert(*args, indices, activation), inputs
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_dtypes
def test_non_finite_scores(device, dtype, activation):
    """NaN and infinite scores give what the reference gives, and only in their own tokens."""
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, dtype)
    clean, _ = run(lambda *args: omni_moe.ops.omni_expert(*args, indices, activation), inputs, grad)
    inputs[0][3] = float("nan")
    inputs[0][4, :] = 0
    inputs[0][4, 7] = float("inf")
    inputs[0][5, 9] = float("-inf")
    inputs[3][6, 2] = float("nan")
    inputs[3][7, 1] = float("inf")
    out, grads = run(
        lambda *args: omni_moe.ops.omni_expert(*args, indices, activation), inputs, grad
    )
    want, want_grads = run_in_double(
        lambda *args: reference.omni_expert(*args, indices.cpu(), activation), inputs, grad
    )
    assert_close(out, want, "out")
    untouched = torch.tensor([t for t in range(37) if t not in (3, 4, 5, 6, 7)], device=device)
    assert_bitwise(out[untouched], clean[untouched])
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@on_dtypes
def test_relu_hides_non_finite_routing_weights(device, dtype, value):
    """Where the score is negative its gradient is 0, as in autograd, not 0 * NaN."""
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, dtype)
    hidden, up, _, routing = inputs
    hidden.abs_().add_(1)
    up[7] = -up[7].abs()
    indices[3], indices[4, 1] = 7, 7
    routing[3], routing[4, 1] = value, value
    _, grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices, "relu"), inputs, grad)
    _, want_grads = run_in_double(
        lambda *args: reference.omni_expert(*args, indices.cpu(), "relu"), inputs, grad
    )
    assert (grads[0][3] == 0).all() and grads[0][4].isfinite().all()
    assert (grads[1][7] == 0).all()
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name)


@on_dtypes
def test_large_scores(device, dtype):
    """Scores of several hundred, past the range of exp in fp32."""
    inputs, indices, grad = expert_inputs(ExpertShape(37, 100, 36, 5), device, dtype)
    inputs[1] *= 300
    for activation in ACTIVATIONS:
        check_against_oracle(inputs, indices, grad, activation)


# ---- flash_expert, the older naming --------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@on_dtypes
def test_flash_expert(device, dtype, activation):
    """Its down_weights score and its up_weights project back."""
    (hidden, up, down, routing), indices, grad = expert_inputs(
        ExpertShape(37, 100, 36, 5), device, dtype
    )

    def flash(hidden, up, down, routing):
        return omni_moe.ops.flash_expert(hidden, up, down, indices, routing, activation)

    def oracle(hidden, up, down, routing):
        up_rows, down_rows = up[indices.cpu()], down[indices.cpu()]
        scores = (hidden[:, None, :] * up_rows).sum(-1)
        gates = ACTIVATION_FUNCTIONS[activation](scores) * routing
        return (gates[..., None] * down_rows).sum(1)

    out, grads = run(flash, (hidden, up, down, routing), grad)
    want, want_grads = run_in_double(oracle, (hidden, up, down, routing), grad)
    assert_close(out, want, "out")
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        assert_close(got, want_grad, name)

    assert_bitwise(
        reference.flash_expert(hidden, up, down, indices, routing, activation),
        reference.omni_expert(hidden, up, down, routing, indices, activation),
    )


@on_devices
def test_python_functions(device):
    """The typed functions hand everything on to the ops."""
    (hidden, up, down, routing), indices, _ = expert_inputs(
        ExpertShape(37, 100, 36, 5), device, torch.float32
    )
    want, _ = ops.omni_expert(hidden, up, down, routing, indices, "gelu")
    got = omni_moe.ops.omni_expert(hidden, up, down, routing, indices, activation="gelu")
    assert_bitwise(got, want)
    got = omni_moe.ops.flash_expert(hidden, up, down, indices, routing, activation="gelu")
    assert_bitwise(got, want)
    assert not torch.equal(want, omni_moe.ops.omni_expert(hidden, up, down, routing, indices))
    got = omni_moe.ops.omni_expert(hidden, up, down, routing, indices, addend=hidden)
    assert_bitwise(got, ops.omni_expert(hidden, up, down, routing, indices, "silu", hidden)[0])
    assert not torch.equal(got, omni_moe.ops.omni_expert(hidden, up, down, routing, indices))


# ---- past 2^31 elements --------------------------------------------------------------------------


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as meminfo:
        facts = dict(line.split(":") for line in meminfo)
    return int(facts["MemAvailable"].split()[0]) * 1024


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_weights_past_2_to_the_31_elements(device):
    """Row offsets of the last experts do not fit in 32 bits."""
    if _free_bytes(device) < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory")
    hidden_size, num_experts = 8192, 2**18 + 640
    assert hidden_size * num_experts > 2**31
    options = {"dtype": torch.bfloat16, "device": device}
    # Zeros but for the last rows: what is read and written there is seen.
    up, down = (torch.zeros(num_experts, hidden_size, **options) for _ in range(2))
    up[-640:] = torch.randn(640, hidden_size, **options) / hidden_size**0.5
    down[-640:] = torch.randn(640, hidden_size, **options) / hidden_size**0.5
    hidden = torch.randn(8, hidden_size, **options)
    routing = torch.rand(8, 5, **options)
    grad = torch.randn(8, hidden_size, **options)
    small_indices = torch.randint(640, (8, 5), device=device)
    indices = small_indices + num_experts - 640

    _, small = run(
        lambda *args: omni_moe.ops.omni_expert(*args, small_indices),
        (hidden, up[-640:], down[-640:], routing),
        grad,
    )
    _, grads = run(
        lambda *args: omni_moe.ops.omni_expert(*args, indices), (hidden, up, down, routing), grad
    )
    for got, want in zip(grads, small, strict=True):
        rows = got[-640:] if got.shape[0] == num_experts else got
        assert_close(rows, want.double())
        if got.shape[0] == num_experts:
            assert not got[:-640].any()


# Named after the strategies that these shapes are for on a Hopper: every row, every pair and every
# tile of the tables is in reach.
@pytest.mark.parametrize(
    ("hidden_size", "num_experts"),
    [
        pytest.param(1024, 2_100_000, id="l2_tiled"),
        pytest.param(1024, 2_200_000, id="fused"),
        pytest.param(1001, 2_200_000, id="two_phase"),
    ],
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("device", [CUDA])
def test_pairs_and_weights_past_2_to_the_31_elements(device, hidden_size, num_experts, index_dtype):
    """T K H and E H: some experts and all tokens that chose them, against the oracle."""
    if _free_bytes(device) < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    num_tokens, k = 33_600, 64
    assert min(num_tokens * k, num_experts) * hidden_size > 2**31
    options = {"dtype": torch.bfloat16, "device": device}
    hidden = torch.randn(num_tokens, hidden_size, **options)
    up, down = (
        torch.randn(num_experts, hidden_size, **options).mul_(hidden_size**-0.5) for _ in range(2)
    )
    routing = torch.rand(num_tokens, k, **options)
    grad = torch.randn(num_tokens, hidden_size, **options)
    indices = torch.randint(num_experts, (num_tokens, k), device=device, dtype=index_dtype)
    out, grads = run(
        lambda *args: omni_moe.ops.omni_expert(*args, indices), (hidden, up, down, routing), grad
    )

    chosen = indices.flatten().long().bincount(minlength=num_experts).bool()
    used, idle = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
    # The experts with the largest ids, and those of the last and of the first pairs.
    experts = torch.cat([used[-8:], indices[-1, -4:].long(), indices[0, :4].long()]).unique()
    tokens = torch.isin(indices, experts).any(dim=1).nonzero().flatten()
    rows, ids = indices[tokens].long().unique(return_inverse=True)
    sample = (hidden[tokens], up[rows], down[rows], routing[tokens])
    want, want_grads = run_in_double(
        lambda *args: reference.omni_expert(*args, ids.cpu()), sample, grad[tokens]
    )
    num_terms = hidden_size + k
    assert_close(out[tokens], want, "out", num_terms=num_terms)
    here = torch.searchsorted(rows, experts).cpu()
    for name, got, want_grad in zip(GRADIENTS, grads, want_grads, strict=True):
        is_table = got.shape[0] == num_experts
        got, want_grad = (got[experts], want_grad[here]) if is_table else (got[tokens], want_grad)
        assert_close(got, want_grad, name, num_terms=num_terms)
        if is_table:
            assert not grads[GRADIENTS.index(name)][idle[-8:]].any()

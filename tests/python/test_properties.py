"""Properties that hold for any input, on inputs that hypothesis makes up."""

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ExpertShape,
    assert_bitwise,
    assert_close,
    brute_force_router,
    expert_inputs,
    on_devices,
    run,
)
from hypothesis import given
from hypothesis import strategies as st

import omni_moe

ops = torch.ops.omni_moe

# Few values, close together and far apart: sums tie, collapse and cancel often.
ULP = 2.0**-23
FINITE = [-(2.0**15), -1.0, -0.5, -0.0, 0.0, ULP / 8, ULP, 0.5, 1.0, 1.0 + ULP, 3.0, 2.0**15]
ANY = [*FINITE, float("nan"), float("inf"), float("-inf")]


@st.composite
def logit_pairs(draw, values):
    """(x, y, K) on the CPU, in any dtype."""
    num_tokens, num_rows, num_cols = (draw(st.integers(1, most)) for most in (3, 12, 12))
    k = draw(st.integers(0, num_rows * num_cols))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))

    def logits(size):
        one_token = st.lists(st.sampled_from(values), min_size=size, max_size=size)
        rows = st.lists(one_token, min_size=num_tokens, max_size=num_tokens)
        return torch.tensor(draw(rows), dtype=torch.float64).to(dtype)

    return logits(num_rows), logits(num_cols), k


def to_device(tensor, device):
    no_kernel = device == "cuda" and tensor.dtype == torch.float64
    return tensor.to(device, torch.float32 if no_kernel else tensor.dtype)


@pytest.mark.parametrize("values", [FINITE, ANY], ids=["finite", "any"])
@on_devices
def test_router_is_the_sorted_grid(device, values):
    @given(logit_pairs(values))
    def check(case):
        x, y, k = case
        x, y = to_device(x, device), to_device(y, device)
        scores, indices = ops.omni_router(x, y, k)
        want_scores, want_indices = brute_force_router(x, y, k)
        assert_bitwise(indices.cpu(), want_indices, "indices")
        assert_bitwise(scores.cpu(), want_scores, "scores")

    check()


@on_devices
def test_router_orders_scores_and_ties(device):
    @given(logit_pairs(FINITE))
    def check(case):
        x, y, k = case
        x, y = to_device(x, device), to_device(y, device)
        _, indices = ops.omni_router(x, y, k)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows, cols = indices.long() // y.shape[1], indices.long() % y.shape[1]
        sums = x.to(wide).gather(1, rows) + y.to(wide).gather(1, cols)
        assert (sums.diff(dim=1) <= 0).all()
        tied = sums.diff(dim=1) == 0
        assert (indices.diff(dim=1)[tied] > 0).all()
        for chosen in indices.tolist():
            assert len(set(chosen)) == k
            assert all(0 <= i < x.shape[1] * y.shape[1] for i in chosen)

    check()


@on_devices
def test_router_of_fewer_is_a_prefix(device):
    @given(logit_pairs(FINITE))
    def check(case):
        x, y, k = case
        x, y = to_device(x, device), to_device(y, device)
        scores, indices = ops.omni_router(x, y, k)
        for fewer in {k // 2, max(k - 1, 0)}:
            fewer_scores, fewer_indices = ops.omni_router(x, y, fewer)
            assert_bitwise(fewer_indices, indices[:, :fewer].contiguous())
            assert_bitwise(fewer_scores, scores[:, :fewer].contiguous())

    check()


@on_devices
def test_router_choice_does_not_depend_on_the_softmax(device):
    @given(logit_pairs(FINITE), st.booleans())
    def check(case, norm_topk_prob):
        x, y, k = case
        x, y = to_device(x, device), to_device(y, device)
        _, indices = ops.omni_router(x, y, k)
        weights, softmax_indices = ops.omni_softmax_router(x, y, k, norm_topk_prob)
        assert_bitwise(softmax_indices, indices)
        assert (weights.diff(dim=1) <= 0).all() and (weights >= 0).all()

    check()


# ---- experts -------------------------------------------------------------------------------------

expert_cases = st.builds(
    ExpertShape, st.integers(1, 9), st.integers(1, 70), st.integers(1, 12), st.integers(1, 9)
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
activations = st.sampled_from(ACTIVATIONS)
seeds = st.integers(0, 2**32 - 1)


def run_expert(inputs, indices, grad, activation):
    return run(lambda *args: omni_moe.ops.omni_expert(*args, indices, activation), inputs, grad)


@on_devices
def test_permuting_experts_permutes_their_gradients(device):
    @given(expert_cases, dtypes, activations, seeds)
    def check(shape, dtype, activation, seed):
        torch.manual_seed(seed)
        inputs, indices, grad = expert_inputs(shape, device, dtype)
        order = torch.randperm(shape.num_experts, device=device)
        new_id = order.argsort()
        hidden, up, down, routing = inputs
        out, grads = run_expert(inputs, indices, grad, activation)
        moved = [hidden, up[order], down[order], routing]
        moved_out, moved_grads = run_expert(moved, new_id[indices], grad, activation)
        assert_bitwise(moved_out, out)
        want = [grads[0], grads[1][order], grads[2][order], grads[3]]
        for got, want_grad in zip(moved_grads, want, strict=True):
            assert_bitwise(got, want_grad)

    check()


@on_devices
def test_permuting_tokens_permutes_their_results(device):
    @given(expert_cases, dtypes, activations, seeds)
    def check(shape, dtype, activation, seed):
        torch.manual_seed(seed)
        (hidden, up, down, routing), indices, grad = expert_inputs(shape, device, dtype)
        order = torch.randperm(shape.num_tokens, device=device)
        out, grads = run_expert((hidden, up, down, routing), indices, grad, activation)
        moved = (hidden[order], up, down, routing[order])
        moved_out, moved_grads = run_expert(moved, indices[order], grad[order], activation)
        assert_bitwise(moved_out, out[order])
        assert_bitwise(moved_grads[0], grads[0][order])
        assert_bitwise(moved_grads[3], grads[3][order])

    check()


@on_devices
def test_duplicates_add_up(device):
    @given(expert_cases, activations, seeds)
    def check(shape, activation, seed):
        """An expert chosen n times with weight w is one chosen once with weight n * w."""
        torch.manual_seed(seed)
        (hidden, up, down, routing), _, grad = expert_inputs(shape, device, torch.float32)
        once = torch.randint(shape.num_experts, (shape.num_tokens, 1), device=device)
        many = once.expand(-1, shape.num_experts_per_token)
        weight = routing[:, :1]
        out, grads = run_expert((hidden, up, down, weight.expand_as(many)), many, grad, activation)
        num_copies = shape.num_experts_per_token
        want, want_grads = run_expert(
            (hidden, up, down, weight * num_copies), once, grad, activation
        )
        assert_close(out, want.double(), num_terms=400)
        for got, want_grad in zip(grads[:3], want_grads[:3], strict=True):
            assert_close(got, want_grad.double(), num_terms=400)
        assert_close(grads[3], want_grads[3].double().expand_as(many), num_terms=400)

    check()


@on_devices
def test_routing_weights_of_zero_add_nothing(device):
    @given(expert_cases, dtypes, activations, seeds)
    def check(shape, dtype, activation, seed):
        torch.manual_seed(seed)
        (hidden, up, down, routing), indices, grad = expert_inputs(shape, device, dtype)
        kept = shape.num_experts_per_token // 2
        routing[:, kept:] = 0
        out, grads = run_expert((hidden, up, down, routing), indices, grad, activation)
        want, want_grads = run_expert(
            (hidden, up, down, routing[:, :kept]), indices[:, :kept], grad, activation
        )
        assert_close(out, want.double(), num_terms=400)
        for got, want_grad in zip(grads[:3], want_grads[:3], strict=True):
            assert_close(got, want_grad.double(), num_terms=400)
        assert_close(grads[3][:, :kept], want_grads[3].double(), num_terms=400)

    check()

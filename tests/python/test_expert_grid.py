"""Experts on a grid: the same results, whatever a plan makes of rows and columns."""

import pytest
import torch
from helpers import (
    GRADIENTS,
    ExpertShape,
    assert_bitwise,
    assert_close,
    expert_inputs,
    needs_gpu,
    on_dtypes,
    random_logits,
    run,
)

import omni_moe

ops = torch.ops.omni_moe
GRID_SHAPES = [(37, 64, 5, 7, 12), (199, 256, 64, 48, 300), (0, 64, 8, 8, 4)]


def routed_inputs(num_tokens, hidden_size, num_rows, num_cols, k, device, dtype):
    """Inputs of the experts with the choice of a router."""
    shape = ExpertShape(num_tokens, hidden_size, num_rows * num_cols, k)
    (hidden, up, down, _), _, grad = expert_inputs(shape, device, dtype)
    logits = random_logits((num_tokens, num_rows, num_cols), device, dtype)
    routing, indices = ops.omni_softmax_router(*logits, k, True)
    return [hidden, up, down, routing], indices, grad


@pytest.mark.parametrize("shape", GRID_SHAPES, ids=str)
@on_dtypes
def test_a_grid_says_nothing_about_the_result(device, dtype, shape):
    inputs, indices, grad = routed_inputs(*shape, device, dtype)
    want, want_grads = run(lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad)
    got, grads = run(
        lambda *args: omni_moe.ops.omni_expert(*args, indices, num_cols=shape[3]), inputs, grad
    )
    for one, other in zip([got, *grads], [want, *want_grads], strict=True):
        roundings = 3 if dtype in (torch.float16, torch.bfloat16) else 0
        assert_close(one, other.double(), num_terms=shape[4], intermediate_roundings=roundings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@needs_gpu
def test_many_experts_per_token_on_a_grid(dtype):
    """Where the plan takes whole rows and columns of the grid, if the GPU has these kernels."""
    num_tokens, hidden_size, num_rows, num_cols, k = shape = (1024, 1024, 320, 320, 4096)
    sizes = {"num_tokens": num_tokens, "hidden_size": hidden_size, "num_experts_per_token": k}
    plans = omni_moe.plan(
        "omni_expert", **sizes, num_experts=num_rows * num_cols, num_cols=num_cols, dtype=dtype
    )
    if plans["expert_forward"]["strategy"] != "bands":
        pytest.skip("the plan takes another strategy on this GPU")
    inputs, indices, grad = routed_inputs(*shape, "cuda", dtype)

    def on_grid(*args):
        return omni_moe.ops.omni_expert(*args, indices, num_cols=num_cols)

    got, grads = run(on_grid, inputs, grad)
    again, grads_again = run(on_grid, inputs, grad)
    wide = [tensor.double() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in wide]
    dots = leaves[0] @ leaves[1].T
    weights = torch.zeros_like(dots).scatter(1, indices.long(), leaves[3])
    want = (torch.nn.functional.silu(dots) * weights) @ leaves[2]
    want_grads = torch.autograd.grad(want, leaves, grad.double())
    for name, one, other, other_again in zip(
        ("out", *GRADIENTS), [got, *grads], [want, *want_grads], [again, *grads_again], strict=True
    ):
        assert_bitwise(one, other_again, name)
        assert_close(one, other.detach(), name, num_terms=k, intermediate_roundings=3)

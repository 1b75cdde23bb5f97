"""Autocast, inference mode, checkpointing, repeatability, and no trace left on the inputs."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import (
    ExpertShape,
    assert_bitwise,
    expert_inputs,
    mlp_inputs,
    on_devices,
    on_dtypes,
    random_logits,
    run,
)
from torch.utils.checkpoint import checkpoint

import omni_moe

ops = torch.ops.omni_moe


def cases(device, dtype=torch.float32):
    """{name: (function of floating-point inputs, inputs, output gradient)}."""
    logits = random_logits((67, 12, 20), device, dtype)
    grad_scores = torch.randn(67, 19).to(device, dtype)
    topk_logits = [torch.randn(67, 60).to(device, dtype)]
    grad_topk = torch.randn(67, 7).to(device, dtype)
    experts, indices, grad_expert = expert_inputs(ExpertShape(67, 100, 40, 7), device, dtype)
    mlp, grad_mlp = mlp_inputs((67,), 100, 52, device, dtype)
    maps = omni_moe.ops.omni_expert_rows(indices, 40)
    return {
        "omni_router": (lambda x, y: ops.omni_router(x, y, 19)[0], logits, grad_scores),
        "omni_softmax_router": (
            lambda x, y: ops.omni_softmax_router(x, y, 19)[0],
            logits,
            grad_scores,
        ),
        "omni_softmax_router-norm": (
            lambda x, y: ops.omni_softmax_router(x, y, 19, True)[0],
            logits,
            grad_scores,
        ),
        "omni_topk_router": (
            lambda x: omni_moe.ops.omni_topk_router(x, 7)[0],
            topk_logits,
            grad_topk,
        ),
        "omni_topk_router-groups": (
            lambda x: omni_moe.ops.omni_topk_router(
                x, 7, scoring_func="sigmoid", norm_topk_prob=True, n_group=6, topk_group=3
            )[0],
            topk_logits,
            grad_topk,
        ),
        "omni_permute": (
            lambda x: omni_moe.ops.omni_permute(x, *maps, 469),
            topk_logits,
            torch.randn(469, 60).to(device, dtype),
        ),
        "omni_unpermute": (
            lambda x, w: omni_moe.ops.omni_unpermute(x, *maps, w),
            [torch.randn(469, 60).to(device, dtype), torch.rand(67, 7).to(device, dtype)],
            torch.randn(67, 60).to(device, dtype),
        ),
        "omni_expert": (
            lambda *args: omni_moe.ops.omni_expert(*args, indices),
            experts,
            grad_expert,
        ),
        "flash_expert": (
            lambda *args: omni_moe.ops.flash_expert(*args[:3], indices, args[3]),
            experts,
            grad_expert,
        ),
        "omni_mlp": (lambda *args: omni_moe.ops.omni_mlp(*args), mlp, grad_mlp),
        "omni_expert_mlp": (
            lambda *args: omni_moe.ops.omni_expert_mlp(*args[:4], indices, *args[4:]),
            [*experts, *mlp[1:]],
            grad_expert,
        ),
    }


on_cases = pytest.mark.parametrize(
    "case",
    [
        "omni_router",
        "omni_softmax_router",
        "omni_softmax_router-norm",
        "omni_topk_router",
        "omni_topk_router-groups",
        "omni_permute",
        "omni_unpermute",
        "omni_expert",
        "flash_expert",
        "omni_mlp",
        "omni_expert_mlp",
    ],
)


def assert_same_run(got, want):
    assert_bitwise(got[0], want[0], "out")
    for i, (grad, want_grad) in enumerate(zip(got[1], want[1], strict=True)):
        assert_bitwise(grad, want_grad, f"gradient {i}")


# ---- repeatability -------------------------------------------------------------------------------


@on_cases
@on_dtypes
def test_repeats_bitwise(device, dtype, case):
    function, inputs, grad = cases(device, dtype)[case]
    first = run(function, inputs, grad)
    for _ in range(3):
        assert_same_run(run(function, inputs, grad), first)


@on_cases
@on_dtypes
def test_uninitialised_memory_does_not_show(device, dtype, case, deterministic_memory):
    """Every output and workspace starts as NaN or as the largest integer."""
    function, inputs, grad = cases(device, dtype)[case]
    poisoned = run(function, inputs, grad)
    torch.use_deterministic_algorithms(False)
    assert_same_run(run(function, inputs, grad), poisoned)


def test_uninitialised_memory_is_poisoned(deterministic_memory):
    """What the test above relies on."""
    assert torch.empty(100).isnan().all()
    assert (torch.empty(100, dtype=torch.uint8) == 255).all()


@on_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_show(dtype, case):
    function, inputs, grad = cases("cpu", dtype)[case]
    if "mlp" in case:
        pytest.skip("its matrix products are the BLAS library's")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(function, inputs, grad)
        for count in (2, 5):
            torch.set_num_threads(count)
            assert torch.get_num_threads() == count
            assert_same_run(run(function, inputs, grad), want)
    finally:
        torch.set_num_threads(threads)


@on_cases
@on_dtypes
def test_inputs_are_not_written(device, dtype, case):
    function, inputs, grad = cases(device, dtype)[case]
    before = copy.deepcopy(inputs), grad.clone()
    versions = [tensor._version for tensor in inputs]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    function(*leaves).backward(grad)
    assert [tensor._version for tensor in inputs] == versions
    for tensor, copied in zip(inputs, before[0], strict=True):
        assert_bitwise(tensor, copied)
    assert_bitwise(grad, before[1])


# ---- inference mode, checkpointing, autocast -----------------------------------------------------


@on_cases
@on_devices
def test_inference_mode(device, case):
    function, inputs, _ = cases(device)[case]
    want = function(*inputs)
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.inference_mode():
        out = function(*inputs)
        assert out.is_inference() and not out.requires_grad
        assert_bitwise(out.clone(), want)
    with torch.no_grad():
        out = function(*inputs)
        assert not out.requires_grad
        assert_bitwise(out, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_cases
@on_devices
def test_activation_checkpointing(device, case, use_reentrant):
    function, inputs, grad = cases(device)[case]
    got = run_checkpointed(function, inputs, grad, use_reentrant)
    assert_same_run(got, run(function, inputs, grad))


def run_checkpointed(function, inputs, grad, use_reentrant):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = checkpoint(function, *leaves, use_reentrant=use_reentrant)
    out.backward(grad)
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("case", ["omni_expert", "flash_expert", "omni_mlp", "omni_expert_mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_devices
def test_autocast_of_experts_and_mlp(device, dtype, case):
    """They run in the autocast dtype; gradients arrive in the dtype of the inputs."""
    function, inputs, _ = cases(device)[case]
    want, want_grads = run(
        function, [t.to(dtype) for t in inputs], torch.ones(67, 100, dtype=dtype, device=device)
    )
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.autocast(device, dtype=dtype):
        out = function(*leaves)
    out.sum().backward()
    assert_bitwise(out, want)
    for leaf, want_grad in zip(leaves, want_grads, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert_bitwise(leaf.grad, want_grad.float())


@pytest.mark.parametrize("retain_graph", [False, True])
@on_cases
@on_devices
def test_backward_under_another_autocast(device, case, retain_graph):
    """It computes in the dtypes of its forward."""
    function, inputs, grad = cases(device)[case]
    for forward_dtype in (None, torch.float16):
        for wanted in (slice(None), slice(1), slice(1, None)):  # all, the first, all others
            if not inputs[wanted]:
                continue
            results = []
            for backward_dtype in (forward_dtype, torch.bfloat16):
                leaves = [tensor.detach().clone() for tensor in inputs]
                for leaf in leaves[wanted]:
                    leaf.requires_grad_()
                with torch.autocast(device, forward_dtype, enabled=forward_dtype is not None):
                    out = function(*leaves)
                with torch.autocast(device, backward_dtype, enabled=backward_dtype is not None):
                    grads = torch.autograd.grad(
                        out, leaves[wanted], grad.to(out.dtype), retain_graph=retain_graph
                    )
                results.append((out, grads))
            assert_same_run(*results)


@pytest.mark.parametrize("case", ["omni_router", "omni_softmax_router", "omni_softmax_router-norm"])
@on_devices
def test_autocast_leaves_routers_in_their_dtype(device, case):
    function, inputs, grad = cases(device)[case]
    want = run(function, inputs, grad)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(function, inputs, grad)
    assert_same_run(got, want)


@pytest.mark.parametrize("op", ["omni_router", "omni_softmax_router"])
@on_devices
def test_autocast_brings_both_logits_to_the_wider_dtype(device, op):
    x, y = random_logits((67, 12, 20), device, torch.float32)
    route = getattr(ops, op)
    for x_dtype, y_dtype, wide in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ):
        mixed = x.to(x_dtype), y.to(y_dtype)
        with torch.autocast(device, dtype=torch.bfloat16):
            scores, indices = route(*mixed, 19)
        want_scores, want_indices = route(*(tensor.to(wide) for tensor in mixed), 19)
        assert scores.dtype == wide
        assert_bitwise(scores, want_scores)
        assert_bitwise(indices, want_indices)


# ---- forward-mode gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("has_grad", [False, True])
@on_cases
@on_devices
def test_forward_mode_raises(device, case, has_grad):
    """No tangent goes missing in silence."""
    function, inputs, _ = cases(device)[case]
    for i, value in enumerate(inputs):
        with torch.set_grad_enabled(has_grad), forward_ad.dual_level():
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                function(*inputs[:i], dual, *inputs[i + 1 :])

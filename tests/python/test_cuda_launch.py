"""Launches that fail, or find less of the device than there is."""

import threading

import pytest
import torch
from helpers import assert_bitwise, assert_close, needs_gpu, run
from launch_testing import failing_launches, needs_launch_testing
from test_cuda_modes import BF16, CASES, assert_same_run

ops = torch.ops.omni_moe
pytestmark = needs_gpu


@needs_launch_testing
@pytest.mark.parametrize(
    "case",
    [name for name in CASES if name.startswith(("router", "softmax_router", "topk", "expert_s"))],
)
def test_a_failed_launch_is_reported_once(case):
    """By the call that failed, not by the next one that works."""
    function, inputs, grad = CASES[case]("cuda")
    want = run(function, inputs, grad)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.cuda.stream(torch.cuda.Stream()):
        run(function, inputs, grad)  # memory of this stream, which cannot be had while it fails
        out = function(*leaves)
        torch.cuda.synchronize()
        with failing_launches(), pytest.raises(RuntimeError, match=r"launch failed.*capture"):
            function(*leaves)
        assert_same_run(run(function, inputs, grad), want)
        with failing_launches(), pytest.raises(RuntimeError, match="during capture"):
            torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert_same_run((out.detach(), torch.autograd.grad(out, leaves, grad)), want)


def green_context(num_sms):
    green_contexts = pytest.importorskip("torch.cuda.green_contexts")
    try:
        return green_contexts.GreenContext.create(num_sms=num_sms)
    except RuntimeError as error:
        pytest.skip(f"no green contexts: {error}")


@pytest.mark.parametrize("num_sms", [8, 64])
@pytest.mark.parametrize("num_tokens", [67, 4096])
def test_batch_statistics_on_a_part_of_the_device(num_tokens, num_sms):
    """Barriers of the grid need all blocks at once: fewer of them, or other kernels."""
    context = green_context(num_sms)
    x, gates = torch.randn(num_tokens, 64), torch.randn(2, 64, 64) / 8
    on_gpu = [tensor.to("cuda", BF16) for tensor in (x, *gates)]
    grads = torch.randn(2, num_tokens, 64).to("cuda", BF16)

    def forward_and_backward():
        *normed, inv_std = ops.omni_router_logits(*on_gpu, [], 0.1, 1e-5)
        saved = (*on_gpu, *normed, inv_std)
        # Not by autograd: its threads know nothing of this context.
        grad_x, _ = ops._omni_router_logits_backward(*grads, *saved, True, [True, False])
        return *normed, grad_x

    forward_and_backward()
    torch.cuda.synchronize()
    context.set_context()
    try:
        got = forward_and_backward()
        torch.cuda.synchronize()
    finally:
        context.pop_context()
    x, *gates = (tensor.cpu().double() for tensor in on_gpu)
    x.requires_grad_()
    want = [torch.nn.functional.batch_norm(x @ g.T, None, None, training=True) for g in gates]
    (grad_x,) = torch.autograd.grad(want, [x], list(grads.cpu().double()))
    # Where the products are made apart from their statistics, they are rounded between.
    for result, expected in zip(got, [*want, grad_x], strict=True):
        assert_close(result, expected.detach(), num_terms=128, intermediate_roundings=3, terms=4)


def test_shared_memory_of_other_threads():
    """A kernel's limit is of the device, not of whoever launched last."""

    def backward(rows, results):
        logits = [torch.randn(8, n, device="cuda", requires_grad=True) for n in (rows, 700)]
        for _ in range(300):
            scores, _ = ops.omni_softmax_router(*logits, 4)
            results.append(torch.autograd.grad(scores.sum(), logits))

    errors = []

    def guarded(*args):
        try:
            backward(*args)
        except Exception as error:
            errors.append(error)

    results = ([], [])
    threads = [
        threading.Thread(target=guarded, args=(rows, kept))
        for rows, kept in zip((3000, 4000), results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for kept in results:
        assert len(kept) == 300
        for grads in kept:
            for grad, first in zip(grads, kept[0], strict=True):
                assert_bitwise(grad, first)

"""Losses of the router's choice, and counters: values, gradients, autocast, compilation."""

import pytest
import torch
from helpers import (
    CUDA,
    ExpertShape,
    assert_bitwise,
    assert_close,
    choose_experts,
    on_devices,
    random_logits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from omni_moe import load_balancing_loss, router_z_loss
from omni_moe.losses import add_expert_counts

H, E, K = 24, 48, 5
SHAPES = [(1, 1, 1, 1), (37, 6, 8, 5), (199, 24, 2, 48), (67, 64, 48, 16)]  # T, R, C, K


def naive_load_balancing_loss(x, y, indices):
    """From all T * E probabilities, counting choice by choice."""
    probs = (x.softmax(-1).unsqueeze(2) * y.softmax(-1).unsqueeze(1)).flatten(1)
    counts = torch.zeros(probs.shape[1], dtype=torch.float64)
    for i in indices.flatten().tolist():
        counts[i] += 1
    return probs.shape[1] * (counts / indices.numel() * probs.mean(0)).sum()


def naive_router_z_loss(x, y):
    scores = (x.unsqueeze(2) + y.unsqueeze(1)).flatten(1)
    return scores.logsumexp(-1).square().mean()


def loss_and_gradients(loss, x, y):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, y)]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_against_all_probabilities(device, dtype, shape):
    num_tokens, num_rows, num_cols, k = shape
    x, y = random_logits(shape[:3], device, dtype, scale=2)
    chosen = ExpertShape(num_tokens, H, num_rows * num_cols, k)
    for indices in (choose_experts(chosen), choose_experts(chosen, "one").int()):
        ids = indices.to(device)
        for loss, naive in (
            (
                lambda x, y, ids=ids: load_balancing_loss(x, y, ids),
                lambda x, y, ids=indices: naive_load_balancing_loss(x, y, ids),
            ),
            (router_z_loss, naive_router_z_loss),
        ):
            got, grads = loss_and_gradients(loss, x, y)
            want, want_grads = loss_and_gradients(naive, x.cpu().double(), y.cpu().double())
            assert got.shape == () and got.device == x.device
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            slack = {"num_terms": num_tokens * num_cols, "accumulation_factor": 4}
            assert_close(got, want, **slack)
            for grad, want_grad in zip(grads, want_grads, strict=True):
                assert grad.dtype == dtype
                # A softmax's gradient is a difference of terms of the size of the loss.
                terms = want.sqrt().item() * max(1, want.sqrt().item()) / num_tokens
                assert_close(grad, want_grad, "gradient", terms=terms, **slack)


@pytest.mark.parametrize("k", [1, K, E])
@on_devices
def test_even_load_costs_one(device, k):
    """Even probabilities or even choices: 1 whatever the other."""
    num_tokens = E
    ids = torch.arange(num_tokens * k, device=device).view(num_tokens, k) % E
    even = torch.zeros(num_tokens, 6, device=device), torch.zeros(num_tokens, 8, device=device)
    assert load_balancing_loss(*even, ids).item() == pytest.approx(1, rel=1e-6)
    assert load_balancing_loss(*even, ids.fill_(3)).item() == pytest.approx(1, rel=1e-6)
    x, y = random_logits((num_tokens, 6, 8), device, torch.float32)
    ids = torch.arange(num_tokens * k, device=device).view(num_tokens, k) % E
    assert load_balancing_loss(x, y, ids).item() == pytest.approx(1, rel=1e-5)


def test_one_expert_for_all_costs_most():
    x, y = torch.zeros(37, 6), torch.zeros(37, 8)
    x[:, 2], y[:, 5] = 100, 100
    loss = load_balancing_loss(x, y, torch.full((37, 1), 2 * 8 + 5))
    assert loss.item() == pytest.approx(E, rel=1e-6)


@pytest.mark.parametrize("k", [0, 3])
@on_devices
def test_no_tokens(device, k):
    leaves = [torch.randn(0, size, device=device, requires_grad=True) for size in (6, 8)]
    ids = torch.zeros(0, k, dtype=torch.int32, device=device)
    loss = load_balancing_loss(*leaves, ids) + router_z_loss(*leaves)
    assert loss.item() == 0
    loss.backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_no_choices():
    x, y = (tensor.requires_grad_() for tensor in random_logits((5, 6, 8), "cpu", torch.float32))
    loss = load_balancing_loss(x, y, torch.zeros(5, 0, dtype=torch.int32))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not y.grad.any()


@on_devices
def test_losses_repeat_bitwise(device):
    x, y = random_logits((199, 64, 48), device, torch.float32)
    ids = choose_experts(ExpertShape(199, H, 64 * 48, 16)).int().to(device)

    def both(x, y):
        return load_balancing_loss(x, y, ids) + router_z_loss(x, y)

    first, grads = loss_and_gradients(both, x, y)
    for _ in range(3):
        again, same_grads = loss_and_gradients(both, x, y)
        assert_bitwise(again, first)
        for grad, same in zip(grads, same_grads, strict=True):
            assert_bitwise(same, grad)


def test_wrong_inputs():
    x, y, ids = torch.randn(5, 6), torch.randn(5, 8), torch.zeros(5, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"router_logits_x: expected floating point of two dim"):
        load_balancing_loss(x[0], y, ids)
    with pytest.raises(ValueError, match=r"router_logits_y: expected floating point of two dim"):
        router_z_loss(x, y.int())
    with pytest.raises(ValueError, match=r"router_logits_y: expected as many rows .* 5, got 4"):
        router_z_loss(x, y[:4])
    with pytest.raises(ValueError, match=r"indices: expected shape \(T, K\) with T = 5, got \(4,"):
        load_balancing_loss(x, y, ids[:4])
    with pytest.raises(ValueError, match="indices: expected int32 or int64, got"):
        load_balancing_loss(x, y, ids.float())
    for bad in (-1, 48):
        with pytest.raises(IndexError):
            load_balancing_loss(x, y, torch.full_like(ids, bad))


# ---- autocast, compile ---------------------------------------------------------------------------


@on_devices
def test_autocast_leaves_the_losses_in_fp32(device):
    x, y = random_logits((67, 12, 20), device, torch.float32)
    ids = choose_experts(ExpertShape(67, H, 240, 5)).to(device)

    def both(x, y):
        return load_balancing_loss(x, y, ids) + router_z_loss(x, y)

    want, want_grads = loss_and_gradients(both, x, y)

    def both_under_autocast(x, y):
        with torch.autocast(device, dtype=torch.bfloat16):
            return both(x, y)

    got, grads = loss_and_gradients(both_under_autocast, x, y)
    assert_bitwise(got, want)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert_bitwise(grad, want_grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@on_devices
def test_compiled_losses(device, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x, y, ids):
        return load_balancing_loss(x, y, ids) + router_z_loss(x, y)

    for num_tokens in (37, 50, 11):
        x, y = random_logits((num_tokens, 6, 8), device, torch.float32)
        ids = choose_experts(ExpertShape(num_tokens, H, E, K)).int().to(device)
        for tensor in (x, y, ids):
            torch._dynamo.mark_dynamic(tensor, 0)
        want = load_balancing_loss(x, y, ids) + router_z_loss(x, y)
        assert_close(compiled(x, y, ids), want.double(), num_terms=1000)
    assert counter.frame_count == 1


# ---- counters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@on_devices
def test_counts(device, index_dtype, dtype):
    counts = torch.full((E,), 7, dtype=dtype, device=device)
    for pattern in ("random", "one", "duplicates"):
        indices = choose_experts(ExpertShape(199, H, E, K), pattern)
        want = counts.cpu() + torch.bincount(indices.flatten(), minlength=E)
        add_expert_counts(counts, indices.to(device, index_dtype))
        assert counts.tolist() == want.tolist() and counts.dtype == dtype
        add_expert_counts(counts, indices[:0].to(device, index_dtype))
        assert counts.tolist() == want.tolist()

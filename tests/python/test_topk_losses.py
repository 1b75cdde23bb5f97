"""Losses of the top-k router: values and gradients against loops, masks, sequences, ranks."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_bitwise, assert_close, on_devices, on_dtypes
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from omni_moe import (
    topk_load_balancing_loss,
    topk_router_z_loss,
    topk_sequence_load_balancing_loss,
)
from omni_moe.modules import TopKRouter
from omni_moe.ops import omni_topk_router

B, S, E, K = 4, 9, 12, 3
SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
on_scores = pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
on_masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def make_inputs(device="cpu", dtype=torch.float32, masked=False):
    """Logits (B, S, E), ids (B, S, K), counts (E,), a mask (B, S) that leaves out one sequence."""
    logits = (2 * torch.randn(B, S, E, dtype=torch.float64)).to(device, dtype)
    mask = None
    if masked:
        mask = torch.rand(B, S) > 0.4
        mask[1] = False
        mask = mask.to(device)
    flat_mask = None if mask is None else mask.flatten()
    _, ids, counts = omni_topk_router(logits.flatten(0, 1), K, token_mask=flat_mask)
    return logits, ids.view(B, S, K), counts, mask


def naive_loss(logits, ids, scoring_func):
    """Of tokens that all count: (T, E) fp64 and (T, K)."""
    if len(logits) == 0:
        return logits.sum()
    if scoring_func == "softmax":
        probs = logits.softmax(-1)
    else:
        sigmoid = scoring_func == "sigmoid"
        scores = logits.sigmoid() if sigmoid else torch.log1p(logits.exp()).sqrt()
        probs = scores / scores.sum(-1, keepdim=True)
    counts = torch.zeros(logits.shape[1], dtype=torch.float64)
    for i in ids.flatten().tolist():
        counts[i] += 1
    return logits.shape[1] * (counts / ids.numel() * probs.mean(0)).sum()


def assert_loss(got_of, want_of, logits):
    """Value and gradient, of fp64 copies of the logits on the CPU."""
    leaf = logits.clone().requires_grad_()
    value = got_of(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    wide = logits.cpu().double().requires_grad_()
    want = want_of(wide)
    (want_grad,) = torch.autograd.grad(want, wide)
    assert value.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert_close(value, want, "loss", num_terms=B * S * E, accumulation_factor=8)
    # Each element is a difference of terms of this size.
    terms = want.item() * E / (B * S)
    assert_close(grad, want_grad, "gradient", num_terms=E, accumulation_factor=8, terms=terms)
    # Nothing in it depends on the order of atomics.
    (again,) = torch.autograd.grad(got_of(leaf), leaf)
    assert_bitwise(again, grad)


@on_masks
@on_scores
@on_dtypes
def test_load_balancing_loss(device, dtype, scoring_func, masked):
    logits, ids, counts, mask = make_inputs(device, dtype, masked)
    kept = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.cpu()
    assert_loss(
        lambda x: topk_load_balancing_loss(
            x.flatten(0, 1),
            counts,
            scoring_func=scoring_func,
            token_mask=None if mask is None else mask.flatten(),
        ),
        lambda x: naive_loss(x[kept], ids.cpu()[kept], scoring_func),
        logits,
    )


@on_masks
@on_scores
@on_dtypes
def test_sequence_load_balancing_loss(device, dtype, scoring_func, masked):
    logits, ids, _, mask = make_inputs(device, dtype, masked)
    kept = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.cpu()

    def want(x):
        losses = [
            naive_loss(x[b][kept[b]], ids[b].cpu()[kept[b]], scoring_func)
            for b in range(B)
            if kept[b].any()
        ]
        return torch.stack(losses).mean()

    assert_loss(
        lambda x: topk_sequence_load_balancing_loss(
            x, ids, scoring_func=scoring_func, token_mask=mask
        ),
        want,
        logits,
    )


@on_masks
@on_dtypes
def test_z_loss(device, dtype, masked):
    logits, _, _, mask = make_inputs(device, dtype, masked)
    kept = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.cpu()
    assert_loss(
        lambda x: topk_router_z_loss(x, mask),
        lambda x: x[kept].logsumexp(-1).square().mean(),
        logits,
    )


def test_even_and_uneven_loads():
    even = torch.arange(E).repeat(4).view(-1, K)
    counts = torch.bincount(even.flatten(), minlength=E)
    logits = torch.zeros(len(even), E, dtype=torch.float64)
    assert_close(topk_load_balancing_loss(logits, counts), torch.ones((), dtype=torch.float64))
    logits[:, 3], counts = 100, torch.zeros(E, dtype=torch.int64)
    counts[3] = len(even)
    want = torch.tensor(float(E), dtype=torch.float64)
    assert_close(topk_load_balancing_loss(logits, counts), want)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_that_of_transformers(masked):
    """Which does not divide by K."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, _, counts, mask = make_inputs(masked=masked)
    flat = logits.flatten(0, 1)
    want = modeling.load_balancing_loss_func((flat,), E, K, None if mask is None else mask.long())
    flat_mask = None if mask is None else mask.flatten()
    got = K * topk_load_balancing_loss(flat, counts, token_mask=flat_mask)
    assert_close(got, want.double(), num_terms=B * S, accumulation_factor=4)


@on_devices
def test_what_is_masked_does_not_show(device):
    """NaN in padding reaches neither loss nor gradient; where nothing counts the loss is 0."""
    logits, ids, counts, mask = make_inputs(device, masked=True)
    nothing = torch.zeros_like(mask)
    spoilt = logits.masked_fill(~mask.unsqueeze(-1), float("nan"))

    def losses(x, mask):
        flat, flat_mask = x.flatten(0, 1), mask.flatten()
        counted = counts if mask.any() else torch.zeros_like(counts)
        return (
            topk_load_balancing_loss(flat, counted, token_mask=flat_mask),
            topk_sequence_load_balancing_loss(x, ids, token_mask=mask),
            topk_router_z_loss(flat, flat_mask),
        )

    leaf = spoilt.requires_grad_()
    for got, want in zip(losses(leaf, mask), losses(logits, mask), strict=True):
        assert_bitwise(got, want)
        (grad,) = torch.autograd.grad(got, leaf)
        assert grad.isfinite().all() and (grad[~mask] == 0).all()
    for got in losses(leaf, nothing):
        assert got == 0
        assert (torch.autograd.grad(got, leaf)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, S, E), (B, 0, E)])
def test_no_tokens(shape):
    logits = torch.randn(shape, requires_grad=True)
    ids = torch.zeros(*shape[:2], K, dtype=torch.int32)
    counts = torch.zeros(E, dtype=torch.int64)
    for loss in (
        topk_load_balancing_loss(logits.flatten(0, 1), counts),
        topk_sequence_load_balancing_loss(logits, ids),
        topk_router_z_loss(logits),
    ):
        assert loss == 0
        loss.backward()


# ---- accumulation, checkpointing, compilation ----------------------------------------------------


def test_gradient_accumulation():
    """With the counts of all micro-batches the mean of their losses is that of the batch."""
    logits, _, counts, _ = make_inputs(dtype=torch.float64)
    parts = logits.flatten(0, 1).chunk(4)
    whole = topk_load_balancing_loss(logits.flatten(0, 1), counts)
    mean = torch.stack([topk_load_balancing_loss(part, counts) for part in parts]).mean()
    assert_close(mean, whole)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    router = TopKRouter(8, E, K, jitter_noise=0.1)
    x = torch.randn(B * S, 8)

    def losses(x):
        output = router(x)
        balance = topk_load_balancing_loss(output.logits, output.counts)
        return balance + topk_router_z_loss(output.logits)

    grads = []
    for run in (losses, lambda x: checkpoint(losses, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        router.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        grads.append((leaf.grad, router.weight.grad))
    for got, want in zip(*grads, strict=True):
        assert_bitwise(got, want)


@on_devices
def test_compiled(device):
    counter = CompileCounterWithBackend("aot_eager")

    def losses(logits, ids, counts, mask):
        flat, flat_mask = logits.flatten(0, 1), mask.flatten()
        return (
            topk_load_balancing_loss(flat, counts, scoring_func="sigmoid", token_mask=flat_mask)
            + topk_sequence_load_balancing_loss(logits, ids, token_mask=mask)
            + topk_router_z_loss(flat, flat_mask)
        )

    logits, ids, counts, mask = make_inputs(device, masked=True)
    logits.requires_grad_()
    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    want, got = losses(logits, ids, counts, mask), compiled(logits, ids, counts, mask)
    assert_bitwise(got, want)
    assert_bitwise(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))
    assert counter.frame_count == 1


def test_autocast_does_not_round():
    logits, _, counts, _ = make_inputs()
    flat = logits.flatten(0, 1)
    want = topk_load_balancing_loss(flat, counts), topk_router_z_loss(flat)
    with torch.autocast("cpu", torch.bfloat16):
        got = topk_load_balancing_loss(flat, counts), topk_router_z_loss(flat)
    for one, other in zip(got, want, strict=True):
        assert_bitwise(one, other)


# ---- ranks ---------------------------------------------------------------------------------------


def rank_losses(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    logits, ids, _, _ = make_inputs(dtype=torch.float64)
    # Of different numbers of tokens.
    part = logits.flatten(0, 1).tensor_split([10])[rank].requires_grad_()
    counts = torch.bincount(ids.flatten(0, 1).tensor_split([10])[rank].flatten(), minlength=E)
    loss = topk_load_balancing_loss(part, counts, process_group=dist.group.WORLD)
    loss.backward()
    router = TopKRouter(8, E, K, score_correction=True)
    router.tokens_per_expert.copy_(counts)
    router.update_score_correction(0.1)
    found = (loss.detach(), part.grad, router.e_score_correction_bias)
    results[rank] = tuple(tensor.numpy() for tensor in found)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_all_ranks():
    """The mean over two ranks, and its gradients, are those of all tokens together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_losses, (port, results), nprocs=2)
        found = [[torch.as_tensor(array) for array in results[rank]] for rank in range(2)]
    (loss_0, grad_0, bias_0), (loss_1, grad_1, bias_1) = found
    torch.manual_seed(0)
    logits, _, counts, _ = make_inputs(dtype=torch.float64)
    flat = logits.flatten(0, 1).requires_grad_()
    want = topk_load_balancing_loss(flat, counts)
    (want_grad,) = torch.autograd.grad(want, flat)
    assert_close((loss_0 + loss_1) / 2, want)
    # What data parallelism averages are sums over the tokens of a rank.
    assert_close(torch.cat([grad_0, grad_1]) / 2, want_grad)
    assert_bitwise(bias_0, bias_1)
    mean = counts.sum().double() / E
    assert_close(bias_0, 0.1 * (mean - counts.double()).sign())


# ---- errors --------------------------------------------------------------------------------------


def test_errors():
    logits, ids, counts, _ = make_inputs()
    flat = logits.flatten(0, 1)
    with pytest.raises(ValueError, match="router_logits: expected floating point of 2 dimensions"):
        topk_load_balancing_loss(logits, counts)
    with pytest.raises(ValueError, match="router_logits: expected floating point of 3 dimensions"):
        topk_sequence_load_balancing_loss(flat, ids)
    with pytest.raises(ValueError, match="router_logits: expected floating point"):
        topk_router_z_loss(flat.int())
    with pytest.raises(ValueError, match=r"expert_counts: expected shape \(12,\), got \(11,\)"):
        topk_load_balancing_loss(flat, counts[1:])
    with pytest.raises(ValueError, match=r"indices: expected shape \(B, S, K\)"):
        topk_sequence_load_balancing_loss(logits, ids[1:])
    with pytest.raises(ValueError, match=r"scoring_func: expected one of .*got 'relu'"):
        topk_load_balancing_loss(flat, counts, scoring_func="relu")
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(B * S)):
        with pytest.raises(ValueError, match="token_mask: expected bool of shape"):
            topk_load_balancing_loss(flat, counts, token_mask=mask)
    for value in (-2, E):
        wrong = ids.clone()
        wrong[1, 2, 0] = value
        with pytest.raises(IndexError):
            topk_sequence_load_balancing_loss(logits, wrong)

"""The classic mixture of experts on a GPU in bf16: against fp64, in graphs, without waiting."""

import contextlib
import copy

import pytest
import torch
from helpers import assert_bitwise, assert_close, needs_gpu
from test_cuda_modes import synchronisation_raises

from omni_moe import reference, topk_load_balancing_loss, topk_router_z_loss
from omni_moe.modules import MixtureOfExperts

BF16 = torch.bfloat16
pytestmark = needs_gpu

# (T, H, I, E, k, capacity_factor): Mixtral and DeepSeek in small, few tokens, dropped pairs, widths
# that the grouped GEMM does not take.
CASES = {
    "mixtral": (512, 256, 896, 8, 2, None),
    "deepseek": (512, 256, 64, 256, 8, None),
    "decode": (1, 256, 64, 32, 4, None),
    "dropped": (512, 256, 64, 16, 2, 0.8),
    "unaligned": (67, 100, 52, 8, 2, None),
}
on_cases = pytest.mark.parametrize("case", CASES)


def make(case, **options):
    num_tokens, hidden_size, intermediate_size, num_experts, k, capacity_factor = CASES[case]
    layer = MixtureOfExperts(
        hidden_size, intermediate_size, num_experts, k, capacity_factor, device="cuda", dtype=BF16,
        **options,
    )  # fmt: skip
    return layer, torch.randn(num_tokens, hidden_size, device="cuda", dtype=BF16)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@on_cases
def test_against_the_loop(case, gated, bias):
    layer, x = make(case, gated=gated, bias=bias)
    x.requires_grad_()
    output, router = layer(x)
    grad = torch.randn_like(output)
    experts = dict(layer.experts.named_parameters())
    got = torch.autograd.grad(output, [x, *experts.values()], grad, allow_unused=True)

    exact = copy.deepcopy(layer).double()
    y = x.detach().double().requires_grad_()
    indices = router.indices
    if router.slots is not None:
        indices = indices.masked_fill(router.slots < 0, -1)
        assert (indices < 0).any()
    exact_experts = dict(exact.experts.named_parameters())
    up_name = "gate_up_proj" if gated else "up_proj"
    want = reference.mixture_of_experts(
        y, router.weights.detach().double(), indices,
        up_proj=exact_experts[up_name], down_proj=exact_experts["down_proj"],
        up_bias=exact_experts.get(f"{up_name}_bias"),
        down_bias=exact_experts.get("down_proj_bias"), gated=gated,
    )  # fmt: skip
    assert_close(output, want, num_terms=x.shape[1], intermediate_roundings=4)
    want_grads = torch.autograd.grad(want, list(exact_experts.values()), grad.double())
    for name, ours, theirs in zip(experts, got[1:], want_grads, strict=True):
        scale = theirs.abs().max().item()
        assert_close(ours, theirs, name, num_terms=len(x), intermediate_roundings=4, terms=scale)
    assert got[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "unaligned"])
def test_no_synchronisation(case, bias):
    """Forward, losses and backward."""
    layer, x = make(case, bias=bias, shared_intermediate_size=64, shared_expert_gate=True)
    for checked in (contextlib.nullcontext(), synchronisation_raises()):
        with checked:
            output, router = layer(x)
            balance = topk_load_balancing_loss(router.logits, router.counts)
            loss = output.square().mean() + balance + topk_router_z_loss(router.logits)
            loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("case", ["mixtral", "deepseek", "decode", "dropped"])
def test_graph_of_a_training_step(case):
    """Captured once, replayed on tokens that choose other experts."""
    layer, x = make(case, shared_intermediate_size=64)
    twin = copy.deepcopy(layer)
    parameters = list(layer.parameters())

    def step():
        output, router = layer(x)
        return output, router.counts, *torch.autograd.grad(output.square().sum(), parameters)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for scale in (1, 5):
        x.copy_(torch.randn_like(x) * scale)
        for result in results:
            result.fill_(-1)
        graph.replay()
        output, router = twin(x)
        grads = torch.autograd.grad(output.square().sum(), list(twin.parameters()))
        for got, want in zip(results, (output, router.counts, *grads), strict=True):
            assert_bitwise(got, want)


def test_one_expert_has_all_and_the_others_none():
    layer, x = make("mixtral")
    x.requires_grad_()
    ids = torch.zeros(len(x), 2, dtype=torch.int32, device="cuda")
    ids[:, 0] = 5
    ids[:, 1] = -1
    output, _ = layer(x, replay_indices=ids)
    output.sum().backward()
    for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
        others = [e for e in range(8) if e != 5]
        assert not parameter.grad[others].any() and parameter.grad[5].any()


def test_fp32_and_fp16_run_the_loop():
    for dtype in (torch.float32, torch.float16):
        layer, x = make("dropped")
        layer, x = layer.to(dtype), x.to(dtype)
        output, router = layer(x)
        exact = copy.deepcopy(layer).double()
        indices = router.indices.masked_fill(router.slots < 0, -1)
        want = reference.mixture_of_experts(
            x.double(), router.weights.double(), indices,
            exact.experts.gate_up_proj, exact.experts.down_proj,
        )  # fmt: skip
        assert_close(output, want, num_terms=256, intermediate_roundings=4, accumulation_factor=4)


def test_autocast():
    layer = MixtureOfExperts(64, 96, 8, 2, bias=True, shared_intermediate_size=64, device="cuda")
    x = torch.randn(67, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=BF16), synchronisation_raises():
        output, router = layer(x)
    assert output.dtype == BF16
    output.float().square().sum().backward()
    exact, _ = layer(x, replay_indices=router.indices)
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.02)

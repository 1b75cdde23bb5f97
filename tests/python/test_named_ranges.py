"""Ranges of router, experts and MLP that profilers see, forward and backward."""

import pytest
import torch
from helpers import needs_gpu, on_devices
from torch import nn
from torch.profiler import ProfilerActivity, profile

from omni_moe import OmniMoE, OmniMoEConfig

ROUTER, EXPERTS, MLP = ("omni_moe.router", "omni_moe.experts", "omni_moe.mlp")
H = 16


def make_layer(device="cpu", **options) -> OmniMoE:
    sizes = {"hidden_size": H, "intermediate_size": 24, "num_experts": 64}
    return OmniMoE(OmniMoEConfig(**sizes, num_experts_per_token=4, **options), device=device)


def ranges(function) -> dict[str, list]:
    """Our ranges that a profiler sees, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    found = {}
    for event in profiler.events():
        if event.name.startswith("omni_moe."):
            found.setdefault(event.name, []).append(event)
    return found


def count(found) -> dict[str, int]:
    return {name: len(events) for name, events in found.items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@on_devices
def test_layer(device, training):
    """The router is two ops, its logits and the choice; experts and MLP are parts of one."""
    layer = make_layer(device).train(training)
    x = torch.randn(15, H, device=device, requires_grad=True)
    outputs = []
    found = ranges(lambda: outputs.append(layer(x)))
    assert count(found) == {ROUTER: 2, EXPERTS: 1, MLP: 1}
    (experts,), (mlp,) = found[EXPERTS], found[MLP]
    assert experts.cpu_parent.name == mlp.cpu_parent.name == "omni_moe::omni_expert_mlp"
    found = ranges(lambda: outputs[0].sum().backward())
    assert count(found) == {ROUTER: 2, EXPERTS: 1, MLP: 1}


def test_modules_that_are_called():
    layer = make_layer()
    for module in (layer.router_gate_x, layer.gate_proj):
        module.register_forward_hook(lambda *args: None)
    found = ranges(lambda: layer(torch.randn(15, H)))
    assert count(found) == {ROUTER: 2, EXPERTS: 1, MLP: 1}


@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "called"])
def test_compiled_layer(is_plain):
    torch._dynamo.reset()
    layer = make_layer()
    if not is_plain:
        layer.gate_proj = nn.Linear(H, 24)  # with a bias
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(15, H)
    compiled(x)
    found = count(ranges(lambda: compiled(x)))
    assert found[ROUTER] == 2 and found[EXPERTS] == 1


def test_without_a_profiler_there_is_none(monkeypatch):
    """Nor is the range of the called modules made."""
    layer = make_layer()
    layer.gate_proj.register_forward_hook(lambda *args: None)
    monkeypatch.delattr(torch.profiler, "record_function")
    layer(torch.randn(15, H))


@needs_gpu
def test_nvtx_ranges_change_nothing():
    layer = make_layer("cuda").eval()
    x = torch.randn(15, H, device="cuda")
    want = layer(x)
    with torch.autograd.profiler.emit_nvtx():
        got = layer(x)
    assert torch.equal(got, want)

"""torchao's weight-only quantisation of the classic mixture of experts."""

import copy

import pytest
import torch
from helpers import on_devices

pytest.importorskip("torchao")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from omni_moe.modules import MixtureOfExperts

# The largest error of a weight relative to the largest of its row: half a step of int8, and of the
# three bits behind the point of fp8.
CONFIGS = {
    "int8": (lambda: Int8WeightOnlyConfig(version=2), 0.5 / 127),
    "fp8": (Float8WeightOnlyConfig, 2.0**-4),
}
on_configs = pytest.mark.parametrize("config", CONFIGS)


def quantised(layer, config):
    make, _ = CONFIGS[config]
    names = ("experts.gate_up_proj", "experts.down_proj")
    layer = copy.deepcopy(layer).requires_grad_(False)
    quantize_(layer, FqnToConfig(dict.fromkeys(names, make())), None)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@on_configs
@on_devices
def test_experts(device, dtype, config):
    """The layer of the weights that the quantised ones stand for, which are near the given ones."""
    layer = MixtureOfExperts(64, 96, 8, 2, shared_intermediate_size=32, device=device, dtype=dtype)
    narrow = quantised(layer, config)
    assert type(narrow.experts.down_proj).__module__.startswith("torchao")
    exact = copy.deepcopy(layer)
    for name in ("gate_up_proj", "down_proj"):
        given = layer.experts.get_parameter(name).detach().float()
        stood_for = getattr(narrow.experts, name).dequantize()
        steps = (stood_for.float() - given).abs() / given.abs().amax(-1, keepdim=True)
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        assert 0 < steps.max() <= CONFIGS[config][1] + 2 * rounding
        exact.experts.get_parameter(name).data.copy_(stood_for)
    x = torch.randn(30, 64, device=device, dtype=dtype)
    got, router = narrow(x)
    want, _ = exact(x, replay_indices=router.indices)
    assert torch.equal(got, want)


@on_configs
def test_shared_expert(config):
    layer = MixtureOfExperts(64, 96, 8, 2, shared_intermediate_size=32).requires_grad_(False)
    narrow = copy.deepcopy(layer)
    make, _ = CONFIGS[config]
    quantize_(narrow, make(), filter_fn=lambda m, name: "shared" in name and "_proj" in name)
    assert type(narrow.shared_experts.up_proj.weight).__module__.startswith("torchao")
    x = torch.randn(30, 64)
    got, want = narrow(x)[0], layer(x)[0]
    assert 0 < (got - want).norm() < 0.1 * want.norm()


def test_gradients_of_the_tokens():
    layer = quantised(MixtureOfExperts(64, 96, 8, 2), "int8")
    x = torch.randn(30, 64, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()

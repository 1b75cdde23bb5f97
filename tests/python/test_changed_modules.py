"""Modules of a layer that were changed: called, where of plain ones the weights are read."""

import copy
import functools

import pytest
import torch
from helpers import assert_bitwise, assert_close
from test_module import E, H, I, make_layer
from torch import nn
from torch.nn.utils import prune

MODULES = (
    *("router_gate_x", "router_gate_y", "router_norm_x", "router_norm_y", "up_embed", "down_embed"),
    *("gate_proj", "up_proj", "down_proj"),
)


def set_momentum(layer):
    layer.router_norm_x.momentum = layer.router_norm_y.momentum = None


def replace_forward(layer):
    for name in ("router_gate_x", "gate_proj", "down_embed"):
        module = layer.get_submodule(name)
        module.forward = lambda *args, module=module: type(module).forward(module, *args)


def forget_statistics(layer):
    for axis, width in (("x", 6), ("y", 8)):
        norm = nn.BatchNorm1d(width, affine=False, track_running_stats=False)
        setattr(layer, f"router_norm_{axis}", norm.double())


CHANGES = {
    "hook on a gate": lambda layer: layer.router_gate_x.register_forward_hook(lambda *_: None),
    "hook on a norm": lambda layer: layer.router_norm_y.register_forward_pre_hook(lambda *_: None),
    "hook on the MLP": lambda layer: layer.up_proj.register_full_backward_hook(lambda *_: None),
    "hook on the experts": lambda layer: layer.up_embed.register_forward_hook(lambda *_: None),
    "forward of the instance": replace_forward,
    "average without momentum": set_momentum,
    "no running statistics": forget_statistics,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_are_called(change):
    """The layer takes the weights of its modules itself only where nobody would notice."""
    plain, changed = make_layer(), make_layer()
    changed.load_state_dict(plain.state_dict())
    CHANGES[change](changed)
    x = torch.randn(37, H, dtype=torch.float64)
    grad = torch.randn(37, H, dtype=torch.float64)
    outputs, grads = [], []
    for layer in (plain, changed):
        leaf = x.clone().requires_grad_()
        outputs.append(layer(leaf))
        outputs[-1].backward(grad)
        grads.append([leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    slack = {"num_terms": 1000, "accumulation_factor": 4}
    assert_close(outputs[1], outputs[0], **slack)
    for got, want in zip(*reversed(grads), strict=True):
        assert_close(got, want, **slack)


@pytest.mark.parametrize("name", MODULES)
def test_replaced_forward_is_called(name):
    layer = make_layer()
    x = torch.randn(37, H, dtype=torch.float64)
    before = layer(x)
    module = layer.get_submodule(name)
    module.forward = lambda *args: -type(module).forward(module, *args)
    assert not torch.allclose(layer(x), before)


REWEIGHTED = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight_norm": lambda module: nn.utils.weight_norm(module, "weight"),
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", REWEIGHTED)
def test_weights_that_are_computed(change):
    """By hooks or properties, anew in each forward."""
    layer = make_layer()
    plain = copy.deepcopy(layer).eval()
    names = [name for name, module in layer.named_children() if hasattr(module, "weight")]
    names = [name for name in names if "norm" not in name]
    assert len(names) == 7
    for name in names:
        REWEIGHTED[change](layer.get_submodule(name))
    layer.eval()
    x = torch.randn(37, H, dtype=torch.float64)
    for _ in range(2):
        out = layer(x)
        out.sum().backward()
    with torch.no_grad():
        for name in names:
            before = plain.get_submodule(name).weight
            before.copy_(layer.get_submodule(name).weight)
    assert_close(out, plain(x), num_terms=1000)
    assert not torch.allclose(out, make_layer()(x))
    assert all(parameter.grad is not None for parameter in layer.parameters())


class Quantised(torch.Tensor):
    """What a quantised weight is to the layer: a tensor with a linear of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight = args[0], args[1].as_subclass(torch.Tensor)
            return torch.nn.functional.linear(x, weight.round())
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("names", [["router_gate_y"], ["gate_proj", "up_proj", "down_proj"]])
def test_weights_with_a_linear_of_their_own(names):
    layer = make_layer().eval()
    rounded = copy.deepcopy(layer)
    for name in names:
        weight = layer.get_submodule(name).weight
        weight.data *= 4
        rounded.get_submodule(name).weight.data.copy_(weight.round())
        quantised = nn.Parameter(weight.detach().as_subclass(Quantised), requires_grad=False)
        layer.get_submodule(name).weight = quantised
    x = torch.randn(37, H, dtype=torch.float64)
    assert_close(layer(x), rounded(x), num_terms=1000)


def test_gates_of_two_dtypes_are_refused():
    layer = make_layer(dtype=torch.float32)
    layer.router_gate_y.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(37, H))


def test_hooks_see_what_they_saw():
    layer, seen = make_layer(), []
    for name in MODULES:
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, tuple(output.shape)))
        )
    layer(torch.randn(37, H, dtype=torch.float64))
    rows, cols = layer.config.grid
    widths = {"x": rows, "y": cols, "gate_proj": I, "up_proj": I, "down_proj": H}
    wanted = {name: (37, widths[name.removeprefix("router_gate_").removeprefix("router_norm_")])
              for name in MODULES if "embed" not in name}  # fmt: skip
    wanted |= {"up_embed": (E, H), "down_embed": (E, H)}
    assert len(seen) == len(MODULES) and dict(seen) == wanted


# ---- accelerate's hooks --------------------------------------------------------------------------


@pytest.fixture
def hooks():
    return pytest.importorskip("accelerate.hooks")


def triple(module):
    module.forward = lambda *args, old=module.forward: 3 * old(*args)


@pytest.mark.parametrize("name", MODULES)
def test_replaced_forward_beside_a_placing_hook_is_called(hooks, name):
    def place(module, kind=hooks.AlignDevicesHook):
        hooks.add_hook_to_module(module, kind(execution_device="cpu"))

    class Triple(hooks.AlignDevicesHook):
        def post_forward(self, module, output):
            return 3 * output

    changes = {
        "before": (triple, place),
        "after": (place, triple),
        "subclass": (functools.partial(place, kind=Triple),),
    }
    layer = make_layer().eval()
    tripled = copy.deepcopy(layer)
    triple(tripled.get_submodule(name))
    x = torch.randn(37, H, dtype=torch.float64)
    want = tripled(x)
    assert not torch.allclose(want, layer(x))
    for how, steps in changes.items():
        changed = copy.deepcopy(layer)
        for step in steps:
            step(changed.get_submodule(name))
        assert_close(changed(x), want, how, num_terms=1000)


@pytest.mark.parametrize("removed", [False, True])
def test_placing_hooks_alone_change_nothing(hooks, removed, monkeypatch):
    """A device map over several devices puts a hook on each module; none needs to be called."""
    layer = make_layer()
    x = torch.randn(37, H, dtype=torch.float64)
    want = layer(x)
    for module in layer.children():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    if removed:
        hooks.remove_hook_from_submodules(layer)
    assert all("forward" in module.__dict__ for module in layer.children())
    monkeypatch.setattr(nn.Module, "_call_impl", None)
    assert_bitwise(layer.forward(x), want)

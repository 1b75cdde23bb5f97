"""Modules of a layer that were changed: called, where of plain ones the weights are read."""

import copy
import functools

import pytest
import torch
from helpers import assert_bitwise, assert_close
from test_module import E, H, I, K, make_layer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from omni_moe import OmniMoE, reference

MODULES = (
    *("router_gate_x", "router_gate_y", "router_norm_x", "router_norm_y", "up_embed", "down_embed"),
    *("gate_proj", "up_proj", "down_proj"),
)


COARSEST_FIRST = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

# ---- hooks and other modules ---------------------------------------------------------------------

# Each hook changes values, so that one that does not run is found.
HOOKS = {
    "forward_pre": lambda module, args: (args[0].flip(0),),
    "forward": lambda module, args, output: output.flip(0),
    "full_backward_pre": lambda module, grad_output: (2 * grad_output[0],),
    "full_backward": lambda module, grad_input, grad_output: (2 * grad_input[0],),
}


def add_hook(layer, kind, name):
    register = getattr(layer.get_submodule(name), f"register_{kind}_hook")
    register(HOOKS[kind])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def change_class(layer):
    layer.up_proj.__class__ = Doubled


def add_bias(layer):
    layer.gate_proj.bias = nn.Parameter(torch.linspace(-1, 1, I, dtype=torch.float64))


def make_affine(layer):
    layer.router_norm_x.weight = nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64))
    layer.router_norm_x.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))


def keep_outside_of_parameters(module, name, values):
    """As FSDP1 does where it flattens parameters."""
    del module._parameters[name]
    setattr(module, name, values.double())


def forget_statistics(layer):
    for name in ("router_norm_x", "router_norm_y"):
        norm = nn.BatchNorm1d(6, affine=False, track_running_stats=False)
        setattr(layer, name, norm.double())


def average_without_momentum(layer):
    layer.router_norm_x.momentum = layer.router_norm_y.momentum = None


def stop_tracking(layer):
    layer.router_norm_x.track_running_stats = layer.router_norm_y.track_running_stats = False


def share_the_norm(layer):
    layer.router_norm_y = layer.router_norm_x


CHANGES = {
    f"{kind} hook on {name}": functools.partial(add_hook, kind=kind, name=name)
    for kind in HOOKS
    for name in MODULES
    # Expert ids, the input of an embedding, have no gradient that a hook could change.
    if kind != "full_backward" or "embed" not in name
} | {
    "class": change_class,
    "bias": add_bias,
    "affine norm": make_affine,
    "bias that is no parameter": lambda layer: keep_outside_of_parameters(
        layer.gate_proj, "bias", torch.linspace(-1, 1, I)
    ),
    "affine norm without parameters": lambda layer: keep_outside_of_parameters(
        layer.router_norm_x, "weight", torch.linspace(1, 2, 6)
    ),
    "no running statistics": forget_statistics,
    "average without momentum": average_without_momentum,
    "statistics not tracked any more": stop_tracking,
    "max_norm of up": lambda layer: setattr(layer.up_embed, "max_norm", 0.5),
    "max_norm of down": lambda layer: setattr(layer.down_embed, "max_norm", 0.5),
    "padding_idx of up": lambda layer: setattr(layer.up_embed, "padding_idx", 3),
    "padding_idx of down": lambda layer: setattr(layer.down_embed, "padding_idx", 3),
    "one norm for both axes": share_the_norm,
    "momentum of one norm": lambda layer: setattr(layer.router_norm_y, "momentum", 0.5),
    "eps of one norm": lambda layer: setattr(layer.router_norm_y, "eps", 0.5),
    "mode of one norm": lambda layer: layer.router_norm_x.eval(),
}


def forward_by_calls(layer, x):
    """The forward of an `OmniMoE` layer that calls all of its modules."""
    logits = (
        layer.router_norm_x(layer.router_gate_x(x)),
        layer.router_norm_y(layer.router_gate_y(x)),
    )
    routing_weights, indices = reference.omni_softmax_router(*logits, K)
    ids = torch.arange(layer.config.num_experts)
    expert_states = reference.omni_expert(
        x,
        up_weights=layer.up_embed(ids),
        down_weights=layer.down_embed(ids),
        routing_weights=routing_weights,
        indices=indices,
    )
    gate = nn.functional.silu(layer.gate_proj(x))
    return expert_states + layer.down_proj(gate * layer.up_proj(x))


def outcome(layer, forward, x, grad):
    """What a training step and an evaluation leave: outputs, gradients and buffers by name."""
    x = x.clone().requires_grad_()
    out = forward(layer, x)
    out.backward(grad)
    found = {"output": out, "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    found |= {name: buffer.double() for name, buffer in layer.named_buffers()}
    return found | {"output in eval mode": forward(layer.eval(), x)}


def differ(one, other):
    return one.keys() != other.keys() or not all(
        torch.allclose(value, other[name]) for name, value in one.items()
    )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # embeddings have ids for input
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_are_called(change):
    """The layer takes the weights of its modules itself only where that is the same."""
    plain, changed, by_calls = (make_layer(num_experts=36) for _ in range(3))
    for layer in (changed, by_calls):
        layer.load_state_dict(plain.state_dict())
        CHANGES[change](layer)
    x, grad = torch.randn(2, 37, H, dtype=torch.float64)
    got = outcome(changed, lambda layer, x: layer(x), x, grad)
    want = outcome(by_calls, forward_by_calls, x, grad)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert_close(value, want[name], name, num_terms=1000, accumulation_factor=4)
    assert differ(got, outcome(plain, lambda layer, x: layer(x), x, grad))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_a_forward_are_noticed(change):
    """And their end, when plain modules come back."""
    layer = make_layer(num_experts=36).eval()
    plain_modules = copy.deepcopy(dict(layer.named_children()))
    by_calls = copy.deepcopy(layer)
    x = torch.randn(37, H, dtype=torch.float64)
    before = layer(x)
    CHANGES[change](layer)
    CHANGES[change](by_calls)
    assert_close(layer(x), forward_by_calls(by_calls, x), num_terms=1000)
    for name, module in plain_modules.items():
        setattr(layer, name, module)
    assert_bitwise(layer(x), before)


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
@pytest.mark.parametrize("name", ["up_embed", "down_embed"])
def test_embeddings_with_options_of_their_gradient_are_called(name, option, monkeypatch):
    layer = make_layer()
    embedding = layer.get_submodule(name)
    setattr(embedding, option, True)
    layer(torch.randn(37, H, dtype=torch.float64)).sum().backward()
    assert embedding.weight.grad.is_sparse == (option == "sparse")
    called = []
    forward = nn.Embedding.forward
    monkeypatch.setattr(
        nn.Embedding, "forward", lambda self, ids: called.append(self) or forward(self, ids)
    )
    layer(torch.randn(37, H, dtype=torch.float64))
    assert called == [embedding]


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
    outputs = []
    for _ in range(2):
        outputs.append(layer(x))
        outputs[-1].sum().backward()
        with torch.no_grad():
            for name in names:
                plain.get_submodule(name).weight.copy_(layer.get_submodule(name).weight)
            assert_close(outputs[-1], plain(x), num_terms=1000)
            # What the weights are computed from changes, and with it the next output.
            for parameter in layer.parameters():
                assert parameter.grad is not None
                parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(*outputs)


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


def test_norms_of_two_dtypes_are_called():
    layer = make_layer(dtype=torch.bfloat16).eval()
    layer.router_norm_y.float()
    x = torch.randn(37, H).bfloat16()
    logits_x, logits_y = layer._router_logits(x)
    assert_bitwise(logits_x, layer.router_norm_x(layer.router_gate_x(x)))
    assert_bitwise(logits_y, layer.router_norm_y(layer.router_gate_y(x)))


@pytest.mark.parametrize("called", [None, "router_gate_x", "router_norm_y"])
@pytest.mark.parametrize("stats_dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_running_statistics_of_another_dtype(dtype, stats_dtype, called):
    """As left by who casts parameters and not buffers: both modes run, and update them."""
    layer = make_layer(dtype=dtype)
    want = copy.deepcopy(layer).double()
    for norm in (layer.router_norm_x, layer.router_norm_y):
        norm.to(stats_dtype)
    if called is not None:
        layer.get_submodule(called).register_forward_hook(lambda *args: None)
    x = torch.randn(37, H, dtype=dtype)
    for training in (True, False):
        got_logits = layer.train(training)._router_logits(x)
        want_logits = want.train(training)._router_logits(x.double())
        for one, other in zip(got_logits, want_logits, strict=True):
            assert one.dtype == dtype
            assert_close(one, other, num_terms=37 + H, terms=8.0, intermediate_roundings=4)
        wanted = dict(want.named_buffers())
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                assert buffer.dtype == stats_dtype
                coarse = buffer.to(min(dtype, stats_dtype, key=COARSEST_FIRST.index))
                assert_close(coarse, wanted[name], name, num_terms=37 + H, intermediate_roundings=2)
                wanted[name].copy_(buffer)  # as rounded: what the evaluation reads
            else:
                assert buffer == wanted[name] == 1


def test_statistics_start_in_fp32():
    """Whatever the default: a tenth of a small change to a number in bf16 rounds to nothing."""
    default = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            layer = OmniMoE(make_layer().config)
        finally:
            torch.set_default_dtype(default)
        assert layer.up_embed.weight.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        assert layer.router_norm_x.running_mean.dtype == wide


@pytest.mark.parametrize("called", [None, "router_gate_x"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_router_in_fp32(dtype, called):
    """Beside experts in a half: the router computes in fp32, and the layer's output is a half."""
    layer = make_layer(dtype=dtype)
    for name in ("router_gate_x", "router_gate_y", "router_norm_x", "router_norm_y"):
        layer.get_submodule(name).float()
    want = copy.deepcopy(layer).double()
    if called is not None:
        layer.get_submodule(called).register_forward_hook(lambda *args: None)
    x = torch.randn(37, H, dtype=dtype)
    logits = layer._router_logits(x)
    assert all(axis.dtype == torch.float32 for axis in logits)
    out = layer(x)
    assert out.dtype == dtype
    assert_close(out, want(x.double()), num_terms=1000, intermediate_roundings=4)
    out.sum().backward()
    assert layer.router_gate_x.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)


def test_gates_of_two_dtypes_are_refused():
    layer = make_layer(dtype=torch.float32)
    layer.router_gate_y.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(37, H))


def test_hooks_for_all_modules_see_the_layer_alone():
    """As the docs say: such a hook is no change of one module."""
    layer = make_layer()
    x = torch.randn(37, H, dtype=torch.float64)
    seen = []
    with register_module_forward_hook(lambda module, args, output: seen.append(module)):
        layer(x)
    assert seen == [layer]
    layer.up_proj.register_forward_hook(lambda *args: None)
    with register_module_forward_hook(lambda module, args, output: seen.append(module)):
        layer(x)
    assert seen[1:] == [layer.gate_proj, layer.up_proj, layer.down_proj, layer]


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

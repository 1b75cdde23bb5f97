"""FlopCounterMode: the operations of every op, forward and backward, and of the layer."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import on_devices
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops import auto_functionalize
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from omni_moe import OmniMoE, OmniMoEConfig, ops

T, H, I, R, C, K = 15, 16, 24, 8, 8, 4  # noqa: E741
E = R * C
GATES = T * 2 * H * (R + C)
PAIRS = T * 2 * K * H  # one product for each pair of a token and an expert
PRODUCT = T * 2 * H * I  # one of the MLP's
FORWARD = 46080
assert FORWARD == GATES + 2 * PAIRS + 3 * PRODUCT

SIZES = {
    "hidden_size": H,
    "intermediate_size": I,
    "num_experts": E,
    "num_experts_per_token": K,
}


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def make_layer(device="cpu", **options) -> OmniMoE:
    return OmniMoE(OmniMoEConfig(**SIZES, **options), device=device)


def run_and_count(function, x) -> tuple[int, int]:
    """Operations of the forward and of the backward pass."""
    outputs = []
    forward = counted(lambda: outputs.append(function(x)))
    return forward, counted(lambda: outputs[0].sum().backward())


# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("router_norm", ["batch_norm", "layer_norm", "rms_norm", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@on_devices
def test_layer(device, training, router_norm):
    layer = make_layer(device, router_norm=router_norm).train(training)
    x = torch.randn(3, T // 3, H, device=device, requires_grad=True)
    assert run_and_count(layer, x) == (FORWARD, 2 * FORWARD)
    with torch.no_grad():
        assert counted(lambda: layer(x.detach())) == FORWARD


def test_layer_of_called_modules():
    """What is no plain module counts the same by PyTorch's own formulas."""
    layer = make_layer()
    for module in (layer.router_gate_x, layer.gate_proj):
        module.register_forward_hook(lambda *args: None)
    x = torch.randn(T, H, requires_grad=True)
    assert run_and_count(layer, x) == (FORWARD, 2 * FORWARD)


def test_gradient_of_the_input_is_not_asked_for():
    assert run_and_count(make_layer(), torch.randn(T, H)) == (
        FORWARD,
        2 * FORWARD - GATES - PAIRS - 2 * PRODUCT,
    )


def test_meta_tensors_and_modules():
    model = nn.Sequential(nn.Linear(H, H), make_layer("meta")).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(T, H, device="meta")).sum().backward()
    counts = counter.get_flop_counts()
    assert sum(counts["Sequential.1"].values()) == 3 * FORWARD
    assert counter.get_total_flops() == 3 * FORWARD + T * 2 * H * H * 2


# ---- what torch.compile makes of it --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_layer():
    torch._dynamo.reset()
    layer = make_layer()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    x = torch.randn(T, H, requires_grad=True)
    compiled(x).sum().backward()
    assert run_and_count(compiled, x) == (FORWARD, 2 * FORWARD)


def graph_flops(graph: torch.fx.Graph) -> int:
    """By the formulas of the calls in a graph; those in place stand in a wrapper without them."""
    total = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        op, args, kwargs = node.target, node.args, node.kwargs
        if op in (
            auto_functionalize.auto_functionalized_v2,
            auto_functionalize.auto_functionalized,
        ):
            (op,), args = args, ()
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        packet = getattr(op, "_overloadpacket", None)
        if packet not in flop_registry:
            continue
        args, kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        total += flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    return total


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_graphs_of_a_compiled_layer(training):
    """The ops that compiled code calls, those in place included, count the same."""
    torch._dynamo.reset()
    flops = []

    def compile_graph(module, inputs):
        flops.append(graph_flops(module.graph))
        return make_boxed_func(module)

    layer = make_layer().train(training)
    backend = aot_autograd(fw_compiler=compile_graph)
    x = torch.randn(T, H, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend=backend)(x).sum().backward()
    assert flops == [FORWARD, 2 * FORWARD]


# ---- every op ------------------------------------------------------------------------------------


def all_ops() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("omni_moe::") for name in names if name.startswith("omni_moe:"))


@pytest.mark.parametrize("name", all_ops())
def test_every_op_has_a_formula(name):
    assert getattr(torch.ops.omni_moe, name) in flop_registry


def tensors(*shapes, requires_grad=True):
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def test_router_counts_nothing():
    x, y = tensors((T, R), (T, C))
    for router in (
        lambda x: torch.ops.omni_moe.omni_router(x, y, K)[0],
        lambda x: ops.omni_softmax_router(x, y, K)[0],
    ):
        assert run_and_count(router, x) == (0, 0)


@pytest.mark.parametrize(
    ("wanted", "num_products"),
    [
        ("hidden up down routing", 4),
        ("hidden", 2),
        ("up", 2),
        ("down", 1),
        ("routing", 1),
        ("up down", 3),
    ],
)
def test_experts(wanted, num_products):
    ids = torch.randint(E, (T, K))
    shapes = {"hidden": (T, H), "up": (E, H), "down": (E, H), "routing": (T, K)}
    inputs = [torch.randn(shape, requires_grad=n in wanted.split()) for n, shape in shapes.items()]
    forward = run_and_count(lambda x: ops.omni_expert(*inputs, ids), None)
    assert forward == (2 * PAIRS, num_products * PAIRS)


@pytest.mark.parametrize(
    ("wanted", "num_products"),
    [("x gate up down", 6), ("x", 3), ("gate", 2), ("up", 2), ("down", 1), ("gate up down", 4)],
)
@pytest.mark.parametrize("leading", [(T,), (3, T // 3)], ids=str)
def test_mlp(leading, wanted, num_products):
    shapes = {"x": (*leading, H), "gate": (I, H), "up": (I, H), "down": (H, I)}
    inputs = [torch.randn(shape, requires_grad=n in wanted.split()) for n, shape in shapes.items()]
    assert run_and_count(lambda x: ops.omni_mlp(*inputs), None) == (
        3 * PRODUCT,
        num_products * PRODUCT,
    )


@on_devices
def test_counting_changes_no_result(device):
    layer = make_layer(device)
    twin = copy.deepcopy(layer)
    x = torch.randn(T, H, device=device)
    layer(x).sum().backward()
    with FlopCounterMode(display=False):
        twin(x).sum().backward()
    wanted = dict(layer.named_parameters())
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, wanted[name].grad), name

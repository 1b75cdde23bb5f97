"""Router losses and jitter of a layer: what it leaves, and what that does to its load."""

import copy
import math

import pytest
import torch
from helpers import assert_bitwise, assert_close, copied, needs_gpu, on_copies, on_devices
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from omni_moe import OmniMoE, OmniMoEConfig, load_balancing_loss, router_loss, router_z_loss
from omni_moe.modules.recording import recorded_router_outputs

H, E, K = 24, 48, 5
LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


def make_layer(device="cpu", dtype=torch.float32, **options):
    options = {"num_experts": E, "num_experts_per_token": K, "router_norm": "none"} | options
    config = OmniMoEConfig(hidden_size=H, intermediate_size=40, initializer_range=0.5, **options)
    return OmniMoE(config).to(device, dtype)


def backward(layer, x, step=lambda layer, x: layer(x)):
    """Gradients of all parameters and of x for the square of the output and the router's loss."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = step(layer, x)
    (y.square().mean() + router_loss(layer)).backward()
    return {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert_bitwise(grad, want[name], name)


# ---- the loss of a layer -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"router_norm": "batch_norm"}, {"norm_topk_prob": True}])
@on_devices
def test_loss_of_a_layer(device, options):
    layer = make_layer(device, **LOSSES, **options)
    assert layer.aux_loss is None
    x = torch.randn(3, 11, H, device=device)
    plain = make_layer(device, **options)
    plain.load_state_dict(layer.state_dict())
    assert_bitwise(layer(x), plain(x))
    assert plain.aux_loss is None and router_loss(plain).item() == 0
    plain.load_state_dict(layer.state_dict())

    logits = layer._router_logits(x.view(33, H))
    _, indices = torch.ops.omni_moe.omni_softmax_router(*logits, K, False)
    want = 0.1 * load_balancing_loss(*logits, indices) + 0.01 * router_z_loss(*logits)
    assert_bitwise(layer.aux_loss, want)
    assert layer.aux_loss.dtype == torch.float32 and layer.aux_loss.requires_grad
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(copy.deepcopy(layer), plain)})
    assert model["b"][0].aux_loss is None
    model["b"][0](x)
    assert_bitwise(router_loss(model), 2 * want)

    layer.zero_grad()
    router_loss(layer).backward()
    for name, parameter in layer.named_parameters():
        reached = parameter.grad is not None and parameter.grad.any()
        assert reached == name.startswith("router_gate"), name


def test_only_training_forwards_with_gradients_have_a_loss():
    layer = make_layer(**LOSSES)
    x = torch.randn(7, H)
    layer(x)
    assert layer.aux_loss is not None
    layer.eval()(x)
    assert layer.aux_loss is None and router_loss(layer).item() == 0
    layer.train()
    with torch.no_grad():
        layer(x)
        assert layer.aux_loss is None and router_loss(layer).item() == 0
    with pytest.raises(RuntimeError, match=r"ran under no_grad in training mode.*use_reentrant"):
        router_loss(layer)
    layer(x)
    assert router_loss(layer) > 0


def test_router_loss_without_parameters():
    assert router_loss(nn.Identity()).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone(name):
    layer = make_layer(**{name: 0.5})
    x = torch.randn(7, H)
    layer(x)
    logits = layer._router_logits(x)
    _, indices = torch.ops.omni_moe.omni_softmax_router(*logits, K, False)
    is_balance = name == "router_aux_loss_coef"
    loss = load_balancing_loss(*logits, indices) if is_balance else router_z_loss(*logits)
    assert_bitwise(layer.aux_loss, 0.5 * loss)


def test_fp64_layers_have_fp64_losses():
    layer = make_layer(dtype=torch.float64, **LOSSES)
    layer(torch.randn(7, H, dtype=torch.float64))
    assert layer.aux_loss.dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_layer_without_tokens(training):
    layer = make_layer(**LOSSES, router_jitter_noise=0.1).train(training)
    (layer(torch.randn(0, H)).sum() + router_loss(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert not parameter.grad.any(), name


@on_devices
def test_layer_under_autocast(device):
    layer = make_layer(device, **LOSSES)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = layer(torch.randn(37, H, device=device)).float().square().mean()
    loss = loss + router_loss(layer)
    assert layer.aux_loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()


@on_copies
def test_copies_have_no_loss(how):
    layer = make_layer(**LOSSES)
    x = torch.randn(7, H)
    y = layer(x)
    twin = copied(layer, how)
    assert twin.aux_loss is None and layer.aux_loss is not None
    assert_bitwise(twin(x), y)
    assert_bitwise(twin.aux_loss, layer.aux_loss)


@on_copies
def test_copies_are_not_recorded(how):
    layer = make_layer()
    x = torch.randn(7, H)
    with recorded_router_outputs([layer]) as (outputs,):
        y = layer(x)
        assert outputs[0].logits_x.requires_grad  # what copies refuse
        twin = copied(layer, how)
        assert twin._recorders == () and len(layer._recorders) == 1
        assert_bitwise(twin(x), y)
        assert len(outputs) == 1


def test_state_dict_is_unchanged():
    layer = make_layer(**LOSSES, router_jitter_noise=0.1)
    layer(torch.randn(7, H))
    assert list(layer.state_dict()) == list(make_layer().state_dict())


# ---- compile, graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@on_devices
def test_compiled_layer(device, backend):
    torch._dynamo.reset()
    layer = make_layer(device, **LOSSES, track_expert_load=True)
    eager = copy.deepcopy(layer)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (37, 50, 11):
        x = torch.randn(num_tokens, H, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        (compiled(x).square().mean() + router_loss(compiled)).backward()
        (eager(x).square().mean() + router_loss(eager)).backward()
        assert_close(layer.aux_loss, eager.aux_loss.double(), num_terms=1000)
    assert counter.frame_count == 1
    wanted = dict(eager.named_parameters())
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, wanted[name].grad.double(), name, num_terms=10**4)
    assert_bitwise(layer.expert_load().counts, eager.expert_load().counts)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_graph_replays_a_training_forward():
    """Loss, jitter off, counters: captured once, without waiting for the device."""
    layer = make_layer("cuda", **LOSSES, track_expert_load=True)
    static = torch.randn(67, H, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for mode in ("default", "error"):  # the second time nothing is loaded any more
                torch.cuda.set_sync_debug_mode(mode)
                (layer(static).square().mean() + router_loss(layer)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = layer(static).square().mean() + router_loss(layer)
        loss.backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    layer.reset_expert_load()
    for _ in range(2):
        static.copy_(torch.randn(67, H))
        for grad in grads.values():
            grad.zero_()
        graph.replay()
        other = copy.deepcopy(layer)
        want = backward(other, static)
        for name, grad in grads.items():
            assert_bitwise(grad, want[name], name)
    assert layer.expert_load().counts.sum() == 2 * 67 * K


# ---- activation checkpointing --------------------------------------------------------------------


@on_devices
def test_checkpointed_layer(device):
    layer = make_layer(device, **LOSSES, router_jitter_noise=0.2)
    x = torch.randn(37, H, device=device)
    torch.manual_seed(3)
    want = backward(layer, x)
    value = layer.aux_loss.detach()
    torch.manual_seed(3)
    got = backward(layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert_same_gradients(got, want)
    assert_bitwise(layer.aux_loss.detach(), value)


def test_recomputing_keeps_the_loss_of_the_forward():
    """The loss of the recomputation would keep the recomputed activations alive."""
    layer = make_layer(**LOSSES)
    y = checkpoint(layer, torch.randn(37, H), use_reentrant=False)
    loss = layer.aux_loss
    (y.sum() + router_loss(layer)).backward()
    assert layer.aux_loss is loss


def test_reentrant_checkpointing_is_refused():
    layer = make_layer(**LOSSES)
    x = torch.randn(37, H, requires_grad=True)
    for _ in range(2):  # the second time after a recomputation
        y = checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use use_reentrant=False"):
            router_loss(layer)
        y.sum().backward()


def test_compiled_checkpointing_with_router_losses():
    """Each forward counts once and leaves its loss, with the switch that the docs name."""
    options = {"router_norm": "none", "router_aux_loss_coef": 0.1, "track_expert_load": True}
    layer = make_layer(dtype=torch.float64, **options)
    x = torch.randn(37, H, dtype=torch.float64)

    def step(x):
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return out.square().sum() + router_loss(layer)

    def run(function):
        layer.zero_grad()
        layer.reset_expert_load()
        loss = function(x)
        loss.backward()
        grads = [parameter.grad.clone() for parameter in layer.parameters()]
        return loss.detach(), grads, layer.expert_load().counts

    loss, grads, counts = run(step)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        got_loss, got_grads, got_counts = run(
            torch.compile(step, fullgraph=True, backend="aot_eager")
        )
    assert_close(got_loss, loss)
    for got, want in zip(got_grads, grads, strict=True):
        assert_close(got, want, num_terms=1000)
    assert_bitwise(got_counts, counts)


# ---- jitter --------------------------------------------------------------------------------------


@on_devices
def test_jitter_is_reproducible_and_only_in_training(device):
    layer, plain = make_layer(device, router_jitter_noise=0.3), make_layer(device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(37, H, device=device)
    assert_bitwise(layer.eval()(x), plain.eval()(x))
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    assert not torch.equal(y, layer(x))
    torch.manual_seed(1)
    assert_bitwise(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_jitter_multiplies_the_input_of_the_router(dtype):
    layer = make_layer(dtype=dtype, router_jitter_noise=0.25)
    seen = []
    layer.router_gate_x.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.router_gate_y.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.rand(500, H, dtype=dtype) + 1
    before = x.clone()
    layer(x)
    assert_bitwise(x, before)
    assert_bitwise(seen[0], seen[1])
    assert seen[0].dtype == dtype
    factors = seen[0].double() / x.double()
    rounding = 2.0**-7
    assert 0.75 * (1 - rounding) <= factors.min() < 0.76
    assert 1.24 < factors.max() <= 1.25 * (1 + rounding)
    assert abs(factors.mean().item() - 1) < 0.01


def test_jitter_leaves_the_experts_input_alone():
    """K = E and a router of zeros always choose the same: only the experts' input could vary."""
    layer = make_layer(num_experts_per_token=E, router_jitter_noise=0.5)
    nn.init.zeros_(layer.router_gate_x.weight)
    nn.init.zeros_(layer.router_gate_y.weight)
    x = torch.randn(7, H)
    assert_bitwise(layer(x), layer.eval()(x))


# ---- what they are for ---------------------------------------------------------------------------


def train_a_collapsed_router(coef, device):
    """Unevenness before and after: at first a constant feature sends all tokens to one corner."""
    torch.manual_seed(0)
    layer = make_layer(device, router_aux_loss_coef=coef, track_expert_load=True)
    with torch.no_grad():
        for gate in (layer.router_gate_x, layer.router_gate_y):
            gate.weight.mul_(0.2)
            gate.weight[:2, 0] = 5
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    unevenness = []
    for _ in range(60):
        x = torch.randn(128, H, device=device)
        x[:, 0] = 1
        layer.reset_expert_load()
        loss = (layer(x) - x).square().mean() + router_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        unevenness.append(layer.expert_load().unevenness)
    return unevenness[0], unevenness[-1]


@on_devices
def test_balances_a_collapsed_router(device):
    before, after = train_a_collapsed_router(1.0, device)
    assert before > 0.7 * math.log(E / K)  # which is that of K experts chosen by all
    assert after < 0.25 * before
    _, without = train_a_collapsed_router(0.0, device)
    assert without > 2 * after


def test_z_loss_shrinks_the_logits():
    layer = make_layer(router_z_loss_coef=1.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    x = torch.randn(128, H)
    losses = []
    for _ in range(20):
        layer(x)
        losses.append(router_loss(layer))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]

"""The classic mixture of experts against a loop over its experts in fp64, and its options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_bitwise,
    assert_close,
    copied,
    on_copies,
    on_devices,
    on_dtypes,
    run,
    run_in_double,
    strided,
)
from permute_helpers import choose
from torch.utils.checkpoint import checkpoint

from omni_moe import reference, topk_load_balancing_loss, topk_router_z_loss
from omni_moe.activations import ACTIVATION_FUNCTIONS
from omni_moe.modules import Experts, MixtureOfExperts
from omni_moe.modules.mixture_of_experts import gated_activation

# (T, H, I, E, k): empty, one of each, odd sizes, all experts, idle experts, sizes of the grouped
# GEMM of a GPU.
SHAPES = [
    (0, 16, 24, 4, 2),
    (1, 1, 1, 1, 1),
    (37, 10, 7, 5, 2),
    (37, 16, 24, 4, 4),
    (5, 24, 16, 40, 3),
    (199, 64, 40, 8, 2),
]
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-H{}-I{}-E{}-k{}".format(*s))
on_kinds = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
on_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


def make_experts(shape, device, dtype, **options):
    _, hidden_size, intermediate_size, num_experts, _ = shape
    experts = Experts(hidden_size, intermediate_size, num_experts, **options)
    return experts.to(device, dtype)


def assert_experts(experts, hidden, indices, weights, **options):
    """Output and all gradients of a call are those of the loop."""
    names = [name for name, _ in experts.named_parameters()]
    up_name = "gate_up_proj" if experts.gated else "up_proj"
    inputs = [hidden, weights, *(experts.get_parameter(name).detach() for name in names)]
    grad = torch.randn(hidden.shape).to(hidden)
    in_effect = indices.cpu()
    if options.get("slots") is not None:
        in_effect = in_effect.masked_fill(options["slots"].cpu() < 0, -1)

    def ours(x, w, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, state, (x, indices, w), options)

    def loop(x, w, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return reference.mixture_of_experts(
            x,
            routing_weights=w,
            indices=in_effect,
            up_proj=state[up_name],
            down_proj=state["down_proj"],
            up_bias=state.get(f"{up_name}_bias"),
            down_bias=state.get("down_proj_bias"),
            activation=experts.hidden_act,
            gated=experts.gated,
        )

    got, grads = run(ours, inputs, grad)
    want, want_grads = run_in_double(loop, inputs, grad)
    num_terms = max(experts.hidden_size, 2 * experts.intermediate_size, indices.numel())
    for name, result, expected in zip(
        ("output", "hidden", "weights", *names), (got, *grads), (want, *want_grads), strict=True
    ):
        scale = expected.abs().max().item() if expected.numel() else 0
        result = result.to(hidden.dtype)  # gradients of wider weights are of rows in this one
        assert_close(
            result, expected, name, num_terms=num_terms, intermediate_roundings=4, terms=2 * scale
        )


# ---- experts -------------------------------------------------------------------------------------


@on_bias
@on_kinds
@on_shapes
@on_dtypes
def test_experts(device, dtype, shape, gated, bias):
    num_tokens, hidden_size, _, num_experts, k = shape
    experts = make_experts(shape, device, dtype, gated=gated, bias=bias)
    assert_experts(
        experts,
        torch.randn(num_tokens, hidden_size).to(device, dtype),
        choose(num_tokens, num_experts, k, "masked").to(device),
        torch.rand(num_tokens, k).to(device, dtype),
    )


@pytest.mark.parametrize("hidden_act", ACTIVATION_FUNCTIONS)
@on_kinds
@on_dtypes
def test_activations(device, dtype, gated, hidden_act):
    shape = (37, 16, 24, 4, 2)
    experts = make_experts(shape, device, dtype, gated=gated, hidden_act=hidden_act)
    hidden = torch.randn(37, 16).to(device, dtype)
    ids = choose(37, 4, 2, "random").to(device)
    assert_experts(experts, hidden, ids, torch.rand(37, 2).to(device, dtype))


@on_bias
@on_dtypes
def test_all_tokens_on_one_expert(device, dtype, bias):
    experts = make_experts((37, 16, 24, 4, 1), device, dtype, bias=bias)
    hidden, weights = torch.randn(37, 16).to(device, dtype), torch.rand(37, 1).to(device, dtype)
    for expert in (0, 3):
        ids = torch.full((37, 1), expert, dtype=torch.int32, device=device)
        assert_experts(experts, hidden, ids, weights)


@on_bias
@on_dtypes
def test_dropped_pairs_and_fewer_rows(device, dtype, bias):
    from omni_moe.ops import omni_expert_slots

    experts = make_experts((37, 16, 24, 4, 2), device, dtype, bias=bias)
    ids = choose(37, 4, 2, "masked").to(device)
    slots = omni_expert_slots(ids, 4, 5)
    assert (slots < 0).any()
    hidden, weights = torch.randn(37, 16).to(device, dtype), torch.rand(37, 2).to(device, dtype)
    for num_rows in (None, 20):
        assert_experts(experts, hidden, ids, weights, slots=slots, num_rows=num_rows)


@on_devices
def test_weights_wider_than_tokens(device):
    """Router weights in fp32 beside bf16 experts are not rounded."""
    experts = make_experts((37, 16, 24, 4, 2), device, torch.bfloat16)
    ids = choose(37, 4, 2, "random").to(device)
    hidden = torch.randn(37, 16).to(device, torch.bfloat16)
    assert_experts(experts, hidden, ids, torch.rand(37, 2, device=device))
    one, above = torch.ones(37, 2, device=device), torch.full((37, 2), 1 + 2.0**-9, device=device)
    assert_bitwise(above.bfloat16().float(), one)
    assert not torch.equal(experts(hidden, ids, above), experts(hidden, ids, one))


@on_devices
def test_gated_activation_of_strided_rows(device):
    rows = torch.randn(9, 14, device=device, requires_grad=True)
    got = gated_activation(strided(rows), "gelu")
    want = F.gelu(rows[:, :7]) * rows[:, 7:]
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(gated_activation(rows, "gelu").sum(), rows)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), rows))


def test_gradients_once():
    rows = torch.randn(9, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated_activation(x, "gelu_tanh"), rows)
    (grad,) = torch.autograd.grad(gated_activation(rows).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grad.sum().backward()


# ---- layer ---------------------------------------------------------------------------------------


def oracle(layer, x, token_mask=None):
    """The layer in plain PyTorch, in fp64 on the CPU, from the router's own choice."""
    layer, x = copy.deepcopy(layer).cpu().double(), x.detach().cpu().double().requires_grad_()
    mask = None if token_mask is None else token_mask.cpu()
    router = layer.gate(x, mask)
    indices = router.indices
    if router.slots is not None:
        indices = indices.masked_fill(router.slots < 0, -1)
    experts = layer.experts
    tokens = x.flatten(0, -2)
    out = reference.mixture_of_experts(
        tokens,
        routing_weights=router.weights,
        indices=indices,
        up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        activation=experts.hidden_act,
    )
    if layer.shared_experts is not None:
        shared = layer.shared_experts
        up = F.silu(shared.gate_proj(tokens)) * shared.up_proj(tokens)
        gate = layer.shared_expert_gate
        out = out + shared.down_proj(up) * (1 if gate is None else gate(tokens).sigmoid())
    return layer, x, out.view(x.shape)


@pytest.mark.parametrize("shared", ["none", "shared", "shared_gated"])
@pytest.mark.parametrize("capacity_factor", [None, 0, 0.6, 1.5])
@on_devices
def test_layer(device, capacity_factor, shared):
    layer = MixtureOfExperts(
        16, 24, 6, 2, capacity_factor,
        shared_intermediate_size=0 if shared == "none" else 40,
        shared_expert_gate=shared == "shared_gated",
        router_options={"norm_topk_prob": True}, device=device,
    )  # fmt: skip
    x = torch.randn(3, 13, 16, device=device, requires_grad=True)
    mask = torch.rand(3, 13, device=device) < 0.8
    got, router = layer(x, mask)
    want_layer, want_x, want = oracle(layer, x, mask)
    assert_close(got, want, num_terms=64, terms=4)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad.cpu().double(), want_x.grad, rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(layer.named_parameters(), want_layer.parameters(), strict=True):
        scale = q.grad.abs().max().item() + 1e-12
        torch.testing.assert_close(
            p.grad.cpu().double(),
            q.grad,
            rtol=0,
            atol=2e-5 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    if shared == "none":
        assert not got[~mask].any()
        assert not x.grad[~mask].any()
    assert router.counts.sum() == 2 * mask.sum()


def test_tokens_of_other_shapes():
    layer = MixtureOfExperts(16, 24, 6, 2, shared_intermediate_size=8)
    x = torch.randn(4, 3, 5, 16)
    output, router = layer(x)
    assert output.shape == x.shape and router.indices.shape == (60, 2)
    assert_bitwise(layer(x.view(60, 16))[0], output.view(60, 16))
    assert layer(x[:0])[0].shape == (0, 3, 5, 16)
    empty = torch.empty(0, 16, requires_grad=True)
    layer(empty)[0].sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


def test_losses_train_the_gate():
    layer = MixtureOfExperts(16, 24, 6, 2)
    _, router = layer(torch.randn(30, 16))
    loss = topk_load_balancing_loss(router.logits, router.counts) + topk_router_z_loss(
        router.logits
    )
    loss.backward()
    assert layer.gate.weight.grad.any() and layer.experts.down_proj.grad is None


def test_replayed_choice():
    layer = MixtureOfExperts(16, 24, 6, 2)
    x = torch.randn(30, 16)
    output, router = layer(x)
    assert_bitwise(layer(x, replay_indices=router.indices)[0], output)
    others = (router.indices + 1) % 6
    assert not torch.allclose(layer(x, replay_indices=others)[0], output)


@on_copies
def test_copies(how):
    layer = MixtureOfExperts(16, 24, 6, 2, shared_intermediate_size=8, shared_expert_gate=True)
    x = torch.randn(30, 16)
    assert_bitwise(copied(layer, how)(x)[0], layer(x)[0])


def test_state_dict_has_the_names_of_transformers():
    layer = MixtureOfExperts(16, 24, 6, 2, shared_intermediate_size=8, shared_expert_gate=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "gate.weight": (6, 16),
        "experts.gate_up_proj": (6, 48, 16),
        "experts.down_proj": (6, 16, 24),
        "shared_experts.gate_proj.weight": (8, 16),
        "shared_experts.up_proj.weight": (8, 16),
        "shared_experts.down_proj.weight": (16, 8),
        "shared_expert_gate.weight": (1, 16),
    }
    plain = Experts(16, 24, 6, gated=False, bias=True)
    assert {name: tuple(value.shape) for name, value in plain.state_dict().items()} == {
        "up_proj": (6, 24, 16),
        "up_proj_bias": (6, 24),
        "down_proj": (6, 16, 24),
        "down_proj_bias": (6, 16),
    }


def test_initialisation_is_that_of_linear_layers():
    experts = Experts(64, 16, 50, bias=True)
    for name, fan_in in (("gate_up_proj", 64), ("down_proj", 16)):
        for parameter in (getattr(experts, name), getattr(experts, f"{name}_bias")):
            bound = fan_in**-0.5
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu"])
def test_autocast(device):
    layer = MixtureOfExperts(16, 24, 6, 2, shared_intermediate_size=8, device=device)
    x = torch.randn(30, 16, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        output, router = layer(x)
    assert output.dtype == router.weights.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())
    exact = layer(x, replay_indices=router.indices)[0]
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
@on_bias
@on_devices
def test_compile(device, bias, capacity_factor):
    torch._dynamo.reset()
    layer = MixtureOfExperts(
        16, 24, 6, 2, capacity_factor, bias=bias, shared_intermediate_size=8, device=device
    )
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for num_tokens in (30, 11, 7):
        x = torch.randn(num_tokens, 16, device=device)
        got, want = compiled(x)[0], layer(x)[0]
        assert_bitwise(got, want)
        got.sum().backward()
        want.sum().backward()
    for p, q in zip(compiled.parameters(), layer.parameters(), strict=True):
        assert_bitwise(p.grad, q.grad)


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_export(capacity_factor):
    layer = MixtureOfExperts(16, 24, 6, 2, capacity_factor, shared_intermediate_size=8)
    num_tokens = torch.export.Dim("num_tokens")
    inputs = (torch.randn(9, 16),)
    exported = torch.export.export(_OutputAlone(layer), inputs, dynamic_shapes=({0: num_tokens},))
    for n in (9, 31):
        x = torch.randn(n, 16)
        assert_bitwise(exported.module()(x), layer(x)[0])


class _OutputAlone(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def test_checkpointing():
    layer = MixtureOfExperts(16, 24, 6, 2, capacity_factor=0.8)
    again = copy.deepcopy(layer)
    x = torch.randn(30, 16)
    layer(x)[0].sum().backward()
    checkpoint(lambda y: again(y)[0], x, use_reentrant=False).sum().backward()
    for p, q in zip(layer.parameters(), again.parameters(), strict=True):
        assert_bitwise(p.grad, q.grad)


@on_devices
def test_same_bits_every_run(device):
    layer = MixtureOfExperts(16, 24, 6, 2, bias=True, capacity_factor=0.9, device=device)
    x = torch.randn(300, 16, device=device, requires_grad=True)

    def once():
        output = layer(x)[0]
        return output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])

    for got, want in zip(once(), once(), strict=True):
        assert_bitwise(got, want)


# ---- errors --------------------------------------------------------------------------------------


def test_wrong_options():
    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(*args, **options)

    refused("hidden_act: expected one of silu, .* got 'tanh'", 16, 24, 6, 2, hidden_act="tanh")
    refused("intermediate_size: expected a positive number, got 0", 16, 0, 6, 2)
    refused("k: expected 1 to 6", 16, 24, 6, 7)
    refused(
        "shared_intermediate_size: expected >= 0, got -1", 16, 24, 6, 2, shared_intermediate_size=-1
    )
    refused("shared_expert_gate: expected False without", 16, 24, 6, 2, shared_expert_gate=True)
    with pytest.raises(TypeError, match="scoring"):
        MixtureOfExperts(16, 24, 6, 2, router_options={"scoring": "sigmoid"})
    layer = MixtureOfExperts(16, 24, 6, 2)
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \(..., 16\)"):
        layer(torch.randn(3, 15))
    with pytest.raises(ValueError, match="expected weight in the dtype of rows"):
        layer.experts(torch.randn(3, 16).double(), torch.zeros(3, 1).int(), torch.ones(3, 1))


def test_ends_that_do_not_ascend():
    rows, weight = torch.randn(9, 16), torch.randn(3, 24, 16)
    for ends, message in (
        ([4, 2, 9], "to ascend up to the 9 rows, but got 2 at expert 1"),
        ([4, 5, 10], "to ascend up to the 9 rows, but got 10 at expert 2"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.omni_moe._omni_grouped_linear(rows, weight, torch.tensor(ends).int())

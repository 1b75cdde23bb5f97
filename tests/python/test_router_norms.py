"""The layer with a norm of each token's logits: causal, the same in training and evaluation."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_bitwise, assert_close, on_devices
from test_module import E, H, K, make_layer
from torch import nn

from omni_moe import OmniMoE, OmniMoEConfig, reference
from omni_moe.modules import omni_moe as layer_module
from omni_moe.modules.recording import recording

NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
on_norms = pytest.mark.parametrize("norm", NORMS)


def calls_of_the_op(monkeypatch):
    """What `omni_router_logits_per_token` is called with by layers from now on."""
    calls = []
    op = layer_module.omni_router_logits_per_token

    def recording(*args, **kwargs):
        calls.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(layer_module, "omni_router_logits_per_token", recording)
    return calls


@on_norms
def test_modules_and_state(norm):
    layer = make_layer(router_norm=norm, expert_grid=(6, 8))
    for module, width in ((layer.router_norm_x, 6), (layer.router_norm_y, 8)):
        assert type(module) is NORMS[norm]
        assert module.normalized_shape == (width,) and module.eps == 1e-5
    plain = make_layer(router_norm="none", expert_grid=(6, 8))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())
    layer.reset_parameters()


@on_norms
@on_devices
def test_agrees_with_the_reference(device, norm, monkeypatch):
    """The layer's op against the modules, called; forward and backward."""
    calls = calls_of_the_op(monkeypatch)
    dtype = torch.float64 if device == "cpu" else torch.float32
    layer = make_layer(device, dtype, router_norm=norm)
    x = torch.randn(37, H, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(y, leaves, grad)
    assert len(calls) == 1 and calls[0]["norm"] == norm and calls[0]["eps"] == 1e-5

    oracle = make_layer("cpu", torch.float64, router_norm=norm)
    oracle.load_state_dict(layer.state_dict())
    wide = x.detach().cpu().double().requires_grad_()
    want = reference.omni_moe(oracle, wide)
    assert_close(y, want, num_terms=100, terms=20 * want.abs().max().item())
    grads = torch.autograd.grad(want, [wide, *oracle.parameters()], grad.cpu().double())
    for one, other in zip(got, grads, strict=True):
        assert_close(one, other, num_terms=200, terms=50 * other.abs().max().item())


def hook(layer):
    layer.router_norm_x.register_forward_hook(lambda module, args, output: output.flip(-1))


def replace(layer):
    layer.router_norm_y = nn.GroupNorm(2, 8, affine=False, dtype=torch.float64)


def make_affine(layer):
    kind = type(layer.router_norm_x)
    layer.router_norm_x = kind(6, elementwise_affine=True, dtype=torch.float64)
    nn.init.normal_(layer.router_norm_x.weight)


def change_eps(layer):
    layer.router_norm_y.eps = 0.5


def share_batch_norm(layer):
    layer.router_norm_x = nn.BatchNorm1d(6, affine=False, dtype=torch.float64)


def leave_eps_to_the_dtype(layer):
    layer.router_norm_x = nn.RMSNorm(6, elementwise_affine=False)
    layer.router_norm_y = nn.RMSNorm(8, elementwise_affine=False)


CHANGES = (hook, replace, make_affine, change_eps, share_batch_norm, leave_eps_to_the_dtype)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@on_norms
def test_changed_modules_are_called(norm, change, monkeypatch):
    calls = calls_of_the_op(monkeypatch)
    layer = make_layer(router_norm=norm, expert_grid=(6, 8))
    x = torch.randn(37, H, dtype=torch.float64)
    before = layer(x)
    assert len(calls) == 1
    change(layer)
    got = layer(x)
    assert len(calls) == 1
    assert not torch.allclose(got, before)
    torch.testing.assert_close(got, reference.omni_moe(layer, x))


@on_norms
def test_norms_of_another_width_are_called_and_raise(norm):
    layer = make_layer(router_norm=norm, expert_grid=(6, 8))
    layer.router_norm_x = NORMS[norm](8, eps=1e-5, elementwise_affine=False)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer(torch.randn(37, H, dtype=torch.float64))


# ---- what a norm per token is for ----------------------------------------------------------------


@on_norms
@pytest.mark.parametrize("training", [True, False])
@on_devices
def test_earlier_tokens_do_not_see_later_ones(device, norm, training):
    """Not a bit of what they get changes. BatchNorm, in training, moves them all."""
    for name in (norm, "batch_norm"):
        layer = make_layer(device, torch.float32, router_norm=name).train(training)
        x = torch.randn(1, 37, H, device=device)
        before = layer(x)
        x[:, -1] = torch.randn(H, device=device)
        after = layer(x)
        moved = (after != before).any(-1)
        assert moved[0, -1]
        assert moved[0, :-1].any() == (name == "batch_norm" and training)


@on_norms
@on_devices
def test_training_computes_what_evaluation_does(device, norm):
    layer = make_layer(device, torch.float32, router_norm=norm)
    x = torch.randn(3, 7, H, device=device)
    assert_bitwise(layer.train()(x), layer.eval()(x))
    # A token alone is no special case.
    want = layer.eval()(x)[:1, :1].double()
    assert_close(layer.train()(x[:1, :1]), want, num_terms=99, terms=20 * want.abs().max().item())


class Policy(nn.Module):
    """A model of tokens that see each other only in the router's norm."""

    def __init__(self, norm):
        super().__init__()
        self.embed = nn.Embedding(16, H)
        self.layer = OmniMoE(
            OmniMoEConfig(
                hidden_size=H,
                intermediate_size=40,
                num_experts=E,
                num_experts_per_token=K,
                router_norm=norm,
                initializer_range=0.5,
            )
        )
        self.head = nn.Linear(H, 16)

    def log_probs(self, ids):
        """(B,): of each sequence."""
        logits = self.head(self.layer(self.embed(ids[:, :-1])))
        return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(-1)


@pytest.mark.parametrize("norm", [*NORMS, "none", "batch_norm"])
def test_dpo_starts_at_ln_2(norm):
    """A policy in training against itself in evaluation, its reference; not with BatchNorm."""
    policy, reference_model = Policy(norm).train(), Policy(norm).eval()
    reference_model.load_state_dict(policy.state_dict())
    chosen, rejected = torch.randint(16, (2, 4, 12))
    margins = [
        model.log_probs(chosen) - model.log_probs(rejected) for model in (policy, reference_model)
    ]
    loss = -F.logsigmoid(0.1 * (margins[0] - margins[1])).mean()
    difference = abs(loss.item() - math.log(2))
    assert difference > 1e-3 if norm == "batch_norm" else difference < 1e-5


# ---- compile, export, vmap -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_norms
@pytest.mark.parametrize("training", [True, False])
def test_vmap(norm, training):
    """In training, too: nothing is mutated."""
    layer = make_layer("cpu", torch.float64, router_norm=norm).train(training)
    x = torch.randn(3, 7, H, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


@on_norms
def test_export(norm):
    layer = make_layer("cpu", torch.float32, router_norm=norm)
    x = torch.randn(3, 7, H)
    program = torch.export.export(layer, (x,))
    assert_bitwise(program.module()(x), layer(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "omni_moe.omni_router_logits_per_token.default" in called


@on_norms
def test_compiled(norm):
    layer = make_layer("cpu", torch.float32, router_norm=norm)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, H, requires_grad=True)
    want, got = layer(x), compiled(x)
    assert_bitwise(got, want)
    grad = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, [x, *layer.parameters()], grad),
        torch.autograd.grad(want, [x, *layer.parameters()], grad),
        strict=True,
    ):
        assert_bitwise(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("gates_in_fp32", [False, True])
@on_norms
def test_halves(norm, gates_in_fp32):
    """Gates in fp32 beside halves make the router compute in fp32."""
    layer = make_layer("cpu", torch.bfloat16, router_norm=norm)
    if gates_in_fp32:
        layer.router_gate_x.float(), layer.router_gate_y.float()
    x = torch.randn(37, H, dtype=torch.bfloat16)
    dtypes = []
    with recording([layer], [dtypes]):
        assert layer(x).dtype == torch.bfloat16
    assert dtypes[0].logits_x.dtype == (torch.float32 if gates_in_fp32 else torch.bfloat16)


def test_transformers_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    from transformers_helpers import omni_config, random_ids

    from omni_moe.integrations.transformers import omni_moe_layers

    for norm, kind in NORMS.items():
        model = transformers.AutoModelForCausalLM.from_config(omni_config(router_norm=norm))
        model.save_pretrained(tmp_path / norm)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / norm)
        assert all(type(one.router_norm_x) is kind for one in omni_moe_layers(loaded).values())
        ids = random_ids()
        assert_bitwise(loaded.eval()(ids).logits, model.eval()(ids).logits)

"""Doge's mixture of experts and the experts interface, against Transformers' own modules."""

import copy

import pytest
import torch
from helpers import assert_bitwise, assert_close, on_devices
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import DogeConfig, DogeForCausalLM, NemotronHConfig  # noqa: E402
from transformers.models.doge.modeling_doge import DogeCDMoE  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts  # noqa: E402
from transformers_helpers import SIZES, random_ids  # noqa: E402

from omni_moe.integrations.transformers import OmniDogeCDMoE, replace_doge_moe  # noqa: E402

H, E, K = 32, 64, 5


# ---- Doge ----------------------------------------------------------------------------------------


def doge_config(**options) -> DogeConfig:
    experts = {"is_moe": True, "num_experts": E, "num_experts_per_tok": K}
    return DogeConfig(**(SIZES | experts | options))


def stock_doge(**options) -> DogeCDMoE:
    module = DogeCDMoE(doge_config(**options))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def check_against(stock: nn.Module, got: Tensor, module: nn.Module, inputs: list[Tensor]) -> None:
    """`got` is module(*inputs): output and gradients against the stock module in fp64."""
    inputs = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in inputs]
    stock = copy.deepcopy(stock).double()
    want = stock(*inputs)
    want = want[0] if isinstance(want, tuple) else want
    grad = torch.randn(got.shape)
    got.backward(grad.to(got.device))
    want.backward(grad.double())
    slack = {"num_terms": 1000, "accumulation_factor": 4}
    assert_close(got, want, **slack)
    wanted = dict(stock.named_parameters())
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, wanted[name].grad, name, **slack)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_topk_prob": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}],
    ids=str,
)
@on_devices
def test_doge_as_the_stock_module(device, options):
    stock = stock_doge(**options)
    module = OmniDogeCDMoE(doge_config(**options)).to(device)
    module.load_state_dict(stock.state_dict())
    x = torch.randn(3, 7, H)
    with torch.no_grad():
        want, want_logits = stock(x)
    # It normalises in place what softmax has normalised: the same values, but no backward.
    stock.norm_topk_prob = False
    got, got_logits = module(x.to(device))
    assert got.shape == want.shape and got_logits.shape == (2, 21, 8)
    torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(got_logits.cpu(), want_logits)
    check_against(stock, got, module, [x])


@on_devices
def test_doge_split_layout(device):
    """The stock module, given its logits token by token, as its view reads them."""
    stock = stock_doge().to(device)
    module = OmniDogeCDMoE(doge_config(), router_layout="split").to(device)
    module.load_state_dict(stock.state_dict())
    x = torch.randn(2, 6, H, device=device)
    got, got_logits = module(x)
    stock.router_gate.register_forward_hook(
        lambda gate, args, out: out.flatten(0, 1).unflatten(1, (2, 8)).transpose(0, 1).contiguous()
    )
    want, want_logits = stock(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_logits, want_logits)


def test_only_the_split_layout_keeps_tokens_apart():
    x = torch.randn(1, 6, H)
    other = x.clone()
    other[:, -1] += 1
    for layout, apart in (("split", True), ("hf_view", False)):
        module = OmniDogeCDMoE(doge_config(), router_layout=layout)
        module.load_state_dict(stock_doge().state_dict())
        assert torch.equal(module(x)[0][:, :-1], module(other)[0][:, :-1]) == apart


def test_replace_doge_moe(tmp_path):
    model = DogeForCausalLM(doge_config()).eval()
    stock = copy.deepcopy(model)
    assert replace_doge_moe(model) is model
    moes = [module for module in model.modules() if isinstance(module, DogeCDMoE)]
    assert len(moes) == 3 and all(type(module) is OmniDogeCDMoE for module in moes)
    assert list(model.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, 5, H)
    torch.testing.assert_close(moes[1](x)[0], stock.model.layers[1].mlp(x)[0])
    model.save_pretrained(tmp_path)
    again = DogeForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp) is DogeCDMoE
    assert_bitwise(again.model.layers[0].mlp.up_embed.weight, moes[0].up_embed.weight)


def test_doge_model():
    ids = random_ids()
    model = DogeForCausalLM(doge_config()).eval()
    try:
        want = model(ids, output_router_logits=True)
    except TypeError:
        pytest.skip("this Transformers' Doge decoder does not take the outputs of its own experts")
    got = replace_doge_moe(model)(ids, output_router_logits=True)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)


def test_wrong_doge():
    with pytest.raises(ValueError, match="num_experts: expected a square, got 60"):
        OmniDogeCDMoE(doge_config(num_experts=60))
    with pytest.raises(ValueError, match="router_layout: expected one of hf_view, split, got 'x'"):
        replace_doge_moe(DogeForCausalLM(doge_config()), router_layout="x")
    with pytest.raises(ValueError, match=r"expected a Doge model with config.is_moe=True"):
        replace_doge_moe(DogeForCausalLM(doge_config(is_moe=False)))
    model = DogeForCausalLM(doge_config())
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp: activation: .* got Tanh"):
        replace_doge_moe(model)


# ---- the experts interface -----------------------------------------------------------------------


def nemotron_config(**options) -> NemotronHConfig:
    """Attention and experts only, whose experts have no gate and width 1."""
    return NemotronHConfig(
        **{
            **SIZES,
            "layers_block_type": ["full_attention", "moe"],
            "mlp_hidden_act": "silu",
            "n_routed_experts": E,
            "num_experts_per_tok": K,
            "moe_intermediate_size": 1,
            "moe_shared_expert_intermediate_size": 24,
            **options,
        }
    )


def experts(device="cpu", implementation="omni_moe", **options) -> NemotronHExperts:
    config = nemotron_config(**options)
    config._experts_implementation = implementation
    module = NemotronHExperts(config).to(device)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def routing(num_tokens: int, device: str):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(num_tokens)])
    return ids.to(device), torch.rand(num_tokens, K, device=device)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@on_devices
def test_experts_as_the_stock_modules(device, activation):
    stock = experts(implementation="eager", mlp_hidden_act=activation)
    ours = copy.deepcopy(stock).to(device)
    ours.config._experts_implementation = "omni_moe"
    x = torch.randn(9, H)
    ids, weights = routing(9, device)
    got = ours(x.to(device), ids, weights)
    torch.testing.assert_close(got.cpu(), stock(x, ids.cpu(), weights.cpu()))
    check_against(stock, got, ours, [x, ids, weights])


@on_devices
def test_transposed_experts(device):
    ours = experts(device)
    transposed = copy.deepcopy(ours)
    transposed.is_transposed = True
    for name in ("up_proj", "down_proj"):
        weight = getattr(ours, name).detach().transpose(1, 2).contiguous()
        setattr(transposed, name, nn.Parameter(weight))
    x = torch.randn(9, H, device=device)
    assert_bitwise(transposed(x, *routing_of(9, device)), ours(x, *routing_of(9, device)))


def routing_of(seed: int, device: str):
    torch.manual_seed(seed)
    return routing(9, device)


@on_devices
def test_sentinels_contribute_nothing(device):
    module = experts(device)
    ids, weights = routing(6, device)
    x = torch.randn(6, H, device=device)
    with torch.no_grad():
        want = module(x, ids, weights.where(torch.arange(K, device=device) > 1, 0))
    ids[:, :2] = torch.tensor([E, E + 1000], device=device)
    ids[4] = E
    x[4] = float("nan")  # a masked token may hold anything
    weights[:, 0] = float("nan")
    want[4] = 0
    x.requires_grad_()
    got = module(x, ids, weights)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[4].any()
    for parameter in module.parameters():
        assert parameter.grad.isfinite().all()


@on_devices
def test_a_model_takes_it(device):
    config = nemotron_config()
    model = transformers.NemotronHForCausalLM(config).eval().to(device)
    ids = random_ids(device=device)
    model.set_experts_implementation("eager")
    want = model(ids).logits
    model.set_experts_implementation("omni_moe")
    torch.testing.assert_close(model(ids).logits, want)
    assert model.config._experts_implementation == "omni_moe"


def test_experts_that_are_not_atomic():
    ids, weights = routing(9, "cpu")
    x = torch.randn(9, H)

    def refused(module, message):
        with pytest.raises(ValueError, match=message):
            module(x, ids, weights)

    refused(experts(moe_intermediate_size=2), "NemotronHExperts to have width 1, got 2")
    refused(
        experts(mlp_hidden_act="relu2"),
        r"NemotronHExperts: activation: expected one of .* got ReLUSq",
    )
    for flag, what in (("has_gate", "no gate"), ("has_bias", "no bias")):
        module = experts()
        setattr(module, flag, True)
        refused(module, f"to have {what}, got {flag}=True")

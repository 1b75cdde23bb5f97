"""replace_mlp: the same function at first, generation, models that do not fit."""

import inspect
import json

import numpy as np
import pytest
import torch
from helpers import assert_bitwise, on_devices
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    FAMILIES,
    SIZES,
    dense_model,
    family_config,
    logits,
    omni_model,
    random_ids,
    replaced_model,
    wake_experts,
)

from omni_moe import OmniMoE  # noqa: E402
from omni_moe.integrations.transformers import (  # noqa: E402
    num_active_parameters,
    omni_moe_layers,
    replace_mlp,
)

# ---- the replacement -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@on_devices
def test_starts_as_the_same_function(device, family):
    model = dense_model(family).to(device)
    ids = random_ids(device=device)
    want = logits(model, ids)
    names = set(model.state_dict())
    assert replace_mlp(model, **EXPERTS) is model
    assert len(omni_moe_layers(model)) == 3
    torch.testing.assert_close(logits(model, ids), want)
    assert names < set(model.state_dict())
    assert {p.device.type for p in model.parameters()} == {device}
    assert not torch.allclose(logits(wake_experts(model), ids), want)


def test_keeps_weights_and_dtype():
    model = dense_model().to(torch.bfloat16)
    old = [block.mlp for block in model.model.layers]
    replace_mlp(model, **EXPERTS, layers=[2, 0], norm_topk_prob=True, expert_grid=(4, 16))
    assert [type(block.mlp) is OmniMoE for block in model.model.layers] == [True, False, True]
    for index in (0, 2):
        layer = model.model.layers[index].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert getattr(layer, name) is getattr(old[index], name)
        assert layer.config.grid == (4, 16) and layer.config.norm_topk_prob
        assert layer.up_embed.weight.dtype == torch.bfloat16 and layer.up_embed.weight.any()
        assert not layer.down_embed.weight.any()
        assert not layer.training
    assert model.model.layers[1].mlp is old[1]


def test_every_parameter_of_the_layer_learns():
    model = replace_mlp(dense_model(), **EXPERTS).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids(4, 32)
    for _ in range(2):  # down_embed moves first; only then do the others get gradients
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_second_call_changes_further_layers(tmp_path):
    model = replace_mlp(dense_model(), **EXPERTS, layers=[0])
    replace_mlp(model, num_experts=16, num_experts_per_token=2, layers=[2])
    wake_experts(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.config.num_experts for layer in omni_moe_layers(loaded).values()] == [64, 16]
    ids = random_ids()
    assert_bitwise(logits(loaded, ids), logits(model, ids))


def test_the_given_config_is_not_changed():
    config = family_config("Llama")
    before = config.to_dict()
    first = AutoModelForCausalLM.from_config(config)
    replace_mlp(first, **EXPERTS, layers=[1])
    assert config.to_dict() == before and type(config) is transformers.LlamaConfig
    second = replace_mlp(AutoModelForCausalLM.from_config(config), **EXPERTS, layers=[0])
    assert second.config.omni_moe["replaced"][0]["layers"] == [0]
    assert first.config.omni_moe["replaced"][0]["layers"] == [1]
    assert first.model.config is first.config
    assert first.model.layers[0].self_attn.config is first.config


def test_number_of_parameters():
    model = dense_model()
    dense = model.num_parameters()
    replace_mlp(model, **EXPERTS, layers=[0, 1])
    H, R, C, E, K = 32, 8, 8, 64, 4
    assert model.num_parameters() == dense + 2 * ((R + C) * H + 2 * E * H)
    active = dense + 2 * ((R + C) * H + 2 * K * H)
    assert model.num_active_parameters() == active == num_active_parameters(model)
    assert num_active_parameters(model, exclude_embeddings=True) == active - 61 * H


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@on_devices
def test_generation_with_cache(device, family):
    model = replaced_model(family).to(device)
    ids = random_ids(2, 5, device=device)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
    }
    with_cache = model.generate(ids, use_cache=True, **options)
    assert with_cache.shape == (2, 13)
    assert_bitwise(with_cache, model.generate(ids, use_cache=False, **options))
    # Every new token is the best one after those before it.
    assert_bitwise(with_cache[:, 5:], logits(model, with_cache).argmax(-1)[:, 4:-1])


@on_devices
def test_cached_logits(device):
    model = replaced_model().to(device)
    ids = random_ids(device=device)
    # Transformers renamed the argument and the output.
    arguments = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"
    prefix = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], **{name: prefix[name]})
    torch.testing.assert_close(rest.logits, logits(model, ids)[:, 7:])


# ---- models that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], r"layers: expected indices in \[0, 3\), got \[3\]"),
        ([-1, 0], r"layers: expected indices in \[0, 3\), got \[-1, 0\]"),
        ([], r"layers: expected None or layer indices, got \[\]"),
        (1, "layers: expected None or layer indices, got 1"),
        ([True], "layers: expected None or layer indices"),
    ],
)
def test_wrong_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        replace_mlp(dense_model(), **EXPERTS, layers=layers)


def test_wrong_models():
    with pytest.raises(ValueError, match="expected a PreTrainedModel, got Linear"):
        replace_mlp(nn.Linear(2, 2), **EXPERTS)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(
        ValueError, match=r"blocks that hold an MLP of gate_proj.*none in GPT2LMHead"
    ):
        replace_mlp(gpt2, **EXPERTS)
    t5gemma = transformers.T5GemmaModuleConfig(**SIZES)
    t5gemma = transformers.T5GemmaConfig(encoder=t5gemma, decoder=t5gemma, vocab_size=61)
    with pytest.raises(
        ValueError, match=r"expected a decoder, got T5GemmaForCond.* with its encoder"
    ):
        replace_mlp(transformers.T5GemmaForConditionalGeneration(t5gemma), **EXPERTS)
    with pytest.raises(ValueError, match="layer 0: gate_proj: expected a Linear without bias"):
        replace_mlp(dense_model(mlp_bias=True), **EXPERTS)
    with pytest.raises(ValueError, match=r"layer 0: activation: expected one of silu.* got Tanh"):
        replace_mlp(dense_model(hidden_act="tanh"), **EXPERTS)
    one_of_two = dense_model()
    one_of_two.model.layers[1].mlp.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match=r"layer 1: activation: expected one of .* got Tanh"):
        replace_mlp(one_of_two, **EXPERTS)
    with pytest.raises(ValueError, match="layer 0: expected a dense MLP, got an OmniMoE layer"):
        replace_mlp(omni_model(), **EXPERTS)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"num_experts_per_token: expected an int in \[1, 64\]"):
        replace_mlp(dense_model(), num_experts=64, num_experts_per_token=65)
    with pytest.raises(ValueError, match="router_norm: expected one of"):
        replace_mlp(dense_model(), **EXPERTS, router_norm="group_norm")


def test_layers_without_a_gated_mlp():
    config = transformers.Qwen2MoeConfig(
        **{name: size for name, size in SIZES.items() if name != "head_dim"},
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        mlp_only_layers=[1],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ValueError, match=r"expected blocks that hold an MLP of gate_proj.* \[1\], "
    ):
        replace_mlp(model, **EXPERTS)
    ids = random_ids()
    want = logits(model, ids)
    replace_mlp(model, **EXPERTS, layers=np.array([1]))
    assert json.loads(model.config.to_json_string())["omni_moe"]["replaced"][0]["layers"] == [1]
    torch.testing.assert_close(logits(model, ids), want)


def test_an_mlp_that_computes_something_else():
    model = dense_model()
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="layer 2: expected LlamaMLP to compute"):
        replace_mlp(model, **EXPERTS)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("training", [True, False])
def test_an_mlp_that_returns_something_else(training):
    model = dense_model().train(training)
    model.model.layers[1].mlp.forward = lambda x: (x, None)
    with pytest.raises(ValueError, match="layer 1: expected LlamaMLP to compute"):
        replace_mlp(model, **EXPERTS)
    assert {module.training for module in model.modules()} == {training}


def test_an_mlp_that_raises():
    model = dense_model().train()
    model.model.layers[1].mlp.forward = lambda x, router_logits: x
    with pytest.raises(TypeError, match="router_logits"):
        replace_mlp(model, **EXPERTS)
    assert {module.training for module in model.modules()} == {True}
    assert type(model) is transformers.LlamaForCausalLM


def test_a_default_device_does_not_show():
    model = dense_model()
    ids = random_ids()
    want = logits(model, ids)
    with torch.device("meta"):
        replace_mlp(model, **EXPERTS)
    torch.testing.assert_close(logits(model, ids), want)


def test_fewer_layers_than_were_replaced(tmp_path):
    replaced_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers: expected indices in \[0, 2\), got \[0, 1, 2\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)


def test_a_config_of_a_replaced_model_builds_its_layers(tmp_path):
    replaced_model(layers=[1]).config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert list(omni_moe_layers(model)) == ["model.layers.1.mlp"]
    assert model(random_ids()).logits.isfinite().all()


def test_a_base_that_is_not_known(tmp_path):
    replaced_model().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["omni_moe"]["base_model_type"] = "somebody's"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match='base_model_type that AutoConfig knows, got "somebody\'s"'
    ):
        AutoConfig.from_pretrained(tmp_path)

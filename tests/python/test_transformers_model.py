"""OmniMoeForCausalLM: configuration, presets, Auto classes, agreement with its parts, counts."""

import copy

import pytest
import torch
from helpers import assert_bitwise, on_devices
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: E402
from transformers_helpers import (  # noqa: E402
    SIZES,
    family_config,
    omni_config,
    omni_model,
    random_ids,
)

from omni_moe.integrations.transformers import (  # noqa: E402
    PRESETS,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    OmniMoeModel,
    omni_moe_layers,
)

H, L = SIZES["hidden_size"], SIZES["num_hidden_layers"]


# ---- configuration -------------------------------------------------------------------------------


def test_config_round_trip(tmp_path):
    config = omni_config(
        norm_topk_prob=True, expert_grid=(4, 16), router_norm="none", hidden_act="gelu_pytorch_tanh"
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is OmniMoeConfig
    layer = loaded.layer_config()
    assert layer == config.layer_config()
    assert layer.grid == (4, 16) and layer.hidden_act == "gelu_tanh" and layer.norm_topk_prob
    assert loaded.num_experts_per_tok == loaded.num_experts_per_token == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts_per_token": 65}, r"num_experts_per_token: expected an int in \[1, 64\]"),
        ({"num_experts": 61}, "num_experts: expected a number with a factorisation"),
        ({"expert_grid": (3, 16)}, r"expert_grid: expected rows \* cols = num_experts"),
        ({"router_norm": "group_norm"}, "router_norm: expected one of batch_norm, layer_norm"),
        ({"hidden_act": "tanh"}, "activation: expected one of silu.*, got 'tanh'"),
    ],
    ids=str,
)
def test_wrong_configs(options, message):
    with pytest.raises(ValueError, match=message):
        omni_config(**options)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = OmniMoeConfig.from_preset(name, vocab_size=1000)
    num_layers, hidden_size = map(int, name.split("x"))
    assert (config.num_hidden_layers, config.hidden_size) == (num_layers, hidden_size)
    assert config.layer_config().grid == (320, 320)
    with torch.device("meta"):
        model = OmniMoeForCausalLM(config)
    expert_tables = 2 * num_layers * 320 * 320 * hidden_size
    assert 0 < model.num_parameters() - expert_tables < 0.1 * expert_tables
    chosen = 2 * num_layers * 512 * hidden_size
    assert model.num_active_parameters() == model.num_parameters() - expert_tables + chosen


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"name: expected one of 12x768.*, got 'large'"):
        OmniMoeConfig.from_preset("large")


# ---- the model -----------------------------------------------------------------------------------


def test_auto_classes(tmp_path):
    model = omni_model(track_expert_load=True)
    assert type(model) is OmniMoeForCausalLM and len(omni_moe_layers(model)) == L
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is OmniMoeForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for layer in omni_moe_layers(loaded).values():
        assert not layer.expert_load().counts.any()
    ids = random_ids()
    assert_bitwise(loaded(ids).logits, model(ids).logits)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is OmniMoeModel
    assert_bitwise(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_initial_weights():
    model = omni_model(hidden_size=256, num_experts=1024, initializer_range=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "layernorm.weight")):
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() / 0.1 - 1) < 0.1, name
    embed = model.model.embed_tokens.weight
    assert not embed[SIZES["pad_token_id"]].any()
    for layer in omni_moe_layers(model).values():
        assert (layer.router_norm_x.running_mean == 0).all()


@on_devices
def test_without_experts_it_is_the_dense_decoder(device):
    """The same weights in Transformers' Qwen3, whose MLP is the shared branch."""
    model = omni_model(tie_word_embeddings=False).to(device)
    for layer in omni_moe_layers(model).values():
        nn.init.zeros_(layer.down_embed.weight)
    dense = Qwen3ForCausalLM(family_config("Qwen3", tie_word_embeddings=False)).eval().to(device)
    dense.load_state_dict({name: model.state_dict()[name] for name in dense.state_dict()})
    ids = random_ids(device=device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got, want = (m(ids, attention_mask=mask).logits for m in (model, dense))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


@on_devices
def test_generation_with_cache(device):
    model = omni_model().to(device)
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


@on_devices
def test_training_lowers_the_loss(device):
    model = omni_model(norm_topk_prob=True).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = random_ids(4, 16, device=device)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


@pytest.mark.parametrize("use_reentrant", [True, False])
@on_devices
def test_gradient_checkpointing(device, use_reentrant):
    model = omni_model().to(device).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ids = random_ids(4, 16, device=device)
    for each in (model, checkpointed):
        each(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(model.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        assert_bitwise(parameter.grad, wanted[name].grad, name)


def test_compile():
    torch._dynamo.reset()
    model = omni_model()
    ids = random_ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)

"""replace_mlp: the same function at first, checkpoints, generation, bad models."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import assert_bitwise, environment, on_devices
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    FAMILIES,
    SIZES,
    dense_model,
    family_config,
    omni_model,
    random_ids,
    replaced_model,
    vision_language_model,
    wake_experts,
)

import omni_moe.integrations.transformers  # noqa: E402
from omni_moe import OmniMoE  # noqa: E402
from omni_moe.integrations.transformers import (  # noqa: E402
    num_active_parameters,
    omni_moe_layers,
    replace_mlp,
)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


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


# ---- classes and checkpoints ---------------------------------------------------------------------


def test_classes():
    model = replaced_model()
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == "OmniMoeLlamaForCausalLM"
    assert isinstance(model.config, transformers.LlamaConfig)
    assert model.config.model_type == "llama"
    assert not [name for name in model.config.base_model_tp_plan if ".mlp." in name]
    assert json.loads(model.config.to_json_string())["model_type"] == "omni_moe_replaced"


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    model = replaced_model(family, layers=[0, 2], track_expert_load=True)
    ids = random_ids()
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["error_msgs"]
    assert type(loaded) is type(model)
    assert loaded.config.omni_moe["replaced"] == model.config.omni_moe["replaced"]
    for layer in omni_moe_layers(loaded).values():
        assert not layer.expert_load().counts.any()
    assert_bitwise(logits(loaded, ids), want)
    assert_bitwise(logits(type(model).from_pretrained(tmp_path), ids), want)

    loaded.save_pretrained(tmp_path / "again")
    first, again = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path, tmp_path / "again")
    )
    assert first == again


def test_the_bare_decoder_and_a_classifier(tmp_path):
    model = replaced_model()
    model.save_pretrained(tmp_path)
    ids = random_ids()
    want = model(ids, output_hidden_states=True).hidden_states

    decoder = AutoModel.from_pretrained(tmp_path)
    got = decoder(ids, output_hidden_states=True)
    for layer_got, layer_want in zip(got.hidden_states, want, strict=True):
        assert_bitwise(layer_got, layer_want)
    decoder.save_pretrained(tmp_path / "decoder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    assert_bitwise(again.model(ids).last_hidden_state, got.last_hidden_state)

    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(omni_moe_layers(classifier)) == 3
    assert_bitwise(classifier.model(ids).last_hidden_state, got.last_hidden_state)


def test_replacing_in_a_bare_decoder():
    decoder = replace_mlp(AutoModel.from_config(family_config("Llama")), **EXPERTS)
    assert type(decoder).__name__ == "OmniMoeLlamaModel"
    assert len(decoder(random_ids(), output_hidden_states=True).hidden_states) == 4


@on_devices
def test_low_precision_loading(device, tmp_path):
    pytest.importorskip("accelerate")  # for device_map
    replaced_model(track_expert_load=True).save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "device_map": device}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {device}
    assert logits(loaded, random_ids(device=device)).isfinite().all()


def test_buffers_that_are_in_no_checkpoint(tmp_path):
    """Those of Falcon-H1's mamba layers are filled by another module's initialisation."""
    model = AutoModelForCausalLM.from_config(transformers.FalconH1Config(**SIZES)).eval()
    wake_experts(replace_mlp(model, **EXPERTS)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = dict(model.named_buffers())
    assert any("mup_vector" in name for name in wanted)
    for name, buffer in loaded.named_buffers():
        assert_bitwise(buffer, wanted[name], name)
    ids = random_ids()
    assert_bitwise(logits(loaded, ids), logits(model, ids))


def test_the_language_model_beside_a_vision_tower(tmp_path):
    """Both have blocks with a gated MLP."""
    model = vision_language_model().eval()
    ids = random_ids()
    want = logits(model, ids)
    replace_mlp(model, **EXPERTS)
    assert list(omni_moe_layers(model)) == [
        f"model.language_model.layers.{i}.mlp" for i in range(3)
    ]
    torch.testing.assert_close(logits(model, ids), want)
    wake_experts(model).save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(model)
    assert_bitwise(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("head", ["QuestionAnswering", "TokenClassification"])
def test_other_heads(head, tmp_path):
    replaced_model().save_pretrained(tmp_path / "causal")
    auto_class = getattr(transformers, f"AutoModelFor{head}")
    model = auto_class.from_pretrained(tmp_path / "causal")
    assert len(omni_moe_layers(model)) == 3
    model.save_pretrained(tmp_path / head)
    loaded = auto_class.from_pretrained(tmp_path / head)
    ids = random_ids()
    with torch.no_grad():
        for got, want in zip(loaded(ids).to_tuple(), model(ids).to_tuple(), strict=True):
            assert_bitwise(got, want)


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
def test_sharded_checkpoints(kind, tmp_path):
    model = replaced_model() if kind == "replaced" else omni_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = random_ids()
    assert_bitwise(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


# ---- accelerate's device maps --------------------------------------------------------------------


def device_map(middle: str) -> dict[str, str]:
    """The middle block's device is another than that of the rest."""
    names = ["embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2"]
    devices = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    return devices | {"model.layers.1": middle}


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
def test_offloaded_layers(kind, tmp_path):
    pytest.importorskip("accelerate")
    model = replaced_model() if kind == "replaced" else omni_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map("disk"), offload_folder=tmp_path / "offload"
    )
    layer = omni_moe_layers(loaded)["model.layers.1.mlp"]
    assert layer.up_embed.weight.is_meta and layer.up_proj.weight.is_meta
    ids = random_ids()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    assert layer.up_embed.weight.is_meta


def test_replacing_offloaded_mlps(tmp_path):
    pytest.importorskip("accelerate")
    dense_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map("disk"), offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="layer 1: gate_proj: expected weights on a device"):
        replace_mlp(model, **EXPERTS)
    assert not omni_moe_layers(model)


def test_placed_layers_keep_their_kernels():
    """A device map over several devices puts a hook on each module; none needs to be called."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer = omni_moe_layers(replaced_model())["model.layers.0.mlp"]
    x = torch.randn(3, 5, 32)
    want = layer(x)
    for module in layer.children():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
        module._old_forward = None
    assert_bitwise(layer(x), want)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    model = replaced_model()
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model) and copied.config.to_dict() == model.config.to_dict()
    ids = random_ids()
    assert_bitwise(logits(copied, ids), logits(model, ids))


FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
replaced, scratch, ids, out = sys.argv[1:]
for path, model_type in ((replaced, "omni_moe_replaced"), (scratch, "omni_moe")):
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except ValueError as error:
        assert f"model type `{model_type}`" in str(error), error
    else:
        raise AssertionError("loaded without its experts")

import omni_moe.integrations.transformers
ids = torch.load(ids)
models = [AutoModelForCausalLM.from_pretrained(path) for path in (replaced, scratch)]
with torch.no_grad():
    torch.save([model(ids).logits for model in models], out)
"""


def test_loading_in_a_fresh_process(tmp_path):
    models = {"replaced": replaced_model(), "scratch": omni_model()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    ids = random_ids()
    torch.save(ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in (*models, "ids.pt", "logits.pt")]
    command = [sys.executable, "-c", FRESH_PROCESS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "logits.pt")
    for got_logits, model in zip(got, models.values(), strict=True):
        assert_bitwise(got_logits, logits(model, ids))


WITHOUT_TRANSFORMERS = """
import sys, omni_moe, omni_moe.integrations
assert "transformers" not in sys.modules
sys.modules["transformers"] = None  # as if it were not installed
try:
    import omni_moe.integrations.transformers
except ImportError as error:
    assert "needs Transformers 5.17 or newer, found none: pip install" in str(error), error
else:
    raise AssertionError("imported")
"""


def test_import_without_transformers():
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_import_with_an_old_transformers(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"needs Transformers 5\.17 or newer, found 5\.16\.2"):
        importlib.reload(omni_moe.integrations.transformers)


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
    prefix = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=prefix.past_key_values)
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
    with pytest.raises(ValueError, match="layer 0: gate_proj: expected a Linear without bias"):
        replace_mlp(dense_model(mlp_bias=True), **EXPERTS)
    with pytest.raises(ValueError, match=r"activation: expected one of silu.* got Tanh"):
        replace_mlp(dense_model(hidden_act="tanh"), **EXPERTS)
    with pytest.raises(ValueError, match="layer 0: expected a dense MLP, got an OmniMoE layer"):
        replace_mlp(omni_model(), **EXPERTS)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"num_experts_per_token: expected an int in \[1, 64\]"):
        replace_mlp(dense_model(), num_experts=64, num_experts_per_token=65)
    with pytest.raises(ValueError, match="router_norm: expected one of"):
        replace_mlp(dense_model(), **EXPERTS, router_norm="layer_norm")


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

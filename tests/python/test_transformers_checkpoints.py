"""replace_mlp and checkpoints: classes, saving and loading, copies, processes, device maps."""

import copy
import functools
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import assert_bitwise, environment, on_devices
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    FAMILIES,
    SIZES,
    audio_language_model,
    dense_model,
    family_config,
    logits,
    omni_config,
    omni_model,
    random_ids,
    replaced_model,
    vision_language_model,
    wake_experts,
)

import omni_moe.integrations.transformers  # noqa: E402
from omni_moe.integrations.transformers import (  # noqa: E402
    OmniMoeForCausalLM,
    omni_moe_layers,
    replace_mlp,
)

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


def encoder() -> transformers.PreTrainedModel:
    config = transformers.EuroBertConfig(**SIZES, mask_token_id=3)
    return transformers.EuroBertForMaskedLM(config)


AUTO_CLASSES = {
    "masked language model": (encoder, "MaskedLM"),
    "classifier of an encoder": (
        lambda: transformers.EuroBertForSequenceClassification(encoder().config),
        "SequenceClassification",
    ),
    "vision": (functools.partial(vision_language_model, "Qwen2VL"), "MultimodalLM"),
    "vision as text": (functools.partial(vision_language_model, "Qwen2VL"), "ImageTextToText"),
    "audio": (audio_language_model, "MultimodalLM"),
    "audio as text": (audio_language_model, "Seq2SeqLM"),
}


@pytest.mark.parametrize("case", AUTO_CLASSES)
def test_every_auto_class(case, tmp_path):
    """Those of the base make the replaced model."""
    make, name = AUTO_CLASSES[case]
    model = wake_experts(replace_mlp(make(), **EXPERTS)).eval()
    auto_class = getattr(transformers, f"AutoModelFor{name}")
    assert f"AutoModelFor{name}" in model.config.auto_map
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(model) and len(omni_moe_layers(loaded)) == 3
    ids = random_ids()
    with torch.no_grad():
        assert_bitwise(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert len(omni_moe_layers(decoder)) == 3
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_auto_classes_of_a_part():
    """Gated models that Transformers' Auto classes know by a part of their config are left out."""
    model = replace_mlp(vision_language_model(), **EXPERTS)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(model.config)


def test_class_labels_and_rewards(tmp_path):
    """Heads on a checkpoint of OmniMoeForCausalLM, and back."""
    causal = omni_model()
    causal.save_pretrained(tmp_path / "causal")
    ids = random_ids()
    for head, width in (("SequenceClassification", 1), ("TokenClassification", 5)):
        auto_class = getattr(transformers, f"AutoModelFor{head}")
        model = auto_class.from_pretrained(tmp_path / "causal", num_labels=width)
        assert type(model).__name__ == f"OmniMoeFor{head}"
        assert_bitwise(model.model(ids).last_hidden_state, causal.model(ids).last_hidden_state)
        model.save_pretrained(tmp_path / head)
        again = auto_class.from_pretrained(tmp_path / head)
        assert again(ids).logits.shape[-1] == width
        assert_bitwise(again(ids).logits, model(ids).logits)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "causal")
    assert model(ids).start_logits.shape == (2, 11)


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


class Redrawn(OmniMoeForCausalLM):
    """Custom code as Transformers knows it: draws weights in place."""

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()


def test_subclasses_are_custom_code(tmp_path):
    """Transformers must not initialise again what it has loaded."""
    model = Redrawn(omni_config(tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = Redrawn.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert_bitwise(value, model.state_dict()[name], name)
    assert Redrawn.is_custom_code() and not OmniMoeForCausalLM.is_custom_code()
    assert not type(replaced_model()).is_custom_code()


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

"""Weights of 4 and 8 bits, and training adapters on them: the layer runs where a stock one does."""

import copy

import pytest
import torch
from helpers import assert_bitwise

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    dense_model,
    omni_model,
    random_ids,
    wake_experts,
)

from omni_moe.integrations.transformers import omni_moe_layers, replace_mlp  # noqa: E402

KINDS = ["replaced", "scratch"]
# bitsandbytes quantises blocks of 64 weights.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def model_of(kind, dtype=torch.float32):
    if kind == "scratch":
        return wake_experts(omni_model(**WIDE)).to(dtype)
    return wake_experts(replace_mlp(dense_model(**WIDE).to(dtype), **EXPERTS))


def statistics(model):
    return {name: t for name, t in model.named_buffers() if ".running_" in name}


def train_and_generate(model):
    """A step without and one under autocast, an evaluation, a generation."""
    ids = random_ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    learnt = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert learnt and all(grad is not None and grad.isfinite().all() for grad in learnt)
    model.eval()
    assert model(ids).logits.isfinite().all()
    new = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert new.shape == (2, 14)


# ---- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_stay_in_fp32(dtype, tmp_path):
    model = replace_mlp(dense_model().to(dtype), **EXPERTS)
    assert {t.dtype for t in statistics(model).values()} == {torch.float32}
    model(random_ids())
    wake_experts(model).save_pretrained(tmp_path)
    for options in ({}, {"dtype": dtype}, {"dtype": "auto"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        for name, buffer in statistics(loaded).items():
            assert_bitwise(buffer, statistics(model)[name], name)
        loaded(random_ids())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert {t.dtype for t in statistics(fresh).values()} == {torch.float32}


@pytest.mark.parametrize("modules_to_save", [None, ["router_norm_x", "router_norm_y"]], ids=str)
@pytest.mark.parametrize("targets", [["q_proj"], ["router_gate_x"], "all-linear"], ids=str)
@pytest.mark.parametrize("stats_dtype", [torch.float32, torch.bfloat16])
def test_parameters_cast_to_fp32(stats_dtype, targets, modules_to_save):
    """As PEFT casts them, and not the buffers, before it trains adapters on few bits."""
    peft = pytest.importorskip("peft")
    model = model_of("replaced", torch.bfloat16)
    for buffer in statistics(model).values():
        buffer.data = buffer.to(stats_dtype)
    model = peft.prepare_model_for_kbit_training(model)
    lora = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=modules_to_save)
    model = peft.get_peft_model(model, lora)
    before = copy.deepcopy(statistics(model))
    train_and_generate(model)
    moved = statistics(model)
    assert {t.dtype for t in moved.values()} == {stats_dtype}
    assert any((moved[name] != before[name]).any() for name in moved)


# ---- weights of few bits -------------------------------------------------------------------------

BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 with a list of its own": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights(bitsandbytes, kind, bits, dtype, tmp_path):
    peft = pytest.importorskip("peft")
    model_of(kind).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**BITS[bits])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=dtype, device_map="cpu"
    )
    for layer in omni_moe_layers(loaded).values():
        for name in ("router_gate_x", "router_gate_y"):
            gate = layer.get_submodule(name)
            assert type(gate) is torch.nn.Linear and gate.weight.is_floating_point()
        assert layer.up_embed.weight.dtype == layer.down_embed.weight.dtype == dtype
        assert type(layer.gate_proj) is not torch.nn.Linear
    ids = random_ids()
    assert loaded(ids).logits.isfinite().all()
    assert loaded.generate(input_ids=ids, max_new_tokens=2, eos_token_id=None).shape == (2, 13)

    prepared = peft.prepare_model_for_kbit_training(loaded)
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    train_and_generate(peft.get_peft_model(prepared, lora))


@pytest.mark.parametrize("stats_dtype", [torch.float32, torch.bfloat16])
def test_quantised_gates(bitsandbytes, stats_dtype):
    """Who quantises them by hand has a layer that runs, whatever the dtype of its statistics."""
    model = dense_model(**WIDE)  # and gates as wide as bitsandbytes wants them
    model = wake_experts(replace_mlp(model, num_experts=1024, num_experts_per_token=4))
    for buffer in statistics(model).values():
        buffer.data = buffer.to(stats_dtype)
    want = copy.deepcopy(model)
    for layer, other in zip(*(omni_moe_layers(m).values() for m in (model, want)), strict=True):
        for name in ("router_gate_x", "router_gate_y"):
            gate = layer.get_submodule(name)
            quantised = bitsandbytes.nn.Linear4bit(*gate.weight.shape[::-1], bias=False)
            quantised.load_state_dict(gate.state_dict())
            setattr(layer, name, quantised.to("cpu"))
            assert not layer.get_submodule(name).weight.is_floating_point()
            # The same numbers without the quantised module.
            weight = bitsandbytes.functional.dequantize_4bit(
                quantised.weight.data, quantised.weight.quant_state
            )
            other.get_submodule(name).weight.data = weight
    ids = random_ids()
    torch.testing.assert_close(model(ids).logits, want(ids).logits)
    train_and_generate(model)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_checkpoints(bitsandbytes, kind, tmp_path):
    model_of(kind).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**BITS["nf4"])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    )
    loaded.save_pretrained(tmp_path / "nf4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu")
    ids = random_ids()
    assert_bitwise(again(ids).logits, loaded(ids).logits)

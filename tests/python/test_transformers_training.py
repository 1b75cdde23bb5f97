"""Trainer, resuming, router losses in the loss of a model."""

import inspect
import math

import pytest
import torch
from helpers import assert_bitwise, on_devices

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_helpers import LOSSES, balanced_model, make_trainer, tracked_models  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    dense_model,
    family_config,
    omni_model,
    random_ids,
    vision_language_model,
)

from omni_moe import router_loss  # noqa: E402
from omni_moe.integrations.transformers import (  # noqa: E402
    ExpertLoadCallback,
    omni_moe_layers,
    replace_mlp,
)


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
@on_devices
def test_trainer(device, options, kind, examples, tmp_path):
    model = tracked_models()[kind]
    trainer = make_trainer(model, examples, tmp_path, device, **options)
    ExpertLoadCallback().add_to(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["loss"] < 0.9 * logged[0]["loss"]
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").to(model.device)
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without its autocast
    ids = random_ids(device=device)
    with torch.no_grad():
        assert_bitwise(loaded(ids).logits, model.eval()(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (2, 14)


def test_resuming(examples, tmp_path):
    whole, resumed = tracked_models()["replaced"], tracked_models()["replaced"]
    resumed.load_state_dict(whole.state_dict())
    make_trainer(whole, examples, tmp_path).train()
    trainer = make_trainer(resumed, examples, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    wanted = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert_bitwise(value, wanted[name], name)


# ---- router losses -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
@on_devices
def test_router_loss_is_part_of_the_loss_in_training(device, kind):
    model = balanced_model(kind).to(device)
    base = LlamaForCausalLM if kind == "replaced" else Qwen3ForCausalLM
    ids = random_ids(device=device)
    task = model(ids, labels=ids).loss
    assert_bitwise(task, base.forward(model, ids, labels=ids).loss)
    model.train()
    outputs = model(ids, labels=ids)
    assert outputs["loss"] is outputs.loss
    assert router_loss(model) > 1  # three layers of at least 0.5 each
    assert_bitwise(outputs.loss, base.forward(model, ids, labels=ids).loss + router_loss(model))
    assert_bitwise(model(ids, labels=ids, return_dict=False)[0], outputs.loss)
    assert model(ids).loss is None
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, task)
    # The Trainer chooses a dataset's columns by it.
    assert inspect.signature(model.forward) == inspect.signature(base(model.config).forward)
    outputs.loss.backward()
    for layer in omni_moe_layers(model).values():
        assert layer.router_gate_x.weight.grad.any()


def test_router_loss_of_a_classifier():
    config = family_config("Llama", num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).train()
    replace_mlp(model, **EXPERTS, **LOSSES)
    ids, labels = random_ids(), torch.tensor([0, 2])
    loss = model(ids, labels=labels).loss
    added = router_loss(model)
    assert added > 1
    assert_bitwise(loss, model.eval()(ids, labels=labels).loss + added)


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
def test_router_options_are_saved(kind, tmp_path):
    model = balanced_model(kind, router_jitter_noise=0.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    layers = zip(omni_moe_layers(loaded).values(), omni_moe_layers(model).values(), strict=True)
    for layer, saved in layers:
        assert layer.config == saved.config and layer.config.has_router_loss
    ids = random_ids()
    loss = loaded(ids, labels=ids).loss
    assert loss > loaded.eval()(ids, labels=ids).loss + 1


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
@on_devices
def test_trainer_balances(device, options, kind, examples, tmp_path):
    """With the router's loss in the Trainer's, and only with it, that loss falls."""
    model = balanced_model(kind).to(device)
    ids = torch.stack([example["input_ids"] for example in examples]).to(device)

    def cost():
        model.train()(ids)
        return router_loss(model).item()

    for layer in omni_moe_layers(model).values():
        torch.nn.init.normal_(layer.router_gate_x.weight, std=0.5)
    before = cost()
    trainer = make_trainer(model, examples, tmp_path, device, **options)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert cost() < 0.95 * before
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] > math.log(8) + 1


def test_share_of_a_vision_language_model():
    """Its labels are shifted, too, as the Trainer counts them."""
    model = vision_language_model().train()
    replace_mlp(model, **EXPERTS, router_norm="none", router_z_loss_coef=0.1)
    ids = random_ids(4, 4)
    loss = model(input_ids=ids, labels=ids).loss
    counted = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4 * 3)).loss
    torch.testing.assert_close(counted, loss)


@pytest.mark.parametrize("kind", ["replaced", "scratch", "peft"])
def test_label_smoothing_shifts_labels(kind, examples, tmp_path):
    """The Trainer's own loss is that of the next token, as for Transformers' classes."""
    model = omni_model() if kind == "scratch" else replace_mlp(dense_model(), **EXPERTS)
    if kind == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"])
        model = peft.get_peft_model(model, config)
    options = {"label_smoothing_factor": 0.1, "max_steps": 40}
    trainer = make_trainer(model, examples, tmp_path, **options)
    ids = torch.stack([example["input_ids"] for example in examples])
    before = model.eval()(ids, labels=ids).loss
    trainer.train()
    assert model.eval()(ids, labels=ids).loss < before / 2


def test_gradient_accumulation_weighs_the_router_loss_once(examples, tmp_path):
    """The z-loss is a mean over tokens: the same in one batch as in micro-batches."""
    losses = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        model = balanced_model("replaced", router_aux_loss_coef=0.0)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        options = {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
        trainer = make_trainer(model, examples, tmp_path, **sizes, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_router_loss_refuses_reentrant_checkpointing():
    model = balanced_model("scratch").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = random_ids()
    with pytest.raises(RuntimeError, match="use use_reentrant=False"):
        model(ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("kind", ["replaced", "scratch"])
def test_compiled_router_loss(kind):
    torch._dynamo.reset()
    model = balanced_model(kind).train()
    ids = random_ids()
    want = model(ids, labels=ids, use_cache=False).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, want)
    loss.backward()

"""PEFT: adapters beside the layer and of its experts, what is saved of them, router losses."""

import copy
import warnings

import pytest
import torch
from helpers import assert_bitwise

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_helpers import balanced_model, make_trainer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers_helpers import omni_model, random_ids, replaced_model  # noqa: E402

from omni_moe.integrations.transformers import ExpertLoadCallback, omni_moe_layers  # noqa: E402


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj", "router_gate_x"], ["down_proj"], "all-linear"], ids=str
)
@pytest.mark.parametrize("kind", ["replaced", "scratch"])
def test_lora(peft, kind, targets, examples, tmp_path):
    base = replaced_model() if kind == "replaced" else omni_model()
    base.save_pretrained(tmp_path / "base")
    frozen = copy.deepcopy(base.state_dict())
    # Training moves the running statistics of the router's BatchNorm: the adapter must hold them.
    norms = ["router_norm_x", "router_norm_y"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=norms)
    model = peft.get_peft_model(base, config)
    trainer = make_trainer(model, examples, tmp_path)
    trainer.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.any(), f"{name} has not learnt"
    trained = model.base_model.model.state_dict()
    for name, value in frozen.items():
        module, _, leaf = name.rpartition(".")
        wrapped = next(
            n
            for n in (name, f"{module}.base_layer.{leaf}", f"{module}.original_module.{leaf}")
            if n in trained
        )
        assert_bitwise(trained[wrapped], value, name)

    trainer.save_model(str(tmp_path / "adapter"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    ids = random_ids()
    with torch.no_grad():
        assert_bitwise(again(ids).logits, model.eval()(ids).logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)


def saving_warns(model, out, **options) -> bool:
    """Whether it is said that running statistics are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(out, **options)
    messages = [str(warning.message) for warning in caught]
    found = [m for m in messages if "saved without the running statistics of the routers" in m]
    assert len(found) <= 1
    return bool(found)


@pytest.mark.parametrize("how", ["PeftModel", "add_adapter", "Trainer"])
@pytest.mark.parametrize("kind", ["replaced", "scratch"])
def test_adapters_without_running_statistics(peft, kind, how, examples, tmp_path):
    """They compute something else when they are loaded, which is said as they are saved."""

    def trained(**options):
        base = replaced_model(**options) if kind == "replaced" else omni_model(**options)
        base.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=to_save)
        if how == "add_adapter":
            try:
                base.add_adapter(config)
            except ValueError as error:
                pytest.skip(str(error))  # this Transformers wants a newer PEFT
            model = base
        else:
            model = peft.get_peft_model(base, config)
        if how == "Trainer":
            make_trainer(model, examples, tmp_path, max_steps=1).train()
        else:
            model.train()(random_ids())
        return model

    norms = ["router_norm_x", "router_norm_y"]
    ids = random_ids()
    for to_save, options, expected in (
        (None, {}, True),
        (["layers.0.mlp"], {}, True),
        (norms, {}, False),
        (["mlp"], {}, False),
        (None, {"router_norm": "none"}, False),
    ):
        if options and kind == "replaced":
            continue  # has no statistics to wake
        model = trained(**options)
        assert saving_warns(model, tmp_path / "adapter") == expected, to_save
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
        with torch.no_grad():
            same = torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
        assert same != expected, to_save
    assert not saving_warns(replaced_model().train(), tmp_path / "whole")


def test_training_the_experts_themselves(peft, examples, tmp_path):
    base = replaced_model(layers=[1], track_expert_load=True)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])
    model = peft.get_peft_model(base, config)
    trainer = make_trainer(model, examples, tmp_path)
    ExpertLoadCallback().add_to(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["expert_usage/0"] > 0
    assert "expert_usage/1" not in trainer.state.log_history[0]
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    ids = random_ids()
    with torch.no_grad():
        assert_bitwise(again(ids).logits, model.eval()(ids).logits)


def test_router_loss_with_adapters(peft):
    """PEFT calls the forward of the model itself; copies of layers that it keeps do not count."""
    base = balanced_model("replaced")
    targets, ids = ["q_proj", "router_gate_x"], random_ids()
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["layers.1.mlp"])
    model = peft.get_peft_model(base, config)
    task = model.eval()(ids, labels=ids).loss
    loss = model.train()(ids, labels=ids).loss
    layers = omni_moe_layers(model)
    assert len(layers) == 3 and all(layer.aux_loss > 0.5 for layer in layers.values())
    assert_bitwise(loss, task + sum(layer.aux_loss for layer in layers.values()))
    loss.backward()


@pytest.mark.parametrize("targets", [["up_embed"], ["up_embed", "down_embed", "q_proj"]], ids=str)
def test_lora_of_the_experts(peft, targets):
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(replaced_model(), config)
    ids = random_ids()
    loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.any(), name
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids, labels=ids).loss, loss)
    assert abs(replaced_model()(ids, labels=ids).loss - loss) > 1e-3

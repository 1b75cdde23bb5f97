"""Trainer, resuming, router losses, the expert load callback and its plot, PEFT."""

import copy
import inspect
import math
import os
import socket
import warnings

import pytest
import torch
from helpers import assert_bitwise, on_devices

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    dense_model,
    family_config,
    omni_model,
    random_ids,
    replaced_model,
    vision_language_model,
)

from omni_moe import router_loss  # noqa: E402
from omni_moe.integrations.transformers import (  # noqa: E402
    ExpertLoadCallback,
    omni_moe_layers,
    plot_expert_load,
    replace_mlp,
)
from omni_moe.modules.omni_moe import recorded_router_outputs  # noqa: E402

NUM_STEPS = 8


@pytest.fixture
def examples() -> list[dict]:
    """Each token is the one before it plus 1."""
    rows = 3 + (torch.arange(16).unsqueeze(1) + torch.arange(12)) % 32
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(model, examples, out, device="cpu", **options) -> Trainer:
    arguments = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **(arguments | options)),
        train_dataset=examples,
        eval_dataset=examples[:4],
    )


def tracked_models() -> dict:
    return {
        "replaced": replace_mlp(dense_model(), **EXPERTS, layers=[0, 2], track_expert_load=True),
        "scratch": omni_model(track_expert_load=True),
    }


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

LOSSES = {"router_norm": "none", "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def balanced_model(kind, **options):
    options = LOSSES | options
    scratch = kind == "scratch"
    return omni_model(**options) if scratch else replace_mlp(dense_model(), **EXPERTS, **options)


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


# ---- the callback --------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """A reporter: keeps what on_log gives it."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


METRICS = ("expert_usage", "dead_experts", "expert_unevenness", "router_entropy")


def check_logged(entry, index, layers_outputs):
    """What was logged of one layer, against the outputs of its router in all forwards."""
    num_experts = EXPERTS["num_experts"]
    counts = torch.zeros(num_experts, dtype=torch.int64)
    entropies = []
    for x, y, indices, _ in layers_outputs:
        counts += torch.bincount(indices.flatten(), minlength=num_experts)
        scores = (x.double().unsqueeze(2) + y.double().unsqueeze(1)).flatten(1)
        entropies.append(torch.special.entr(scores.softmax(1)).sum(1))
    share = counts / counts.sum()
    assert entry[f"expert_usage/{index}"] == (counts > 0).double().mean()
    assert entry[f"dead_experts/{index}"] == (counts == 0).sum()
    unevenness = math.log(num_experts) - torch.special.entr(share.double()).sum().item()
    assert entry[f"expert_unevenness/{index}"] == pytest.approx(unevenness, abs=1e-6)
    entropy = torch.cat(entropies).mean().item()
    assert entry[f"router_entropy/{index}"] == pytest.approx(entropy, rel=1e-5)
    return counts


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_expert_load_callback(options, examples, tmp_path):
    """Of the steps since the last log all tokens, and no others."""
    model = replace_mlp(dense_model(), **EXPERTS, layers=[0, 2], track_expert_load=True)
    model(random_ids())  # counted before training: must not show
    recorder = Recorder()
    options |= {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(model, examples, tmp_path, **options, **sizes)
    trainer.add_callback(recorder)
    ExpertLoadCallback().add_to(trainer)
    layers, of_training = list(omni_moe_layers(model).values()), ([], [])
    for layer, kept in zip(layers, of_training, strict=True):
        layer.register_forward_hook(
            lambda layer, args, out, kept=kept: (
                kept.append(args[0].detach())
                if layer.training and torch._C._current_graph_task_id() == -1
                else None
            )
        )
    trainer.train()

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == NUM_STEPS // 2
    assert [entry for entry in recorder.logs if "loss" in entry] == [
        {name: value for name, value in entry.items() if name != "step"} for entry in logged
    ]
    for entry in logged:
        names = {name for name in entry if name.startswith(METRICS)}
        assert names == {f"{metric}/{index}" for metric in METRICS for index in (0, 1)}
    assert not any("expert_usage/0" in e for e in trainer.state.log_history if "eval_loss" in e)
    # Two steps of two micro-batches of 2 x 12 tokens a log.
    for index, (layer, kept) in enumerate(zip(layers, of_training, strict=True)):
        assert len(kept) == 2 * NUM_STEPS
        assert not layer._recorders
        for number, entry in enumerate(logged):
            with torch.no_grad(), recorded_router_outputs([layer.train()]) as (outputs,):
                for hidden_states in kept[4 * number : 4 * (number + 1)]:
                    layer(hidden_states)
            counts = check_logged(entry, index, outputs)
            assert counts.sum() == 4 * 2 * 12 * EXPERTS["num_experts_per_token"]


def log_as_one_of_two(rank, port, examples, out):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.manual_seed(0)
    model = replace_mlp(dense_model(), **EXPERTS, router_norm="none")
    sizes = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no"}
    trainer = make_trainer(model, examples, out, learning_rate=0.0, **sizes)
    ExpertLoadCallback().add_to(trainer)
    trainer.train()
    torch.save(trainer.state.log_history, out / f"log-{rank}.pt")
    # A process whose peer has gone may abort at its own end.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_logged_values_are_of_all_processes(examples, tmp_path):
    """Two processes of two rows each log what one process with their four rows logs."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(log_as_one_of_two, (port, examples, tmp_path), nprocs=2)
    torch.manual_seed(0)
    model = replace_mlp(dense_model(), **EXPERTS, router_norm="none")
    trainer = make_trainer(model, examples, tmp_path, learning_rate=0.0, max_steps=2)
    ExpertLoadCallback().add_to(trainer)
    trainer.train()
    logs = [trainer.state.log_history, *(torch.load(tmp_path / f"log-{r}.pt") for r in (0, 1))]
    (want, *rest) = ([entry for entry in log if "loss" in entry] for log in logs)
    for got in rest:
        assert len(got) == len(want) == 1
        for name, value in want[0].items():
            if name.startswith(METRICS):
                assert got[0][name] == pytest.approx(value, rel=1e-5), name


def test_tensorboard(examples, tmp_path, monkeypatch):
    """The Trainer's own reporter writes what the callback counts."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = tracked_models()["replaced"]
    trainer = make_trainer(model, examples, tmp_path, report_to=["tensorboard"])
    ExpertLoadCallback().add_to(trainer)
    trainer.train()
    events = reader.EventAccumulator(str(tmp_path / "board")).Reload()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for metric in ("expert_usage/0", "expert_usage/1", "expert_unevenness/1"):
        (tag,) = (tag for tag in events.Tags()["scalars"] if tag.endswith(metric))
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        assert written == [
            (entry["step"], pytest.approx(entry[metric], rel=1e-6)) for entry in logged
        ]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"{metric}/{i}" for metric in ("expert_usage", "expert_unevenness") for i in (0, 1)]
    history = [{"step": step} | dict.fromkeys(names, 0.1 * step) for step in (1, 2, 3)]
    plot_expert_load([*history, {"step": 2, "eval_loss": 1.0}], tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="log_history: expected entries of an ExpertLoadCallback"):
        plot_expert_load([{"loss": 1.0, "step": 1}], tmp_path / "load.png")


def test_wrong_callback_models(examples, tmp_path):
    trainer = make_trainer(dense_model(), examples, tmp_path)
    trainer.add_callback(ExpertLoadCallback())
    with pytest.raises(ValueError, match="expected OmniMoE layers, got none in LlamaForCausalLM"):
        trainer.train()


# ---- PEFT ----------------------------------------------------------------------------------------


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

"""The callback that logs experts' load: its values, over processes too, reporters, and the plot."""

import math
import os
import socket

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_helpers import NUM_STEPS, make_trainer, tracked_models  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers_helpers import EXPERTS, dense_model, random_ids  # noqa: E402

from omni_moe.integrations.transformers import (  # noqa: E402
    ExpertLoadCallback,
    omni_moe_layers,
    plot_expert_load,
    replace_mlp,
)
from omni_moe.modules.recording import recorded_router_outputs  # noqa: E402


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
    for x, y, indices, *_ in layers_outputs:
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

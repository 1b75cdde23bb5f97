"""Expert usage during training: a Trainer callback and a plot of what it logged."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omni_moe import OmniMoE
from omni_moe.integrations.transformers.layers import omni_moe_layers

_METRICS = {"expert_usage": "share of experts used", "expert_unevenness": "unevenness, KL in nats"}


class ExpertLoadCallback(TrainerCallback):
    """Logs `expert_usage/<layer>` and `expert_unevenness/<layer>` of every OmniMoE layer.

    Only layers with OmniMoE are numbered, from 0. A value counts the tokens, padding included, that
    this process has trained on since the log before it. Evaluations do not count; they also discard
    what was counted since the last log. The values stand in `trainer.state.log_history`. Use
    `add_to`, instead of passing the callback to the Trainer, to let reporters such as TensorBoard
    see them too.

    Raises:
        ValueError: at the start of training, the model has no OmniMoE layer, or one without
            `track_expert_load`.
    """

    def __init__(self) -> None:
        self._layers: list[OmniMoE] = []

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to `trainer`, before the callbacks that report to somewhere."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        self._layers = list(omni_moe_layers(model).values())
        if not self._layers:
            raise ValueError(f"model: expected OmniMoE layers, got none in {type(model).__name__}")
        if not all(layer.config.track_expert_load for layer in self._layers):
            raise ValueError("model: expected OmniMoE layers with track_expert_load=True")
        self._reset()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" in logs:
            values = self._values()
            logs.update(values)
            state.log_history[-1].update(values)
        self._reset()

    def _values(self) -> dict[str, float]:
        values = {}
        for index, layer in enumerate(self._layers):
            load = layer.expert_load()
            values[f"expert_usage/{index}"] = load.usage
            values[f"expert_unevenness/{index}"] = load.unevenness
        return values

    def _reset(self) -> None:
        for layer in self._layers:
            layer.reset_expert_load()


def plot_expert_load(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Draws usage and unevenness of every layer over the steps of a training run.

    Args:
        log_history: `trainer.state.log_history` of a run with an `ExpertLoadCallback`.
        path: of the image to write; needs matplotlib.

    Raises:
        ValueError: nothing was logged.
    """
    from matplotlib.figure import Figure

    logged = [entry for entry in log_history if "expert_usage/0" in entry]
    if not logged:
        raise ValueError("log_history: expected entries of an ExpertLoadCallback, got none")
    steps = [entry["step"] for entry in logged]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), _METRICS.items(), strict=True):
        names = [name for name in logged[0] if name.startswith(f"{metric}/")]
        for name in names:
            values = [entry[name] for entry in logged]
            axes.plot(steps, values, label=f"layer {name.rpartition('/')[2]}")
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

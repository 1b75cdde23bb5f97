"""Expert usage during training: a Trainer callback and a plot of what it logged."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omni_moe import OmniMoE
from omni_moe.integrations.transformers.layers import omni_moe_layers
from omni_moe.losses import add_expert_counts
from omni_moe.modules.omni_moe import ExpertLoad
from omni_moe.modules.recording import RouterOutputs, recording

_METRICS = {"expert_usage": "share of experts used", "expert_unevenness": "unevenness, KL in nats"}


class ExpertLoadCallback(TrainerCallback):
    """Logs how every OmniMoE layer has routed the training tokens since the log before.

    Only layers with OmniMoE are numbered, from 0. With each loss are logged
    - `expert_usage/<layer>`, the share of experts chosen at least once, in [0, 1];
    - `dead_experts/<layer>`, the number of the others;
    - `expert_unevenness/<layer>`, KL(z || uniform) in nats, z the experts' shares in the choices;
    - `router_entropy/<layer>`, the mean over the tokens of the entropy of the routing probabilities
      of all E experts, in nats: ln E where all are as probable, 0 where one has all.

    Tokens are those of all processes and all accumulation steps, and no others: padding does not
    count where the model is given an attention mask of two dimensions, nor do forwards in
    evaluation mode and those that activation checkpointing repeats. Training under
    `torch.distributed` sums over the processes at each log.

    The values stand in `trainer.state.log_history`. Use `add_to`, instead of passing the callback
    to the Trainer, to let reporters such as TensorBoard see them too.

    Raises:
        ValueError: at the start of training, the model has no OmniMoE layer.
    """

    def __init__(self) -> None:
        self._meters: list[_Meter] = []
        self._recording = contextlib.ExitStack()

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
        layers = list(omni_moe_layers(model).values())
        if not layers:
            raise ValueError(f"model: expected OmniMoE layers, got none in {type(model).__name__}")
        self._recording.close()  # a run before this one may have ended with an error
        self._meters = [_Meter(layer) for layer in layers]
        self._recording.enter_context(recording(layers, self._meters))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._recording.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" in logs and self._meters:
            values = self._values(args.device)
            logs.update(values)
            state.log_history[-1].update(values)

    def _values(self, device: torch.device) -> dict[str, float]:
        sums = [meter.sums(device) for meter in self._meters]
        counts = _sum_over_processes([counts for counts, _ in sums])
        entropies = _sum_over_processes([entropy for _, entropy in sums])
        values = {}
        for index, (count, entropy) in enumerate(zip(counts, entropies, strict=True)):
            load = ExpertLoad.of(count)
            values[f"expert_usage/{index}"] = load.usage
            values[f"dead_experts/{index}"] = (count == 0).sum().item()
            values[f"expert_unevenness/{index}"] = load.unevenness
            values[f"router_entropy/{index}"] = (entropy[0] / entropy[1]).item()
        for meter in self._meters:
            meter.reset()
        return values


class _Meter:
    """Sums up what one layer's router does in training; appended to as a list of its outputs."""

    def __init__(self, layer: OmniMoE) -> None:
        self._layer = layer
        # nn.DataParallel runs the layer on several devices at once, each in a thread of its own.
        self._sums: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def reset(self) -> None:
        self._sums.clear()

    def sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Counts of the experts; entropies of the tokens added up, and the number of tokens."""
        counts, entropy = self._zeros(device)
        for other_counts, other_entropy in self._sums.values():
            counts += other_counts.to(device)
            entropy += other_entropy.to(device)
        return counts, entropy

    def _zeros(self, device: torch.device) -> tuple[Tensor, Tensor]:
        counts = torch.zeros(self._layer.config.num_experts, dtype=torch.int64, device=device)
        return counts, torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def append(self, outputs: RouterOutputs) -> None:
        if not self._layer.training:
            return
        device = outputs.indices.device
        if device not in self._sums:
            self._sums[device] = self._zeros(device)
        counts, entropy = self._sums[device]
        mask = outputs.token_mask
        add_expert_counts(counts, outputs.indices, mask)
        # The probability of an expert is a product, so the entropies of both axes add up.
        for logits in (outputs.logits_x, outputs.logits_y):
            entropies = torch.special.entr(logits.float().softmax(-1)).sum(-1)
            if mask is not None:
                entropies = entropies.masked_fill(~mask, 0)
            entropy[0] += entropies.sum()
        entropy[1] += len(outputs.logits_x) if mask is None else mask.sum()


def _sum_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Each summed over the processes, in one reduction, on the CPU."""
    flat = torch.cat(tensors)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat)
    return list(flat.cpu().split([len(tensor) for tensor in tensors]))


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

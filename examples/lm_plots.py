"""The figures of train_lm.py: loss curves, and a heat map of how often each expert is chosen."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

from omni_moe import OmniMoE

SMOOTHING_STEPS = 20


def plot_losses(
    train_bits: dict[str, list[float]],
    held_out_bits: dict[str, list[tuple[int, float]]],
    unigram_bits: float,
    path: Path,
) -> None:
    """Bits per byte against step: training (running mean) as lines, held-out as points."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, name in enumerate(train_bits):
        color = f"C{index}"
        axes.plot(_running_mean(train_bits[name]), color=color, lw=1, alpha=0.6)
        steps, bits = zip(*held_out_bits[name], strict=True)
        axes.plot(steps, bits, "o-", color=color, label=f"{name}, held-out")
    axes.axhline(unigram_bits, color="0.5", ls="--", label="unigram")
    axes.set(xlabel="step", ylabel="bits per byte", title="Training (thin) and held-out loss")
    axes.set_ylim(top=1.15 * unigram_bits)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _running_mean(values: list[float]) -> list[float]:
    windows = (values[max(0, i - SMOOTHING_STEPS + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_expert_usage(layers: list[OmniMoE], path: Path) -> None:
    """One expert grid per layer, coloured by how often each expert was chosen (white: never)."""
    figure, all_axes = plt.subplots(
        1, len(layers), figsize=(3.2 * len(layers) + 1, 3.6), squeeze=False, layout="constrained"
    )
    loads = [layer.expert_load() for layer in layers]
    norm = LogNorm(vmin=1, vmax=max(2, max(load.counts.max().item() for load in loads)))
    for index, (axes, layer, load) in enumerate(zip(all_axes[0], layers, loads, strict=True)):
        grid = load.counts.view(layer.config.grid).cpu().double()
        image = axes.imshow(grid.where(grid > 0, float("nan")), norm=norm, aspect="auto")
        axes.set_title(f"layer {index}: {load.usage:.1%} used, KL {load.unevenness:.2f}", size=9)
        axes.set(xlabel="column", ylabel="row")
    figure.colorbar(image, ax=all_axes, label="times chosen")
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Operations of a training step, and the share of a device's peak at which they ran (MFU)."""

import argparse
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense TFLOP/s of the data sheets in bf16 and fp32, by a part of the device's name; the first that
# fits.
PEAK_TFLOPS = {
    "B200": (2250, 75),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "H800": (989, 67),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "RTX 5090": (210, 105),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def add_peak_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peak-tflops",
        type=_positive_float,
        help="of the device, for its share in use (default: that of a known GPU)",
    )


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")
    return value


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """Of a known GPU; None for other devices. `dtype`: bf16 or fp32."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    return found and found[("bf16", "fp32").index(dtype)]


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without data, which takes no memory."""
    copies = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    copies |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, copies)


def training_flops(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> int:
    """Operations of a forward and a backward pass, two for each multiplication with its addition.

    Counted on a copy on the meta device, so that nothing of the model changes. Without those that
    activation checkpointing would repeat.

    Args:
        model: the model, on any device.
        loss_of: given the copy, its loss, of inputs on the meta device.
    """
    model = on_meta(model).train()
    with FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    return counter.get_total_flops()


def utilisation(flops_per_second: float, peak: float | None) -> dict[str, float | None]:
    """What metrics.json says; `peak` in TFLOP/s."""
    tflops = flops_per_second / 1e12
    return {"tflops_per_second": tflops, "mfu": tflops / peak if peak else None}


def describe(speed: dict[str, float | None]) -> str:
    mfu = "" if speed["mfu"] is None else f", {speed['mfu']:.1%} of the device's peak (MFU)"
    return f"{speed['tflops_per_second']:.3g} TFLOP/s{mfu}"

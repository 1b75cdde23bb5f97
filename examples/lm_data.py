"""Real text that every machine has: the Python sources of the standard library, as bytes."""

import hashlib
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
HELD_OUT_SHARE = 0.1


def default_root() -> Path:
    """The directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(root: Path) -> tuple[Tensor, Tensor]:
    """Reads all .py files under `root`, tests and installed packages left out.

    Files are split, not lines: a file is held out when a hash of its relative path says so, the
    same on every machine.

    Returns:
        train, held_out: uint8 tensors, the files of each split in sorted order.

    Raises:
        ValueError: a split is empty.
    """
    splits: dict[str, list[bytes]] = {"train": [], "held_out": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRECTORIES.isdisjoint(relative.parts):
            splits[_split_of(relative.as_posix())].append(path.read_bytes())
    for name, files in splits.items():
        if not any(files):
            raise ValueError(
                f"data: expected Python files for the {name} split, got none in {root}"
            )
    train, held_out = (
        torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)
        for files in splits.values()
    )
    return train, held_out


def _split_of(relative_path: str) -> str:
    first_bytes = hashlib.sha256(relative_path.encode()).digest()[:4]
    return "held_out" if int.from_bytes(first_bytes, "big") < HELD_OUT_SHARE * 2**32 else "train"


def digest(text: Tensor) -> str:
    """Short fingerprint of a text."""
    return hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16]


def random_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length + 1) int64: inputs and, shifted by one, targets, at random positions.

    Raises:
        ValueError: the text is shorter than a window.
    """
    _check_length(text, length)
    starts = torch.randint(text.numel() - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


def spread_windows(text: Tensor, count: int, length: int) -> Tensor:
    """(count, length + 1) int64: disjoint windows spread evenly, fewer if the text is short.

    Raises:
        ValueError: the text is shorter than a window.
    """
    _check_length(text, length)
    count = min(count, text.numel() // (length + 1))
    stride = text.numel() // count
    starts = torch.arange(count).unsqueeze(1) * stride
    return text[starts + torch.arange(length + 1)].long()


def _check_length(text: Tensor, length: int) -> None:
    if text.numel() <= length:
        raise ValueError(f"text: expected more than {length} bytes, got {text.numel()}")


def unigram_bits_per_byte(train: Tensor, targets: Tensor) -> float:
    """Cross-entropy on `targets` of the byte frequencies of `train` (plus one each)."""
    counts = torch.bincount(train.long(), minlength=256).double() + 1
    log_probs = (counts / counts.sum()).log()
    return -log_probs[targets.flatten()].mean().item() / math.log(2)

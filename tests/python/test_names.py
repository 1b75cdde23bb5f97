"""Names of the published packages: the aliases, and the table of them in docs/names.md."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import parse_arguments
from omni_moe import ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("idea", ["expert", "router", "mlp"])
def test_published_paths(idea):
    name = f"triton_omni_{idea}_func"
    ours = getattr(ops, f"omni_{idea}")
    package = importlib.import_module("omni_moe.ops.triton")
    assert getattr(package, name) is ours
    assert getattr(importlib.import_module(f"omni_moe.ops.triton.omni_{idea}"), name) is ours


def test_published_call_of_the_experts():
    """As the published document writes it: import, order of the arguments, dtype of the ids."""
    from omni_moe.ops.triton.omni_expert import triton_omni_expert_func

    hidden_states, routing_weights = torch.randn(5, 8), torch.rand(5, 3)
    up_weights, down_weights = torch.randn(9, 8), torch.randn(9, 8)
    indices = torch.randint(9, (5, 3), dtype=torch.int32)
    expert_states = triton_omni_expert_func(
        hidden_states, up_weights, down_weights, routing_weights, indices
    )
    scores = torch.einsum("th,tkh->tk", hidden_states, up_weights[indices])
    gates = torch.nn.functional.silu(scores) * routing_weights
    want = torch.einsum("tk,tkh->th", gates, down_weights[indices])
    torch.testing.assert_close(expert_states, want)


def our_names() -> list[str]:
    """What stands in backticks right of the first column of the tables."""
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "names.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.partition(" | ")[2])]


NAMES = our_names()
IN_PACKAGE = sorted({name for name in NAMES if name.startswith("omni_moe.")})
COMMANDS = sorted({name for name in NAMES if name.startswith("python ")})


@pytest.mark.parametrize("name", IN_PACKAGE)
def test_names_in_the_table_exist(name):
    path, _, arguments = name.rstrip(")").partition("(")
    module, _, attribute = path.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if arguments:  # their order; what this library adds comes behind them
        wanted = arguments.split(", ")
        assert list(inspect.signature(value).parameters)[: len(wanted)] == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_table_exist(command):
    module, *arguments = command.removeprefix("python -m ").split()
    if module == "benchmarks":
        parse_arguments(arguments)  # exits where it does not know one
    else:
        assert module == "pytest"
        assert all((ROOT / name).exists() for name in arguments if not name.startswith("-"))


def test_the_table_is_read():
    assert "omni_moe.OmniMoE" in IN_PACKAGE
    assert any(name.startswith("omni_moe.ops.flash_expert(") for name in IN_PACKAGE)
    assert "python -m benchmarks --op moe" in COMMANDS

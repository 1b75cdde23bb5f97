"""A layer whose modules are plain runs this library's fused operators, and calls no module."""

import contextlib
import re

import pytest
import torch
from helpers import on_devices
from test_changed_modules import CHANGES, MODULES
from test_module import H, make_layer

# The operators of a forward, in order. Training and evaluation may have each its own of the logits.
FUSED = (
    r"omni_moe::_?omni_router_logits\w*",
    r"omni_moe::omni_softmax_router",
    r"omni_moe::omni_expert_mlp",
)


def operators_called(function) -> list[str]:
    """Names of the operators that Python calls in `function`, without those that these call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        function()
    return [event.name for event in profiler.events() if event.cpu_parent is None]


def are_fused(names: list[str]) -> bool:
    return len(names) == len(FUSED) and all(map(re.fullmatch, FUSED, names))


MODES = {
    "gradients": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@on_devices
def test_a_plain_layer_runs_fused_operators(device, training, mode, autocast):
    layer = make_layer(device, torch.float32, num_experts=36).train(training)
    x = torch.randn(37, H, device=device)
    with MODES[mode](), torch.autocast(device, torch.bfloat16, enabled=autocast):
        names = operators_called(lambda: layer(x))
    assert are_fused(names), names


@pytest.mark.parametrize("name", MODULES)
def test_a_changed_module_is_called(name):
    """The test above can fail, for each module."""
    layer = make_layer(num_experts=36)
    CHANGES[f"forward hook on {name}"](layer)
    names = operators_called(lambda: layer(torch.randn(37, H, dtype=torch.float64)))
    assert not are_fused(names), names


# ---- Transformers --------------------------------------------------------------------------------


def language_model(kind: str, path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM
    from transformers_helpers import omni_model, replaced_model

    if kind == "scratch":
        return omni_model()
    model = replaced_model()
    if kind == "loaded":
        model.save_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
    if kind == "device map":
        accelerate = pytest.importorskip("accelerate")
        # As for a map over several devices, with a hook on each module.
        devices = {name: "cpu" for name, _ in model.named_children()}
        model = accelerate.dispatch_model(model, devices, force_hooks=True)
        assert hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    return model


@pytest.mark.parametrize("mode", ["train", "eval", "autocast"])
@pytest.mark.parametrize("kind", ["scratch", "replaced", "loaded", "device map"])
def test_language_models_run_fused_operators(kind, mode, tmp_path):
    model = language_model(kind, tmp_path).train(mode == "train")
    ids = torch.randint(3, 60, (2, 11))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        names = operators_called(lambda: model(ids, use_cache=False))
    ours = [name for name in names if name.startswith("omni_moe::")]
    assert len(ours) == 3 * len(FUSED)
    for first in range(0, len(ours), len(FUSED)):
        assert are_fused(ours[first : first + len(FUSED)]), ours
    assert names.count("aten::embedding") == 1  # of the tokens

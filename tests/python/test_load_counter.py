"""The counter of `track_expert_load`, however a layer gets its memory: from zero, on its device."""

import copy

import pytest
import torch
from helpers import CUDA, assert_bitwise, copied, on_copies, on_devices
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from omni_moe import OmniMoE, OmniMoEConfig

H, I, E, K, T = 16, 24, 64, 4, 15  # noqa: E741

CONFIG = OmniMoEConfig(
    hidden_size=H,
    intermediate_size=I,
    num_experts=E,
    num_experts_per_token=K,
    track_expert_load=True,
)
GARBAGE = -(2**40)


@pytest.fixture
def dirty_memory(monkeypatch):
    """What `to_empty` allocates holds garbage, as memory that was used before does."""
    empty_like = torch.empty_like

    def garbage_like(*args, **kwargs):
        made = empty_like(*args, **kwargs)
        return made if made.is_meta else made.fill_(GARBAGE)

    monkeypatch.setattr(torch, "empty_like", garbage_like)


def layer_on_meta() -> OmniMoE:
    with torch.device("meta"):
        return OmniMoE(CONFIG)


def assert_counts(layer, device="cpu"):
    """Nothing so far; then the choices of one batch."""
    usage, _, counts = layer.expert_load()
    assert usage == 0 and not counts.any() and counts.shape == (E,)
    layer(torch.randn(T, H, device=device))
    counts = layer.expert_load().counts
    assert counts.sum() == T * K and counts.min() >= 0
    assert counts.device.type == device
    layer.reset_expert_load()
    assert not layer.expert_load().counts.any()


# ---- from the meta device ------------------------------------------------------------------------


@on_devices
def test_to_empty_and_load(device, dirty_memory):
    layer = layer_on_meta().to_empty(device=device)
    assert layer.expert_counts.device.type == device
    layer.load_state_dict(OmniMoE(CONFIG).state_dict())
    assert_counts(layer, device)


@on_devices
def test_to_empty_inside_of_a_model(device, dirty_memory):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(H, H), OmniMoE(CONFIG))
    model.to_empty(device=device)
    model[1].reset_parameters()
    assert_counts(model[1], device)


@on_devices
def test_load_by_assignment(device):
    layer = layer_on_meta()
    layer.load_state_dict(OmniMoE(CONFIG).to(device).state_dict(), assign=True)
    assert_counts(layer, device)


def test_first_forward_in_inference_mode():
    layer = layer_on_meta()
    layer.load_state_dict(OmniMoE(CONFIG).state_dict(), assign=True)
    x = torch.randn(T, H)
    with torch.inference_mode():
        layer.eval()(x)
    layer.train()(x)
    assert layer.expert_load().counts.sum() == 2 * T * K


def test_compiled_after_loading_by_assignment():
    torch._dynamo.reset()
    layer = layer_on_meta()
    layer.load_state_dict(OmniMoE(CONFIG).state_dict(), assign=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(torch.randn(T, H))
    assert layer.expert_load().counts.sum() == 3 * T * K
    assert counter.frame_count <= 2  # one of them makes the counter


def test_nothing_is_counted_on_meta():
    layer = layer_on_meta()
    layer(torch.empty(T, H, device="meta"))
    usage, unevenness, counts = layer.expert_load()
    assert usage == 0 and unevenness != unevenness and not counts.any()


@on_copies
def test_copies_of_a_layer_on_meta(how):
    twin = copied(layer_on_meta(), how)
    twin.load_state_dict(OmniMoE(CONFIG).state_dict(), assign=True)
    assert_counts(twin)


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("include_buffers", [False, True])
def test_empty_weights_of_accelerate(include_buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = nn.ModuleDict({"mlp": OmniMoE(CONFIG)})
    weights = nn.ModuleDict({"mlp": OmniMoE(CONFIG)}).state_dict()
    path = str(tmp_path / "model.bin")
    torch.save(weights, path)
    accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})
    assert_counts(model["mlp"])


@pytest.mark.parametrize(
    "device_map", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str
)
def test_replaced_model_through_accelerate(device_map, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from omni_moe.integrations.transformers import omni_moe_layers, replace_mlp

    config = transformers.LlamaConfig(
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )

    def replaced():
        return replace_mlp(
            transformers.LlamaForCausalLM(config),
            num_experts=E,
            num_experts_per_token=K,
            track_expert_load=True,
        )

    stored = replaced().eval()
    stored.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = replaced()
    model = accelerate.load_checkpoint_and_dispatch(
        model, tmp_path, device_map=device_map, no_split_module_classes=model._no_split_modules
    ).eval()
    ids = torch.arange(T)[None]
    device = next(model.parameters()).device
    with torch.no_grad():
        got, want = model(ids.to(device)).logits, stored.to(device)(ids.to(device)).logits
    assert_bitwise(got, want)
    for layer in omni_moe_layers(model).values():
        assert layer.expert_load().counts.sum() == T * K


# ---- moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_counts_move_with_the_layer(device):
    layer = OmniMoE(CONFIG)
    layer(torch.randn(T, H))
    want = layer.expert_load().counts
    layer.to(device)
    assert_bitwise(layer.expert_load().counts.cpu(), want)
    layer.double().float().share_memory()
    assert_bitwise(layer.expert_load().counts.cpu(), want)


def test_counts_outlive_to_empty(dirty_memory):
    """They are no parameter that a checkpoint will bring back."""
    layer = OmniMoE(CONFIG)
    layer(torch.randn(T, H))
    want = layer.expert_load().counts
    layer.to_empty(device="cpu")
    assert_bitwise(layer.expert_load().counts, want)


def test_meta_and_back_starts_anew(dirty_memory):
    layer = OmniMoE(CONFIG)
    layer(torch.randn(T, H))
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    assert_counts(layer)


def test_without_tracking_there_is_no_counter(dirty_memory):
    config = OmniMoEConfig(
        hidden_size=H, intermediate_size=I, num_experts=E, num_experts_per_token=K
    )
    with torch.device("meta"):
        layer = OmniMoE(config)
    assert layer.to_empty(device="cpu").expert_counts is None

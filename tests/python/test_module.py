"""The OmniMoE layer: quick start, parameters, agreement with the reference, load statistics."""

import copy
import dataclasses
import io
import math
import pickle
from functools import partial

import pytest
import torch
from helpers import CUDA, assert_bitwise, assert_close, copied, needs_gpu, on_copies, on_devices
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import omni_moe
from omni_moe import OmniMoE, OmniMoEConfig, reference

H, I, E, K = 24, 40, 48, 5  # noqa: E741


def make_layer(device="cpu", dtype=torch.float64, **options):
    options = {"hidden_size": H, "intermediate_size": I, "num_experts": E} | options
    options.setdefault("num_experts_per_token", K)
    layer = OmniMoE(OmniMoEConfig(**options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.to(device, dtype)


# ---- quick start, names, state -------------------------------------------------------------------


def quick_start(device, dtype, hidden_size, intermediate_size, num_tokens):
    from omni_moe.modules.omni_moe import OmniMoE, OmniMoEConfig

    config = OmniMoEConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        hidden_act="silu",
        num_experts=4096,
        num_experts_per_token=16,
    )

    x = torch.randn(1, num_tokens, config.hidden_size, device=device, dtype=dtype)
    moe = OmniMoE(config).to(device=device, dtype=dtype)

    y = moe(x)
    assert y.shape == (1, num_tokens, hidden_size)
    assert y.dtype == dtype and y.device.type == device
    assert y.isfinite().all() and (y != 0).any()


@on_devices
def test_quick_start(device):
    quick_start(device, torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_tokens=4096)


@on_devices
def test_small_quick_start(device):
    quick_start(device, torch.bfloat16, hidden_size=64, intermediate_size=96, num_tokens=100)


def test_both_import_paths_give_the_same_classes():
    from omni_moe.modules import omni_moe as module

    assert module.OmniMoE is omni_moe.OmniMoE
    assert module.OmniMoEConfig is omni_moe.OmniMoEConfig


def test_parameter_names_and_shapes():
    layer = make_layer(expert_grid=(6, 8))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "gate_proj.weight": (I, H),
        "up_proj.weight": (I, H),
        "down_proj.weight": (H, I),
        "router_gate_x.weight": (6, H),
        "router_gate_y.weight": (8, H),
        "up_embed.weight": (E, H),
        "down_embed.weight": (E, H),
    }
    buffers = {f"router_norm_{axis}.running_{name}" for axis in "xy" for name in ("mean", "var")}
    buffers |= {f"router_norm_{axis}.num_batches_tracked" for axis in "xy"}
    assert set(layer.state_dict()) == buffers | {name for name, _ in layer.named_parameters()}


def test_load_counter_is_not_in_the_state_dict():
    assert set(make_layer(track_expert_load=True).state_dict()) == set(make_layer().state_dict())


def test_state_dict_round_trip():
    layer, other = make_layer(), make_layer()
    x = torch.randn(37, H, dtype=torch.float64)
    layer(x)  # moves the running statistics
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other.eval()(x), layer.eval()(x))
    other.load_state_dict(torch.load(file))
    assert_bitwise(other(x), layer(x))


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["meta", "cpu", CUDA])
def test_device_and_dtype_arguments(device, dtype):
    """As the modules of torch.nn have them."""
    if (device, dtype) == ("cuda", torch.float64):
        pytest.skip("no CUDA kernels for float64")
    config = OmniMoEConfig(
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        num_experts_per_token=K,
        track_expert_load=True,
    )
    layer = OmniMoE(config, device=device, dtype=dtype)
    dtype = dtype or torch.get_default_dtype()
    assert {(t.device.type, t.dtype) for t in layer.parameters()} == {(device, dtype)}
    wide = torch.promote_types(dtype, torch.float32)  # of statistics, beside int64 counters
    assert {t.dtype for t in layer.buffers()} == {wide, torch.int64}
    assert {t.device.type for t in layer.buffers()} == {device}
    x = torch.randn(37, H, device=device, dtype=dtype)
    assert layer(x).dtype == x.dtype and layer(x).device == x.device


def test_reset_parameters():
    layer = OmniMoE(
        OmniMoEConfig(
            hidden_size=256,
            intermediate_size=300,
            num_experts=4096,
            num_experts_per_token=K,
            initializer_range=0.1,
            track_expert_load=True,
        )
    )
    layer(torch.randn(9, 256))
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        spread = parameter.std().item()
        assert abs(spread / 0.1 - 1) < 4 / math.sqrt(parameter.numel()), name
        assert abs(parameter.mean().item()) < 0.5 / math.sqrt(parameter.numel()), name
    assert (layer.router_norm_x.running_mean == 0).all()
    assert layer.router_norm_y.num_batches_tracked == 0
    assert layer.expert_load().counts.sum() == 0


@on_copies
def test_copies(how):
    layer = make_layer(track_expert_load=True)
    x = torch.randn(37, H, dtype=torch.float64)
    layer(x)
    twin = copied(layer, how)
    assert twin.config == layer.config and repr(twin) == repr(layer)
    assert_bitwise(twin.eval()(x), layer.eval()(x))
    assert_bitwise(twin.expert_load().counts, layer.expert_load().counts)
    with torch.no_grad():
        twin.up_embed.weight.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_a_compiled_layer_can_be_saved():
    layer = make_layer().eval()
    layer.compile(backend="eager")
    x = torch.randn(37, H, dtype=torch.float64)
    want = layer(x)
    assert_bitwise(pickle.loads(pickle.dumps(layer))(x), want)


# ---- agreement with the reference ----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_topk_prob": True, "hidden_act": "gelu"},
        {"router_norm": "none", "hidden_act": "relu"},
        {"expert_grid": (2, 24), "num_experts_per_token": E},
        {"num_experts": 30, "num_experts_per_token": 1, "hidden_act": "gelu_tanh"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(37, H), (3, 11, H)], ids=str)
def test_against_reference(shape, options, training):
    layer = make_layer(**options)
    layer(torch.randn(50, H, dtype=torch.float64))  # running statistics to use in eval
    layer.zero_grad()
    layer.train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    other_x = x.detach().clone().requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)

    y, want = layer(x), reference.omni_moe(other, other_x)
    y.backward(grad)
    want.backward(grad)
    # Through BatchNorm and the softmax a few digits more are lost than in one op.
    slack = {"num_terms": 1000, "accumulation_factor": 4}
    assert_close(y, want, **slack)
    assert_close(x.grad, other_x.grad, "grad of the input", **slack)
    wanted = dict(other.named_parameters())
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, wanted[name].grad, name, **slack)
    for name, buffer in layer.named_buffers():
        assert_close(buffer.double(), dict(other.named_buffers())[name].double(), name, **slack)


def test_running_statistics_are_those_of_batch_norm():
    layer = make_layer()
    stock = {axis: nn.BatchNorm1d(n, affine=False).double() for axis, n in (("x", 6), ("y", 8))}
    for _ in range(3):
        tokens = torch.randn(37, H, dtype=torch.float64) + 1
        layer(tokens)
        for axis, norm in stock.items():
            norm(getattr(layer, f"router_gate_{axis}")(tokens))
    for axis, norm in stock.items():
        ours = getattr(layer, f"router_norm_{axis}")
        assert_close(ours.running_mean, norm.running_mean, num_terms=1000)
        assert_close(ours.running_var, norm.running_var, num_terms=1000)
        assert ours.num_batches_tracked == 3

    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    layer(tokens)
    for name, value in layer.state_dict().items():
        assert_bitwise(value, before[name], name)


@pytest.mark.parametrize("training", [False, True])
def test_half_layer_under_autocast_of_the_other_half(training):
    layer = OmniMoE(make_layer().config).half().train(training)
    layer.router_norm_x.float(), layer.router_norm_y.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(37, H).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors(dtype):
    config = dataclasses.replace(make_layer().config, router_aux_loss_coef=0.1)
    with torch.device("meta"):
        layer = OmniMoE(config).to(dtype)
        out = layer(torch.empty(37, H, dtype=dtype))
    assert out.shape == (37, H) and out.dtype == dtype and layer.aux_loss.shape == ()


def test_batch_and_sequence_are_tokens():
    layer = make_layer().eval()
    x = torch.randn(3, 11, H, dtype=torch.float64)
    assert_bitwise(layer(x).view(33, H), layer(x.view(33, H)))
    assert_bitwise(layer(x.transpose(0, 1)), layer(x.transpose(0, 1).contiguous()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, H), (2, 0, H)], ids=str)
@on_devices
def test_no_tokens(device, shape, training):
    layer = make_layer(device, torch.float32).train(training)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_every_expert_can_be_chosen():
    """K = E: a sum over all experts, whatever the grid."""
    for options in ({}, {"num_experts": 30}, {"expert_grid": (1, E)}, {"expert_grid": (24, 2)}):
        num_experts = options.get("num_experts", E)
        layer = make_layer(num_experts_per_token=num_experts, track_expert_load=True, **options)
        layer(torch.randn(7, H, dtype=torch.float64))
        assert (layer.expert_load().counts == 7).all()


def test_wrong_inputs():
    layer = make_layer(dtype=torch.float32)
    for shape in ((H,), (3, H + 1), (1, 2, 3, H)):
        with pytest.raises(ValueError, match=r"hidden_states: expected shape .* H = 24, got"):
            layer(torch.randn(shape))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, H))
    assert layer.eval()(torch.randn(1, H)).shape == (1, H)


# ---- dtypes, autocast, compile, SyncBatchNorm ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_devices
def test_training_step_lowers_the_loss(device, dtype):
    layer = make_layer(device, dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    x = torch.randn(64, H, device=device, dtype=dtype)
    losses = []
    for _ in range(5):
        loss = (layer(x) - x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@on_devices
def test_autocast(device):
    layer = make_layer(device, torch.float32)
    x = torch.randn(37, H, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert layer.router_norm_x.running_mean.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@on_devices
def test_compile(device, training):
    torch._dynamo.reset()
    layer = make_layer(device, torch.float32, track_expert_load=True).train(training)
    eager = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (37, 50, 11):
        x = torch.randn(num_tokens, H, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        y, want = compiled(x), eager(x)
        assert_close(y, want.double(), accumulation_factor=4)
        y.sum().backward()
        want.sum().backward()
    assert counter.frame_count == 1
    wanted = dict(eager.named_parameters())
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, wanted[name].grad.double(), name, num_terms=10**4)
    assert_bitwise(layer.expert_load().counts, eager.expert_load().counts)


def test_convert_sync_batchnorm():
    layer = make_layer().eval()
    x = torch.randn(37, H, dtype=torch.float64)
    want, names = layer(x), list(layer.state_dict())
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(layer.router_norm_x, nn.SyncBatchNorm)
    assert isinstance(layer.router_norm_y, nn.SyncBatchNorm)
    assert list(layer.state_dict()) == names
    assert_close(layer.eval()(x), want, num_terms=1000)


@needs_gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layer = make_layer("cuda:1", torch.float32).eval()
    x = torch.randn(37, H, device="cuda:1")
    assert_bitwise(layer(x).to("cuda:0"), copy.deepcopy(layer).to("cuda:0")(x.to("cuda:0")))


# ---- expert load ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_expert_load(device):
    layer = make_layer(device, torch.float32, track_expert_load=True, router_norm="none")
    counts = [0] * E
    for num_tokens in (37, 5):
        x = torch.randn(num_tokens, H, device=device)
        layer(x)
        _, indices = torch.ops.omni_moe.omni_softmax_router(
            layer.router_gate_x(x), layer.router_gate_y(x), K
        )
        for i in indices.flatten().tolist():
            counts[i] += 1
    load = layer.expert_load()
    assert load.counts.tolist() == counts and load.counts.dtype == torch.int64
    assert load.usage == pytest.approx(sum(c > 0 for c in counts) / E, rel=1e-12)
    shares = [c / sum(counts) for c in counts if c]
    assert load.unevenness == pytest.approx(sum(z * math.log(z * E) for z in shares), rel=1e-12)

    load.counts.zero_()  # a copy
    assert layer.expert_load().counts.tolist() == counts
    layer.reset_expert_load()
    usage, unevenness, counts = layer.expert_load()
    assert usage == 0 and math.isnan(unevenness) and not counts.any()


@on_devices
def test_selective_checkpointing(device):
    """A policy may keep the results of all our ops: none is written to afterwards."""

    def save_own_ops(context, op, *args, **kwargs):
        saves = op.namespace == "omni_moe"
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    layer = make_layer(device, torch.float32)
    x = torch.randn(37, H, device=device, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    contexts = partial(create_selective_checkpoint_contexts, save_own_ops)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    (got,) = torch.autograd.grad(out.sum(), x)
    assert_bitwise(got, want)
    assert layer.router_norm_x.num_batches_tracked == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_forwards_do_not_count(use_reentrant):
    layer = make_layer(track_expert_load=True)
    x = torch.randn(37, H, dtype=layer.up_embed.weight.dtype, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    out.sum().backward()
    assert layer.expert_load().counts.sum() == 37 * K


def test_even_and_uneven_load():
    layer = make_layer(track_expert_load=True)
    layer.expert_counts.fill_(3)
    assert layer.expert_load()[:2] == (1.0, pytest.approx(0, abs=1e-12))
    layer.expert_counts.zero_()[7] = 100
    assert layer.expert_load()[:2] == (pytest.approx(1 / E), pytest.approx(math.log(E)))


def test_load_is_not_tracked_by_default():
    layer = make_layer()
    layer.reset_expert_load()
    with pytest.raises(RuntimeError, match="expected track_expert_load=True in the config"):
        layer.expert_load()

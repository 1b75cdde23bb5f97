"""Token masks of the layer: padded and unpadded batches give equal numbers."""

import copy

import pytest
import torch
from helpers import assert_bitwise, needs_gpu, on_devices
from test_module import H, K, make_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from omni_moe import reference, router_loss
from omni_moe.modules.omni_moe import counting_tokens
from omni_moe.modules.recording import recording

NORMS = ("batch_norm", "layer_norm", "rms_norm", "none")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}  # of the largest element, or the terms
ROUTER_LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def padded_batch(device="cpu", dtype=torch.float64):
    """(B, S, H) with padding on either side, the mask, and the tokens that count."""
    x = torch.randn(4, 11, H, device=device, dtype=dtype)
    lengths = torch.tensor([11, 4, 7, 1], device=device)
    mask = torch.arange(11, device=device) < lengths.unsqueeze(-1)
    mask[2] = mask[2].flip(0)
    return x, mask, x[mask]


def compare(got, want, name="result", terms=0.0):
    """`terms`: size of what was summed, where sums cancel."""
    scale = max([terms, *want.abs().flatten().tolist()])
    tolerance = TOLERANCE.get(want.dtype, 0) * scale
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def run_layer(layer, x, mask=None, wanted=slice(None)):
    """Of the wanted tokens outputs and gradients of the input; then what is left in the layer."""
    x = x.detach().requires_grad_()
    out = layer(x) if mask is None else layer(x, token_mask=mask)
    part = out[wanted]
    loss = (part * torch.linspace(-1, 1, part.numel(), dtype=x.dtype).view_as(part).to(x)).sum()
    total = loss + router_loss(layer).to(x) if layer.training else loss
    total.backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    counts = layer.expert_load().counts
    return part.detach(), x.grad[wanted], total.detach(), gradients, buffers, counts


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router_norm", NORMS)
@on_devices
def test_padded_is_unpadded(device, router_norm, training, norm_topk_prob):
    """Outputs, gradients, losses, statistics and counts of the tokens that count."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    options = {"router_norm": router_norm, "norm_topk_prob": norm_topk_prob, **ROUTER_LOSSES}
    layer = make_layer(device, dtype, track_expert_load=True, **options).train(training)
    x, mask, tokens = padded_batch(device, dtype)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    results = []
    for args in ((x, mask, mask), (tokens,)):
        layer.load_state_dict(state)
        layer.reset_expert_load()
        results.append(run_layer(layer, *args))
    (out, grad, loss, gradients, buffers, counts), want = results
    compare(out, want[0], "outputs")
    compare(grad, want[1], "gradient of the input")
    compare(loss, want[2], "loss", terms=out.abs().sum().item())
    assert gradients.keys() == want[3].keys()
    for name in gradients:
        compare(gradients[name], want[3][name], name)
    for name in buffers:
        compare(buffers[name], want[4][name], name)
    assert_bitwise(counts, want[5])
    assert counts.sum() == mask.sum() * K


@pytest.mark.parametrize("router_norm", NORMS)
@on_devices
def test_masked_tokens_get_the_mlp_alone(device, router_norm):
    dtype = torch.float64 if device == "cpu" else torch.float32
    layer = make_layer(device, dtype, router_norm=router_norm)
    x, mask, _ = padded_batch(device, dtype)
    mlp = reference.omni_mlp(
        x, layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight
    )
    out = layer(x, token_mask=mask)
    compare(out[~mask], mlp[~mask])
    # A loss on masked tokens alone has no gradient to router and tables.
    out[~mask].square().sum().backward()
    for name, parameter in layer.named_parameters():
        is_mlp = name.split(".")[0] in ("gate_proj", "up_proj", "down_proj")
        assert parameter.grad.any() == is_mlp, name


@pytest.mark.parametrize("router_norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@on_devices
def test_all_masked(device, training, router_norm):
    options = {"router_norm": router_norm, **ROUTER_LOSSES}
    layer = make_layer(device, torch.float32, track_expert_load=True, **options).train(training)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 5, H, device=device)
    nothing = torch.zeros(3, 5, dtype=torch.bool, device=device)
    out, grad, _, gradients, _, counts = run_layer(layer, x, nothing)
    assert out.isfinite().all() and grad.isfinite().all() and not counts.any()
    for name in ("router_gate_x", "router_gate_y", "up_embed", "down_embed"):
        assert not gradients[f"{name}.weight"].any()
    for name, tensor in layer.state_dict().items():
        counted = 1 if training and "num_batches" in name else 0
        assert_bitwise(tensor, state[name] + counted, name)


@on_devices
def test_one_counted_token_in_training(device):
    """No error, which would have to wait for the device: logits of zero, statistics stay."""
    layer = make_layer(device, torch.float32)
    layer.router_norm_x.running_mean.normal_()
    before = layer.router_norm_x.running_mean.clone()
    x = torch.randn(6, H, device=device)
    mask = torch.arange(6, device=device) == 4
    outputs = []
    with recording([layer], [outputs]):
        assert layer(x, token_mask=mask).isfinite().all()
    assert not outputs[0].logits_x.any() and not outputs[0].logits_y.any()
    assert_bitwise(layer.router_norm_x.running_mean, before)
    assert layer.router_norm_x.num_batches_tracked == 1
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x[4:5])


def test_masks_of_either_shape():
    layer = make_layer()
    x, mask, _ = padded_batch()
    want = layer(x, token_mask=mask)
    assert_bitwise(layer(x, token_mask=mask.flatten()), want)
    assert_bitwise(layer(x.flatten(0, 1), token_mask=mask.flatten()), want.flatten(0, 1))
    assert_bitwise(layer(x, mask), want)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 11),
        torch.ones(4, 11, dtype=torch.int64),
        torch.ones(4, 10, dtype=torch.bool),
        torch.ones(11, 4, dtype=torch.bool),
        torch.ones(45, dtype=torch.bool),
        torch.ones(4, 1, 1, 11, dtype=torch.bool),
    ],
    ids=lambda mask: f"{mask.dtype} {tuple(mask.shape)}",
)
def test_bad_masks_of_the_layer(mask):
    layer = make_layer()
    with pytest.raises(
        ValueError, match=r"token_mask: expected bool of shape \(4, 11\) or \(44,\)"
    ):
        layer(padded_batch()[0], token_mask=mask)


@pytest.mark.parametrize("router_norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@on_devices
def test_autocast(device, dtype, router_norm):
    """Counted tokens do not see masked ones there, either."""
    layer = make_layer(device, torch.float32, router_norm=router_norm)
    x, mask, _ = padded_batch(device, torch.float32)
    outputs = []
    for _ in range(2):
        with torch.autocast(device, dtype=dtype):
            outputs.append(layer(x, token_mask=mask)[mask])
        x[~mask] = 3 * torch.randn_like(x[~mask])
    assert outputs[0].dtype == dtype
    assert_bitwise(*outputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router_norm", ["batch_norm", "layer_norm"])
def test_compiled_layer(router_norm, training):
    torch._dynamo.reset()
    layer = make_layer("cpu", torch.float32, router_norm=router_norm).train(training)
    x, mask, _ = padded_batch("cpu", torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x, token_mask=mask), layer(x, token_mask=mask))
    torch._dynamo.reset()


def test_exported_layer():
    layer = make_layer("cpu", torch.float32).eval()
    x, mask, _ = padded_batch("cpu", torch.float32)
    program = torch.export.export(layer, (x, mask))
    assert_bitwise(program.module()(x, mask), layer(x, mask))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmapped_layer():
    layer = make_layer().eval()
    x, mask, _ = padded_batch()
    torch.testing.assert_close(torch.vmap(layer)(x, mask), layer(x, mask))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@needs_gpu
def test_no_synchronisation():
    layer = make_layer("cuda", torch.bfloat16, track_expert_load=True, **ROUTER_LOSSES)
    x, mask, _ = padded_batch("cuda", torch.bfloat16)

    def step():
        (layer(x, token_mask=mask).sum() + router_loss(layer)).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_graph_replays():
    """Captured once; each replay goes by the mask that is there then."""
    layer = make_layer("cuda", torch.bfloat16, router_norm="batch_norm")
    layer.router_norm_x.float(), layer.router_norm_y.float()
    static_x, static_mask, _ = padded_batch("cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(static_x, token_mask=static_mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        got = layer(static_x, token_mask=static_mask)
    for _ in range(2):
        x, mask = torch.randn_like(static_x), torch.rand(static_mask.shape, device="cuda") < 0.5
        static_x.copy_(x), static_mask.copy_(mask)
        graph.replay()
        with torch.no_grad():
            assert_bitwise(got, layer(x, token_mask=mask))


# ---- norms that are called -----------------------------------------------------------------------


def hook_gate(layer):
    layer.router_gate_x.register_forward_hook(lambda *args: None)


def hook_norm(layer):
    layer.router_norm_x.register_forward_hook(lambda module, args, out: out.clone())


def wrap_norms(layer):
    """As PEFT does for `modules_to_save`."""
    layer.router_norm_x = nn.Sequential(layer.router_norm_x)
    layer.router_norm_y = nn.Sequential(layer.router_norm_y)


def mean_of_all_batches(layer):
    layer.router_norm_x.momentum = layer.router_norm_y.momentum = None


def make_affine(layer):
    for norm in (layer.router_norm_x, layer.router_norm_y):
        width = norm.num_features
        norm.weight = nn.Parameter(torch.linspace(1, 2, width, dtype=torch.float64))
        norm.bias = nn.Parameter(torch.linspace(-1, 2, width, dtype=torch.float64))


def no_running_statistics(layer):
    for name, width in (("router_norm_x", 6), ("router_norm_y", 8)):
        setattr(layer, name, nn.BatchNorm1d(width, affine=False, track_running_stats=False))


def synchronise(layer):
    nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    for name in ("router_norm_x", "router_norm_y"):
        setattr(layer, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(layer, name)))


CHANGES = (
    *(hook_gate, hook_norm, wrap_norms, mean_of_all_batches, make_affine),
    *(no_running_statistics, synchronise),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_called_norms_leave_masked_tokens_out(change):
    layer = make_layer(expert_grid=(6, 8), track_expert_load=True, **ROUTER_LOSSES)
    change(layer)
    x, mask, tokens = padded_batch()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    got = run_layer(layer, x, mask, mask)
    layer.load_state_dict(state)
    layer.reset_expert_load()
    if change is synchronise:  # which has no kernels on the CPU
        layer.router_norm_x = nn.BatchNorm1d(6, affine=False, dtype=torch.float64)
        layer.router_norm_y = nn.BatchNorm1d(8, affine=False, dtype=torch.float64)
    want = run_layer(layer, tokens)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    assert "forward" not in layer.router_norm_x.__dict__


def test_statistics_in_a_narrow_dtype_of_called_norms():
    layer = make_layer("cpu", torch.float32, expert_grid=(6, 8))
    hook_gate(layer)
    layer.router_norm_x.bfloat16(), layer.router_norm_y.bfloat16()
    x, mask, tokens = padded_batch("cpu", torch.float32)
    before = layer.router_norm_x.running_mean.clone()
    got = layer(x, token_mask=mask)[mask]
    moved = layer.router_norm_x.running_mean.clone()
    layer.router_norm_x.running_mean.copy_(before)
    torch.testing.assert_close(got, layer(tokens))
    assert moved.dtype == torch.bfloat16 and (moved != before).any()


class OwnForward(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_batch_norms_with_a_forward_of_their_own():
    """Whose statistics nothing is known of: an error in training, called in evaluation."""
    layer = make_layer(expert_grid=(6, 8))
    layer.router_norm_x = OwnForward(6, affine=False, dtype=torch.float64)
    x, mask, _ = padded_batch()
    layer(x)
    with pytest.raises(ValueError, match=r"token_mask: expected norms .* got OwnForward"):
        layer(x, token_mask=mask)
    layer.eval()(x, token_mask=mask)


def test_norms_of_single_tokens_are_called_with_all():
    layer = make_layer(expert_grid=(6, 8), router_norm="layer_norm")
    layer.router_norm_x.register_forward_hook(lambda module, args, out: out.clone())
    x, mask, tokens = padded_batch()
    torch.testing.assert_close(layer(x, token_mask=mask)[mask], layer(tokens))


# ---- the mask of a model around the layer --------------------------------------------------------


def test_mask_of_the_model_around():
    layer = make_layer()
    x, mask, _ = padded_batch()
    want, without = layer(x, token_mask=mask), layer(x)
    assert not torch.equal(want, without)
    with counting_tokens([layer], mask):
        assert_bitwise(layer(x), want)
        everything = torch.ones_like(mask)
        assert_bitwise(layer(x, token_mask=everything), layer(x, everything))
        # One that is longer ends where the input ends; one that does not fit is no mask of it.
        longer = torch.cat([~mask[:, :3], mask], 1)
        with counting_tokens([layer], longer):
            assert_bitwise(layer(x), want)
        with counting_tokens([layer], mask[:2]):
            assert_bitwise(layer(x), without)
        with counting_tokens([layer], mask[:, :-1]):
            assert_bitwise(layer(x), without)
        assert_bitwise(layer(x), want)
    assert_bitwise(layer(x), without)


@pytest.mark.parametrize("how", ["inside", "outside"])
def test_repeated_forwards_have_the_mask(how):
    """Of the last forward, where the repetition runs outside of the model's."""
    layer = make_layer()
    x, mask, _ = padded_batch()
    x.requires_grad_()
    grads = []
    for repeats in (False, True):
        with counting_tokens([layer], mask):
            if repeats:
                out = checkpoint(layer, x, use_reentrant=False)
            else:
                out = layer(x)
            if how == "inside":
                grads.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
        if how == "outside":
            grads.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    for one, other in zip(*grads, strict=True):
        assert_bitwise(one, other)


def test_copies_have_no_mask():
    layer = make_layer()
    x, mask, _ = padded_batch()
    with counting_tokens([layer], mask):
        layer(x)
        twin = copy.deepcopy(layer)
    assert twin._model_mask is None and twin._last_model_mask is None


def test_recorded_outputs_name_the_mask():
    layer = make_layer()
    x, mask, _ = padded_batch()
    outputs = []
    with recording([layer], [outputs]):
        layer(x, token_mask=mask)
        layer(x)
    assert_bitwise(outputs[0].token_mask, mask.flatten())
    assert (outputs[0].indices[~mask.flatten()] == -1).all()
    assert outputs[1].token_mask is None

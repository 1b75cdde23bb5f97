"""torch.library.opcheck of every op: schema, autograd registration, fake tensors, AOT dispatch."""

import pytest
import torch
from helpers import ExpertShape, expert_inputs, mlp_inputs, on_devices, random_logits, strided
from torch.library import opcheck

ops = torch.ops.omni_moe

T, K = 5, 3


def with_grad(*tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def router_samples(device):
    x, y = random_logits((T, 4, 6), device, torch.float32)
    return [
        (*with_grad(x, y), K),
        (*with_grad(strided(x), strided(y)), K),
        (*with_grad(x), y, K),
        (x, y, 24),
        (x, y, 0),
        (x[:0], y[:0], K),
        (x[:1].half(), y[:1].half(), 1),
    ]


def softmax_router_samples(device):
    return [(*sample, norm) for sample in router_samples(device)[:4] for norm in (False, True)]


def router_backward_samples(device):
    grad = torch.randn(T, K, device=device)
    indices = torch.randint(24, (T, K), device=device, dtype=torch.int32)
    return [(grad, indices, 4, 6), (grad[:0], indices[:0], 4, 6), (strided(grad), indices, 4, 6)]


def softmax_router_backward_samples(device):
    x, y = random_logits((T, 4, 6), device, torch.float32)
    grad, indices, *_ = router_backward_samples(device)[0]
    return [(grad, x, y, indices, False), (strided(grad), strided(x), y, indices, True)]


def expert_samples(device):
    inputs, indices, _ = expert_inputs(ExpertShape(T, 10, 7, K), device, torch.float32)
    hidden, up, down, routing = inputs
    transposed = torch.randn(10, 1, device=device).t()
    return [
        (*with_grad(*inputs), indices),
        (*with_grad(*map(strided, inputs)), strided(indices.int()), "gelu"),
        (hidden, *with_grad(up), down, routing, indices, "relu"),
        (*with_grad(hidden[:0]), up, down, *with_grad(routing[:0]), indices[:0]),
        (transposed, up, down, routing[:1], indices[:1]),
        (*(tensor.bfloat16() for tensor in inputs), indices),
        (*with_grad(*inputs), indices, "silu", *with_grad(torch.randn_like(hidden))),
    ]


def expert_save_scores_samples(device):
    samples = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs, indices, _ = expert_inputs(ExpertShape(T, 10, 7, K), device, dtype)
        samples.append((*inputs, indices, "silu"))
        samples.append((*inputs, indices, "silu", torch.randn_like(inputs[0])))
    return samples


def expert_backward_samples(device):
    inputs, indices, grad = expert_inputs(ExpertShape(T, 10, 7, K), device, torch.float32)
    _, scores = ops.omni_expert_save_scores(*inputs, indices, "silu")
    masks = ([True] * 4, [False] * 4, [True, False, False, True], [False, True, False, False])
    samples = [(grad, *inputs, indices, "silu", mask, scores) for mask in masks]
    samples.append((grad, *inputs, indices, "silu", masks[0], strided(scores)))
    samples.append((grad, *inputs, indices, "silu", masks[0], scores, torch.randn_like(grad)))
    return [*samples, (strided(grad), *map(strided, inputs), indices.int(), "gelu_tanh", masks[0])]


def flash_expert_samples(device):
    (hidden, up, down, routing), indices, _ = expert_inputs(
        ExpertShape(T, 10, 7, K), device, torch.float32
    )
    return [(*with_grad(hidden, up, down), indices, *with_grad(routing))]


def mlp_samples(device):
    inputs, _ = mlp_inputs((2, T), 10, 6, device, torch.float32)
    x, *weights = inputs
    return [
        (*with_grad(*inputs), "silu", False),
        (*with_grad(*inputs), "silu", True),
        (*with_grad(*map(strided, inputs)), "gelu", False),
        (*with_grad(x), *weights),
        (x[:, :0], *with_grad(*weights)),
        (x[0, 0], *weights),
    ]


def mlp_save_gates_samples(device):
    inputs, _ = mlp_inputs((2, T), 10, 6, device, torch.float32)
    return [(*inputs, "silu"), (inputs[0][0, 0], *map(strided, inputs[1:]), "relu")]


def mlp_backward_samples(device):
    inputs, grad = mlp_inputs((2, T), 10, 6, device, torch.float32)
    _, gate, up = ops.omni_mlp_save_gates(*inputs, "silu")
    masks = ([True] * 4, [False] * 4, [True, False, False, True])
    samples = [(grad, *inputs, gate, up, "silu", mask) for mask in masks]
    return [
        *samples,
        (grad, *inputs, None, None, "silu", masks[0]),
        (strided(grad), *map(strided, inputs), strided(gate), strided(up), "silu", masks[0]),
    ]


def mlp_backward_consume_samples(device):
    inputs, grad = mlp_inputs((2, T), 10, 6, device, torch.float32)
    _, gate, up = ops.omni_mlp_save_gates(*inputs, "silu")
    return [
        (grad, *inputs, gate, up, "silu", [True] * 4),
        (grad, *inputs, gate.clone(), up.clone(), "gelu", [True, False, False, True]),
    ]


def expert_mlp_samples(device):
    experts, indices, _ = expert_inputs(ExpertShape(T, 10, 7, K), device, torch.float32)
    (_, *weights), _ = mlp_inputs((T,), 10, 6, device, torch.float32)
    return [
        (*with_grad(*experts), indices, *with_grad(*weights), "silu", recompute)
        for recompute in (False, True)
    ] + [(*experts[:3], *with_grad(experts[3]), indices.int(), *with_grad(*map(strided, weights)))]


def expert_mlp_save_samples(device):
    experts, indices, _ = expert_inputs(ExpertShape(T, 10, 7, K), device, torch.float32)
    (_, *weights), _ = mlp_inputs((T,), 10, 6, device, torch.float32)
    strided_inputs = (*map(strided, experts), indices.int(), *map(strided, weights))
    return [
        (*experts, indices, *weights, "silu", True),
        (*experts, indices, *weights, "silu", False),
        (*strided_inputs, "gelu", True),
    ]


def batch_norm_samples(device):
    logits = torch.randn(T, 10, device=device)
    mean, var = torch.zeros(2, 10, device=device), torch.ones(2, 10, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    buffers = (mean[0, :4], var[0, :4], counts[0], mean[1, :6], var[1, :6], counts[1])
    apart = [buffer.clone() for buffer in buffers]
    narrow = [b.bfloat16() if b.is_floating_point() else b.clone() for b in buffers]
    none = [None] * 3
    return [
        (*with_grad(logits), 4, *apart, True, 0.1, 1e-5),
        (*with_grad(strided(logits)), 4, *apart, True, 0.3, 1e-3),
        (*with_grad(logits), 4, *apart, False, 0.1, 1e-5),
        (logits, 4, *apart, True, 0.1, 1e-5),
        (logits[:, :5], 4, *none, *none, True, 0.1, 1e-5),
        (logits, 4, *apart[:2], None, *none, True, 0.1, 1e-5),
        (logits[:0], 4, *apart, True, 0.1, 1e-5),
        (logits.bfloat16(), 4, *narrow, True, 0.1, 1e-5),
    ]


def batch_norm_save_stats_samples(device):
    return [
        tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in sample)
        for sample in batch_norm_samples(device)
    ]


def batch_norm_backward_samples(device):
    shapes = ((T, 4), (T, 6), (T, 4), (T, 6), (10,))
    saved = [torch.randn(shape, device=device) for shape in shapes]
    return [
        (*saved, True),
        (*saved, False),
        (*map(strided, saved), True),
        (*(tensor[:0] for tensor in saved[:4]), saved[4], True),
        (*(tensor.half() for tensor in saved[:4]), saved[4], True),
    ]


def router_logits_samples(device):
    """Of one kernel where a device has it (the first two), and of several."""
    hidden, gates = torch.randn(T, 8, device=device), torch.randn(2, 16, 8, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    buffers = [torch.zeros(16, device=device), torch.ones(16, device=device), counts[0].clone()]
    apart = [*buffers, *(buffer.clone() for buffer in buffers)]
    short = [*(buffer[:6].clone() for buffer in buffers[:2]), None]
    none = [None] * 3
    half = [tensor.bfloat16() for tensor in (hidden, gates[0], gates[1])]
    inputs = (hidden, gates[0].clone(), gates[1, :6].clone())
    return [
        (*with_grad(*half), *apart, True, 0.1, 1e-5),
        (*half, *apart, False, 0.1, 1e-5),
        (*with_grad(*inputs), *buffers, *short, True, 0.3, 1e-3),
        (*inputs, *buffers, *short, True, 0.1, 1e-5),
        (hidden, *with_grad(*inputs[1:]), *none, *none, True, 0.1, 1e-5),
        (*with_grad(*map(strided, inputs)), *buffers, *short, False, 0.1, 1e-5),
        (hidden[:0], *inputs[1:], *buffers, *none, True, 0.1, 1e-5),
    ]


def router_logits_save_stats_samples(device):
    return [
        tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in sample)
        for sample in router_logits_samples(device)
    ]


def router_logits_backward_samples(device):
    shapes = ((T, 4), (T, 6), (T, 8), (4, 8), (6, 8), (T, 4), (T, 6), (10,))
    saved = [torch.randn(shape, device=device) for shape in shapes]
    samples = [(*saved, True, mask) for mask in ([True] * 2, [False] * 2, [True, False])]
    return [
        *samples,
        (*map(strided, saved), True, [False, True]),
        (*(tensor.half() for tensor in saved[:7]), saved[7], False, [True] * 2),
    ]


SAMPLES = {
    "omni_router": router_samples,
    "omni_router_backward": router_backward_samples,
    "omni_softmax_router": softmax_router_samples,
    "omni_softmax_router_backward": softmax_router_backward_samples,
    "omni_expert": expert_samples,
    "omni_expert_save_scores": expert_save_scores_samples,
    "omni_expert_backward": expert_backward_samples,
    "flash_expert": flash_expert_samples,
    "omni_mlp": mlp_samples,
    "omni_mlp_save_gates": mlp_save_gates_samples,
    "omni_mlp_backward": mlp_backward_samples,
    "omni_mlp_backward_consume": mlp_backward_consume_samples,
    "omni_expert_mlp": expert_mlp_samples,
    "omni_expert_mlp_save": expert_mlp_save_samples,
    "omni_batch_norm": batch_norm_samples,
    "omni_batch_norm_save_stats": batch_norm_save_stats_samples,
    "omni_batch_norm_backward": batch_norm_backward_samples,
    "omni_router_logits": router_logits_samples,
    "omni_router_logits_save_stats": router_logits_save_stats_samples,
    "omni_router_logits_backward": router_logits_backward_samples,
}
TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def test_every_op_has_samples():
    registered = {
        schema.name.removeprefix("omni_moe::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("omni_moe::")
    }
    assert registered == set(SAMPLES)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("op", SAMPLES)
@on_devices
def test_opcheck(device, op, test):
    for sample in SAMPLES[op](device):
        opcheck(getattr(ops, op).default, sample, test_utils=test)

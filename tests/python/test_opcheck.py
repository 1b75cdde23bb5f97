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


def token_mask(device):
    return torch.arange(T, device=device) % 3 > 0


def softmax_router_samples(device):
    samples = router_samples(device)
    return [
        *((*sample, norm) for sample in samples[:4] for norm in (False, True)),
        (*samples[0], True, token_mask(device)),
        (*samples[3], False, strided(token_mask(device))),
    ]


def router_backward_samples(device):
    grad = torch.randn(T, K, device=device)
    indices = torch.randint(24, (T, K), device=device, dtype=torch.int32)
    return [(grad, indices, 4, 6), (grad[:0], indices[:0], 4, 6), (strided(grad), indices, 4, 6)]


def softmax_router_backward_samples(device):
    x, y = random_logits((T, 4, 6), device, torch.float32)
    grad, indices, *_ = router_backward_samples(device)[0]
    masked = torch.where(token_mask(device).unsqueeze(-1), indices, -1)
    return [
        (grad, x, y, indices, False),
        (strided(grad), strided(x), y, indices, True),
        (grad, x, y, masked, False),
    ]


def topk_router_samples(device):
    logits = torch.randn(T, 8, device=device)
    bias, mask = torch.randn(8, device=device), torch.arange(T, device=device) % 3 > 0
    ids = torch.randint(-1, 8, (T, K), device=device)
    grouped = ("sigmoid", True, 2.5, 4, 2, "top2_sum", bias, mask)
    return [
        (*with_grad(logits), K),
        (*with_grad(strided(logits)), 8, "sqrtsoftplus", True),
        (*with_grad(logits), K, *grouped),
        (*with_grad(logits), K, *grouped, ids),
        (logits.half(), K, "softmax", False, 1.0, 4, 2, "max", *with_grad(bias)),
        (logits, 0),
        (logits[:0], K),
        (logits[:1], 1, *grouped[:6], strided(bias), mask[:1], ids[:1, :1].int()),
    ]


def topk_router_backward_samples(device):
    grad, logits = torch.randn(T, K, device=device), torch.randn(T, 8, device=device)
    ids = torch.randint(-1, 8, (T, K), device=device, dtype=torch.int32)
    return [
        (grad, logits, ids, "softmax", False, 1.0),
        (strided(grad), strided(logits), strided(ids), "sigmoid", True, 2.5),
        (grad[:0], logits[:0], ids[:0], "sqrtsoftplus", True, 1.0),
    ]


def expert_slots_samples(device):
    ids = torch.randint(-1, 8, (T, K), device=device, dtype=torch.int32)
    return [(ids, 8, 1), (strided(ids), 8, 2, torch.rand(T, K, device=device)), (ids[:0], 8, 0)]


def expert_rows_samples(device):
    ids = torch.randint(-1, 8, (T, K), device=device, dtype=torch.int32)
    slots = ops.omni_expert_slots(ids, 8, 2)
    return [
        (ids, 8),
        (strided(ids.long()), 8, strided(slots)),
        (ids, 8, slots, 2),
        (ids, 8, None, 3),
        (ids[:0], 8, None, 0),
    ]


def permutation_maps(device):
    """Row ids and ends: without gaps, and with three rows for each expert."""
    ids = torch.randint(-1, 8, (T, K), device=device, dtype=torch.int32)
    return ops.omni_expert_rows(ids, 8), ops.omni_expert_rows(ids, 8, None, 3)


def permute_samples(device):
    tokens, (dense, padded) = torch.randn(T, 10, device=device), permutation_maps(device)
    return [
        (*with_grad(tokens), *dense, T * K),
        (*with_grad(strided(tokens)), *map(strided, padded), 24, True),
        (tokens.bfloat16(), *padded, 24, True),
        (*with_grad(tokens[:0]), dense[0][:0], torch.zeros_like(dense[1]), 16),
    ]


def unpermute_samples(device):
    dense, padded = permutation_maps(device)
    rows, weights = torch.randn(24, 10, device=device), torch.rand(T, K, device=device)
    return [
        (*with_grad(rows), *dense, *with_grad(weights)),
        (*with_grad(rows), *dense),
        (rows, *dense, *with_grad(weights)),
        (*with_grad(strided(rows)), *map(strided, padded), strided(weights), True),
        (*with_grad(rows.bfloat16()), *padded, *with_grad(weights), True),
        (*with_grad(rows), dense[0][:0], torch.zeros_like(dense[1]), weights[:0]),
    ]


def unpermute_backward_samples(device):
    dense, padded = permutation_maps(device)
    grad, rows = torch.randn(T, 10, device=device), torch.randn(24, 10, device=device)
    weights = torch.rand(T, K, device=device)
    masks = ([True] * 2, [False] * 2, [True, False], [False, True])
    samples = [(grad, rows, *padded, weights, True, mask) for mask in masks]
    return [*samples, (strided(grad), strided(rows), *dense, strided(weights), False, masks[0])]


def grouped_linear_samples(device):
    rows, weight = torch.randn(12, 10, device=device), torch.randn(4, 6, 10, device=device)
    ends = torch.tensor([3, 3, 10, 12], dtype=torch.int32, device=device)
    half = rows.new_zeros(12, 16).bfloat16(), weight.new_ones(4, 8, 16).bfloat16()
    return [
        (*with_grad(rows, weight), ends),
        (*with_grad(strided(rows), weight.transpose(1, 2).contiguous().transpose(1, 2)), ends),
        (rows, *with_grad(weight), strided(ends)),
        (*with_grad(*half), ends),
        (*with_grad(rows[:0], weight), torch.zeros_like(ends)),
    ]


def grouped_linear_backward_samples(device):
    shapes = ((12, 6), (12, 10), (4, 6, 10))
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    ends = torch.tensor([3, 3, 10, 12], dtype=torch.int32, device=device)
    masks = ([True] * 2, [False] * 2, [True, False])
    return [(*tensors, ends, mask) for mask in masks]


def gated_activation_samples(device):
    rows = torch.randn(T, 10, device=device)
    return [
        (*with_grad(rows), "silu"),
        (*with_grad(strided(rows)), "gelu"),
        (rows.bfloat16(), "relu"),
        (*with_grad(rows[:0]), "silu"),
    ]


def gated_activation_backward_samples(device):
    grad, rows = torch.randn(T, 5, device=device), torch.randn(T, 10, device=device)
    return [(grad, rows, "silu"), (strided(grad), strided(rows), "gelu_tanh")]


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
        (*inputs, indices, "silu", None, True),
        (*with_grad(*inputs), indices, "silu", None, True),
        (*(tensor.bfloat16() for tensor in inputs), indices, "silu", hidden.bfloat16(), True),
    ]


def expert_backward_samples(device):
    inputs, indices, grad = expert_inputs(ExpertShape(T, 10, 7, K), device, torch.float32)
    _, saved = ops.omni_expert(*inputs, indices, save_for_backward=True)
    masks = ([True] * 4, [False] * 4, [True, False, False, True], [False, True, False, False])
    samples = [(grad, *inputs, indices, saved, "silu", None, mask) for mask in masks]
    strided_inputs = (strided(grad), *map(strided, inputs), indices.int(), strided(saved))
    return [
        *samples,
        (grad, *inputs, indices, saved, "silu", torch.randn_like(grad), masks[0]),
        (*strided_inputs, "gelu_tanh", None, masks[0]),
    ]


def mlp_samples(device):
    inputs, _ = mlp_inputs((2, T), 10, 6, device, torch.float32)
    x, *weights = inputs
    return [
        (*with_grad(*inputs), "silu"),
        (*with_grad(*map(strided, inputs)), "gelu"),
        (*with_grad(x), *weights),
        (x[:, :0], *with_grad(*weights)),
        (x[0, 0], *weights),
        (*inputs, "silu", True),
        (*with_grad(*inputs), "silu", True),
        (x[0, 0], *map(strided, weights), "relu", True),
    ]


def mlp_backward_samples(device):
    inputs, grad = mlp_inputs((2, T), 10, 6, device, torch.float32)
    _, gate, up = ops.omni_mlp(*inputs, save_for_backward=True)
    masks = ([True] * 4, [False] * 4, [True, False, False, True])
    samples = [(grad, *inputs, gate, up, "silu", mask) for mask in masks]
    return [
        *samples,
        (strided(grad), *map(strided, inputs), strided(gate), strided(up), "silu", masks[0]),
    ]


def mlp_backward_consume_samples(device):
    inputs, grad = mlp_inputs((2, T), 10, 6, device, torch.float32)
    _, gate, up = ops.omni_mlp(*inputs, save_for_backward=True)
    return [
        (grad, *inputs, gate, up, "silu", [True] * 4),
        (grad, *inputs, gate.clone(), up.clone(), "gelu", [True, False, False, True]),
    ]


def expert_mlp_samples(device):
    experts, indices, _ = expert_inputs(ExpertShape(T, 10, 7, K), device, torch.float32)
    (_, *weights), _ = mlp_inputs((T,), 10, 6, device, torch.float32)
    return [
        (*with_grad(*experts), indices, *with_grad(*weights)),
        (*experts[:3], *with_grad(experts[3]), indices.int(), *with_grad(*map(strided, weights))),
        (*experts, indices, *weights, "silu", True),
        (*map(strided, experts), indices.int(), *map(strided, weights), "gelu", True),
    ]


def batch_norm_buffers(num_rows, num_cols, device, dtype=torch.float32):
    return [
        buffer
        for size in (num_rows, num_cols)
        for buffer in (
            torch.zeros(size, device=device, dtype=dtype),
            torch.ones(size, device=device, dtype=dtype),
            torch.tensor(0, device=device),
        )
    ]


def router_logits_samples(device):
    """Of one kernel where a device has it (the first), and of several."""
    inputs = [torch.randn(size, 8, device=device) for size in (T, 16, 6)]
    half = [tensor.bfloat16() for tensor in (*inputs[:2], torch.randn(16, 8, device=device))]
    wide = batch_norm_buffers(16, 16, device)
    buffers = batch_norm_buffers(16, 6, device)
    return [
        (*with_grad(*half), wide, 0.1, 1e-5),
        (*half, batch_norm_buffers(16, 16, device, torch.bfloat16), 0.1, 1e-5),
        (*with_grad(*inputs), buffers, 0.3, 1e-3),
        (*inputs, buffers),
        (inputs[0], *with_grad(*inputs[1:]), []),
        (*with_grad(*map(strided, inputs)), buffers),
        (inputs[0][:0], *inputs[1:], buffers),
        (*with_grad(*inputs), buffers, 0.3, 1e-3, token_mask(device)),
        (*half, wide, 0.1, 1e-5, strided(token_mask(device))),
    ]


def router_logits_eval_samples(device):
    samples = [sample[:4] for sample in router_logits_samples(device)]
    return [(*inputs, *stats[:2], *stats[3:5]) for *inputs, stats in samples if stats]


def router_logits_backward_samples(device):
    shapes = ((T, 4), (T, 6), (T, 8), (4, 8), (6, 8), (T, 4), (T, 6), (10,))
    saved = [torch.randn(shape, device=device) for shape in shapes]
    samples = [(*saved, True, mask) for mask in ([True] * 2, [False] * 2, [True, False])]
    return [
        *samples,
        (*map(strided, saved), True, [False, True]),
        (*(tensor.half() for tensor in saved[:7]), saved[7], False, [True] * 2),
        (*saved, True, [True] * 2, token_mask(device)),
    ]


def router_logits_per_token_samples(device):
    inputs = [torch.randn(size, 8, device=device) for size in (T, 16, 6)]
    return [
        (*with_grad(*inputs), "layer_norm", 1e-3),
        (*inputs, "rms_norm"),
        (inputs[0], *with_grad(*inputs[1:])),
        (*with_grad(*map(strided, inputs)), "rms_norm"),
        (*(tensor.bfloat16() for tensor in inputs),),
        (inputs[0][:0], *inputs[1:], "layer_norm"),
    ]


def router_logits_per_token_backward_samples(device):
    shapes = ((T, 4), (T, 6), (T, 8), (4, 8), (6, 8), (T, 4), (T, 6), (T, 2))
    saved = [torch.randn(shape, device=device) for shape in shapes]
    samples = [(*saved, "layer_norm", mask) for mask in ([True] * 2, [False] * 2, [True, False])]
    return [*samples, (*map(strided, saved), "rms_norm", [False, True])]


SAMPLES = {
    "omni_router": router_samples,
    "_omni_router_backward": router_backward_samples,
    "omni_softmax_router": softmax_router_samples,
    "_omni_softmax_router_backward": softmax_router_backward_samples,
    "omni_topk_router": topk_router_samples,
    "_omni_topk_router_backward": topk_router_backward_samples,
    "omni_expert_slots": expert_slots_samples,
    "omni_expert_rows": expert_rows_samples,
    "omni_permute": permute_samples,
    "omni_unpermute": unpermute_samples,
    "_omni_unpermute_backward": unpermute_backward_samples,
    "_omni_grouped_linear": grouped_linear_samples,
    "_omni_grouped_linear_backward": grouped_linear_backward_samples,
    "_omni_gated_activation": gated_activation_samples,
    "_omni_gated_activation_backward": gated_activation_backward_samples,
    "omni_expert": expert_samples,
    "_omni_expert_backward": expert_backward_samples,
    "omni_mlp": mlp_samples,
    "_omni_mlp_backward": mlp_backward_samples,
    "_omni_mlp_backward_consume": mlp_backward_consume_samples,
    "omni_expert_mlp": expert_mlp_samples,
    "omni_router_logits": router_logits_samples,
    "_omni_router_logits_eval": router_logits_eval_samples,
    "_omni_router_logits_backward": router_logits_backward_samples,
    "omni_router_logits_per_token": router_logits_per_token_samples,
    "_omni_router_logits_per_token_backward": router_logits_per_token_backward_samples,
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

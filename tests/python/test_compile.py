"""torch.compile in one graph, with dynamic T, and the shapes that it and meta tensors rely on."""

import pytest
import torch
from helpers import (
    ExpertShape,
    assert_bitwise,
    assert_close,
    expert_inputs,
    mlp_inputs,
    on_devices,
    random_logits,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import omni_moe
from omni_moe import OmniMoE, OmniMoEConfig

ops = torch.ops.omni_moe


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def router_case(num_tokens, device):
    inputs = random_logits((num_tokens, 8, 12), device, torch.float32)
    return lambda x, y: ops.omni_router(x, y, 5)[0], inputs, [0, 1]


def softmax_router_case(num_tokens, device):
    inputs = random_logits((num_tokens, 8, 12), device, torch.float32)
    return lambda x, y: ops.omni_softmax_router(x, y, 5, True)[0], inputs, [0, 1]


def topk_router_case(num_tokens, device):
    bias = torch.randn(12, device=device) / 10

    def route(logits):
        weights, ids, _ = omni_moe.ops.omni_topk_router(
            logits,
            4,
            scoring_func="sigmoid",
            norm_topk_prob=True,
            n_group=4,
            topk_group=2,
            e_score_correction_bias=bias,
        )
        slots = omni_moe.ops.omni_expert_slots(ids, 12, logits.shape[0] // 3, weights)
        return weights.masked_fill(slots < 0, 0)

    return route, [torch.randn(num_tokens, 12, device=device)], [0]


def expert_case(num_tokens, device):
    inputs, indices, _ = expert_inputs(ExpertShape(num_tokens, 20, 11, 3), device, torch.float32)

    def experts(hidden, up, down, routing):
        # The ids as a product of the traced tokens, so that their T is dynamic too.
        ids = torch.cat([indices, indices, indices])[: hidden.shape[0]]
        return omni_moe.ops.omni_expert(hidden, up, down, routing, ids, "gelu")

    return experts, inputs, [0, 3]


def flash_expert_case(num_tokens, device):
    (hidden, up, down, routing), indices, _ = expert_inputs(
        ExpertShape(num_tokens, 20, 11, 3), device, torch.float32
    )

    def experts(hidden, up, down, routing):
        ids = torch.cat([indices, indices, indices])[: hidden.shape[0]]
        return omni_moe.ops.flash_expert(hidden, up, down, ids, routing)

    return experts, [hidden, up, down, routing], [0, 3]


def mlp_case(num_tokens, device):
    inputs, _ = mlp_inputs((num_tokens,), 20, 12, device, torch.float32)
    return omni_moe.ops.omni_mlp, inputs, [0]


def expert_mlp_case(num_tokens, device):
    _, inputs, dynamic = expert_case(num_tokens, device)
    (_, *weights), _ = mlp_inputs((num_tokens,), 20, 12, device, torch.float32)

    def both(hidden, up, down, routing, *weights):
        ids = (routing.detach().abs() * 3).long() % 11
        return omni_moe.ops.omni_expert_mlp(hidden, up, down, routing, ids, *weights)

    return both, [*inputs, *weights], dynamic


CASES = {
    "omni_router": router_case,
    "omni_softmax_router": softmax_router_case,
    "omni_topk_router": topk_router_case,
    "omni_expert": expert_case,
    "flash_expert": flash_expert_case,
    "omni_mlp": mlp_case,
    "omni_expert_mlp": expert_mlp_case,
}


@pytest.mark.parametrize("case", CASES)
@on_devices
def test_compiled_ops(device, case):
    """The same bits as eager, forward and backward, one graph, no recompilation for another T."""
    function, inputs, token_inputs = CASES[case](13, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for num_tokens in (13, 29, 7):
        sized = list(inputs)
        for i in token_inputs:
            repeats = [3] + [1] * (inputs[i].dim() - 1)
            sized[i] = inputs[i].repeat(repeats)[:num_tokens].clone()
        want = function(*sized)
        grad = torch.randn_like(want)

        def traced(*leaves):
            for i in token_inputs:
                torch._dynamo.mark_dynamic(leaves[i], 0)
            return compiled(*leaves)

        out, grads = run(traced, sized, grad)
        eager_out, eager_grads = run(function, sized, grad)
        assert_bitwise(out, eager_out)
        for got, want_grad in zip(grads, eager_grads, strict=True):
            assert_bitwise(got, want_grad)
    assert counter.frame_count == 1


def test_compiled_with_inductor():
    """Router, experts and MLP between ordinary operators, with the default backend."""
    router_inputs = random_logits((13, 8, 12), "cpu", torch.float32)
    (hidden, up, down, _), _, _ = expert_inputs(ExpertShape(13, 20, 96, 5), "cpu", torch.float32)
    (_, *mlp_weights), _ = mlp_inputs((13,), 20, 12, "cpu", torch.float32)
    inputs = [*router_inputs, hidden, up, down, *mlp_weights]

    def layer(x, y, hidden, up, down, *mlp_weights):
        weights, indices = ops.omni_softmax_router(x * 2, y * 2, 5)
        experts = omni_moe.ops.omni_expert(hidden.sin(), up, down, weights, indices)
        return (experts + omni_moe.ops.omni_mlp(hidden, *mlp_weights)).cos()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (13, 9):
        with torch._dynamo.config.patch(error_on_recompile=num_tokens != 13):
            sized = [tensor[:num_tokens] for tensor in inputs[:3]] + inputs[3:]
            grad = torch.randn(num_tokens, 20)
            out, grads = run(compiled, sized, grad)
            want, want_grads = run(layer, sized, grad)
            assert_close(out, want.double())
            for got, want_grad in zip(grads, want_grads, strict=True):
                assert_close(got, want_grad.double(), num_terms=100)


@on_devices
def test_errors_reach_the_caller_of_a_compiled_function(device):
    compiled = torch.compile(
        lambda x, y: ops.omni_router(x, y, 500), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="between 0 and the 96 experts of the grid, but got 500"):
        compiled(*random_logits((13, 8, 12), device, torch.float32))


# ---- meta and fake tensors -----------------------------------------------------------------------


def expected_outputs(t, k):
    """{op: (arguments, [(shape, dtype) of each output])} for T = t, H 10, E 24, I 6, in fp16."""
    half, int32 = torch.float16, torch.int32

    def empty(*shape, dtype=half):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y = empty(t, 4), empty(t, 6)
    chosen = [((t, k), half), ((t, k), int32)]
    indices, routing = empty(t, k, dtype=int32), empty(t, k)
    expert = (empty(t, 10), empty(24, 10), empty(24, 10), routing)
    mlp = (empty(2, t, 10), empty(6, 10), empty(6, 10), empty(10, 6))
    shapes = [((t, 10), half), ((24, 10), half), ((24, 10), half), ((t, k), half)]
    none = ((0,), half)
    saved = ((t, k), torch.float32)
    products = (empty(2, t, 6), empty(2, t, 6))
    buffers = [
        buffer
        for size in (4, 6)
        for buffer in (*[empty(size, dtype=torch.float32)] * 2, empty(dtype=torch.int64))
    ]
    normed = [((t, 4), half), ((t, 6), half), ((10,), torch.float32)]
    router_logits = (empty(t, 12), empty(4, 12), empty(6, 12))
    return {
        "omni_router": ((x, y, k), chosen),
        "omni_softmax_router": ((x, y, k, True), chosen),
        "_omni_router_backward": ((routing, indices, 4, 6), [((t, 4), half), ((t, 6), half)]),
        "_omni_softmax_router_backward": (
            (routing, x, y, indices, False),
            [((t, 4), half), ((t, 6), half)],
        ),
        "omni_expert": ((*expert, indices, "silu", None, True), [shapes[0], saved]),
        "_omni_expert_backward": (
            (
                *(empty(t, 10), *expert, indices, empty(t, k, dtype=torch.float32)),
                *("silu", None, [True, False, True, False]),
            ),
            [shapes[0], none, shapes[2], none],
        ),
        "omni_mlp": ((*mlp, "relu", True), [((2, t, 10), half), *[((2, t, 6), half)] * 2]),
        "_omni_mlp_backward": (
            (empty(2, t, 10), *mlp, *products, "silu", [False, True, True, True]),
            [none, ((6, 10), half), ((6, 10), half), ((10, 6), half)],
        ),
        "_omni_mlp_backward_consume": (
            (empty(2, t, 10), *mlp, *products, "silu", [True] * 4),
            [((2, t, 10), half), ((6, 10), half), ((6, 10), half), ((10, 6), half)],
        ),
        "omni_expert_mlp": (
            (*expert, indices, *mlp[1:], "relu", True),
            [shapes[0], saved, ((t, 6), half), ((t, 6), half)],
        ),
        "omni_router_logits": ((*router_logits, buffers), normed),
        "_omni_router_logits_eval": ((*router_logits, *buffers[:2], *buffers[3:5]), normed),
        "_omni_router_logits_backward": (
            (x, y, *router_logits, x, y, empty(10, dtype=torch.float32), True, [True] * 2),
            [((t, 12), half), ((10, 12), half)],
        ),
        "omni_router_logits_per_token": (
            (*router_logits, "rms_norm"),
            [*normed[:2], ((t, 2), torch.float32)],
        ),
        "_omni_router_logits_per_token_backward": (
            (x, y, *router_logits, x, y, empty(t, 2, dtype=torch.float32), "rms_norm", [True] * 2),
            [((t, 12), half), ((10, 12), half)],
        ),
    }


@pytest.mark.parametrize(("num_tokens", "k"), [(0, 3), (5, 0), (5, 3), (2**20, 24)])
@pytest.mark.parametrize("op", expected_outputs(1, 1))
def test_meta_shapes(op, num_tokens, k):
    args, want = expected_outputs(num_tokens, k)[op]
    outputs = getattr(ops, op)(*args)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    assert [(tuple(out.shape), out.dtype) for out in outputs] == want
    assert all(out.device.type == "meta" and out.is_contiguous() for out in outputs)


@on_devices
def test_fake_tensors_of_a_device(device):
    """Fake tensors of a device that need not exist keep it."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        logits = torch.empty(5, 4, device=device)
        weights, indices = ops.omni_softmax_router(logits, logits, 3)
        out = omni_moe.ops.omni_expert(
            torch.empty(5, 8, device=device),
            torch.empty(16, 8, device=device),
            torch.empty(16, 8, device=device),
            weights,
            indices,
        )
    assert out.shape == (5, 8) and out.device.type == device and indices.dtype == torch.int32


# ---- a layer in evaluation under vmap and export ------------------------------------------------

CONFIG = OmniMoEConfig(
    hidden_size=24, intermediate_size=40, num_experts=48, num_experts_per_token=5
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_devices
def test_vmap_of_an_evaluation_pass(device):
    """Nothing is mutated there, so that torch.func can batch the layer."""
    layer = OmniMoE(CONFIG).to(device).eval()
    x = torch.randn(3, 7, CONFIG.hidden_size, device=device)
    got = torch.vmap(layer)(x)
    want = layer(x)
    assert_close(got, want.double(), num_terms=69, terms=want.abs().max().item())


@pytest.mark.parametrize("export", [torch.export.export, torch.export.draft_export])
@on_devices
def test_export_of_an_evaluation_pass(device, export):
    layer = OmniMoE(CONFIG).to(device).eval()
    x = torch.randn(3, 7, CONFIG.hidden_size, device=device)
    program = export(layer, (x,))
    assert_bitwise(program.module()(x), layer(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {
        "omni_moe._omni_router_logits_eval.default",
        "omni_moe.omni_softmax_router.default",
        "omni_moe.omni_expert_mlp.default",
    } <= called

"""What CUDA adds: graphs, streams, several devices, dirty memory, no waiting for the device.

Every kernel strategy has a case; results are compared bit for bit with a plain serial run.
"""

import contextlib
import copy
import threading
from functools import partial

import pytest
import torch
from helpers import (
    ExpertShape,
    assert_bitwise,
    expert_inputs,
    mlp_inputs,
    needs_gpu,
    random_logits,
    run,
)

import omni_moe
from omni_moe import OmniMoE, OmniMoEConfig
from omni_moe.modules import MixtureOfExperts

ops = torch.ops.omni_moe
BF16 = torch.bfloat16
pytestmark = needs_gpu


def router_case(shape, k, name, device, **options):
    logits = random_logits(shape, device, BF16)
    grad = torch.randn(shape[0], k).to(device, BF16)
    return lambda x, y: getattr(ops, name)(x, y, k, **options)[0], logits, grad


def topk_router_case(shape, k, options, device):
    """Scores, choice, counts and slots; pairs past a capacity lose their weight."""
    num_tokens, num_experts = shape
    logits, grad = torch.randn(shape).to(device, BF16), torch.randn(num_tokens, k).to(device, BF16)
    bias = torch.randn(num_experts).to(device) / 10

    def route(logits):
        weights, ids, counts = omni_moe.ops.omni_topk_router(
            logits, k, e_score_correction_bias=bias, **options
        )
        slots = omni_moe.ops.omni_expert_slots(ids, num_experts, num_tokens * k // num_experts)
        fits = (slots >= 0) & (counts[ids.long()] > 1)
        return weights.masked_fill(~fits, 0)

    return route, [logits], grad


def expert_case(shape, index_dtype, device):
    inputs, indices, grad = expert_inputs(ExpertShape(*shape), device, BF16)
    indices = indices.to(index_dtype)
    return lambda *args: omni_moe.ops.omni_expert(*args, indices), inputs, grad


def mlp_case(hidden_size, intermediate_size, device):
    inputs, grad = mlp_inputs((67,), hidden_size, intermediate_size, device, BF16)
    return omni_moe.ops.omni_mlp, inputs, grad


def expert_mlp_case(device):
    experts, indices, grad = expert_inputs(ExpertShape(67, 256, 300, 8), device, BF16)
    (_, *weights), _ = mlp_inputs((67,), 256, 512, device, BF16)
    return (
        lambda *args: omni_moe.ops.omni_expert_mlp(*args[:4], indices, *args[4:]),
        [*experts, *weights],
        grad,
    )


def permute_case(shape, hidden_size, capacity, device):
    """Rows, permutation and its undoing; by a sum of both their gradients meet."""
    num_tokens, num_experts, k = shape
    ids = torch.randint(-1, num_experts, (num_tokens, k), device=device)
    num_rows = num_tokens * k if capacity is None else num_experts * capacity
    is_padded = capacity is not None

    def there_and_back(tokens, weights):
        maps = omni_moe.ops.omni_expert_rows(ids, num_experts, capacity=capacity)
        rows = omni_moe.ops.omni_permute(tokens, *maps, num_rows, is_padded)
        sums = omni_moe.ops.omni_unpermute(rows, *maps, None, is_padded)
        return omni_moe.ops.omni_unpermute(rows, *maps, weights, is_padded) + sums

    tokens, grad = torch.randn(2, num_tokens, hidden_size, device=device, dtype=BF16)
    return there_and_back, [tokens, torch.rand(num_tokens, k, device=device)], grad


def module_case(module, num_tokens, hidden_size, device):
    """Output, and the gradients of tokens and parameters."""
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        output = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)
        return output[0] if isinstance(output, tuple) else output

    x, grad = torch.randn(2, num_tokens, hidden_size, device=device, dtype=BF16)
    return function, [x, *(p.detach() for p in module.parameters())], grad


def mixture_case(device, **options):
    layer = MixtureOfExperts(64, 96, 12, 3, shared_intermediate_size=40, **options)
    return module_case(layer.to(device, BF16), 67, 64, device)


def layer_case(num_experts, training, device):
    config = OmniMoEConfig(
        hidden_size=64, intermediate_size=96, num_experts=num_experts, num_experts_per_token=9
    )
    return module_case(OmniMoE(config).to(device, BF16).train(training), 67, 64, device)


# Named after what is meant to run on a Hopper. Shapes of the experts: T, H, E, K.
CASES = {
    "router": partial(router_case, (67, 12, 20), 19, "omni_router"),
    "softmax_router": partial(router_case, (67, 30, 40), 16, "omni_softmax_router"),
    "router_forward_block": partial(router_case, (37, 64, 48), 700, "omni_softmax_router"),
    "router_forward_unsorted": partial(
        router_case, (401, 64, 48), 700, "omni_softmax_router", sorted=False
    ),
    "topk_router_warp": partial(topk_router_case, (67, 60), 7, {"norm_topk_prob": True}),
    "topk_router_groups": partial(
        topk_router_case, (1024, 256), 8, {"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4}
    ),
    "topk_router_block": partial(topk_router_case, (67, 2000), 40, {}),
    "expert_two_phase": partial(expert_case, (67, 100, 40, 7), torch.int64),
    "expert_splits": partial(expert_case, (2, 256, 300, 200), torch.int32),
    "expert_fused": partial(expert_case, (67, 256, 300, 8), torch.int32),
    "expert_fused_int64": partial(expert_case, (67, 256, 300, 8), torch.int64),
    "expert_l2_tiled": partial(expert_case, (1024, 512, 2000, 16), torch.int32),
    "expert_l2_tiled_int64": partial(expert_case, (1024, 512, 2000, 16), torch.int64),
    # So many pairs an expert that the backward's schedule is a radix sort.
    "expert_sorted": partial(expert_case, (1024, 512, 8, 4), torch.int32),
    "mlp_cublas": partial(mlp_case, 100, 52),
    "mlp_fused": partial(mlp_case, 256, 512),
    "expert_mlp": expert_mlp_case,
    "permute": partial(permute_case, (67, 12, 3), 256, None),
    "permute_by_element": partial(permute_case, (300, 40, 2), 100, None),
    "permute_padded": partial(permute_case, (67, 12, 3), 256, 15),
    "mixture_of_experts": mixture_case,
    "mixture_of_experts_with_capacity": partial(mixture_case, capacity_factor=0.8),
    "layer": partial(layer_case, 400, False),
    # Their statistics need a barrier of the grid: BatchNorm's kernels, and the gates' kernel.
    "training_layer_batch_norm": partial(layer_case, 400, True),
    "training_layer_router_logits": partial(layer_case, 4096, True),
}
on_cases = pytest.mark.parametrize("case", CASES)


def assert_same_run(got, want):
    assert_bitwise(got[0], want[0], "out")
    for i, (grad, want_grad) in enumerate(zip(got[1], want[1], strict=True)):
        assert_bitwise(grad, want_grad, f"gradient {i}")


# ---- graphs --------------------------------------------------------------------------------------


def capture(function, leaves, grad):
    """A graph of forward and backward, and its output and gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # cuBLAS and lazily loaded kernels before the capture
            torch.autograd.grad(function(*leaves), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, grad)
    return graph, (out, grads)


@on_cases
def test_graph_replays(case):
    """Captured once, replayed on new inputs: no host synchronisation, no change of addresses."""
    function, inputs, grad = CASES[case]("cuda")
    static = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    graph, results = capture(function, static, grad)
    for _ in range(2):
        fresh = [torch.randn_like(tensor) for tensor in inputs]
        with torch.no_grad():
            for tensor, value in zip(static, fresh, strict=True):
                tensor.copy_(value)
        graph.replay()
        assert_same_run(results, run(function, fresh, grad))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(67, 256, 300, 8), (1024, 512, 2000, 16)], ids=str)
def test_graph_replays_on_other_experts(shape, index_dtype):
    """Nothing of the schedule is decided at capture: from even to a single expert and back."""
    shape = ExpertShape(*shape)
    inputs, indices, grad = expert_inputs(shape, "cuda", BF16)
    static = indices.to(index_dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    graph, results = capture(lambda *args: omni_moe.ops.omni_expert(*args, static), leaves, grad)
    others = [torch.full_like(static, 17), static.clone(), static.flip(0) // 2 * 2]
    for ids in others:
        static.copy_(ids)
        graph.replay()
        want = run(lambda *args, ids=ids: omni_moe.ops.omni_expert(*args, ids), inputs, grad)
        assert_same_run(results, want)


def training_layer(**options):
    config = OmniMoEConfig(
        hidden_size=64,
        intermediate_size=96,
        num_experts=400,
        num_experts_per_token=9,
        track_expert_load=True,
        **options,
    )
    return OmniMoE(config).to("cuda", BF16)


@pytest.mark.parametrize("losses", [False, True])
def test_graph_of_a_whole_training_step(losses):
    """Forward, losses, backward, optimiser, running statistics and counters, as without a graph."""
    options = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1} if losses else {}
    layer = training_layer(**options)
    eager = copy.deepcopy(layer)
    batches = torch.randn(8, 2, 33, 64, device="cuda", dtype=BF16)
    static = batches[0].clone()

    def make_step(layer, x):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, capturable=True)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = layer(x).float().square().mean()
            (loss + layer.aux_loss if losses else loss).backward()
            optimizer.step()
            return loss.detach()

        return step

    step, eager_input = make_step(layer, static), batches[0].clone()
    eager_step = make_step(eager, eager_input)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        eager_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for batch in batches:
        static.copy_(batch)
        eager_input.copy_(batch)
        graph.replay()
        assert_bitwise(loss, eager_step())
    state, want = layer.state_dict(), eager.state_dict()
    for name in want:
        assert_bitwise(state[name], want[name], name)
    assert state["router_norm_x.num_batches_tracked"] == 11
    assert_bitwise(layer.expert_load().counts, eager.expert_load().counts)
    assert layer.expert_load().counts.sum() == 11 * 66 * 9


@pytest.mark.parametrize("num_tokens", [67, 800, 1024])
def test_experts_right_behind_their_router(num_tokens):
    """Kernels that start early must not read the ids of a router that has not ended."""
    shape = ExpertShape(num_tokens, 256, 4096, 16)
    (hidden, up, down, _), _, _ = expert_inputs(shape, "cuda", BF16)
    x, y = random_logits((num_tokens, 64, 64), "cuda", BF16)

    def chain():
        return omni_moe.ops.omni_expert(hidden, up, down, *ops.omni_softmax_router(x, y, 16))

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        for logits in (x, y):
            logits.copy_(torch.randn_like(logits))
        weights, indices = ops.omni_softmax_router(x, y, 16)
        torch.cuda.synchronize()
        want = omni_moe.ops.omni_expert(hidden, up, down, weights, indices)
        out.fill_(float("nan"))
        graph.replay()
        assert_bitwise(out, want)


# ---- streams and devices -------------------------------------------------------------------------


def test_concurrent_streams():
    """All cases at once, several rounds on four streams, as if one came after the other."""
    made = {name: make("cuda") for name, make in CASES.items()}
    want = {name: run(*case) for name, case in made.items()}
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = []
    for turn in range(3):
        for i, (name, case) in enumerate(made.items()):
            with torch.cuda.stream(streams[(turn + i) % len(streams)]):
                got.append((name, run(*case)))
    torch.cuda.synchronize()
    for name, results in got:
        assert_same_run(results, want[name])


@on_cases
def test_threads_without_a_context(case):
    """A new thread, as autograd's are, has no current context until something makes one so."""
    function, inputs, grad = CASES[case]("cuda")
    want, got = run(function, inputs, grad), []
    out = function(*(leaves := [tensor.detach().requires_grad_() for tensor in inputs]))

    def forward_then_backward():
        got.append(run(function, inputs, grad))

    def backward_alone():
        got.append((out.detach(), torch.autograd.grad(out, leaves, grad)))

    for target in (forward_then_backward, backward_alone):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert len(got) == 2
    for results in got:
        assert_same_run(results, want)


@on_cases
def test_tensors_of_another_device(case):
    """The device of the tensors counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("GPUs of two kinds may differ in the last bits")
    want = run(*CASES[case]("cuda:0"))
    torch.manual_seed(0)
    assert torch.cuda.current_device() == 0
    out, grads = run(*CASES[case]("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in (out, *grads))
    assert_same_run((out.to("cuda:0"), [grad.to("cuda:0") for grad in grads]), want)


def test_tensors_of_two_devices_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    _, (x, y), _ = CASES["router"]("cuda:0")
    with pytest.raises(ValueError, match="cuda:1"):
        ops.omni_router(x, y.to("cuda:1"), 19)


# ---- memory and synchronisation ------------------------------------------------------------------


def leave_behind(byte):
    """Fills the blocks that the caching allocator will hand out next."""
    torch.cuda.empty_cache()
    sizes = [2**power for power in range(9, 26)]
    for _ in range(2):  # the second round finds the blocks of the first
        blocks = [
            torch.full((size,), byte, dtype=torch.uint8, device="cuda")
            for size in sizes
            for _ in range(6)
        ]
        del blocks


@on_cases
def test_dirty_memory_does_not_show(case):
    """Outputs and workspaces that start as NaN (0xff), as zero, or as what a run left there."""
    function, inputs, grad = CASES[case]("cuda")
    leave_behind(0xFF)
    first = run(function, inputs, grad)
    assert_same_run(run(function, inputs, grad), first)
    leave_behind(0)
    assert_same_run(run(function, inputs, grad), first)


@contextlib.contextmanager
def synchronisation_raises():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@on_cases
def test_no_synchronisation(case):
    function, inputs, grad = CASES[case]("cuda")
    want = run(function, inputs, grad)
    with synchronisation_raises():
        got = run(function, inputs, grad)
    assert_same_run(got, want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation_in_a_training_layer():
    """Batch statistics, router losses and load counters included."""
    layer = training_layer(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    x = torch.randn(2, 33, 64, device="cuda", dtype=BF16)
    for checked in (contextlib.nullcontext(), synchronisation_raises()):
        with checked:
            (layer(x).square().mean() + layer.aux_loss).backward()
    assert layer.expert_load().counts.sum() == 2 * 66 * 9


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_synchronisation_is_seen():
    """What the tests above rely on."""
    with synchronisation_raises(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device="cuda").sum().item()

"""Kernels that start before the one in front has ended (csrc/cuda/common/dependent_launch.cuh).

Whatever such a kernel reads, the one before may still be writing, and whatever it writes, the one
before may still be reading. Here the one before takes its time on purpose, and everything must come
out as if it had ended; and whole sequences of ops must give the same bits with and without early
launches.
"""

import contextlib
import random

import pytest
import torch
from helpers import ExpertShape, assert_bitwise, expert_inputs, needs_gpu, run
from launch_testing import early_copy, late_check, late_copy, needs_launch_testing
from test_cuda_modes import BF16, CASES, assert_same_run, capture, on_cases

import omni_moe
from omni_moe import GpuProperties

pytestmark = [needs_gpu, needs_launch_testing]


@contextlib.contextmanager
def early_launch(allowed):
    before = omni_moe._C.set_early_launch(allowed)
    try:
        yield
    finally:
        omni_moe._C.set_early_launch(before)


def stale(tensor):
    """Values of the tensor that would show: NaN, or other valid ids."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"))
    return tensor.flip(0).contiguous()


@contextlib.contextmanager
def written_late(tensor):
    """Within, the tensor's values are still on their way, behind the back of autograd."""
    fresh = tensor.detach().clone()
    tensor.data.copy_(stale(fresh))
    torch.cuda.synchronize()
    late_copy(tensor.detach(), fresh)
    yield
    torch.cuda.synchronize()


# ---- the tests can fail --------------------------------------------------------------------------


@pytest.fixture
def starts_early():
    if not GpuProperties.of().has_early_launch:
        pytest.skip("kernels do not start early on this GPU, or in this build")


def in_some_of_five(attempt):
    """Whether it ever succeeds: a host that is held up launches the second kernel too late."""
    return any(attempt() for _ in range(5))


@pytest.mark.parametrize("waits", [True, False])
def test_a_kernel_that_does_not_wait_is_found(starts_early, waits):
    source = torch.randn(1000, device="cuda")
    copied = torch.empty_like(source)

    def reads_stale_values():
        with written_late(source):
            early_copy(copied, source, waits=waits)
        return copied.isnan().any().item()

    assert in_some_of_five(reads_stale_values) == (not waits)


def test_a_write_that_comes_too_early_is_found(starts_early):
    block = torch.empty(1000, dtype=torch.uint8, device="cuda")
    zeros = torch.zeros_like(block)

    def writes_too_early():
        block.fill_(0xA5)
        num_changed = late_check([block], 0xA5)
        early_copy(block, zeros, waits=False)
        return num_changed.item() > 0

    assert in_some_of_five(writes_too_early)


# ---- late writers --------------------------------------------------------------------------------


@on_cases
def test_forward_of_inputs_written_late(case):
    function, inputs, grad = CASES[case]("cuda")
    want = run(function, inputs, grad)[0]
    for i, tensor in enumerate(inputs):
        with torch.no_grad(), written_late(tensor):
            out = function(*inputs)
        assert_bitwise(out, want, f"input {i}")


@on_cases
def test_backward_of_inputs_written_late(case):
    """What the forward saved and the gradient; stale values would meet the backward alone."""
    function, inputs, grad = CASES[case]("cuda")
    want = run(function, inputs, grad)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    late = [*leaves, grad]
    for i, tensor in enumerate(late):
        out = function(*leaves)
        with written_late(tensor):
            grads = torch.autograd.grad(out, leaves, grad)
        assert_same_run((out.detach(), grads), want)
        assert not tensor.isnan().any(), i


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape",
    [(67, 100, 40, 7), (67, 256, 300, 8), (1024, 512, 2000, 16), (1024, 512, 8, 4)],
    ids=["two_phase", "fused", "l2_tiled", "sorted"],
)
def test_experts_of_ids_written_late(shape, index_dtype):
    inputs, indices, grad = expert_inputs(ExpertShape(*shape), "cuda", BF16)
    ids = indices.to(index_dtype)

    def function(*args):
        return omni_moe.ops.omni_expert(*args, ids)

    want = run(function, inputs, grad)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.no_grad(), written_late(ids):
        out = function(*inputs)
    assert_bitwise(out, want[0], "forward")
    out = function(*leaves)
    with written_late(ids):
        grads = torch.autograd.grad(out, leaves, grad)
    assert_same_run((out.detach(), grads), want)


# ---- late readers --------------------------------------------------------------------------------


def free_blocks_that_are_still_read():
    """Fills memory that the allocator hands out next; a kernel checks it later."""
    torch.cuda.empty_cache()
    sizes = [2**power for power in range(9, 25)]
    blocks = [
        torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda")
        for size in sizes
        for _ in range(4)
    ]
    spans = [(block.data_ptr(), block.data_ptr() + block.nbytes) for block in blocks]
    return spans, late_check(blocks, 0xA5)


def is_within(tensors, spans):
    return any(begin <= t.data_ptr() < end for t in tensors for begin, end in spans)


@on_cases
def test_memory_is_not_written_before_its_last_reader_has_ended(case):
    function, inputs, grad = CASES[case]("cuda")
    want = run(function, inputs, grad)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    spans, num_changed = free_blocks_that_are_still_read()
    out = function(*leaves)
    assert num_changed.item() == 0
    reused = is_within([out], spans)

    spans, num_changed = free_blocks_that_are_still_read()
    grads = torch.autograd.grad(out, leaves, grad)
    assert num_changed.item() == 0
    assert_same_run((out.detach(), grads), want)
    assert reused or is_within(grads, spans), "no result lies in the memory that was checked"


# ---- early against not early ---------------------------------------------------------------------


def play(made, seed, streams):
    """A random sequence of 50 passes; between them memory is poisoned and freed."""
    choose = random.Random(seed)
    kept = []
    for step in range(50):
        name = choose.choice(list(made))
        with torch.cuda.stream(streams[step % len(streams)]):
            function, inputs, grad = made[name]
            if choose.random() < 0.5:
                kept.append(run(function, inputs, grad))
            else:
                with torch.no_grad():
                    kept.append((function(*inputs), ()))
            if choose.random() < 0.5:
                torch.full((2 ** choose.randrange(9, 24),), 0xFF, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    return kept


@pytest.mark.parametrize("num_streams", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_random_sequences_do_not_depend_on_early_launch(seed, num_streams):
    torch.manual_seed(seed)
    made = {name: make("cuda") for name, make in CASES.items()}
    # Training layers keep running statistics, which two streams would update at once.
    if num_streams > 1:
        made = {name: case for name, case in made.items() if "training" not in name}
    streams = [torch.cuda.Stream() for _ in range(num_streams)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    with early_launch(False):
        want = play(made, seed, streams)
    with early_launch(True):
        got = play(made, seed, streams)
    for result, expected in zip(got, want, strict=True):
        assert_same_run(result, expected)


def test_two_graphs_at_once():
    """Kernels with a barrier of the grid among them, which cannot share the device."""
    names = ["training_layer_router_logits", "training_layer_batch_norm", "expert_l2_tiled"]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    captured = []
    for stream in streams:
        for name in names:
            function, inputs, grad = CASES[name]("cuda")
            leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
            with early_launch(False):
                want = run(function, inputs, grad)
            alive = (function, leaves, grad)  # what the graph reads
            captured.append((stream, *capture(*alive), want, alive))
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph, *_ in captured:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, _, results, want, _ in captured:
            assert_same_run(results, want)


def test_early_launch_is_on_where_the_code_has_it():
    """And the switch that the tests above rely on turns it off."""
    info = omni_moe.build_info()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("what code a GPU runs is known of Hopper")
    architectures = {arch.partition("-")[0] for arch in info["cuda_architectures"].split()}
    if architectures <= {"80", "90", "90a"}:
        assert GpuProperties.of().has_early_launch == bool(architectures & {"90", "90a"})
    assert GpuProperties.of().has_hopper_kernels == (info["hopper_kernels"] == "yes")
    with early_launch(False):
        assert not GpuProperties.of().has_early_launch

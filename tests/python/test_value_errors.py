"""Values no op can take, expert ids above all, and derivatives that there are not."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CUDA, environment, needs_gpu, on_devices
from op_arguments import (
    EXPERTS,
    MLPS,
    ROUTERS,
    C,
    E,
    H,
    K,
    R,
    T,
    arguments,
    call_with,
    ops,
)

import omni_moe

# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-1, R * C + 1, 2**31])
@pytest.mark.parametrize("op", ROUTERS)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_number_of_experts_per_token(device, op, k):
    message = (
        f"{op}: expected num_experts_per_token between 0 and the {R * C} experts of the grid, "
        f"but got {k}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call_with(op, device, num_experts_per_token=k)


@pytest.mark.parametrize("op", ROUTERS)
def test_grid_of_too_many_experts(op):
    x, y = torch.zeros(1, 2**16, device="meta"), torch.zeros(1, 2**15, device="meta")
    with pytest.raises(ValueError, match=r"expected at most 2\^31 - 1 experts.*65536 x 32768"):
        getattr(ops, op)(x, y, 4)


@pytest.mark.parametrize("op", [*EXPERTS, *MLPS])
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_activation(device, op):
    message = (
        "expected activation to be one of silu, gelu, gelu_tanh, relu, identity, but got 'mish'"
    )
    with pytest.raises(ValueError, match=message):
        call_with(op, device, activation="mish")


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64])
def test_dtype_of_what_is_saved(dtype, expected, given):
    """It comes in the dtype that sums are taken in."""
    arguments_of_dtype = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments("_omni_expert_backward").items()
    } | {"pre_activations": torch.zeros(T, K, dtype=given)}
    if given == expected:
        call_with("_omni_expert_backward", **arguments_of_dtype)
        return
    with pytest.raises(ValueError, match="_omni_expert_backward: expected pre_activations to be "):
        call_with("_omni_expert_backward", **arguments_of_dtype)


@pytest.mark.parametrize("num_cols", [-1, 5, E + 1])
@pytest.mark.parametrize("op", [*EXPERTS, "omni_expert_mlp"])
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_experts_that_are_no_grid(device, op, num_cols):
    message = f"{op}: expected num_cols to be 0 or to divide the number of experts ({E}), but got "
    with pytest.raises(ValueError, match=re.escape(message + str(num_cols))):
        call_with(op, device, num_cols=num_cols)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_consumed_products_lie_apart(device):
    given = arguments("_omni_mlp_backward_consume", device)
    with pytest.raises(ValueError, match="expected gate and up in memory of their own"):
        call_with("_omni_mlp_backward_consume", device, up=given["gate"], gate=given["gate"])


@needs_gpu
@pytest.mark.parametrize("op", ["omni_expert", "_omni_expert_backward"])
def test_too_many_pairs_for_gradients_on_cuda(op):
    """Refused when the forward of a training step begins; expanded tensors take no memory."""
    pairs = (2**16, 2**15)
    given = {
        "hidden_states": torch.zeros(1, H, device="cuda").expand(2**16, H).requires_grad_(),
        "routing_weights": torch.zeros(1, 1, device="cuda").expand(pairs),
        "indices": torch.zeros(1, 1, dtype=torch.int32, device="cuda").expand(pairs),
        "addend": None,
    }
    if op == "_omni_expert_backward":
        given |= {
            "grad_expert_states": given["hidden_states"].detach(),
            "pre_activations": given["routing_weights"],
        }
    message = (
        f"{op}: expected indices to have at most 2147483647 elements for gradients on cuda:0, but "
        "got shape [65536, 32768] (2147483648)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call_with(op, "cuda", **given)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, E, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", EXPERTS)
def test_indices_out_of_range(op, value, index_dtype):
    indices = torch.zeros(T, K, dtype=index_dtype)
    indices[2, 1], indices[4, 0] = value, 10**6
    message = f"{op}: expected indices in [0, {E}), but got {value} at indices[2, 1]"
    with pytest.raises(IndexError, match=re.escape(message)):
        call_with(op, indices=indices)


def test_indices_past_int32():
    """No wrapping into range: 2^32 is not 0."""
    indices = torch.zeros(T, K, dtype=torch.int64)
    indices[0, 2] = 2**32
    with pytest.raises(IndexError, match=re.escape("but got 4294967296 at indices[0, 2]")):
        call_with("omni_expert", indices=indices)


@pytest.mark.parametrize(
    ("op", "lowest"), [("_omni_router_backward", 0), ("_omni_softmax_router_backward", -1)]
)
def test_router_indices_out_of_range(op, lowest):
    """-1 stands for the ids of masked tokens."""
    indices = torch.zeros(T, K, dtype=torch.int32)
    indices[3, 2] = R * C
    message = f"{op}: expected indices in [{lowest}, {R * C}), but got {R * C} at indices[3, 2]"
    with pytest.raises(IndexError, match=re.escape(message)):
        call_with(op, indices=indices)


def test_no_experts_at_all():
    """E = 0 with tokens to route: every index is out of range."""
    none = torch.zeros(0, H)
    with pytest.raises(IndexError, match=re.escape("expected indices in [0, 0), but got")):
        call_with("omni_expert", up_weights=none, down_weights=none)


@pytest.mark.parametrize("op", EXPERTS)
@needs_gpu
def test_host_checked_indices_on_cuda(op):
    """The debug switch raises before the launch; the device stays usable."""
    indices = torch.zeros(T, K, dtype=torch.int64, device="cuda")
    indices[2, 1] = E
    with omni_moe.check_indices(), pytest.raises(IndexError, match=rf"got {E} at indices\[2, 1\]"):
        call_with(op, "cuda", indices=indices)
    torch.cuda.synchronize()
    call_with(op, "cuda")


@needs_gpu
def test_device_side_assert_on_cuda():
    """Without the switch a device-side assert; in its own process, as it ends the CUDA context."""
    script = (
        "import torch, omni_moe\n"
        "h, w, r = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 1)\n"
        "i = torch.tensor([[0], [4]])\n"
        "torch.ops.omni_moe.omni_expert(*(t.cuda() for t in (h, w, w, r, i)))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert "ssertion" in done.stdout + done.stderr


def test_check_indices_ends_with_its_context():
    """The outermost one, also after an exception."""
    is_on = omni_moe._C.index_checks_are_on
    assert not is_on()
    with omni_moe.check_indices():
        with pytest.raises(KeyError), omni_moe.check_indices():
            raise KeyError
        assert is_on()
    assert not is_on()


def test_check_indices_of_two_threads():
    """Contexts that overlap: on until the last one ends, in whatever order they end."""
    is_on = omni_moe._C.index_checks_are_on
    first_is_open, second_is_open, first_has_ended = (threading.Event() for _ in range(3))
    states = {}

    def first():
        with omni_moe.check_indices():
            first_is_open.set()
            second_is_open.wait(60)
        states["after the first"] = is_on()
        first_has_ended.set()

    def second():
        first_is_open.wait(60)
        with omni_moe.check_indices():
            second_is_open.set()
            first_has_ended.wait(60)
            states["in the second"] = is_on()
        states["after both"] = is_on()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(first), threads.submit(second)]:
            done.result()
    assert states == {"after the first": True, "in the second": True, "after both": False}


@on_devices
def test_check_indices_in_backward(device):
    """Autograd's threads see the context of the thread that calls backward."""
    given = arguments("omni_expert", device)
    hidden, ids = given["hidden_states"].requires_grad_(), given["indices"]
    out, _ = ops.omni_expert(*given.values())
    ids.data[2, 1] = E  # behind autograd's back: backward would refuse ids changed in place
    message = rf"_omni_expert_backward: .*but got {E} at indices\[2, 1\]"
    with omni_moe.check_indices(), pytest.raises(IndexError, match=message):
        torch.autograd.grad(out.sum(), hidden)


# ---- Python functions, double backward, devices without kernels ----------------------------------


@pytest.mark.parametrize("axis", ["x", "y"])
def test_num_expert_sqrt(axis):
    logits = {"x": torch.zeros(T, 4), "y": torch.zeros(T, 4)}
    logits[axis] = torch.zeros(T, 5)
    message = f"router_logits_{axis}: expected shape (T, num_expert_sqrt) = (T, 4), got (5, 5)"
    with pytest.raises(ValueError, match=re.escape(message)):
        omni_moe.ops.omni_router(logits["x"], logits["y"], 4, 2)


@pytest.mark.parametrize(
    ("op", "backward"),
    [
        ("omni_router", "_omni_router_backward"),
        ("omni_softmax_router", "_omni_softmax_router_backward"),
        ("omni_expert", "_omni_expert_backward"),
        ("omni_mlp", "_omni_mlp_backward"),
        ("omni_expert_mlp", "_omni_(mlp|expert)_backward"),
    ],
)
def test_double_backward(op, backward):
    given = arguments(op)
    leaves = {
        name: value.requires_grad_()
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    out, *_ = getattr(ops, op)(**given)
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
    message = f"derivative for omni_moe::{backward} is not implemented"
    with pytest.raises(RuntimeError, match=message):
        sum(grad.sum() for grad in grads).backward()

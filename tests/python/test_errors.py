"""Bad input raises before any launch, naming the argument, what was expected and what came."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import CUDA, environment, needs_gpu, on_devices

import omni_moe

ops = torch.ops.omni_moe

T, H, E, K, I, R, C = 5, 8, 12, 3, 6, 4, 3  # noqa: E741


def arguments(op, device="cpu"):
    """Good arguments of an op, by name, in order."""
    choice = torch.randint(E, (T, K), device=device)
    floats = {
        "hidden_states": (T, H),
        "up_weights": (E, H),
        "down_weights": (E, H),
        "routing_weights": (T, K),
        "router_logits_x": (T, R),
        "router_logits_y": (T, C),
        "grad_scores": (T, K),
        "grad_routing_weights": (T, K),
        "grad_expert_states": (T, H),
        "x": (2, T, H),
        "gate_weight": (I, H),
        "up_weight": (I, H),
        "down_weight": (H, I),
        "grad_output": (2, T, H),
        "gate": (2, T, I),
        "up": (2, T, I),
        "scores": (T, K),
        "addend": (T, H),
        "up_embed": (E, H),
        "down_embed": (E, H),
    }
    others = {
        "num_experts_per_token": K,
        "num_rows": R,
        "num_cols": C,
        "norm_topk_prob": False,
        "activation": "silu",
        "recompute": False,
        "output_mask": [True] * 4,
        "indices": choice.int() if "router" in op else choice,
    }
    schema = getattr(ops, op).default._schema
    return {
        argument.name: torch.randn(floats[argument.name], device=device)
        if argument.name in floats
        else others[argument.name]
        for argument in schema.arguments
    }


def call_with(op, device="cpu", **changed):
    given = arguments(op, device) | changed
    return getattr(ops, op)(*given.values())


def test_good_arguments_are_accepted():
    """Each case below differs from these in one argument only."""
    for op in ALL_OPS:
        call_with(op)


ALL_OPS = (
    "omni_router",
    "omni_router_backward",
    "omni_softmax_router",
    "omni_softmax_router_backward",
    "omni_expert",
    "omni_expert_save_scores",
    "omni_expert_backward",
    "flash_expert",
    "omni_mlp",
    "omni_mlp_save_gates",
    "omni_mlp_backward",
    "omni_mlp_backward_consume",
    "omni_expert_mlp",
)
ROUTERS = ("omni_router", "omni_softmax_router")
EXPERTS = ("omni_expert", "omni_expert_backward")
MLPS = ("omni_mlp", "omni_mlp_save_gates", "omni_mlp_backward")


def size_message(argument, dim, meaning, expected, shape):
    return (
        f"expected {argument}.size({dim}) to equal the {meaning} ({expected}), "
        f"but got shape {list(shape)}"
    )


def rank_message(argument, rank, shape):
    return f"expected {argument} to have {rank} dimensions, but got shape {list(shape)}"


# (ops, argument, its wrong shape, message)
SHAPE_CASES = [
    (ROUTERS, "router_logits_x", (R,), rank_message("router_logits_x", 2, (R,))),
    (ROUTERS, "router_logits_y", (1, T, C), rank_message("router_logits_y", 2, (1, T, C))),
    (
        ROUTERS,
        "router_logits_y",
        (T + 1, C),
        size_message("router_logits_y", 0, "number of tokens of router_logits_x", T, (T + 1, C)),
    ),
    (EXPERTS, "hidden_states", (1, T, H), rank_message("hidden_states", 2, (1, T, H))),
    (EXPERTS, "up_weights", (E,), rank_message("up_weights", 2, (E,))),
    (EXPERTS, "down_weights", (E, H, 1), rank_message("down_weights", 2, (E, H, 1))),
    (EXPERTS, "routing_weights", (T * K,), rank_message("routing_weights", 2, (T * K,))),
    (
        EXPERTS,
        "up_weights",
        (E, H + 1),
        size_message("up_weights", 1, "hidden_size of hidden_states", H, (E, H + 1)),
    ),
    (
        EXPERTS,
        "down_weights",
        (E, H + 1),
        size_message("down_weights", 1, "hidden_size of hidden_states", H, (E, H + 1)),
    ),
    (
        EXPERTS,
        "down_weights",
        (E + 1, H),
        size_message("down_weights", 0, "number of experts of up_weights", E, (E + 1, H)),
    ),
    (
        EXPERTS,
        "routing_weights",
        (T + 1, K),
        size_message("routing_weights", 0, "number of tokens of hidden_states", T, (T + 1, K)),
    ),
    (
        EXPERTS,
        "routing_weights",
        (T, K + 1),
        size_message("routing_weights", 1, "experts per token of indices", K, (T, K + 1)),
    ),
    (
        ["omni_expert_backward"],
        "grad_expert_states",
        (T, H + 1),
        size_message("grad_expert_states", 1, "hidden_size of hidden_states", H, (T, H + 1)),
    ),
    (
        ["omni_expert_backward"],
        "grad_expert_states",
        (T + 1, H),
        size_message("grad_expert_states", 0, "number of tokens of hidden_states", T, (T + 1, H)),
    ),
    (["omni_expert_backward"], "grad_expert_states", (H,), "expected grad_expert_states to have 2"),
    (["omni_expert_mlp"], "hidden_states", (H,), rank_message("hidden_states", 2, (H,))),
    (
        ["omni_expert_mlp"],
        "up_embed",
        (E, H + 1),
        size_message("up_embed", 1, "hidden_size of hidden_states", H, (E, H + 1)),
    ),
    (
        ["omni_expert_mlp"],
        "down_embed",
        (E + 1, H),
        size_message("down_embed", 0, "number of experts of up_embed", E, (E + 1, H)),
    ),
    (
        ["omni_expert_mlp"],
        "routing_weights",
        (T, K + 1),
        size_message("routing_weights", 1, "experts per token of indices", K, (T, K + 1)),
    ),
    (
        ["omni_expert_mlp"],
        "gate_weight",
        (I, H + 1),
        size_message("gate_weight", 1, "hidden_size of hidden_states", H, (I, H + 1)),
    ),
    (
        ["omni_expert_mlp"],
        "down_weight",
        (H, I + 1),
        size_message("down_weight", 1, "intermediate_size of gate_weight", I, (H, I + 1)),
    ),
    (["omni_expert"], "addend", (H,), rank_message("addend", 2, (H,))),
    (
        ["omni_expert"],
        "addend",
        (T + 1, H),
        size_message("addend", 0, "number of tokens of hidden_states", T, (T + 1, H)),
    ),
    (
        ["omni_expert"],
        "addend",
        (T, H + 1),
        size_message("addend", 1, "hidden_size of hidden_states", H, (T, H + 1)),
    ),
    (["omni_expert_backward"], "scores", (T * K,), rank_message("scores", 2, (T * K,))),
    (
        ["omni_expert_backward"],
        "scores",
        (T + 1, K),
        size_message("scores", 0, "number of tokens of hidden_states", T, (T + 1, K)),
    ),
    (
        ["omni_expert_backward"],
        "scores",
        (T, K + 1),
        size_message("scores", 1, "experts per token of indices", K, (T, K + 1)),
    ),
    (
        ["omni_router_backward"],
        "grad_scores",
        (T, K + 1),
        size_message("indices", 1, "experts per token of the gradient", K + 1, (T, K)),
    ),
    (
        ["omni_router_backward"],
        "grad_scores",
        (T + 1, K),
        size_message("indices", 0, "number of tokens of the gradient", T + 1, (T, K)),
    ),
    (["omni_router_backward"], "grad_scores", (T,), rank_message("grad_scores", 2, (T,))),
    (
        ["omni_softmax_router_backward"],
        "grad_routing_weights",
        (T, K + 1),
        size_message("indices", 1, "experts per token of the gradient", K + 1, (T, K)),
    ),
    (
        ["omni_softmax_router_backward"],
        "router_logits_x",
        (T + 1, R),
        size_message("router_logits_y", 0, "number of tokens of router_logits_x", T + 1, (T, C)),
    ),
    (MLPS, "x", (), "expected x to have at least 1 dimension, but got a scalar"),
    (MLPS, "gate_weight", (I,), rank_message("gate_weight", 2, (I,))),
    (MLPS, "up_weight", (1, I, H), rank_message("up_weight", 2, (1, I, H))),
    (MLPS, "down_weight", (H,), rank_message("down_weight", 2, (H,))),
    (
        MLPS,
        "gate_weight",
        (I, H + 1),
        size_message("gate_weight", 1, "hidden_size of x", H, (I, H + 1)),
    ),
    (
        MLPS,
        "up_weight",
        (I + 1, H),
        size_message("up_weight", 0, "intermediate_size of gate_weight", I, (I + 1, H)),
    ),
    (
        MLPS,
        "up_weight",
        (I, H + 1),
        size_message("up_weight", 1, "hidden_size of x", H, (I, H + 1)),
    ),
    (
        MLPS,
        "down_weight",
        (H + 1, I),
        size_message("down_weight", 0, "hidden_size of x", H, (H + 1, I)),
    ),
    (
        MLPS,
        "down_weight",
        (H, I + 1),
        size_message("down_weight", 1, "intermediate_size of gate_weight", I, (H, I + 1)),
    ),
    (
        ["omni_mlp_backward"],
        "grad_output",
        (T, H),
        rank_message("grad_output", 3, (T, H)),
    ),
    (
        ["omni_mlp_backward"],
        "grad_output",
        (2, T + 1, H),
        size_message("grad_output", 1, "same size of x", T, (2, T + 1, H)),
    ),
    (
        ["omni_mlp_backward"],
        "grad_output",
        (2, T, H + 1),
        size_message("grad_output", 2, "hidden_size of x", H, (2, T, H + 1)),
    ),
    (
        ["omni_mlp_backward"],
        "gate",
        (2, T, I + 1),
        size_message("gate", 2, "intermediate_size of gate_weight", I, (2, T, I + 1)),
    ),
    (
        ["omni_mlp_backward"],
        "up",
        (2, T, I + 1),
        size_message("up", 2, "intermediate_size of gate_weight", I, (2, T, I + 1)),
    ),
]
SHAPE_CASES = [(op, *case) for op_group, *case in SHAPE_CASES for op in op_group]


@pytest.mark.parametrize(("op", "argument", "shape", "message"), SHAPE_CASES)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_shapes(device, op, argument, shape, message):
    name = "omni_mlp" if op == "omni_mlp_save_gates" else op
    with pytest.raises(ValueError, match=re.escape(f"{name}: ") + ".*" + re.escape(message)):
        call_with(op, device, **{argument: torch.randn(shape, device=device)})


@pytest.mark.parametrize("shape", [(T,), (T + 1, K), (T, K, 1)])
@pytest.mark.parametrize("op", EXPERTS)
@on_devices
def test_shape_of_indices(device, op, shape):
    with pytest.raises(ValueError, match=rf"{op}: expected indices.*got shape \[{shape[0]}"):
        call_with(op, device, indices=torch.zeros(shape, dtype=torch.int64, device=device))


# ---- dtypes --------------------------------------------------------------------------------------

FLOATS = [
    (op, argument.name)
    for op in ALL_OPS
    for argument in getattr(ops, op).default._schema.arguments
    if "Tensor" in str(argument.type) and argument.name not in ("indices", "scores")
]


@pytest.mark.parametrize(("op", "argument"), FLOATS)
@on_devices
def test_mixed_dtypes(device, op, argument):
    if op == "omni_router_backward":
        pytest.skip("has one floating-point argument")
    given = arguments(op, device)
    with pytest.raises(ValueError, match=r"expected \w+ in the dtype of \w+ \((c10::)?\w+\), but"):
        call_with(op, device, **{argument: given[argument].half()})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("op", "argument"),
    [
        ("omni_router", "router_logits_x"),
        ("omni_softmax_router", "router_logits_x"),
        ("omni_router_backward", "grad_scores"),
        ("omni_softmax_router_backward", "grad_routing_weights"),
        ("omni_expert", "hidden_states"),
        ("omni_expert_backward", "hidden_states"),
        ("omni_mlp", "x"),
        ("omni_mlp_backward", "x"),
    ],
)
def test_unsupported_dtypes(op, argument, dtype):
    given = arguments(op)
    message = (
        f"{op}: expected {argument} to be float32, float16 or bfloat16 (float64 on the CPU), "
        "but got "
    )
    with pytest.raises(ValueError, match=re.escape(message) + r"\w+ on cpu"):
        call_with(op, **{argument: given[argument].to(dtype)})


@pytest.mark.parametrize("op", ["omni_router", "omni_softmax_router", "omni_expert", "omni_mlp"])
@needs_gpu
def test_float64_on_cuda(op):
    given = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments(op, "cuda").items()
    }
    with pytest.raises(ValueError, match=r"float64 on the CPU\), but got Double on cuda:0"):
        call_with(op, "cuda", **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
@pytest.mark.parametrize("op", EXPERTS)
@on_devices
def test_index_dtypes(device, op, dtype):
    indices = torch.zeros(T, K, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=f"{op}: expected indices to be int32 or int64, but got "):
        call_with(op, device, indices=indices)


@pytest.mark.parametrize("op", ["omni_router_backward", "omni_softmax_router_backward"])
@on_devices
def test_router_backward_wants_its_own_indices(device, op):
    indices = torch.zeros(T, K, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=f"{op}: expected indices to be int32, but got Long"):
        call_with(op, device, indices=indices)


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "argument"),
    [
        ("omni_router", "router_logits_y"),
        ("omni_softmax_router", "router_logits_y"),
        ("omni_router_backward", "indices"),
        ("omni_softmax_router_backward", "indices"),
        ("omni_expert", "up_weights"),
        ("omni_expert", "indices"),
        ("omni_expert_backward", "grad_expert_states"),
        ("flash_expert", "indices"),
        ("omni_mlp", "down_weight"),
        ("omni_mlp_backward", "grad_output"),
    ],
)
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_mixed_devices(device, op, argument):
    given = arguments(op, device)
    with pytest.raises(
        ValueError, match=rf"expected {argument} on the device of \w+ \({device}.*cpu"
    ):
        call_with(op, device, **{argument: torch.zeros_like(given[argument], device="cpu")})


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


@pytest.mark.parametrize("op", ["omni_expert", "omni_expert_backward", "flash_expert", *MLPS])
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
def test_dtype_of_saved_scores(dtype, expected, given):
    """Scores come in the dtype that sums are taken in."""
    arguments_of_dtype = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments("omni_expert_backward").items()
    } | {"scores": torch.zeros(T, K, dtype=given)}
    if given == expected:
        call_with("omni_expert_backward", **arguments_of_dtype)
        return
    with pytest.raises(ValueError, match="omni_expert_backward: expected scores to be "):
        call_with("omni_expert_backward", **arguments_of_dtype)


@pytest.mark.parametrize("missing", ["gate", "up"])
def test_saved_gates_come_together(missing):
    kept = {"gate": "up", "up": "gate"}[missing]
    with pytest.raises(ValueError, match=f"expected gate and up both or neither.*only {kept}"):
        call_with("omni_mlp_backward", **{missing: None})


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, E, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", [*EXPERTS, "flash_expert"])
def test_indices_out_of_range(op, value, index_dtype):
    indices = torch.zeros(T, K, dtype=index_dtype)
    indices[2, 1], indices[4, 0] = value, 10**6
    name = "omni_expert" if op == "flash_expert" else op
    message = f"{name}: expected indices in [0, {E}), but got {value} at indices[2, 1]"
    with pytest.raises(IndexError, match=re.escape(message)):
        call_with(op, indices=indices)


def test_indices_past_int32():
    """No wrapping into range: 2^32 is not 0."""
    indices = torch.zeros(T, K, dtype=torch.int64)
    indices[0, 2] = 2**32
    with pytest.raises(IndexError, match=re.escape("but got 4294967296 at indices[0, 2]")):
        call_with("omni_expert", indices=indices)


@pytest.mark.parametrize("op", ["omni_router_backward", "omni_softmax_router_backward"])
def test_router_indices_out_of_range(op):
    indices = torch.zeros(T, K, dtype=torch.int32)
    indices[3, 2] = R * C
    message = f"{op}: expected indices in [0, {R * C}), but got {R * C} at indices[3, 2]"
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

    def is_on():
        before = omni_moe._C.set_check_indices(False)
        omni_moe._C.set_check_indices(before)
        return before

    assert not is_on()
    with omni_moe.check_indices():
        with pytest.raises(KeyError), omni_moe.check_indices():
            raise KeyError
        assert is_on()
    assert not is_on()


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
        ("omni_router", "omni_router_backward"),
        ("omni_softmax_router", "omni_softmax_router_backward"),
        ("omni_expert", "omni_expert_backward"),
        ("flash_expert", "omni_expert_backward"),
        ("omni_mlp", "omni_mlp_backward"),
        ("omni_expert_mlp", "omni_(mlp|expert)_backward"),
    ],
)
def test_double_backward(op, backward):
    given = arguments(op)
    leaves = {
        name: value.requires_grad_()
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    out = getattr(ops, op)(*given.values())
    out = out if isinstance(out, torch.Tensor) else out[0]
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
    message = f"derivative for omni_moe::{backward} is not implemented"
    with pytest.raises(RuntimeError, match=message):
        sum(grad.sum() for grad in grads).backward()

"""Shapes, dtypes and devices that disagree raise before any launch, naming the argument."""

import re

import pytest
import torch
from helpers import CUDA, needs_gpu, on_devices
from op_arguments import (
    ALL_OPS,
    EXPERTS,
    MLPS,
    ROUTERS,
    TOPK_ROUTERS,
    C,
    E,
    H,
    I,
    K,
    R,
    T,
    arguments,
    call_with,
    ops,
)


def test_good_arguments_are_accepted():
    """Each case below differs from these in one argument only."""
    for op in ALL_OPS:
        call_with(op)


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
    (TOPK_ROUTERS, "router_logits", (E,), rank_message("router_logits", 2, (E,))),
    (
        ["omni_topk_router"],
        "e_score_correction_bias",
        (E + 1,),
        size_message(
            "e_score_correction_bias", 0, "number of experts of router_logits", E, (E + 1,)
        ),
    ),
    (
        ["_omni_topk_router_backward"],
        "grad_routing_weights",
        (T + 1, K),
        size_message("grad_routing_weights", 0, "number of tokens of router_logits", T, (T + 1, K)),
    ),
    (
        ["_omni_topk_router_backward"],
        "grad_routing_weights",
        (T, K + 1),
        size_message("indices", 1, "experts per token of the gradient", K + 1, (T, K)),
    ),
    (
        ["omni_expert_slots"],
        "priorities",
        (T, K + 1),
        size_message("priorities", 1, "experts per token of indices", K, (T, K + 1)),
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
        ["_omni_expert_backward"],
        "grad_expert_states",
        (T, H + 1),
        size_message("grad_expert_states", 1, "hidden_size of hidden_states", H, (T, H + 1)),
    ),
    (
        ["_omni_expert_backward"],
        "grad_expert_states",
        (T + 1, H),
        size_message("grad_expert_states", 0, "number of tokens of hidden_states", T, (T + 1, H)),
    ),
    (
        ["_omni_expert_backward"],
        "grad_expert_states",
        (H,),
        "expected grad_expert_states to have 2",
    ),
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
    (
        ["_omni_expert_backward"],
        "pre_activations",
        (T * K,),
        rank_message("pre_activations", 2, (T * K,)),
    ),
    (
        ["_omni_expert_backward"],
        "pre_activations",
        (T + 1, K),
        size_message("pre_activations", 0, "number of tokens of hidden_states", T, (T + 1, K)),
    ),
    (
        ["_omni_expert_backward"],
        "pre_activations",
        (T, K + 1),
        size_message("pre_activations", 1, "experts per token of indices", K, (T, K + 1)),
    ),
    (
        ["_omni_router_backward"],
        "grad_scores",
        (T, K + 1),
        size_message("indices", 1, "experts per token of the gradient", K + 1, (T, K)),
    ),
    (
        ["_omni_router_backward"],
        "grad_scores",
        (T + 1, K),
        size_message("indices", 0, "number of tokens of the gradient", T + 1, (T, K)),
    ),
    (["_omni_router_backward"], "grad_scores", (T,), rank_message("grad_scores", 2, (T,))),
    (
        ["_omni_softmax_router_backward"],
        "grad_routing_weights",
        (T, K + 1),
        size_message("indices", 1, "experts per token of the gradient", K + 1, (T, K)),
    ),
    (
        ["_omni_softmax_router_backward"],
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
        ["_omni_mlp_backward"],
        "grad_output",
        (T, H),
        rank_message("grad_output", 3, (T, H)),
    ),
    (
        ["_omni_mlp_backward"],
        "grad_output",
        (2, T + 1, H),
        size_message("grad_output", 1, "same size of x", T, (2, T + 1, H)),
    ),
    (
        ["_omni_mlp_backward"],
        "grad_output",
        (2, T, H + 1),
        size_message("grad_output", 2, "hidden_size of x", H, (2, T, H + 1)),
    ),
    (
        ["_omni_mlp_backward"],
        "gate",
        (2, T, I + 1),
        size_message("gate", 2, "intermediate_size of gate_weight", I, (2, T, I + 1)),
    ),
    (
        ["_omni_mlp_backward"],
        "up",
        (2, T, I + 1),
        size_message("up", 2, "intermediate_size of gate_weight", I, (2, T, I + 1)),
    ),
]
SHAPE_CASES = [(op, *case) for op_group, *case in SHAPE_CASES for op in op_group]


@pytest.mark.parametrize(("op", "argument", "shape", "message"), SHAPE_CASES)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_shapes(device, op, argument, shape, message):
    with pytest.raises(ValueError, match=re.escape(f"{op}: ") + ".*" + re.escape(message)):
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
    if "Tensor" in str(argument.type)
    and argument.name not in ("indices", "pre_activations", "token_mask")
    if op not in ("omni_topk_router", "omni_expert_slots")  # no two in one dtype
]


@pytest.mark.parametrize(("op", "argument"), FLOATS)
@on_devices
def test_mixed_dtypes(device, op, argument):
    if op == "_omni_router_backward":
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
        ("_omni_router_backward", "grad_scores"),
        ("_omni_softmax_router_backward", "grad_routing_weights"),
        ("omni_expert", "hidden_states"),
        ("_omni_expert_backward", "hidden_states"),
        ("omni_mlp", "x"),
        ("_omni_mlp_backward", "x"),
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


@pytest.mark.parametrize("op", ["_omni_router_backward", "_omni_softmax_router_backward"])
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
        ("_omni_router_backward", "indices"),
        ("_omni_softmax_router_backward", "indices"),
        ("omni_topk_router", "e_score_correction_bias"),
        ("omni_topk_router", "token_mask"),
        ("omni_topk_router", "replay_indices"),
        ("_omni_topk_router_backward", "indices"),
        ("omni_expert_slots", "priorities"),
        ("omni_expert", "up_weights"),
        ("omni_expert", "indices"),
        ("_omni_expert_backward", "grad_expert_states"),
        ("omni_mlp", "down_weight"),
        ("_omni_mlp_backward", "grad_output"),
    ],
)
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_mixed_devices(device, op, argument):
    given = arguments(op, device)
    with pytest.raises(
        ValueError, match=rf"expected {argument} on the device of \w+ \({device}.*cpu"
    ):
        call_with(op, device, **{argument: torch.zeros_like(given[argument], device="cpu")})

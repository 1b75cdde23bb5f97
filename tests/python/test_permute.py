"""Tokens into expert order and back, forward and backward, against fp64."""

import pytest
import torch
from helpers import (
    CUDA,
    assert_bitwise,
    assert_close,
    needs_gpu,
    on_devices,
    on_dtypes,
    run,
    run_in_double,
    strided,
)
from permute_helpers import choose, rows_of
from torch.autograd import gradcheck

from omni_moe import check_indices, reference
from omni_moe.ops import omni_expert_rows, omni_expert_slots, omni_permute, omni_unpermute

# (T, E, K, H): empty, one of each, odd sizes that no vector divides, all experts, more pairs than a
# block takes, long rows.
SHAPES = [
    (0, 4, 2, 8),
    (1, 1, 1, 1),
    (37, 4, 0, 8),
    (37, 7, 3, 100),
    (37, 5, 5, 8),
    (199, 60, 4, 1000),
    (5, 3, 2, 1024),
    (300, 300, 7, 17),
    (3, 8, 2, 4104),
]
PATTERNS = ("random", "one", "masked")
LAYOUTS = ("dense", "dropped", "padded")
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-E{}-K{}-H{}".format(*s))
on_patterns = pytest.mark.parametrize("pattern", PATTERNS)
on_layouts = pytest.mark.parametrize("layout", LAYOUTS)


# ---- rows ----------------------------------------------------------------------------------------


@on_layouts
@on_patterns
@on_shapes
@on_devices
def test_rows(device, shape, pattern, layout):
    num_tokens, num_experts, k, _ = shape
    ids = choose(num_tokens, num_experts, k, pattern)
    row_id_map, ends, num_rows, padded = rows_of(ids.to(device), num_experts, layout)
    assert row_id_map.dtype == ends.dtype == torch.int32
    capacity = max(1, ids.numel() // num_experts)
    slots = None if layout == "dense" else reference.omni_expert_slots(ids, num_experts, capacity)
    want = reference.omni_expert_rows(ids, num_experts, slots, capacity if padded else None)
    assert_bitwise(row_id_map.cpu(), want[0], "row_id_map")
    assert_bitwise(ends.cpu(), want[1], "expert_ends")
    assert num_rows >= max([0, *ends.tolist()])


@on_devices
def test_rows_are_a_stable_sort(device):
    ids = torch.randint(0, 50, (700, 3), device=device)
    row_id_map, ends = omni_expert_rows(ids, 50)
    order = ids.flatten().cpu().sort(stable=True).indices
    assert_bitwise(row_id_map.flatten().cpu()[order], torch.arange(2100, dtype=torch.int32))
    assert_bitwise(ends.cpu(), torch.bincount(ids.flatten().cpu(), minlength=50).cumsum(0).int())


@on_devices
def test_rows_by_probability(device):
    """Slots of a router that keeps the most probable pairs, and their padded places."""
    ids = choose(60, 6, 2, "random").to(device)
    slots = omni_expert_slots(ids, 6, 9, torch.rand(60, 2, device=device))
    row_id_map, ends = omni_expert_rows(ids, 6, slots, capacity=9)
    kept = slots >= 0
    assert_bitwise(row_id_map, torch.where(kept, ids * 9 + slots, -1))
    counts = torch.bincount(ids[kept].cpu(), minlength=6)
    assert_bitwise(ends.cpu(), (torch.arange(6) * 9 + counts).int())


@on_devices
def test_no_experts_and_capacity_zero(device):
    none = torch.full((5, 2), -1, device=device)
    row_id_map, ends = omni_expert_rows(none, 0)
    assert (row_id_map == -1).all() and ends.shape == (0,)
    row_id_map, ends = omni_expert_rows(none.clamp(min=0), 3, capacity=0)
    assert (row_id_map == -1).all() and not ends.any()


# ---- permute -------------------------------------------------------------------------------------


@on_layouts
@on_patterns
@on_shapes
@on_dtypes
def test_permute(device, dtype, shape, pattern, layout):
    num_tokens, num_experts, k, hidden_size = shape
    ids = choose(num_tokens, num_experts, k, pattern).to(device)
    row_id_map, ends, num_rows, padded = rows_of(ids, num_experts, layout)
    tokens = torch.randn(num_tokens, hidden_size).to(device, dtype)
    grad = torch.randn(num_rows, hidden_size).to(device, dtype)
    rows, grads = run(
        lambda x: omni_permute(x, row_id_map, ends, num_rows, padded), (tokens,), grad
    )
    on_cpu = row_id_map.cpu()
    want, want_grads = run_in_double(
        lambda x: reference.omni_permute(x, on_cpu, num_rows), (tokens,), grad
    )
    assert_bitwise(rows.cpu().double(), want, "rows")
    assert_close(grads[0], want_grads[0], "gradient", num_terms=k, terms=4)


@on_devices
def test_padded_rows_are_those_of_the_dispatch_tensor(device):
    from omni_moe.modules import TopKRouter

    router = TopKRouter(12, 4, 2, capacity_factor=0.8).to(device)
    tokens = torch.randn(30, 12, device=device)
    output = router(tokens)
    maps = omni_expert_rows(output.indices, 4, output.slots, output.capacity)
    rows = omni_permute(tokens, *maps, 4 * output.capacity, padded=True)
    want = torch.einsum("tec,td->ecd", output.dispatch(), tokens)
    assert_bitwise(rows.view(4, output.capacity, 12), want)
    back = omni_unpermute(rows, *maps, output.weights, padded=True)
    torch.testing.assert_close(back, torch.einsum("tec,ecd->td", output.combine(), want))


# ---- un-permute ----------------------------------------------------------------------------------


@on_layouts
@on_patterns
@on_shapes
@on_dtypes
def test_unpermute(device, dtype, shape, pattern, layout):
    num_tokens, num_experts, k, hidden_size = shape
    ids = choose(num_tokens, num_experts, k, pattern).to(device)
    row_id_map, ends, num_rows, padded = rows_of(ids, num_experts, layout)
    on_cpu = row_id_map.cpu()
    rows = torch.randn(num_rows, hidden_size).to(device, dtype)
    grad = torch.randn(num_tokens, hidden_size).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for weights_dtype in {dtype, wide}:
        weights = torch.randn(num_tokens, k).to(device, weights_dtype)
        got, grads = run(
            lambda *inputs: omni_unpermute(inputs[0], row_id_map, ends, inputs[1], padded),
            (rows, weights),
            grad,
        )
        want, want_grads = run_in_double(
            lambda *inputs: reference.omni_unpermute(inputs[0], on_cpu, inputs[1]),
            (rows, weights),
            grad,
        )
        assert_close(got, want, "tokens", num_terms=k, terms=8)
        assert_close(grads[0], want_grads[0], "gradient of rows")
        assert grads[1].dtype == weights_dtype
        terms = hidden_size**0.5
        assert_close(
            grads[1], want_grads[1], "gradient of weights", num_terms=hidden_size, terms=terms
        )
    got, grads = run(lambda x: omni_unpermute(x, row_id_map, ends, None, padded), (rows,), grad)
    want, want_grads = run_in_double(
        lambda x: reference.omni_unpermute(x, on_cpu, None), (rows,), grad
    )
    assert_close(got, want, "sums", num_terms=k, terms=8)
    assert_bitwise(grads[0].cpu().double(), want_grads[0], "gradient of the sums")


@on_dtypes
def test_one_gradient_alone_is_the_same(device, dtype):
    ids = choose(37, 7, 3, "masked").to(device)
    row_id_map, ends, num_rows, padded = rows_of(ids, 7, "padded")
    rows = torch.randn(num_rows, 40).to(device, dtype)
    weights, grad = torch.rand(37, 3).to(device, dtype), torch.randn(37, 40).to(device, dtype)

    def gradients(*wanted):
        inputs = [x.clone().requires_grad_(w) for x, w in zip((rows, weights), wanted, strict=True)]
        omni_unpermute(inputs[0], row_id_map, ends, inputs[1], padded).backward(grad)
        return [x.grad for x in inputs]

    both, of_rows, of_weights = (
        gradients(True, True),
        gradients(True, False),
        gradients(False, True),
    )
    assert of_rows[1] is None and of_weights[0] is None
    assert_bitwise(of_rows[0], both[0])
    assert_bitwise(of_weights[1], both[1])


@on_devices
def test_pairs_without_a_row_add_nothing(device):
    """Whatever stands in their weights, and whatever stands in rows that no pair has."""
    ids = choose(37, 7, 3, "masked").to(device)
    row_id_map, ends, num_rows, padded = rows_of(ids, 7, "padded")
    rows = torch.randn(num_rows, 40, device=device)
    weights = torch.rand(37, 3, device=device)
    want = omni_unpermute(rows, row_id_map, ends, weights.masked_fill(row_id_map < 0, 0), padded)
    is_used = torch.zeros(num_rows, dtype=torch.bool, device=device)
    is_used[row_id_map[row_id_map >= 0].long()] = True
    assert not is_used.all() and (row_id_map < 0).any()
    rows[~is_used] = torch.nan
    weights[row_id_map < 0] = torch.nan
    rows.requires_grad_()
    weights.requires_grad_()
    got = omni_unpermute(rows, row_id_map, ends, weights, padded)
    assert_bitwise(got, want)
    got.sum().backward()
    assert (rows.grad[~is_used] == 0).all() and rows.grad[is_used].isfinite().all()
    assert (weights.grad[row_id_map < 0] == 0).all() and weights.grad.isfinite().all()


def test_gradcheck():
    ids = choose(5, 4, 3, "masked")
    for layout in LAYOUTS:
        row_id_map, ends, num_rows, padded = rows_of(ids, 4, layout)
        tokens = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(num_rows, 6, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(
            lambda x, m=(row_id_map, ends, num_rows, padded): omni_permute(x, *m), tokens
        )
        assert gradcheck(
            lambda x, w, m=(row_id_map, ends), p=padded: omni_unpermute(x, *m, w, p),
            (rows, weights),
        )


# ---- both ----------------------------------------------------------------------------------------


@on_layouts
@on_devices
def test_strided_inputs(device, layout):
    ids = choose(37, 7, 3, "masked").to(device)
    maps = rows_of(ids, 7, layout)
    tokens, weights = torch.randn(37, 40, device=device), torch.rand(37, 3, device=device)
    rows = omni_permute(tokens, *maps)
    assert_bitwise(omni_permute(strided(tokens), *map(strided, maps[:2]), *maps[2:]), rows)
    back = omni_unpermute(rows, *maps[:2], weights, maps[3])
    strided_back = omni_unpermute(strided(rows), *map(strided, maps[:2]), strided(weights), maps[3])
    assert_bitwise(strided_back, back)
    assert_bitwise(omni_expert_rows(strided(ids.long()), 7)[0], omni_expert_rows(ids, 7)[0])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_rows(dtype, offset):
    """The same bits from addresses that no vector load may read."""
    ids = choose(37, 7, 3, "masked").cuda()
    maps = rows_of(ids, 7, "dense")
    tokens = torch.randn(37, 128, device="cuda").to(dtype)
    memory = torch.empty(37 * 128 + offset, device="cuda", dtype=dtype)
    moved = memory[offset:].view(37, 128).copy_(tokens)
    assert moved.data_ptr() % 16
    assert_bitwise(omni_permute(moved, *maps), omni_permute(tokens, *maps))


@on_devices
def test_deterministic(device, deterministic_memory):
    """Twice the same over memory filled with NaN."""
    ids = choose(500, 40, 6, "masked").to(device)
    row_id_map, ends, num_rows, padded = rows_of(ids, 40, "padded")
    rows = torch.randn(num_rows, 136, device=device)
    weights, grad = torch.rand(500, 6, device=device), torch.randn(500, 136, device=device)

    def once():
        out, grads = run(
            lambda x, w: omni_unpermute(x, row_id_map, ends, w, padded), (rows, weights), grad
        )
        return out, *grads, omni_permute(grad, row_id_map, ends, num_rows, padded)

    for got, again in zip(once(), once(), strict=True):
        assert got.isfinite().all()
        assert_bitwise(got, again)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_autocast(device):
    """Rows in the autocast dtype, weights as they are."""
    ids = choose(9, 4, 2, "random").to(device)
    maps = rows_of(ids, 4, "dense")
    tokens = torch.randn(9, 16, device=device, requires_grad=True)
    weights = torch.rand(9, 2, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        rows = omni_permute(tokens, *maps)
        back = omni_unpermute(rows, *maps[:2], weights)
    assert rows.dtype == back.dtype == torch.bfloat16
    back.float().sum().backward()
    assert tokens.grad.dtype == weights.grad.dtype == torch.float32
    want = omni_unpermute(rows.detach(), *maps[:2], weights)
    assert_bitwise(back, want)


@on_devices
def test_compile(device):
    ids = choose(9, 4, 2, "masked").to(device)
    tokens = torch.randn(9, 16, device=device, requires_grad=True)
    weights = torch.rand(9, 2, device=device, requires_grad=True)

    def function(x, w, ids):
        maps = omni_expert_rows(ids, 4)
        return omni_unpermute(omni_permute(x, *maps, ids.numel()).sin(), *maps, w)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 7):
        inputs = tokens[:n], weights[:n]
        got, want = compiled(*inputs, ids[:n]), function(*inputs, ids[:n])
        assert_bitwise(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), (tokens, weights)),
            torch.autograd.grad(want.sum(), (tokens, weights)),
            strict=True,
        ):
            assert_bitwise(a, b)


# ---- errors --------------------------------------------------------------------------------------


def test_errors():
    ids = torch.zeros(5, 2, dtype=torch.int32)
    row_id_map, ends = omni_expert_rows(ids, 3)
    tokens, rows = torch.randn(5, 8), torch.randn(10, 8)

    def refused(message, function, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            function(*args, **kwargs)

    rank = r"expected indices to have 2 dimensions, but got shape \[10\]"
    refused(rank, omni_expert_rows, ids.flatten(), 3)
    refused("expected indices to be int32 or int64, but got Float", omni_expert_rows, ids * 1.0, 3)
    refused("num_experts between 0 and 4096, but got 5000", omni_expert_rows, ids, 5000)
    refused("slots to be int32, but got Long", omni_expert_rows, ids, 3, ids.long())
    refused(r"slots.size\(0\) to equal the number of tokens", omni_expert_rows, ids, 3, ids[:4])
    refused("capacity >= 0, but got -1", omni_expert_rows, ids, 3, capacity=-1)
    refused(
        r"indices in \[-1, 3\), but got 3 at indices\[1, 0\]", omni_expert_rows,
        ids.index_fill(0, torch.tensor([1]), 3), 3, error=IndexError,
    )  # fmt: skip
    maps = (row_id_map, ends)
    refused("tokens to have 2 dimensions", omni_permute, tokens[0], *maps, 10)
    refused("tokens to be float32, float16", omni_permute, tokens.int(), *maps, 10)
    refused("row_id_map to be int32, but got Long", omni_permute, tokens, ids.long(), ends, 10)
    refused("expert_ends to have 1 dim", omni_permute, tokens, row_id_map, row_id_map, 10)
    refused(r"row_id_map.size\(0\) to equal the number of", omni_permute, tokens[:4], *maps, 10)
    refused(
        "rows that the 3 experts divide if padded, but got 10",
        omni_permute,
        tokens,
        *maps,
        10,
        True,
    )
    refused("num_rows >= 0, but got -1", omni_permute, tokens, *maps, -1)
    refused(
        r"row_id_map in \[-1, 7\), but got 7 at row_id_map\[3, 1\]", omni_permute,
        tokens, *maps, 7, error=IndexError,
    )  # fmt: skip
    refused("weights in the dtype of rows", omni_unpermute, rows, *maps, torch.rand(5, 2).double())
    refused(r"weights.size\(1\) to equal", omni_unpermute, rows, *maps, torch.rand(5, 3))
    refused(r"row_id_map in \[-1, 6\)", omni_unpermute, rows[:6], *maps, error=IndexError)


@needs_gpu
def test_index_checks_on_the_gpu():
    ids = torch.zeros(5, 2, dtype=torch.int32, device="cuda")
    row_id_map, ends = omni_expert_rows(ids, 3)
    with check_indices():
        with pytest.raises(IndexError, match=r"row_id_map in \[-1, 7\), but got 7"):
            omni_permute(torch.randn(5, 8, device="cuda"), row_id_map, ends, 7)
        with pytest.raises(IndexError, match=r"indices in \[-1, 3\), but got 4"):
            omni_expert_rows(ids + 4, 3)


def test_too_many_rows():
    """Of tensors without memory: what cannot be numbered in 32 bits is refused."""
    ids = torch.empty(2**31, 1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 indices, but got 2147483648"):
        omni_expert_rows(ids, 3)
    with pytest.raises(ValueError, match=r"2\^31 - 1 rows of all experts, but got 3000000000"):
        omni_expert_rows(ids[:5], 3, capacity=10**9)
    maps = omni_expert_rows(ids[:5], 3)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 rows, but got 2147483648"):
        omni_permute(torch.empty(5, 8, device="meta"), *maps, 2**31)

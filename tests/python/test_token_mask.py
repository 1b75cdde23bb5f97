"""Token masks of the ops and losses: masked tokens take no part in anything."""

import pytest
import torch
from batch_norm_helpers import EPS, HALVES, MOMENTUM, Buffers
from helpers import (
    CUDA,
    assert_bitwise,
    assert_close,
    on_devices,
    on_dtypes,
    random_logits,
    strided,
)
from router_logits_helpers import make_inputs

from omni_moe import load_balancing_loss, reference, router_z_loss
from omni_moe.losses import add_expert_counts
from omni_moe.ops import omni_router_logits, omni_softmax_router

ops = torch.ops.omni_moe


def random_mask(num_tokens, device="cpu", share=0.6):
    return torch.rand(num_tokens, device=device) < share


# Of T tokens: some, none, one, all but one, all.
def masks_of(num_tokens, device="cpu"):
    none = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    one, all_but_one = none.clone(), ~none
    one[num_tokens // 2] = True
    all_but_one[0] = False
    return {
        "some": random_mask(num_tokens, device),
        "none": none,
        "one": one,
        "all but one": all_but_one,
        "all": ~none,
    }


on_masks = pytest.mark.parametrize("which", ["some", "none", "one", "all but one", "all"])


# ---- the softmax router --------------------------------------------------------------------------

# Few experts per token and many: two kernels on a GPU.
ROUTER_SHAPES = [(37, 4, 6, 3), (199, 16, 16, 1), (37, 320, 33, 512), (5, 1030, 8, 64)]


def run_router(x, y, grad, k, norm, mask, function=omni_softmax_router):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, y)]
    weights, indices = function(*leaves, k, norm, mask)
    return weights.detach(), indices, *torch.autograd.grad(weights, leaves, grad)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", ROUTER_SHAPES, ids=str)
@on_masks
@on_dtypes
def test_router(device, dtype, which, shape, norm):
    """Counted tokens get, bit for bit, what they get without a mask; masked ones nothing."""
    *sizes, k = shape
    x, y = random_logits(sizes, device, dtype)
    grad = torch.randn(shape[0], k).to(device, dtype)
    mask = masks_of(shape[0], device)[which]
    got = run_router(x, y, grad, k, norm, mask)
    want = run_router(x, y, grad, k, norm, None)
    for one, other, nothing in zip(got, want, (0, -1, 0, 0), strict=True):
        assert_bitwise(one[mask], other[mask])
        assert (one[~mask] == nothing).all()


@pytest.mark.parametrize("norm", [False, True])
@on_dtypes
def test_what_masked_tokens_hold_reaches_nothing(device, dtype, norm):
    x, y = random_logits((37, 8, 24), device, dtype)
    grad = torch.randn(37, 5).to(device, dtype)
    mask = random_mask(37, device)
    want = run_router(x, y, grad, 5, norm, mask)
    x[~mask], grad[~mask] = torch.nan, torch.inf
    for one, other in zip(run_router(x, y, grad, 5, norm, mask), want, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("norm", [False, True])
def test_router_gradcheck_and_reference(norm):
    x, y = (logits.requires_grad_() for logits in random_logits((7, 3, 4), "cpu", torch.float64))
    mask = torch.tensor([True, False, True, True, False, True, True])
    got, ids = omni_softmax_router(x, y, 4, norm, mask)
    want, wanted_ids = reference.omni_softmax_router(x, y, 4, norm, mask)
    torch.testing.assert_close(got, want)
    assert_bitwise(ids, wanted_ids)
    assert torch.autograd.gradcheck(lambda *xy: omni_softmax_router(*xy, 4, norm, mask)[0], (x, y))


@on_devices
def test_router_without_tokens_or_experts(device):
    x, y = random_logits((0, 3, 4), device, torch.float32)
    mask = torch.zeros(0, dtype=torch.bool, device=device)
    weights, ids = omni_softmax_router(x, y, 2, False, mask)
    assert weights.shape == ids.shape == (0, 2)
    x, y = random_logits((5, 3, 4), device, torch.float32)
    weights, ids = omni_softmax_router(x, y, 0, False, random_mask(5, device))
    assert weights.shape == ids.shape == (5, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.float(), "expected token_mask to be Bool, but got Float"),
        (lambda mask: mask[:4], r"token_mask.size\(0\) to equal the number of tokens of .* \(5\)"),
        (lambda mask: mask.view(5, 1), r"token_mask to have 1 dimensions, but got shape \[5, 1\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_bad_masks(device, change, message):
    mask = change(torch.ones(5, dtype=torch.bool, device=device))
    x, y, hidden = (torch.zeros(5, n, device=device) for n in (3, 4, 8))
    with pytest.raises(ValueError, match=message):
        omni_softmax_router(x, y, 2, False, mask)
    gates = [torch.zeros(n, 8, device=device) for n in (3, 4)]
    with pytest.raises(ValueError, match=message):
        omni_router_logits(hidden, *gates, [], training=True, token_mask=mask)


# ---- BatchNorm -----------------------------------------------------------------------------------


def run_norm(inputs, grads, buffers, mask, function=omni_router_logits):
    """Outputs, then gradients of hidden states and gates. Updates `buffers`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    logits = function(*leaves, buffers.args(), True, MOMENTUM, EPS, mask)
    return [*(out.detach() for out in logits), *torch.autograd.grad(logits, leaves, grads)]


def check_norm(device, dtype, shape, mask):
    num_tokens, hidden_size, *widths = shape
    inputs, grads = make_inputs(*shape, device, dtype)
    wide = [tensor.cpu().double() for tensor in inputs]
    wide_grads = [grad.cpu().double() for grad in grads]
    buffers = Buffers.make(*widths, device, dtype)
    want_buffers = buffers.double()
    want = run_norm(wide, wide_grads, want_buffers, mask.cpu(), reference.omni_router_logits)
    got = run_norm(inputs, grads, buffers, mask)
    count = int(mask.sum())

    counted = mask.cpu()
    products = (wide[0] @ torch.cat(wide[1:]).T)[counted]
    roundings = 1 if dtype in HALVES else 0
    scale = offset = 0.0
    if count > 0:
        inv_std = (products.var(0, correction=0) + EPS).rsqrt()
        scale, offset = inv_std.max().item(), (products.abs().amax(0) * inv_std).max().item()
    for one, other in zip(got[:2], want[:2], strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        assert not one[~mask].any()
        assert_close(
            one,
            other,
            num_terms=count + hidden_size,
            terms=offset,
            intermediate_roundings=roundings,
        )
    assert not got[2][~mask].any()
    if count >= 37:
        grad_products = scale * (1 + offset) * torch.cat(wide_grads, 1)[counted].abs().max().item()
        columns = wide[0][counted].square().sum(0).sqrt().max().item()
        for one, other, factor in (
            (got[2], want[2], torch.cat(wide[1:]).abs().sum(0).max().item()),
            (got[3], want[3], columns),
            (got[4], want[4], columns),
        ):
            assert_close(
                one,
                other,
                num_terms=num_tokens + hidden_size,
                terms=grad_products * factor,
                intermediate_roundings=4 * roundings,
            )
    else:
        assert all(tensor.isfinite().all() for tensor in got)
    for name in vars(buffers):
        one, other = getattr(buffers, name), getattr(want_buffers, name)
        if "num_batches" in name:
            assert one.item() == other.item()
        else:
            assert_close(
                one.to(dtype if dtype in HALVES else one.dtype),  # of products rounded so
                other,
                name,
                num_terms=count + hidden_size,
                terms=max(products.square().max().item() if count else 0, 1.0),
                intermediate_roundings=roundings,
            )


# The second is one kernel on Hopper without a mask; the last has more than registers hold.
NORM_SHAPES = [(67, 20, 5, 7), (199, 264, 136, 64), (4099, 24, 64, 72), (40000, 8, 8, 8)]


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@on_dtypes
def test_norm(device, dtype, shape):
    check_norm(device, dtype, shape, random_mask(shape[0], device))


@on_masks
@on_dtypes
def test_norm_of_every_mask(device, dtype, which):
    """None that counts: as no tokens. One: zeros, and running statistics stay."""
    check_norm(device, dtype, (67, 20, 8, 16), masks_of(67, device)[which])


@on_dtypes
def test_norm_of_neighbours(device, dtype):
    """Whole parts of the tokens, as a block or a thread has them, are left out."""
    mask = torch.ones(5000, dtype=torch.bool, device=device)
    mask[700:4200] = False
    mask[:3] = False
    check_norm(device, dtype, (5000, 24, 16, 40), mask)


@on_dtypes
def test_norm_is_blind_to_masked_tokens(device, dtype):
    """Not only to their numbers: to NaN in their gradients, too, and to what is in other rows."""
    inputs, grads = make_inputs(199, 72, 16, 24, device, dtype)
    mask = random_mask(199, device)
    start = Buffers.make(16, 24, device, dtype)
    buffers, others = start.clone(), start.clone()
    want = run_norm(inputs, grads, buffers, mask)
    inputs[0][~mask] = inputs[0][~mask] * 100 + 7
    for grad in grads:
        grad[~mask] = torch.nan
    got = run_norm(inputs, grads, others, mask)
    for one, other in zip([*got, *others.args()], [*want, *buffers.args()], strict=True):
        assert_bitwise(one, other)


@on_dtypes
def test_large_mean_of_counted_tokens(device, dtype):
    """The offset cancels before anything is squared, with masked rows in between, too."""
    if dtype in HALVES:
        pytest.skip("their products do not hold the digits")
    hidden = torch.randn(299, 8, dtype=torch.float64)
    hidden[:, 0] = 1
    gates = [torch.randn(n, 8, dtype=torch.float64) for n in (5, 8)]
    for gate in gates:
        gate[:, 0] = 1e4
    mask = random_mask(299)
    products = (hidden @ torch.cat(gates).T)[mask]
    inputs = [tensor.to(device, dtype) for tensor in (hidden, *gates)]
    _, _, inv_std = ops.omni_router_logits(*inputs, [], MOMENTUM, EPS, mask.to(device))
    want = (products.var(0, correction=0) + EPS).rsqrt()
    assert ((inv_std.cpu().double() - want).abs() <= 2e-3 * want).all()


def test_norm_gradcheck():
    inputs, _ = make_inputs(7, 6, 3, 4, "cpu", torch.float64)
    mask = torch.tensor([True, False, True, True, False, True, True])
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: omni_router_logits(*x, [], True, MOMENTUM, EPS, mask), leaves
    )


@on_dtypes
def test_norm_repeats_bitwise(device, dtype, deterministic_memory):
    inputs, grads = make_inputs(4096, 72, 64, 104, device, dtype)
    mask, start = random_mask(4096, device), Buffers.make(64, 104, device, dtype)
    runs = []
    for turn in range(3):
        torch.use_deterministic_algorithms(turn == 0)
        buffers = start.clone()
        runs.append([*run_norm(inputs, grads, buffers, mask), *buffers.args()])
    for got in runs[1:]:
        for one, other in zip(got, runs[0], strict=True):
            assert_bitwise(one, other)


@on_devices
def test_strided_masks(device):
    inputs, grads = make_inputs(37, 72, 16, 24, device, torch.float32)
    mask, start = random_mask(37, device), Buffers.make(16, 24, device, torch.float32)
    want = run_norm(inputs, grads, start.clone(), mask)
    for one, other in zip(run_norm(inputs, grads, start.clone(), strided(mask)), want, strict=True):
        assert_bitwise(one, other)
    x, y = want[:2]
    for one, other in zip(
        omni_softmax_router(x, y, 3, False, strided(mask)),
        omni_softmax_router(x, y, 3, False, mask),
        strict=True,
    ):
        assert_bitwise(one, other)


@on_devices
def test_evaluation_needs_no_mask(device):
    """Running statistics normalise each token by itself."""
    inputs, _ = make_inputs(37, 72, 16, 24, device, torch.float32)
    buffers = Buffers.make(16, 24, device, torch.float32)
    options = (buffers.args(), False, MOMENTUM, EPS)
    for one, other in zip(
        omni_router_logits(*inputs, *options, random_mask(37, device)),
        omni_router_logits(*inputs, *options),
        strict=True,
    ):
        assert_bitwise(one, other)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@on_devices
def test_compiled_ops(device, backend):
    torch._dynamo.reset()

    def function(hidden, gate_x, gate_y, buffers, mask):
        x, y = omni_router_logits(hidden, gate_x, gate_y, buffers, True, MOMENTUM, EPS, mask)
        return omni_softmax_router(x * 2, y, 3, True, mask)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    start = Buffers.make(16, 24, device, torch.float32)
    for num_tokens in (37, 13):
        inputs, _ = make_inputs(num_tokens, 72, 16, 24, device, torch.float32)
        mask = random_mask(num_tokens, device)
        want = function(*inputs, start.clone().args(), mask)
        got = compiled(*inputs, start.clone().args(), mask)
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one, other)
    torch._dynamo.reset()


# ---- losses and counts ---------------------------------------------------------------------------


@on_masks
@on_devices
def test_losses_of_counted_tokens(device, which):
    """Those of the counted tokens alone, whatever the others hold; gradients, too."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, y = random_logits((67, 4, 6), device, dtype)
    mask = masks_of(67, device)[which]
    _, ids = omni_softmax_router(x, y, 3)
    grads = []
    for masked in (True, False):
        leaves = [x.clone(), y.clone()]
        if masked:
            leaves[0][~mask] = torch.nan
            chosen, wanted, arguments = ids.clone(), slice(None), {"token_mask": mask}
            chosen[~mask] = -1
        else:
            chosen, wanted, arguments = ids[mask], mask, {}
        leaves = [leaf.requires_grad_() for leaf in leaves]
        parts = [leaf[wanted] for leaf in leaves]
        balance = load_balancing_loss(*parts, chosen, **arguments)
        z_loss = router_z_loss(*parts, **arguments)
        (balance + z_loss).backward()
        grads.append([balance, z_loss, *(leaf.grad for leaf in leaves)])
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert not grads[0][2][~mask].any() and grads[0][2].isfinite().all()


def test_losses_without_tokens():
    x, y = torch.zeros(0, 4), torch.zeros(0, 6)
    mask, ids = torch.zeros(0, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.int32)
    assert load_balancing_loss(x, y, ids, mask) == 0 and router_z_loss(x, y, mask) == 0
    x, y, mask = torch.zeros(5, 4), torch.zeros(5, 6), torch.ones(5, dtype=torch.bool)
    assert load_balancing_loss(x, y, torch.zeros(5, 0, dtype=torch.int32), mask) == 0


def test_bad_masks_of_losses():
    x, y, ids = torch.zeros(5, 4), torch.zeros(5, 6), torch.zeros(5, 3, dtype=torch.int32)
    for mask in (torch.ones(5), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="token_mask: expected bool of shape"):
            load_balancing_loss(x, y, ids, mask)
        with pytest.raises(ValueError, match="token_mask: expected bool of shape"):
            router_z_loss(x, y, mask)


@on_devices
def test_counts(device):
    ids = torch.randint(9, (37, 3), device=device, dtype=torch.int32)
    mask = random_mask(37, device)
    counts = torch.ones(9, dtype=torch.int64, device=device)
    ids[~mask] = -1
    add_expert_counts(counts, ids, mask)
    assert_bitwise(counts, 1 + torch.bincount(ids[mask].flatten(), minlength=9))

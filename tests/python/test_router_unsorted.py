"""Routers with sorted=False: the same experts and weights in any order, the same on every run."""

import pytest
import torch
from helpers import (
    assert_bitwise,
    assert_close,
    needs_gpu,
    on_devices,
    on_dtypes,
    random_logits,
    router_scores,
    run,
    run_in_double,
    softmax_router_weights,
)

import omni_moe
from omni_moe import OmniMoE, OmniMoEConfig, reference
from omni_moe.losses import load_balancing_loss
from omni_moe.modules.recording import recorded_router_outputs

ops = torch.ops.omni_moe
INF, NAN = float("inf"), float("nan")

MANY = 401  # tokens, for which a GPU has a kernel without a sort


def many(device):
    """That number of tokens on a GPU alone: the CPU has one kernel for any."""
    return MANY if device == "cuda" else 5


@needs_gpu
def test_a_gpu_has_a_kernel_for_many_tokens():
    sizes = {"num_rows": 17, "num_cols": 23, "num_experts_per_token": 129}
    plans = omni_moe.plan("omni_router", num_tokens=MANY, **sizes)
    assert plans["router_forward_unsorted"]["kernel"] == "unsorted"


# (T, R, C, K): with that kernel, and where K or T is small or an axis long, by those that sort.
SHAPES = [
    (0, 30, 20, 150),
    (37, 30, 20, 0),
    (37, 7, 11, 16),
    (37, 17, 23, 129),
    (MANY, 17, 23, 129),
    (MANY, 17, 23, 391),
    (MANY, 1, 300, 200),
    (MANY, 300, 1, 200),
    (MANY, 100, 257, 1000),
    (MANY, 320, 320, 512),
    (MANY, 320, 320, 4096),
    (MANY, 1100, 30, 200),
]
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}-K{}".format(*s))

ROUTERS = {
    "logits": lambda x, y, k, sorted: ops.omni_router(x, y, k, sorted),
    "softmax": lambda x, y, k, sorted: ops.omni_softmax_router(x, y, k, sorted=sorted),
    "softmax-topk": lambda x, y, k, sorted: ops.omni_softmax_router(x, y, k, True, sorted=sorted),
}
on_routers = pytest.mark.parametrize("router", ROUTERS)


def by_id(values, indices):
    order = indices.argsort(dim=1)
    return values.gather(1, order), indices.gather(1, order)


def oracle(router, x, y, indices):
    if router == "logits":
        return router_scores(x, y, indices)
    return softmax_router_weights(x, y, indices, router == "softmax-topk")


def exp_error(x, y):
    """exp makes the rounding of its argument, which grows with the logits, a relative error."""
    return 8 * max(1, *(axis[axis.isfinite()].abs().max().item() for axis in (x, y)))


def assert_same_choice(router, x, y, k, accumulation_factor=1.0):
    """The experts of the sorted router bit for bit, and the scores; weights as fp64 has them."""
    values, indices = ROUTERS[router](x, y, k, False)
    assert indices.dtype == torch.int32
    for _ in range(3):
        again = ROUTERS[router](x, y, k, False)
        assert_bitwise(again[0], values, "values of another run")
        assert_bitwise(again[1], indices, "indices of another run")
    values, indices = by_id(values, indices)
    want, want_indices = by_id(*ROUTERS[router](x, y, k, True))
    assert_bitwise(indices, want_indices, "indices")
    if router == "logits":
        assert_bitwise(values, want, "scores")
        return
    undefined = want.isnan()
    assert_bitwise(values.isnan(), undefined, "NaN weights")
    want = oracle(router, x.cpu().double(), y.cpu().double(), indices.cpu())
    values, undefined = values.cpu(), undefined.cpu()
    assert_close(
        values[~undefined],
        want[~undefined],
        "weights",
        num_terms=k,
        accumulation_factor=accumulation_factor,
    )


@on_routers
@on_shapes
@on_dtypes
def test_same_experts_and_weights(device, dtype, shape, router):
    num_tokens, num_rows, num_cols, k = shape
    num_tokens = many(device) if num_tokens == MANY else num_tokens
    x, y = random_logits((num_tokens, num_rows, num_cols), device, dtype)
    assert_same_choice(router, x, y, k, 1.0 if num_tokens == 0 else exp_error(x, y))


@on_routers
@pytest.mark.parametrize("k", [130, 400, 1000, 1199, 1200])
@on_dtypes
def test_ties(device, dtype, router, k):
    """The smallest ids of those that equal the last sum, however many they are."""
    t = many(device)
    coarse = (torch.randint(-3, 4, (t, 30)) / 4, torch.randint(-3, 4, (t, 40)) / 4)
    equal = (torch.full((t, 30), 0.5), torch.full((t, 40), -1.25))
    # Distinct logits that vanish in the sums: a row's ties are not its first columns.
    swallowed = (1024 + torch.randint(2, (t, 30)) * 4.0, torch.randn(t, 40) * 2.0**-22)
    for x, y in (coarse, equal, swallowed, swallowed[::-1]):
        x, y = x.to(device, dtype), y.to(device, dtype)
        assert_same_choice(router, x, y, k, exp_error(x, y))


@on_routers
@pytest.mark.parametrize("k", [130, 600, 1100])
@on_dtypes
def test_special_values(device, dtype, router, k):
    x, y = random_logits((max(12, many(device)), 30, 40), device, dtype)
    x[0, 3], y[1, 4], x[2, 2], y[2, 8] = NAN, NAN, INF, -INF
    x[3], y[4] = NAN, INF
    x[5, ::2], y[5, 1::3] = -INF, -INF  # masked
    x[6, 1:], y[7, 2:] = -INF, -INF
    x[8], y[8] = -INF, -INF
    x[9, :5], y[9, 1:8] = INF, NAN
    x[10], y[10] = 0.0, -0.0
    assert_same_choice(router, x, y, k, exp_error(x, y))


@on_routers
@on_dtypes
def test_sums_that_overflow(device, dtype, router):
    largest = torch.finfo(dtype).max
    for low, high in ((-1, 1), (0.5, 1), (-1, -0.5)):
        x, y = (
            ((low + (high - low) * torch.rand(many(device), n, dtype=torch.float64)) * largest)
            .clamp(-largest, largest)
            .to(device, dtype)
            for n in (30, 40)
        )
        for k in (150, 1000):
            assert_same_choice(router, x, y, k)


@on_routers
@pytest.mark.parametrize("k", [16, 300])
@on_dtypes
def test_gradients(device, dtype, router, k):
    x, y = random_logits((many(device), 30, 40), device, dtype)
    grad = torch.randn(many(device), k).to(device, dtype)
    values, indices = ROUTERS[router](x, y, k, False)
    _, grads = run(lambda x, y: ROUTERS[router](x, y, k, False)[0], (x, y), grad)
    _, want = run_in_double(lambda x, y: oracle(router, x, y, indices.cpu()), (x, y), grad)
    weights = torch.ones_like(values) if router == "logits" else values
    terms = (grad * weights).double().abs().sum(1).max().item()
    for name, got, exact in zip(("grad_x", "grad_y"), grads, want, strict=True):
        assert_close(got, exact, name, accumulation_factor=exp_error(x, y), terms=terms)


@on_devices
def test_token_mask(device):
    x, y = random_logits((many(device), 30, 40), device, torch.float32)
    mask = torch.rand(len(x), device=device) < 0.5
    mask[:2] = torch.tensor([True, False])
    weights, indices = ops.omni_softmax_router(x, y, 200, True, mask, sorted=False)
    assert (weights[~mask] == 0).all() and (indices[~mask] == -1).all()
    want = ops.omni_softmax_router(x, y, 200, True, sorted=False)
    assert_bitwise(weights[mask], want[0][mask])
    assert_bitwise(indices[mask], want[1][mask])


@on_devices
def test_python_functions(device):
    x, y = random_logits((many(device), 20, 20), device, torch.float32)
    for unsorted, best in (
        (
            omni_moe.ops.omni_router(x, y, 20, 150, sorted=False),
            reference.omni_router(x, y, 150, sorted=False),
        ),
        (
            omni_moe.ops.omni_softmax_router(x, y, 150, sorted=False),
            reference.omni_softmax_router(x, y, 150, sorted=False),
        ),
    ):
        values, indices = by_id(*unsorted)
        want_values, want_indices = by_id(*best)
        assert_bitwise(indices.cpu(), want_indices.cpu())
        torch.testing.assert_close(values, want_values)


@on_devices
def test_layer_with_many_experts_per_token(device):
    """It asks for no order, on which neither its outputs nor losses nor counts depend."""
    config = OmniMoEConfig(
        hidden_size=24,
        intermediate_size=40,
        num_experts=400,
        num_experts_per_token=150,
        track_expert_load=True,
        router_aux_loss_coef=0.5,
    )
    layer = OmniMoE(config, device=device, dtype=torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.zeros_(layer.down_proj.weight)  # the experts alone
    tokens = torch.randn(many(device), 24, device=device)
    with recorded_router_outputs([layer]) as recorded:
        outputs = layer(tokens)
    ((router,),) = recorded
    x, y = router.logits_x, router.logits_y

    weights, indices = omni_moe.ops.omni_softmax_router(x, y, 150)
    assert_bitwise(router.indices.sort(dim=1).values, indices.sort(dim=1).values)
    counts = torch.bincount(indices.flatten(), minlength=400)
    assert torch.equal(layer.expert_load().counts, counts)
    torch.testing.assert_close(layer.aux_loss, 0.5 * load_balancing_loss(x, y, indices))
    tables = layer.up_embed.weight.double(), layer.down_embed.weight.double()
    experts = reference.omni_expert(tokens.double(), *tables, weights.double(), indices)
    assert_close(outputs, experts, num_terms=150, accumulation_factor=4)

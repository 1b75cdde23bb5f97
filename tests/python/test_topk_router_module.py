"""TopKRouter: capacity, dense tensors, balancing, replay, modes."""

import copy
import math

import pytest
import torch
from helpers import CUDA, assert_bitwise, assert_close, copied, on_copies, on_devices
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from omni_moe.modules import TopKRouter

D, E, K, T = 24, 16, 4, 37


def make_router(device="cpu", dtype=torch.float32, **options):
    router = TopKRouter(D, E, K, **options, device=device, dtype=dtype)
    with torch.no_grad():
        router.weight.normal_()
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(std=0.1)
    return router


def tokens(device="cpu", dtype=torch.float32, shape=(T, D)):
    return torch.randn(shape).to(device, dtype)


# ---- capacity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.3, 1.0, 1.25, 100.0])
@on_devices
def test_capacity(device, capacity_factor, policy):
    router = make_router(device, capacity_factor=capacity_factor, token_drop_policy=policy)
    free = copy.deepcopy(router)
    free.capacity_factor = None
    x = tokens(device)
    output, full = router(x), free(x)
    assert output.capacity == math.ceil(capacity_factor * T * K / E)
    assert full.slots is None and full.capacity is None
    assert_bitwise(output.indices, full.indices)
    assert_bitwise(output.counts, full.counts)
    kept = output.slots >= 0
    assert_bitwise(output.weights, full.weights.masked_fill(~kept, 0))
    for expert in range(E):
        is_pair = output.indices == expert
        num_kept = min(int(is_pair.sum()), output.capacity)
        slots = output.slots[is_pair & kept]
        assert slots.sort().values.tolist() == list(range(num_kept))
        if policy == "position":
            assert slots.tolist() == list(range(num_kept))
        elif 0 < num_kept < is_pair.sum():
            dropped = full.weights[is_pair & ~kept]
            assert dropped.max() <= full.weights[is_pair & kept].min()


@pytest.mark.parametrize("masked", [False, True])
@on_devices
def test_dispatch_and_combine(device, masked):
    router = make_router(device, capacity_factor=0.8, norm_topk_prob=True)
    mask = (torch.arange(T, device=device) % 4 > 0) if masked else None
    output = router(tokens(device), mask)
    dispatch, combine = output.dispatch(), output.combine()
    want = torch.zeros(T, E, output.capacity)
    for t in range(T):
        for j in range(K):
            if output.slots[t, j] >= 0:
                want[t, output.indices[t, j], output.slots[t, j]] = output.weights[t, j].item()
    assert_bitwise(combine.detach().cpu(), want)
    assert_bitwise(dispatch.cpu(), (want > 0).float())
    assert (dispatch.sum(0) <= 1).all()  # a place has one token
    # The gradient of the dense tensor is that of the weights.
    grad = torch.randn_like(combine)
    (dense,) = torch.autograd.grad(combine, router.weight, grad, retain_graph=True)
    kept = output.slots >= 0
    slots, ids = output.slots.clamp(min=0).long(), output.indices.clamp(min=0).long()
    picked = grad[torch.arange(T, device=device).unsqueeze(1), ids, slots] * kept
    (sparse,) = torch.autograd.grad(output.weights, router.weight, picked)
    assert_bitwise(dense, sparse)


def test_dense_tensors_need_a_capacity():
    with pytest.raises(ValueError, match="expected a router with a capacity_factor"):
        make_router()(tokens()).dispatch()


@on_devices
def test_statistics(device):
    router = make_router(device, capacity_factor=0.25)
    mask = torch.arange(T, device=device) > 3
    output = router(tokens(device), mask)
    statistics = output.statistics()
    kept = output.slots >= 0
    assert statistics.dropped_pairs == (T - 4) * K - kept.sum()
    assert statistics.dropped_tokens == (~kept[4:].any(1)).sum() > 0
    shares = statistics.counts.double() / statistics.counts.sum()
    assert_close(statistics.load_entropy, -(shares * shares.log()).nansum())
    # All on the same experts.
    with torch.no_grad():
        router.weight.zero_()
    statistics = router(tokens(device)).statistics()
    assert statistics.dead_experts == E - K
    assert_close(statistics.load_entropy, torch.tensor(math.log(K), dtype=torch.float64))
    even = make_router(device, force_load_balancing=True)(tokens(device, shape=(4 * E, D)))
    assert even.statistics().dead_experts == 0 and even.statistics().dropped_pairs == 0
    assert_close(even.statistics().load_entropy, torch.tensor(math.log(E), dtype=torch.float64))


# ---- balancing -----------------------------------------------------------------------------------


@on_devices
def test_score_correction_moves_against_the_load(device):
    router = make_router(device, scoring_func="sigmoid", score_correction=True)
    before = router.e_score_correction_bias.clone()
    outputs = [router(tokens(device)) for _ in range(3)]
    router.eval()(tokens(device))  # does not count
    counts = sum(output.counts for output in outputs)
    assert_bitwise(router.tokens_per_expert, counts)
    router.update_score_correction(0.01)
    want = before + 0.01 * (3 * T * K / E - counts.double()).sign().float()
    assert_bitwise(router.e_score_correction_bias, want)
    assert router.tokens_per_expert.sum() == 0
    # Nothing was routed since: nothing moves.
    router.update_score_correction(0.01)
    assert_bitwise(router.e_score_correction_bias, want)


def test_score_correction_balances():
    router = make_router(scoring_func="sigmoid", score_correction=True)
    with torch.no_grad():
        router.weight.mul_(0.3)  # scores that are not all near 0 or 1
    x = tokens(shape=(2000, D)) + 0.5  # a common part, which favours some experts
    loads = []
    for _ in range(400):
        loads.append(router(x).counts.double())
        router.update_score_correction(5e-3)
    unevenness = [(load.max() / load.mean()).item() for load in (loads[0], loads[-1])]
    assert unevenness[0] > 1.5 and unevenness[1] < 1.1


def test_score_correction_is_not_counted_twice():
    router = make_router(score_correction=True)
    x = tokens().requires_grad_()
    checkpoint(lambda x: router(x).weights, x, use_reentrant=False).sum().backward()
    assert router.tokens_per_expert.sum() == T * K
    with pytest.raises(RuntimeError, match="expected a router with score_correction=True"):
        make_router().update_score_correction()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_score_correction_stays_in_fp32(dtype):
    router = make_router(scoring_func="sigmoid", score_correction=True)
    want = router.e_score_correction_bias.clone()
    router = router.to(dtype)
    assert router.weight.dtype == dtype
    assert_bitwise(router.e_score_correction_bias, want)
    output = router(tokens(dtype=dtype))
    assert output.weights.dtype == dtype
    assert "e_score_correction_bias" in router.state_dict()
    assert "tokens_per_expert" not in router.state_dict()
    on_meta = router.to("meta")
    assert on_meta.e_score_correction_bias.is_meta
    assert on_meta.to_empty(device="cpu").e_score_correction_bias.dtype == torch.float32


@on_copies
def test_copies(how):
    router = make_router(score_correction=True, capacity_factor=1.0, bias=True)
    x = tokens()
    want, got = router(x), copied(router, how)(x)
    assert_bitwise(got.weights, want.weights)
    assert_bitwise(got.slots, want.slots)


@on_devices
def test_forced_balance(device):
    router = make_router(device, force_load_balancing=True, scoring_func="sigmoid")
    x = tokens(device, shape=(2, 4 * E, D)).requires_grad_()
    output = router(x)
    assert (output.counts == 2 * 4 * K).all()
    assert (output.indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert_close(
        output.weights, output.logits.double().sigmoid().gather(1, output.indices.long()),
        accumulation_factor=200,
    )  # fmt: skip
    output.weights.sum().backward()
    assert x.grad.abs().sum() > 0


# ---- replay, jitter, masks, dtypes ---------------------------------------------------------------


@on_devices
def test_replay(device):
    router = make_router(device, n_group=4, topk_group=2, score_correction=True, capacity_factor=1)
    x, mask = tokens(device), torch.arange(T, device=device) % 5 > 0
    first = router(x, mask)
    again = router(x, mask, replay_indices=first.indices)
    for name in ("indices", "weights", "counts", "slots"):
        assert_bitwise(getattr(again, name), getattr(first, name), name)
    with torch.no_grad():
        router.weight.mul_(-1)
    other = router(x, replay_indices=first.indices.long())
    assert_bitwise(other.indices, first.indices)
    assert not torch.equal(other.weights, first.weights)
    other.weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_devices
def test_jitter(device, dtype):
    router = make_router(device, dtype, jitter_noise=0.1)
    x = tokens(device, dtype)
    torch.manual_seed(3)
    first = router(x).logits
    torch.manual_seed(3)
    assert_bitwise(router(x).logits, first)
    assert not torch.equal(router(x).logits, first)
    quiet = router.eval()(x).logits
    assert_bitwise(quiet, torch.nn.functional.linear(x, router.weight))
    # Each product of a logit is at most a tenth larger or smaller.
    most = 0.1 * (x.double().abs() @ router.weight.double().abs().T)
    rounding = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert ((first - quiet).double().abs() <= most * (1 + rounding) + rounding).all()


@on_devices
def test_token_mask_of_a_batch(device):
    """Padded and unpadded tokens give the same numbers."""
    router = make_router(device, norm_topk_prob=True)
    x, mask = tokens(device, shape=(3, 9, D)), torch.ones(3, 9, dtype=torch.bool, device=device)
    mask[1, 5:], mask[2, 2:] = False, False
    output, want = router(x, mask), router(x[mask])
    kept = mask.flatten()
    # The products of the gate may be summed in another order for another number of tokens.
    assert_close(output.weights[kept], want.weights.double(), num_terms=D)
    assert_bitwise(output.indices[kept], want.indices)
    assert_bitwise(output.counts, want.counts)
    assert (output.indices[~kept] == -1).all() and (output.weights[~kept] == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
@on_devices
def test_router_dtype(device, autocast):
    """The gate in fp32 beside bf16 tokens, under autocast too."""
    router = make_router(device, torch.bfloat16, router_dtype=torch.float32, bias=True)
    x = tokens(device, torch.bfloat16).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        output = router(x)
    assert output.logits.dtype == output.weights.dtype == torch.float32
    want = torch.nn.functional.linear(x.float(), router.weight.float(), router.bias.float())
    assert_bitwise(output.logits, want)
    output.weights.sum().backward()
    assert x.grad.dtype == router.weight.grad.dtype == torch.bfloat16
    plain = make_router(device)
    with torch.autocast(device, torch.bfloat16):
        assert plain(tokens(device)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 0, D), (D,)])
@on_devices
def test_few_tokens(device, shape):
    router = make_router(device, capacity_factor=1.0, score_correction=True)
    output = router(tokens(device, shape=shape).requires_grad_())
    num_tokens = math.prod(shape[:-1])
    assert output.weights.shape == output.slots.shape == (num_tokens, K)
    assert output.counts.sum() == num_tokens * K
    assert output.combine().shape == (num_tokens, E, output.capacity)
    output.weights.sum().backward()
    if num_tokens == 0:
        assert (router.weight.grad == 0).all()


# ---- modes ---------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "grouped": {
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "score_correction": True,
        "router_dtype": torch.float32,
    },
    "capacity": {"capacity_factor": 1.1, "token_drop_policy": "probs", "jitter_noise": 0.1},
    "forced": {"force_load_balancing": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@on_devices
def test_compiled(device, options):
    """One graph, the same bits, no recompilation for another T."""
    torch._dynamo.reset()
    router = make_router(device, **OPTIONS[options])
    counter = CompileCounterWithBackend("aot_eager")

    def route(x, mask):
        output = router(x, mask)
        return output.weights, output.indices, output.counts, output.logits

    compiled = torch.compile(route, fullgraph=True, backend=counter)
    num_compilations = 0
    for num_tokens in (13, 29, 7):
        x = tokens(device, shape=(num_tokens, D))
        mask = torch.arange(num_tokens, device=device) % 3 > 0
        for tensor in (x, mask):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.manual_seed(1)
        want = route(x, mask)
        torch.manual_seed(1)
        got = compiled(x, mask)
        for one, other in zip(got, want, strict=True):
            assert_bitwise(one, other)
        (grad,) = torch.autograd.grad(want[0].sum(), router.weight)
        (got_grad,) = torch.autograd.grad(got[0].sum(), router.weight)
        assert_bitwise(got_grad, grad)
        # All compilations were for the first T.
        num_compilations = num_compilations or counter.frame_count
        assert counter.frame_count == num_compilations


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@on_devices
def test_activation_checkpointing(device, options, use_reentrant):
    router = make_router(device, **OPTIONS[options])
    x, grad = tokens(device), torch.randn(T, K).to(device)
    results = []
    for run in (
        lambda x: router(x).weights,
        lambda x: checkpoint(lambda x: router(x).weights, x, use_reentrant=use_reentrant),
    ):
        torch.manual_seed(2)
        router.zero_grad()
        leaf = x.clone().requires_grad_()
        weights = run(leaf)
        weights.backward(grad.to(weights.dtype))
        results.append((weights.detach(), leaf.grad, router.weight.grad))
    for got, want in zip(*results, strict=True):
        assert_bitwise(got, want)


@pytest.mark.parametrize("device", [CUDA])
def test_no_synchronisation(device):
    for options in OPTIONS.values():
        router = make_router(device, **options)
        x = tokens(device)
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                output = router(x)
                output.weights.sum().backward()
                output.statistics()
                if router.e_score_correction_bias is not None:
                    router.update_score_correction()
            finally:
                torch.cuda.set_sync_debug_mode("default")


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected 1 to 16, the experts of topk_group groups, got 0"),
        ({"k": 17}, "k: expected 1 to 16"),
        ({"n_group": 8}, "k: expected 1 to 2,"),
        ({"n_group": 5}, "n_group: expected a divisor of 16, got 5"),
        ({"n_group": 4, "topk_group": 5}, "topk_group: expected 1 to 4, got 5"),
        ({"capacity_factor": -0.5}, "capacity_factor: expected None or >= 0, got -0.5"),
        ({"capacity_factor": math.nan}, "capacity_factor: expected None or >= 0, got nan"),
        ({"token_drop_policy": "random"}, "token_drop_policy: expected one of position, probs"),
        ({"jitter_noise": 1.0}, r"jitter_noise: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(**{"input_dim": D, "num_experts": E, "k": K} | options)


def test_errors_of_inputs():
    router = make_router()
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \(..., 24\)"):
        router(torch.zeros(3, D + 1))
    with pytest.raises(ValueError, match=r"token_mask: expected shape \(3,\), got \(4,\)"):
        router(torch.zeros(3, D), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="token_mask to be Bool"):
        router(torch.zeros(3, D), torch.ones(3))
    with pytest.raises(ValueError, match="scoring_func to be one of"):
        make_router(scoring_func="relu")(torch.zeros(3, D))


def test_initial_weights_are_those_of_a_linear_layer():
    router = TopKRouter(D, E, K, bias=True)
    bound = 1 / math.sqrt(D)
    for parameter in router.parameters():
        assert 0.7 * bound < parameter.abs().max() <= bound
    with torch.no_grad():
        router.bias.fill_(9)
    router.reset_parameters()
    assert router.bias.abs().max() <= bound

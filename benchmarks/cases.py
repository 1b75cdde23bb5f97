"""What is measured: every table as a list of cases, pure data.

The GPU tables are those of a model of hidden size 1024 in bf16; the paper's latency setup is the
320 x 320 grid beside a shared MLP of width 1024. The CPU tables are fp32 on two threads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

OPS = (
    "expert", "router", "mlp", "layer", "peer_layer", "model", "topk_router", "permute", "moe",
)  # fmt: skip
PASSES = ("forward", "forward_backward")
# Dense products over all experts take seconds there, and the published kernels need a GPU.
CPU_IMPLS = ("omni_moe", "eager", "compile")
# Most GPU cases do without `compile`, which takes longer than all other measurements together.
GPU_IMPLS = (
    "omni_moe", "eager", "gathers", "dense_masked", "gemms_only", "upstream_triton", "hf_doge",
)  # fmt: skip
# The paper's latency setup: hidden size, width of the shared MLP, grid.
PAPER = {
    "hidden": 1024, "intermediate": 1024, "experts": 320**2, "rows": 320, "cols": 320,
}  # fmt: skip
PAPER_TOKENS = (1024, 2048, 4096, 8192, 16384)
PAPER_K = (512, 1024, 2048, 4096)
# Experts per token of the PEER layer beside those of PAPER_K; the paper has 1250 to 12500.
PEER_K = (1250, 2500, 6250, 12500)
PEER_HEADS = 2
# Of the classic mixture of experts: the experts implementations of Transformers and the libraries.
MOE_IMPLS = ("omni_moe", "eager", "hf_grouped_mm", "hf_batched_mm", "scattermoe", "megablocks")
# DeepSeek-V3's gate: sigmoid scores and a bias, 4 of 8 groups of 32 experts.
GATING = {"tokens": 4096, "experts": 256, "k": 8, "groups": 8, "topk_groups": 4}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table, measured for several implementations.

    `shape` has those of tokens, layers, hidden, intermediate, experts, rows, cols, heads, k,
    groups, topk_groups that apply; a PEER layer's `k` is that of all its heads.
    `ids` is how expert ids are drawn: uniform, or by a router from normal logits on rows x cols.
    `timing` is wall (CPU), events (GPU, L2 flushed before each repetition) or graph (GPU, several
    calls with inputs of their own inside one CUDA graph, L2 flushed before each replay).
    Goals are what this project set itself: time, or speed-up over `eager`.
    """

    table: str
    op: str
    pass_name: str
    shape: Mapping[str, int]
    dtype: str
    timing: str
    ids: str | None = None
    impls: tuple[str, ...] | None = None  # of those that exist for the op; None: all
    goal_us: float | None = None
    goal_speedup: float | None = None
    quick: bool = field(default=False, compare=False)  # part of --quick


def cases_for(device_type: str) -> list[Case]:
    """All cases of a kind of device, "cpu" or "cuda"."""
    return list(_cpu_cases() if device_type == "cpu" else _gpu_cases())


# ---- CPU ----------------------------------------------------------------------------------------


def _cpu_cases() -> Iterator[Case]:
    shape = {"tokens": 256, "hidden": 512, "experts": 16384, "k": 16}
    expert = Case(
        table="cpu_expert", op="expert", pass_name="forward", shape=shape, dtype="float32",
        timing="wall", ids="uniform", goal_speedup=3, quick=True, impls=CPU_IMPLS,
    )  # fmt: skip
    router = Case(
        table="cpu_router", op="router", pass_name="forward", dtype="float32", timing="wall",
        shape={"tokens": 1024, "rows": 256, "cols": 256, "k": 32}, goal_speedup=5, quick=True,
        impls=CPU_IMPLS,
    )  # fmt: skip
    for case in (expert, router):
        yield from _both_passes(case)
        for dtype in ("bfloat16", "float16"):
            half = replace(
                case, dtype=dtype, goal_speedup=None, quick=False, impls=("omni_moe", "eager")
            )
            yield from _both_passes(half)

    mlp = Case(
        table="cpu_layer", op="mlp", pass_name="forward", dtype="float32", timing="wall",
        shape={"tokens": 256, "hidden": 512, "intermediate": 2048}, impls=("omni_moe", "eager"),
    )  # fmt: skip
    yield from _both_passes(mlp)
    layer_shape = {**shape, "intermediate": 2048, "rows": 128, "cols": 128}
    yield from _both_passes(replace(mlp, op="layer", shape=layer_shape))

    topk_router = replace(
        router, table="cpu_moe", op="topk_router", goal_speedup=None, shape=GATING
    )
    yield from _both_passes(topk_router)
    moe_shape = {"tokens": 256, "hidden": 512, "experts": 16, "k": 2}
    permute = replace(topk_router, op="permute", shape=moe_shape, impls=("omni_moe", "eager"))
    yield from _both_passes(permute)
    yield from _both_passes(
        replace(
            permute, op="moe", shape={**moe_shape, "intermediate": 512}, quick=False,
            impls=("omni_moe", "eager", "hf_grouped_mm"),
        )
    )  # fmt: skip

    sweep = replace(
        expert, table="cpu_sweep", goal_speedup=None, quick=False, impls=("omni_moe", "eager")
    )
    yield from _sweep(
        sweep, experts=(1024, 4096, 65536), k=(4, 64), tokens=(1, 16, 1024)
    )  # 16384, 16 and 256 are measured above


# ---- GPU ----------------------------------------------------------------------------------------


def _gpu_cases() -> Iterator[Case]:
    for case in (
        *_gpu_expert(), *_gpu_router(), *_gpu_mlp_and_layer(), *_gpu_paper(), *_gpu_model(),
        *_gpu_moe(), *_gpu_decode(), *_gpu_sweep(),
    ):  # fmt: skip
        # Tables that only repeat the shapes of others do without `compile`, which takes longest.
        repeats = case.table == "expert_router_ids" and not case.quick
        yield replace(case, impls=GPU_IMPLS) if repeats and not case.impls else case


def _gpu_expert() -> Iterator[Case]:
    base = Case(
        table="expert", op="expert", pass_name="forward", shape={}, dtype="bfloat16",
        timing="events", ids="uniform",
    )  # fmt: skip
    for tokens, experts, k, goal_us in (
        (1024, 4096, 32, 20),
        (4096, 4096, 16, 36),
        (4096, 65536, 16, 65),
        (16384, 65536, 32, 380),
        (4096, 1048576, 64, 250),
    ):
        shape = {"tokens": tokens, "hidden": 1024, "experts": experts, "k": k}
        yield replace(base, shape=shape, goal_us=goal_us, quick=experts == 65536 and k == 16)

    for tokens, side, k, goal_us, goal_train_us in (
        (16384, 64, 16, 90, 320),
        (16384, 64, 64, 180, 600),
        (16384, 128, 32, 150, 500),
        (16384, 256, 32, 240, None),
        (4096, 320, 128, 260, None),
        (4096, 320, 512, 400, 1320),
        (4096, 320, 4096, 950, None),
        (1024, 320, 4096, 330, 1155),
    ):
        shape = {"tokens": tokens, "hidden": 1024, "experts": side**2, "k": k}
        shape |= {"rows": side, "cols": side}
        case = replace(
            base, table="expert_router_ids", ids="router", shape=shape, goal_us=goal_us,
            quick=(tokens, k) == (4096, 512),
        )  # fmt: skip
        yield case
        yield replace(
            case, table="expert_router_ids_train", pass_name="forward_backward",
            goal_us=goal_train_us, impls=("omni_moe", "eager", "gathers", "dense_masked"),
        )  # fmt: skip

    for tokens, experts, k, goal_us in (
        (1024, 4096, 32, 110),
        (4096, 4096, 16, 150),
        (4096, 65536, 16, 235),
        (16384, 65536, 32, 1100),
    ):
        shape = {"tokens": tokens, "hidden": 1024, "experts": experts, "k": k}
        yield replace(
            base, table="expert_train", pass_name="forward_backward", shape=shape,
            goal_us=goal_us, quick=(tokens, experts) == (4096, 65536),
        )  # fmt: skip


def _gpu_router() -> Iterator[Case]:
    for tokens, side, k, goal_us in (
        (4096, 64, 16, 8),
        (4096, 256, 16, 12),
        (4096, 1024, 64, 30),
        (4096, 320, 512, 120),
        (1024, 320, 4096, 150),
    ):
        yield Case(
            table="router", op="router", pass_name="forward", dtype="bfloat16", timing="events",
            shape={"tokens": tokens, "rows": side, "cols": side, "k": k}, goal_us=goal_us,
            quick=side == 256,
        )  # fmt: skip
    yield Case(
        table="router", op="router", pass_name="forward_backward", dtype="bfloat16",
        timing="events", shape={"tokens": 4096, "rows": 256, "cols": 256, "k": 16},
    )  # fmt: skip


def _gpu_mlp_and_layer() -> Iterator[Case]:
    mlp = Case(
        table="mlp", op="mlp", pass_name="forward", dtype="bfloat16", timing="events",
        shape={"tokens": 4096, "hidden": 1024, "intermediate": 4096}, goal_us=155, quick=True,
    )  # fmt: skip
    yield mlp
    yield replace(mlp, pass_name="forward_backward", goal_us=505)

    layer = replace(mlp, table="layer", op="layer", goal_us=None)
    for side, goal_forward, goal_train in ((64, 210, 720), (256, 245, 850)):
        shape = {**mlp.shape, "experts": side**2, "rows": side, "cols": side, "k": 16}
        forward = replace(layer, shape=shape, goal_us=goal_forward, quick=side == 64)
        yield forward
        yield replace(forward, pass_name="forward_backward", goal_us=goal_train)


def _gpu_paper() -> Iterator[Case]:
    """The paper's sweep of the layer, PEER's beside it; then K and E beyond that sweep, one varied.

    `eager` and `peer` work through many tokens in chunks, where their copies of the experts' rows
    would not fit memory otherwise.
    """
    layer = Case(
        table="layer_paper", op="layer", pass_name="forward", shape=PAPER, dtype="bfloat16",
        timing="events", impls=("omni_moe", "eager", "dense_masked"),
    )  # fmt: skip
    peer_shape = {name: size for name, size in PAPER.items() if name != "intermediate"}
    peer_shape |= {"heads": PEER_HEADS}
    peer = replace(layer, op="peer_layer", shape=peer_shape, impls=("peer",))
    for tokens in PAPER_TOKENS:
        for k, peer_k in zip(PAPER_K, PEER_K, strict=True):
            yield replace(layer, shape={"tokens": tokens, **PAPER, "k": k})
            yield replace(peer, shape={"tokens": tokens, **peer_shape, "k": peer_k})

    layer = replace(layer, table="layer_growth", shape={"tokens": 4096, **PAPER, "k": 512})
    yield from _sweep(layer, k=(8, 32, 128))
    for side in (64, 128, 256, 512, 1024):
        grid = {"experts": side**2, "rows": side, "cols": side}
        yield replace(layer, shape={**layer.shape, **grid})


def _gpu_model() -> Iterator[Case]:
    """One training step, without the optimizer, of the smallest preset language model."""
    yield Case(
        table="model", op="model", pass_name="forward_backward", dtype="bfloat16", timing="events",
        shape={
            "tokens": 8192, "layers": 12, "hidden": 768, "intermediate": 768, "experts": 320**2,
            "rows": 320, "cols": 320, "k": 512,
        },
    )  # fmt: skip


def _gpu_moe() -> Iterator[Case]:
    """The classic mixture of experts: gating as DeepSeek-V3's, permutation and layer at its shapes
    and at Mixtral's.
    """
    gating = Case(
        table="topk_router", op="topk_router", pass_name="forward", dtype="bfloat16",
        timing="events", shape=GATING, goal_us=8, goal_speedup=15, quick=True,
        impls=("omni_moe", "eager", "compile"),
    )  # fmt: skip
    for dtype in ("bfloat16", "float32"):
        yield replace(gating, dtype=dtype)
        yield replace(
            gating, dtype=dtype, pass_name="forward_backward", goal_us=None, goal_speedup=None
        )

    mixtral = {"tokens": 4096, "hidden": 4096, "experts": 8, "k": 2}
    deepseek = {"tokens": 4096, "hidden": 2048, "experts": 256, "k": 8}
    permute = replace(
        gating, table="permute", op="permute", goal_us=None, goal_speedup=None,
        impls=("omni_moe", "eager"),
    )  # fmt: skip
    for shape in (mixtral, deepseek):
        yield from _both_passes(replace(permute, shape=shape))
    for shape in (
        {**mixtral, "intermediate": 14336},
        {**deepseek, "intermediate": 256},
        {**deepseek, "intermediate": 2048},
    ):
        layer = replace(permute, table="moe", op="moe", shape=shape, impls=MOE_IMPLS)
        yield from _both_passes(replace(layer, quick=shape["intermediate"] == 256))


def _gpu_decode() -> Iterator[Case]:
    """Few tokens inside a CUDA graph. The layer is in eval mode, as it is when it decodes."""
    impls = ("omni_moe", "eager")
    for tokens in (1, 64):
        case = Case(
            table="decode", op="expert", pass_name="forward", dtype="bfloat16", timing="graph",
            ids="uniform", goal_us=5, quick=tokens == 1, impls=(*impls, "compile"),
            shape={"tokens": tokens, "hidden": 1024, "experts": 65536, "k": 16},
        )  # fmt: skip
        yield case
        router_shape = {"tokens": tokens, "rows": 256, "cols": 256, "k": 16}
        others = replace(case, ids=None, goal_us=None, impls=impls)
        yield replace(others, op="router", shape=router_shape)
        layer_shape = {**case.shape, "intermediate": 4096, "rows": 256, "cols": 256}
        yield replace(others, op="layer", shape=layer_shape)


def _gpu_sweep() -> Iterator[Case]:
    base = Case(
        table="sweep", op="expert", pass_name="forward", dtype="bfloat16", timing="events",
        ids="uniform", impls=("omni_moe", "eager"),
        shape={"tokens": 4096, "hidden": 1024, "experts": 65536, "k": 16},
    )  # fmt: skip
    yield from _sweep(
        base, experts=(1024, 16384, 262144), k=(1, 4, 64, 256), tokens=(16, 64, 256, 1024, 16384)
    )


# ---- helpers ------------------------------------------------------------------------------------


def _both_passes(case: Case) -> Iterator[Case]:
    """A forward, and the same with its backward pass, which has a goal for the expert op only."""
    yield case
    goal_speedup = case.goal_speedup if case.op == "expert" else None
    yield replace(case, pass_name="forward_backward", goal_speedup=goal_speedup)


def _sweep(base: Case, **values: tuple[int, ...]) -> Iterator[Case]:
    """Cases that differ from `base` in one size."""
    for name, sizes in values.items():
        for size in sizes:
            yield replace(base, shape={**base.shape, name: size})

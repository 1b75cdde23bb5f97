"""What is measured: every table as a list of cases, pure data.

The GPU tables are those of a model of hidden size 1024 in bf16; the paper's latency setup is the
320 x 320 grid. The CPU tables are fp32 on two threads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

OPS = ("expert", "router", "mlp", "layer")
PASSES = ("forward", "forward_backward")
# Dense products over all experts take seconds there, and the published kernels need a GPU.
CPU_IMPLS = ("omni_moe", "eager", "compile")
# Most GPU cases do without `compile`, which takes longer than all other measurements together.
GPU_IMPLS = ("omni_moe", "eager", "dense_masked", "gemms_only", "upstream_triton", "hf_doge")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table, measured for several implementations.

    `shape` has those of tokens, hidden, intermediate, experts, rows, cols, k that apply.
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

    sweep = replace(
        expert, table="cpu_sweep", goal_speedup=None, quick=False, impls=("omni_moe", "eager")
    )
    yield from _sweep(
        sweep, experts=(1024, 4096, 65536), k=(4, 64), tokens=(1, 16, 1024)
    )  # 16384, 16 and 256 are measured above


# ---- GPU ----------------------------------------------------------------------------------------


def _gpu_cases() -> Iterator[Case]:
    for case in (
        *_gpu_expert(), *_gpu_router(), *_gpu_mlp_and_layer(), *_gpu_decode(), *_gpu_sweep(),
    ):  # fmt: skip
        # Tables that only repeat the shapes of others do without `compile`, which takes longest.
        repeats = case.table in ("expert_router_ids", "layer_paper") and not case.quick
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

    for tokens, side, k, goal_us in (
        (16384, 256, 32, 320),
        (4096, 320, 128, 280),
        (4096, 320, 512, 750),
        (1024, 320, 4096, 500),
    ):
        shape = {"tokens": tokens, "hidden": 1024, "experts": side**2, "k": k}
        shape |= {"rows": side, "cols": side}
        yield replace(
            base, table="expert_router_ids", ids="router", shape=shape, goal_us=goal_us,
            quick=k == 512,
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

    paper = {"hidden": 1024, "intermediate": 1024, "experts": 320**2, "rows": 320, "cols": 320}
    for tokens, k in ((4096, 512), (1024, 4096)):
        shape = {"tokens": tokens, **paper, "k": k}
        yield replace(layer, table="layer_paper", shape=shape, quick=False)


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

"""Which CUDA kernels an op runs, and how, for sizes and a GPU given by numbers."""

from dataclasses import asdict, dataclass

import torch

from omni_moe import _C

# The sizes that the plans of an op depend on.
_SIZES = {
    "omni_router": ("num_tokens", "num_rows", "num_cols", "num_experts_per_token"),
    "omni_router_logits": ("num_tokens", "hidden_size", "num_rows", "num_cols"),
    "omni_router_logits_per_token": ("num_tokens", "num_rows", "num_cols"),
    "omni_topk_router": ("num_tokens", "num_experts", "num_experts_per_token"),
    "omni_permute": ("num_tokens", "hidden_size", "num_experts", "num_experts_per_token"),
    "omni_expert": ("num_tokens", "hidden_size", "num_experts", "num_experts_per_token"),
    "omni_mlp": ("num_tokens", "hidden_size", "intermediate_size"),
}
# Those that may be left out: 0 then. The experts' plans depend on C where experts form a grid.
_OPTIONAL_SIZES = {"omni_expert": ("num_cols",)}
_PLANS = {
    "omni_router": _C.plan_router,
    "omni_router_logits": _C.plan_router_logits,
    "omni_router_logits_per_token": _C.plan_router_logits_per_token,
    "omni_topk_router": _C.plan_topk_router,
    "omni_permute": _C.plan_permute,
    "omni_expert": _C.plan_expert,
    "omni_mlp": _C.plan_mlp,
}


@dataclass(frozen=True, kw_only=True)
class GpuProperties:
    """What plans read of a GPU, and of the code of this library that runs on it.

    num_sms: streaming multiprocessors.
    l2_bytes: size of the L2 cache.
    shared_bytes_per_block: the most shared memory that one block can opt in to.
    has_cooperative_launch: a grid can wait for all its blocks.
    has_early_launch: a kernel can start before the one in front of it has ended (sm_90 code).
    has_hopper_kernels: it runs the kernels of Hopper's own instructions (sm_90a code).
    """

    num_sms: int
    l2_bytes: int
    shared_bytes_per_block: int
    has_cooperative_launch: bool = True
    has_early_launch: bool = False
    has_hopper_kernels: bool = False

    @classmethod
    def of(cls, device: torch.device | str | int | None = None) -> "GpuProperties":
        """Those of a CUDA device, by default the current one.

        Raises:
            RuntimeError: there is no CUDA device, or the library was built without CUDA.
        """
        if not torch.cuda.is_available():
            raise RuntimeError("GpuProperties: there is no CUDA device; give its numbers")
        index = torch.cuda._utils._get_device_index(device, optional=True)
        return cls(**_C.gpu_properties(index))


def plan(
    op: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gpu: GpuProperties | None = None,
    **sizes: int,
) -> dict[str, dict[str, str | int | bool] | None]:
    """How an op runs on a GPU: a pure function, which needs neither a GPU nor CUDA.

    Operands are taken to be dense and to start at multiples of 16 bytes, as PyTorch allocates them.

    Args:
        op: ``omni_router`` (``omni_softmax_router`` runs the same kernels, of which
            ``router_forward_unsorted`` is that of ``sorted=False``), ``omni_router_logits``,
            ``omni_router_logits_per_token``, ``omni_topk_router`` (without groups, and with
            ``omni_expert_slots`` of its pairs), ``omni_permute`` (without a capacity, and with
            ``omni_expert_rows`` and ``omni_unpermute``), ``omni_expert`` or ``omni_mlp``;
            ``omni_expert_mlp`` runs the kernels of the last two.
        dtype: of the operands; fp32, fp16 or bf16.
        gpu: the device; by default the current CUDA device.
        sizes: ``num_tokens`` and, as the op has them, ``hidden_size``, ``num_rows``, ``num_cols``,
            ``num_experts``, ``num_experts_per_token``, ``intermediate_size``. ``num_cols`` may be
            left out of ``omni_expert``, whose ids then have no grid.

    Returns:
        For each kernel that the op or its backward can run, by name, the numbers of its plan, among
        them ``workspace_bytes`` (without the storage that CUB's radix sort asks for); None for a
        kernel that does not take these operands on this device, where the op runs another.

    Raises:
        ValueError: the op is unknown, a size is missing, not one of the op's, or negative, or there
            are no CUDA kernels for the dtype.
        RuntimeError: `gpu` is not given and there is no CUDA device.
    """
    if op not in _SIZES:
        raise ValueError(f"plan: expected op to be one of {', '.join(_SIZES)}, but got {op!r}")
    optional = _OPTIONAL_SIZES.get(op, ())
    if set(sizes) - set(optional) != set(_SIZES[op]):
        raise ValueError(
            f"plan: expected for {op} the sizes {', '.join(_SIZES[op])}, but got "
            f"{', '.join(sizes) or 'none'}"
        )
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"plan: expected {name} >= 0, but got {size}")
    return _PLANS[op](
        **{**dict.fromkeys(optional, 0), **sizes},
        dtype=str(dtype).removeprefix("torch."),
        gpu=asdict(gpu or GpuProperties.of()),
    )

"""Which CUDA kernel an expert pass runs, for a shape and a GPU given by numbers."""

from dataclasses import dataclass

import torch

from omni_moe import _C


@dataclass(frozen=True, kw_only=True)
class GpuProperties:
    """The properties of a GPU that the plan depends on.

    num_sms: streaming multiprocessors.
    l2_bytes: size of the L2 cache.
    shared_bytes_per_sm: shared memory of one multiprocessor.
    shared_bytes_per_block: the most that one block can opt in to.
    compute_capability: (major, minor).
    """

    num_sms: int
    l2_bytes: int
    shared_bytes_per_sm: int
    shared_bytes_per_block: int
    compute_capability: tuple[int, int]

    @classmethod
    def of(cls, device: torch.device | str | int | None = None) -> "GpuProperties":
        """The properties of a CUDA device, by default the current one."""
        properties = torch.cuda.get_device_properties(device)
        return cls(
            num_sms=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            shared_bytes_per_sm=properties.shared_memory_per_multiprocessor,
            shared_bytes_per_block=properties.shared_memory_per_block_optin,
            compute_capability=(properties.major, properties.minor),
        )


def expert_plan(
    num_tokens: int,
    hidden_size: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gpu: GpuProperties | None = None,
) -> dict[str, str | int]:
    """How `omni_expert` runs on a GPU: a pure function, which needs neither a GPU nor CUDA.

    The token passes of forward and backward run by the same plan.

    Args:
        num_tokens: T.
        hidden_size: H.
        num_experts: E.
        num_experts_per_token: K.
        dtype: of the operands; fp32, fp16 or bf16.
        gpu: the device; by default the current CUDA device.

    Returns:
        ``strategy`` (``two_phase``, ``fused`` or ``l2_tiled``), the numbers that this strategy uses
        (``threads``, ``num_splits`` and ``pairs_per_split``; ``tile_bytes``), and
        ``workspace_bytes`` of the pass. Operands are taken to start at multiples of 16 bytes, as
        PyTorch allocates them.

    Raises:
        ValueError: a size is negative, or there are no CUDA kernels for the dtype.
        RuntimeError: `gpu` is not given and there is no CUDA device.
    """
    sizes = {
        "num_tokens": num_tokens,
        "hidden_size": hidden_size,
        "num_experts": num_experts,
        "num_experts_per_token": num_experts_per_token,
    }
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"expert_plan: expected {name} >= 0, but got {size}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expert_plan: expected float32, float16 or bfloat16, but got {dtype}")
    if gpu is None:
        if not torch.cuda.is_available():
            raise RuntimeError("expert_plan: there is no CUDA device; describe one by `gpu`")
        gpu = GpuProperties.of()
    major, minor = gpu.compute_capability
    return _C.expert_plan(
        **sizes,
        element_size=dtype.itemsize,
        num_sms=gpu.num_sms,
        compute_capability=10 * major + minor,
        shared_bytes_per_sm=gpu.shared_bytes_per_sm,
        shared_bytes_per_block=gpu.shared_bytes_per_block,
        l2_bytes=gpu.l2_bytes,
    )

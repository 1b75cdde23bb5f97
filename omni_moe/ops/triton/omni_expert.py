"""The published package's path of :func:`omni_moe.ops.omni_expert`."""

from omni_moe.ops import omni_expert as triton_omni_expert_func

__all__ = ["triton_omni_expert_func"]

"""The published package's path of :func:`omni_moe.ops.omni_mlp`."""

from omni_moe.ops import omni_mlp as triton_omni_mlp_func

__all__ = ["triton_omni_mlp_func"]

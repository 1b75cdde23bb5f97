"""The published package's path of :func:`omni_moe.ops.omni_router`."""

from omni_moe.ops import omni_router as triton_omni_router_func

__all__ = ["triton_omni_router_func"]

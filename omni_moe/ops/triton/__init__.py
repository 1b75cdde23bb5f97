"""Names of the published package; the functions are those of :mod:`omni_moe.ops`, not Triton's."""

from omni_moe.ops import omni_expert as triton_omni_expert_func
from omni_moe.ops import omni_mlp as triton_omni_mlp_func
from omni_moe.ops import omni_router as triton_omni_router_func

__all__ = ["triton_omni_expert_func", "triton_omni_mlp_func", "triton_omni_router_func"]

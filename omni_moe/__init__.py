"""Mixture-of-Experts layers of atomic experts behind a Cartesian-product router.

Importing the package loads ``libomni_moe.so``, which registers ``torch.ops.omni_moe.*`` (typed
wrappers in :mod:`omni_moe.ops`). Method: "OmniMoE: An Efficient MoE by Orchestrating Atomic Experts
at Scale" (arXiv 2602.05711).
"""

from omni_moe._library import build_info, check_indices

from omni_moe import ops, reference  # isort: skip  (need the ops that _library loads)
import omni_moe.flops  # noqa: F401  # isort: skip  (for FlopCounterMode)
from omni_moe.config import OmniMoEConfig
from omni_moe.losses import (
    load_balancing_loss,
    router_z_loss,
    topk_load_balancing_loss,
    topk_router_z_loss,
    topk_sequence_load_balancing_loss,
)
from omni_moe.modules.omni_moe import OmniMoE, router_loss
from omni_moe.planning import GpuProperties, plan

__version__ = build_info()["version"]

__all__ = [
    "GpuProperties",
    "OmniMoE",
    "OmniMoEConfig",
    "build_info",
    "check_indices",
    "load_balancing_loss",
    "ops",
    "plan",
    "reference",
    "router_loss",
    "router_z_loss",
    "topk_load_balancing_loss",
    "topk_router_z_loss",
    "topk_sequence_load_balancing_loss",
]

from omni_moe.modules.omni_moe import ExpertLoad, OmniMoE, OmniMoEConfig
from omni_moe.modules.topk_router import RouterStatistics, TopKRouter, TopKRouterOutput

__all__ = [
    "ExpertLoad",
    "OmniMoE",
    "OmniMoEConfig",
    "RouterStatistics",
    "TopKRouter",
    "TopKRouterOutput",
]

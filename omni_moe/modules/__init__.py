from omni_moe.modules.mixture_of_experts import Experts, MixtureOfExperts, SharedExpert
from omni_moe.modules.omni_moe import ExpertLoad, OmniMoE, OmniMoEConfig
from omni_moe.modules.topk_router import RouterStatistics, TopKRouter, TopKRouterOutput

__all__ = [
    "ExpertLoad",
    "Experts",
    "MixtureOfExperts",
    "OmniMoE",
    "OmniMoEConfig",
    "RouterStatistics",
    "SharedExpert",
    "TopKRouter",
    "TopKRouterOutput",
]

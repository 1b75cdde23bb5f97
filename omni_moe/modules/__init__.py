from omni_moe.modules.omni_moe import ExpertLoad, OmniMoE, OmniMoEConfig

__all__ = ["ExpertLoad", "OmniMoE", "OmniMoEConfig"]

"""OmniMoE in Hugging Face Transformers 5.x.

Importing this package registers `OmniMoeConfig`, `OmniMoeModel` and `OmniMoeForCausalLM` and the
models changed by `replace_mlp` with the Auto classes, and the experts implementations "omni_moe"
(atomic experts) and "omni_moe_grouped" (experts that are MLPs).
"""

try:
    import transformers
    from packaging.version import Version

    _found = transformers.__version__
    _is_recent = Version(_found) >= Version("5.17")
except ImportError:
    _found, _is_recent = "none", False
if not _is_recent:
    raise ImportError(
        f"omni_moe.integrations.transformers needs Transformers 5.17 or newer, found {_found}: "
        'pip install "transformers>=5.17,<6"'
    )

from omni_moe.integrations.transformers.callbacks import ExpertLoadCallback, plot_expert_load
from omni_moe.integrations.transformers.configuration import PRESETS, OmniMoeConfig
from omni_moe.integrations.transformers.doge import OmniDogeCDMoE, replace_doge_moe
from omni_moe.integrations.transformers.experts import omni_moe_experts_forward
from omni_moe.integrations.transformers.grouped_experts import omni_moe_grouped_experts_forward
from omni_moe.integrations.transformers.layers import num_active_parameters, omni_moe_layers
from omni_moe.integrations.transformers.modeling import OmniMoeForCausalLM, OmniMoeModel
from omni_moe.integrations.transformers.replace import replace_mlp

__all__ = [
    "PRESETS",
    "ExpertLoadCallback",
    "OmniDogeCDMoE",
    "OmniMoeConfig",
    "OmniMoeForCausalLM",
    "OmniMoeModel",
    "num_active_parameters",
    "omni_moe_experts_forward",
    "omni_moe_grouped_experts_forward",
    "omni_moe_layers",
    "plot_expert_load",
    "replace_doge_moe",
    "replace_mlp",
]

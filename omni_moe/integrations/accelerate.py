"""What accelerate does to modules. Works without accelerate, which it does not import."""

from collections.abc import Callable
from typing import Any

from torch import nn

_HOOKS = "accelerate.hooks"


def forward_behind_placing_hook(module: nn.Module) -> Callable[..., Any]:
    """The `forward` set on a module, or the one behind it if it only moves inputs to a device.

    For a `device_map`, accelerate sets a `forward` on every module that runs an `AlignDevicesHook`
    and then the former one. Where the hook does not offload weights it moves the inputs to the
    device of the weights and does nothing else. A subclass of the hook may do more, so that its
    `forward` is returned as it is, as is one that accelerate did not set.

    Args:
        module: with a `forward` of its own, that is in its `__dict__`.
    """
    forward = module.__dict__["forward"]
    hook = module.__dict__.get("_hf_hook")
    is_of_hook = getattr(getattr(forward, "func", None), "__module__", None) == _HOOKS
    kind = type(hook)
    is_placing = kind.__module__ == _HOOKS and kind.__name__ == "AlignDevicesHook"
    return module._old_forward if is_of_hook and is_placing and not hook.offload else forward

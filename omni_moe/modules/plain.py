"""Which modules of a layer are plain, so that the layer may read their tensors.

The fused operators take the weights of several modules and call none of them. That is right for
modules as PyTorch makes them; one with a hook, an adapter (LoRA), a quantised or computed weight or
a `forward` of its own has to be called. No module tells when it is changed, so each forward of a
layer asks anew, about all nine modules in 3 µs: `module.weight` alone would take 1 µs, because
Python looks for parameters, buffers and submodules only after all other attributes.
"""

import torch
from torch import Tensor, nn

from omni_moe.integrations.accelerate import forward_behind_placing_hook
from omni_moe.modules.masked_norm import batch_of_counted

_TOKEN_NORMS = {nn.LayerNorm: "layer_norm", nn.RMSNorm: "rms_norm"}


def plain_weight(module: nn.Module, kind: type[nn.Module]) -> Tensor | None:
    """The weight of a plain module without bias, or None if the module has to be called.

    Args:
        module: any module.
        kind: what a plain one is, `nn.Linear` or `nn.Embedding` (without any of its options).

    Returns:
        `module.weight`.
    """
    if not _is_unchanged(module, kind):
        return None
    # What `module.weight` finds, in the order in which it looks.
    attributes, parameters = module.__dict__, module._parameters
    if kind is nn.Embedding and _has_options(attributes):
        return None
    if "bias" in attributes or parameters.get("bias") is not None:
        return None
    weight = attributes["weight"] if "weight" in attributes else parameters.get("weight")
    return weight if _is_ordinary(weight) else None


def plain_batch_norm_buffers(norm_x: nn.Module, norm_y: nn.Module) -> list[Tensor] | None:
    """The buffers of two plain `nn.BatchNorm1d`, or None if these have to be called.

    One operator runs both. So they must be two, with running statistics and without affine
    parameters, and agree in mode, momentum, eps and dtype.

    Returns:
        Running mean (N,), running variance (N,) and number of batches () of `norm_x`, then those of
        `norm_y`.
    """
    if norm_x is norm_y:
        return None
    buffers = []
    for norm in (norm_x, norm_y):
        if not _is_unchanged(norm, nn.BatchNorm1d) or norm.momentum is None:
            return None
        if not norm.track_running_stats:  # set to False later on, with the buffers still there
            return None
        affine, own = norm._parameters, norm._buffers
        # FSDP1 takes parameters out of the module: only one that is there as None does not exist.
        if affine.get("weight", norm) is not None or affine.get("bias", norm) is not None:
            return None
        mean, var = own.get("running_mean"), own.get("running_var")
        count = own.get("num_batches_tracked")
        if mean is None or var is None or count is None:
            return None
        buffers += (mean, var, count)
    agree = (
        norm_x.training == norm_y.training
        and norm_x.momentum == norm_y.momentum
        and norm_x.eps == norm_y.eps
        and buffers[0].dtype == buffers[3].dtype
    )
    return buffers if agree else None


def plain_token_norm(
    norm_x: nn.Module, norm_y: nn.Module, num_rows: int, num_cols: int
) -> tuple[str, float] | None:
    """What two plain `nn.LayerNorm` or `nn.RMSNorm` compute, or None if these have to be called.

    One operator runs both. So they must be two of a kind, of R and C logits, without affine
    parameters, and agree in eps.

    Returns:
        The norm's name among the options of the config, and its eps.
    """
    kind = type(norm_x)
    name = _TOKEN_NORMS.get(kind)
    if name is None or not (_is_unchanged(norm_x, kind) and _is_unchanged(norm_y, kind)):
        return None
    for norm, width in ((norm_x, num_rows), (norm_y, num_cols)):
        own = norm._parameters
        if own.get("weight", norm) is not None or own.get("bias") is not None:
            return None
        if norm.normalized_shape != (width,) or norm.eps is None:  # None: that of the dtype
            return None
    return (name, norm_x.eps) if norm_x.eps == norm_y.eps else None


def _has_options(embedding: dict[str, object]) -> bool:
    """Whether calling an embedding with these attributes does more than read rows."""
    return (
        embedding["max_norm"] is not None
        or embedding["padding_idx"] is not None
        or embedding["scale_grad_by_freq"]
        or embedding["sparse"]
    )


def call_norm(norm: nn.Module, logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Calls the norm of one axis, whatever the dtype of its running statistics.

    Args:
        norm: any module, wrapped or with hooks too.
        logits: (T, N).
        token_mask: (T,) bool, False for tokens that BatchNorm leaves out of its batch.

    Returns:
        `norm(logits)`.

    Raises:
        ValueError: there is a mask, and a BatchNorm in training with a `forward` of its own.
    """
    with batch_of_counted(norm, token_mask):
        return _call_in_wide_dtype(norm, logits)


def _call_in_wide_dtype(norm: nn.Module, logits: Tensor) -> Tensor:
    """`norm(logits)` with statistics that PyTorch's BatchNorm takes.

    It takes them in fp32 beside halves, else only in the dtype of the logits. But who casts the
    parameters of a model and not its buffers, as PEFT does before training quantised weights,
    leaves statistics in bf16 beside logits in fp32. They then take part as copies in the wider
    dtype, and an update goes back.
    """
    wide_dtype = torch.promote_types(logits.dtype, torch.float32)
    narrow = {
        name: buffer
        for name, buffer in norm.named_buffers()
        if buffer.is_floating_point() and buffer.dtype not in (logits.dtype, wide_dtype)
    }
    if not narrow:
        return norm(logits)
    wide = {name: buffer.to(wide_dtype) for name, buffer in narrow.items()}
    normed = torch.func.functional_call(norm, wide, (logits,))
    if norm.training:
        for name, buffer in narrow.items():
            buffer.copy_(wide[name])
    return normed


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the weight of a linear module, or None where it is not a number's, as in 4 bit.

    Args:
        module: a Linear, or what stands for one: an adapter around it, a quantised one.
    """
    weight = getattr(module, "weight", None)
    is_floating = isinstance(weight, Tensor) and weight.is_floating_point()
    return weight.dtype if is_floating else None


def _is_unchanged(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs the `forward` of `kind` and nothing else."""
    state = module.__dict__
    return (
        type(module) is kind
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and not state["_backward_hooks"]
        and not state["_backward_pre_hooks"]
        and ("forward" not in state or _has_forward_of(module, kind))
    )


def _has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the `forward` set on the module itself is that of its class.

    accelerate leaves it there when it removes its hooks.
    """
    forward = forward_behind_placing_hook(module)
    function, instance = (getattr(forward, name, None) for name in ("__func__", "__self__"))
    return function is kind.forward and instance is module


def _is_ordinary(weight: Tensor | None) -> bool:
    """Whether it is a tensor without functions of its own, as quantised weights have them."""
    kind = type(weight)
    return (
        kind is nn.Parameter
        or kind is Tensor
        or getattr(kind, "__torch_function__", None) is torch._C._disabled_torch_function_impl
    )

"""Finding the gate/up/down MLPs of a decoder and building OmniMoE layers from them."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omni_moe import OmniMoE, OmniMoEConfig
from omni_moe.integrations.transformers.layers import activation_name

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Old MLP against the new layer: relative error in norm that rounding may cause, TF32 included.
_SAME_FUNCTION_TOLERANCE = 0.01
_SAME_FUNCTION_EPSILONS = 16  # the same in units of the dtype's epsilon, for bf16


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The one ModuleList of `model` whose blocks hold MLPs with gate, up and down projections.

    If there are several, as beside a vision tower, that of the language model.

    Raises:
        ValueError: there is none, or more than one; or the model has an encoder as well.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder, got {type(model).__name__} with its encoder")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_mlp_name(block) for block in module)
    }
    if len(found) > 1:
        decoder = set(model.get_decoder().modules())
        found = {name: module for name, module in found.items() if module in decoder} or found
    if len(found) != 1:
        expected = "expected one stack of blocks that hold an MLP of gate_proj, up_proj, down_proj"
        got = f"{len(found)}: {', '.join(found)}" if found else "none"
        raise ValueError(f"model: {expected}, got {got} in {type(model).__name__}")
    return next(iter(found.values()))


def check_layers(layers: Iterable[int] | None, num_layers: int) -> list[int]:
    """Sorted layer indices; all of them for None.

    Raises:
        ValueError: not a collection of ints, none, or one out of range.
    """
    if layers is None:
        return list(range(num_layers))
    chosen = list(layers) if isinstance(layers, Iterable) else None
    if not chosen or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in chosen):
        raise ValueError(f"layers: expected None or layer indices, got {layers!r}")
    chosen = [int(i) for i in chosen]  # NumPy's are in no JSON
    if not all(0 <= i < num_layers for i in chosen):
        raise ValueError(f"layers: expected indices in [0, {num_layers}), got {chosen}")
    return sorted(set(chosen))


def build_layers(
    blocks: nn.ModuleList, *, layers: list[int], **options: Any
) -> dict[int, tuple[str, OmniMoE]]:
    """For each layer index the name of its MLP and the OmniMoE layer to put there.

    The shared branch takes the MLP's own Linear modules; the experts' outputs are zero. Nothing is
    changed in `blocks`.

    Raises:
        ValueError: an MLP that the shared branch cannot replace, an index out of range, or options
            of `OmniMoEConfig` with values they cannot have.
    """
    chosen = check_layers(layers, len(blocks))
    with_mlp = [i for i, block in enumerate(blocks) if _mlp_name(block)]
    if not set(chosen) <= set(with_mlp):
        raise ValueError(
            "layers: expected blocks that hold an MLP of gate_proj, up_proj, down_proj, which are "
            f"{with_mlp}, got {chosen}"
        )
    return {i: _build_layer(f"layer {i}", blocks[i], options) for i in chosen}


def put_in_place(blocks: nn.ModuleList, built: dict[int, tuple[str, OmniMoE]]) -> None:
    """Puts what `build_layers` made into the blocks."""
    for index, (name, layer) in built.items():
        setattr(blocks[index], name, layer)


def _mlp_name(block: nn.Module) -> str | None:
    for name, module in block.named_children():
        if all(isinstance(getattr(module, part, None), nn.Module) for part in _PROJECTIONS):
            return name
    return None


def _build_layer(where: str, block: nn.Module, options: dict[str, Any]) -> tuple[str, OmniMoE]:
    name = _mlp_name(block)
    mlp = getattr(block, name)
    if isinstance(mlp, OmniMoE):
        raise ValueError(f"{where}: expected a dense MLP, got an OmniMoE layer")
    for part in _PROJECTIONS:
        projection = getattr(mlp, part)
        if type(projection) is not nn.Linear or projection.bias is not None:
            raise ValueError(f"{where}: {part}: expected a Linear without bias, got {projection}")
        if projection.weight.is_meta and hasattr(projection, "_hf_hook"):
            raise ValueError(
                f"{where}: {part}: expected weights on a device, got offloaded ones; replace the "
                "MLPs of the model on the CPU, save it, and load it with offloading"
            )
    layer = _from_mlp(where, mlp, options)
    if mlp.gate_proj.weight.device.type != "meta":
        _check_same_function(where, mlp, layer)
    return name, layer


def _from_mlp(where: str, mlp: nn.Module, options: dict[str, Any]) -> OmniMoE:
    weight = mlp.gate_proj.weight
    config = OmniMoEConfig(
        hidden_size=weight.shape[1],
        intermediate_size=weight.shape[0],
        hidden_act=activation_name(getattr(mlp, "act_fn", None), f"{where}: "),
        **options,
    )
    with weight.device:
        layer = OmniMoE(config).to(weight.dtype)
    # Statistics stay in fp32 beside weights in halves.
    for norm in (layer.router_norm_x, layer.router_norm_y):
        norm.to(torch.promote_types(weight.dtype, torch.float32))
    for part in _PROJECTIONS:
        setattr(layer, part, getattr(mlp, part))
    nn.init.zeros_(layer.down_embed.weight)
    # The model's config may change them, and change them back.
    layer.given_coefficients = (config.router_aux_loss_coef, config.router_z_loss_coef)
    return layer.train(mlp.training)


@torch.no_grad()
def _check_same_function(where: str, mlp: nn.Module, layer: OmniMoE) -> None:
    """Refuses MLPs that have the three projections but compute something else with them."""
    weight, was_training = mlp.gate_proj.weight, mlp.training
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, weight.shape[1], generator=generator, device="cpu")
    x = x.to(weight.device, weight.dtype)
    try:
        want = mlp.eval()(x)
    finally:
        mlp.train(was_training)
    got = layer.eval()(x).double()
    layer.train(was_training)
    layer.reset_expert_load()
    epsilon = torch.finfo(weight.dtype).eps
    tolerance = max(_SAME_FUNCTION_TOLERANCE, _SAME_FUNCTION_EPSILONS * epsilon)
    is_tensor = isinstance(want, Tensor) and want.shape == got.shape
    if not (is_tensor and (got - want.double()).norm() <= tolerance * want.double().norm()):
        raise ValueError(
            f"{where}: expected {type(mlp).__name__} to compute "
            "down_proj(act_fn(gate_proj(x)) * up_proj(x)), got another function"
        )

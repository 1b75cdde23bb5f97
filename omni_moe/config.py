"""Configuration of one OmniMoE layer: its sizes, its expert grid and its router."""

import math
from dataclasses import dataclass

from omni_moe.activations import ACTIVATION_FUNCTIONS

ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)
ROUTER_NORMS = ("batch_norm", "layer_norm", "rms_norm", "none")

# Expert ids are int32.
MAX_EXPERTS = 2**31 - 1
# The router's cost grows with R + C: past C = 16 R it is more than twice that of a square grid.
MAX_GRID_ASPECT = 16


@dataclass(frozen=True, kw_only=True)
class OmniMoEConfig:
    """Sizes and options of an `OmniMoE` layer. Validated on construction.

    Args:
        hidden_size: H, width of the input and the output.
        intermediate_size: I, width of the shared MLP.
        hidden_act: activation of the experts and of the shared MLP, one of `ACTIVATIONS`.
        num_experts: E, number of atomic experts. They form an exact grid of R rows and C columns,
            `id = row * C + col`, so that every id can be reached.
        num_experts_per_token: K, experts chosen for each token, 1 <= K <= E.
        norm_topk_prob: divide a token's K routing weights by their sum (Eq. 2 of the paper).
            False keeps the softmax probabilities over all E experts, as the published code does.
        expert_grid: (R, C) with R * C = E. By default the most nearly square exact factorisation.
        router_norm: of both logit vectors, without affine parameters. "batch_norm": BatchNorm1d,
            over the tokens, as in the published code. "layer_norm" and "rms_norm": over each
            token's own R and C logits, so that tokens do not see each other and training computes
            what evaluation does. "none".
        initializer_range: standard deviation of the normal distribution of all initial weights.
        track_expert_load: count in each forward how often each expert is chosen, for
            `OmniMoE.expert_load()`.
        router_aux_loss_coef: weight of `load_balancing_loss` in `OmniMoE.aux_loss`; 0 leaves it
            out. BatchNorm balances the experts without it; other routers need it.
        router_z_loss_coef: weight of `router_z_loss` there.
        router_jitter_noise: eps in [0, 1); in training the router, not the experts, sees its input
            multiplied elementwise by random numbers of uniform(1 - eps, 1 + eps).

    Raises:
        ValueError: a field has a value it cannot have; the message names the field, what was
            expected and what came.
    """

    hidden_size: int
    intermediate_size: int
    hidden_act: str = "silu"
    num_experts: int
    num_experts_per_token: int
    norm_topk_prob: bool = False
    expert_grid: tuple[int, int] | None = None
    router_norm: str = "batch_norm"
    initializer_range: float = 0.02
    track_expert_load: bool = False
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        _check_int("hidden_size", self.hidden_size, 1)
        _check_int("intermediate_size", self.intermediate_size, 1)
        _check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        _check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_int("num_experts_per_token", self.num_experts_per_token, 1, self.num_experts)
        _check_bool("norm_topk_prob", self.norm_topk_prob)
        _check_choice("router_norm", self.router_norm, ROUTER_NORMS)
        _check_positive("initializer_range", self.initializer_range)
        _check_bool("track_expert_load", self.track_expert_load)
        _check_non_negative("router_aux_loss_coef", self.router_aux_loss_coef)
        _check_non_negative("router_z_loss_coef", self.router_z_loss_coef)
        _check_non_negative("router_jitter_noise", self.router_jitter_noise, below=1)
        if self.expert_grid is None:
            nearest_square_grid(self.num_experts)
        else:
            object.__setattr__(self, "expert_grid", _checked_grid(self))

    @property
    def has_router_loss(self) -> bool:
        """Whether a loss of the router is asked for."""
        return self.router_aux_loss_coef > 0 or self.router_z_loss_coef > 0

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C): rows and columns of the expert grid."""
        return self.expert_grid or nearest_square_grid(self.num_experts)


def nearest_square_grid(num_experts: int) -> tuple[int, int]:
    """The factorisation R * C = num_experts with R <= C and R as large as possible.

    Raises:
        ValueError: C > 16 R (a prime, say), where a grid would save the router little.
    """
    rows, cols = _most_square_factors(num_experts)
    if cols <= MAX_GRID_ASPECT * rows:
        return rows, cols
    below = next(n for n in range(num_experts - 1, 0, -1) if _has_near_square_grid(n))
    above = next(n for n in range(num_experts + 1, 2 * num_experts) if _has_near_square_grid(n))
    raise ValueError(
        f"num_experts: expected a number with a factorisation rows * cols no flatter than "
        f"1:{MAX_GRID_ASPECT}, got {num_experts} = {rows} * {cols}; "
        f"use {below} or {above}, or set expert_grid=({rows}, {cols})"
    )


def _most_square_factors(n: int) -> tuple[int, int]:
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return rows, n // rows


def _has_near_square_grid(n: int) -> bool:
    rows, cols = _most_square_factors(n)
    return cols <= MAX_GRID_ASPECT * rows


def _checked_grid(config: OmniMoEConfig) -> tuple[int, int]:
    grid = config.expert_grid
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"expert_grid: expected (rows, cols) or None, got {grid!r}")
    rows, cols = grid
    _check_int("expert_grid rows", rows, 1)
    _check_int("expert_grid cols", cols, 1)
    if rows * cols != config.num_experts:
        raise ValueError(
            f"expert_grid: expected rows * cols = num_experts = {config.num_experts}, "
            f"got {rows} * {cols} = {rows * cols}"
        )
    return rows, cols


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        bounds = f"an int >= {low}" if high is None else f"an int in [{low}, {high}]"
        raise ValueError(f"{name}: expected {bounds}, got {value!r}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def _check_non_negative(name: str, value: object, below: float = math.inf) -> None:
    if not _is_number(value) or not 0 <= value < below:
        expected = "a finite number >= 0" if below == math.inf else f"a number in [0, {below})"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

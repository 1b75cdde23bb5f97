"""OmniMoEConfig: validation and the factorisation of the expert grid."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_moe import OmniMoEConfig
from omni_moe.config import MAX_GRID_ASPECT, nearest_square_grid

GOOD = {"hidden_size": 8, "intermediate_size": 12, "num_experts": 36, "num_experts_per_token": 4}


def test_defaults():
    config = OmniMoEConfig(**GOOD)
    assert config.hidden_act == "silu" and config.router_norm == "batch_norm"
    assert not config.norm_topk_prob and not config.track_expert_load
    assert config.router_aux_loss_coef == config.router_z_loss_coef == 0
    assert config.router_jitter_noise == 0 and not config.has_router_loss
    assert config.grid == (6, 6) and config.expert_grid is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size: expected an int >= 1, got 0"),
        ("hidden_size", 8.0, "hidden_size: expected an int >= 1, got 8.0"),
        ("hidden_size", True, "hidden_size: expected an int >= 1, got True"),
        ("intermediate_size", -3, "intermediate_size: expected an int >= 1, got -3"),
        (
            "hidden_act",
            "swish",
            "hidden_act: expected one of silu, gelu, gelu_tanh, relu, identity",
        ),
        ("num_experts", 0, "num_experts: expected an int in [1, 2147483647], got 0"),
        ("num_experts", 2**31, "num_experts: expected an int in [1, 2147483647], got 2147483648"),
        ("num_experts", "36", "num_experts: expected an int in [1, 2147483647], got '36'"),
        ("num_experts_per_token", 0, "num_experts_per_token: expected an int in [1, 36], got 0"),
        ("num_experts_per_token", 37, "num_experts_per_token: expected an int in [1, 36], got 37"),
        ("norm_topk_prob", 1, "norm_topk_prob: expected True or False, got 1"),
        ("router_norm", "group_norm", "router_norm: expected one of batch_norm, layer_norm"),
        ("initializer_range", 0, "initializer_range: expected a finite number > 0, got 0"),
        ("initializer_range", float("nan"), "initializer_range: expected a finite number > 0"),
        ("track_expert_load", None, "track_expert_load: expected True or False, got None"),
        ("router_aux_loss_coef", -0.1, "router_aux_loss_coef: expected a finite number >= 0, got"),
        ("router_aux_loss_coef", True, "router_aux_loss_coef: expected a finite number >= 0, got"),
        ("router_z_loss_coef", math.inf, "router_z_loss_coef: expected a finite number >= 0, got"),
        ("router_z_loss_coef", math.nan, "router_z_loss_coef: expected a finite number >= 0, got"),
        ("router_jitter_noise", 1, "router_jitter_noise: expected a number in [0, 1), got 1"),
        ("router_jitter_noise", -1, "router_jitter_noise: expected a number in [0, 1), got -1"),
        ("router_jitter_noise", None, "router_jitter_noise: expected a number in [0, 1), got None"),
        (
            "expert_grid",
            (5, 7),
            "expert_grid: expected rows * cols = num_experts = 36, got 5 * 7 = 35",
        ),
        ("expert_grid", (36,), "expert_grid: expected (rows, cols) or None, got (36,)"),
        ("expert_grid", 6, "expert_grid: expected (rows, cols) or None, got 6"),
        ("expert_grid", (-6, -6), "expert_grid rows: expected an int >= 1, got -6"),
        ("expert_grid", (6.0, 6), "expert_grid rows: expected an int >= 1, got 6.0"),
    ],
)
def test_bad_fields(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OmniMoEConfig(**(GOOD | {field: value}))


def test_has_router_loss():
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        assert OmniMoEConfig(**GOOD, **{name: 1}).has_router_loss
    assert not OmniMoEConfig(**GOOD, router_jitter_noise=0.5).has_router_loss


def test_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        OmniMoEConfig(**GOOD).num_experts = 49
    with pytest.raises(TypeError):
        OmniMoEConfig(8, 12)


@pytest.mark.parametrize(
    ("num_experts", "grid"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (12, (3, 4)),
        (36, (6, 6)),
        (48, (6, 8)),
        (4096, (64, 64)),
        (8192, (64, 128)),
        (102400, (320, 320)),
        (2**30, (2**15, 2**15)),
    ],
)
def test_grid(num_experts, grid):
    assert OmniMoEConfig(
        **(GOOD | {"num_experts": num_experts, "num_experts_per_token": 1})
    ).grid == (grid)


def test_given_grid():
    assert OmniMoEConfig(**GOOD, expert_grid=(1, 36)).grid == (1, 36)
    assert OmniMoEConfig(**GOOD, expert_grid=[9, 4]).grid == (9, 4)
    assert hash(OmniMoEConfig(**GOOD, expert_grid=[9, 4])) == hash(
        OmniMoEConfig(**GOOD, expert_grid=(9, 4))
    )


def test_a_number_without_a_good_grid():
    message = (
        "num_experts: expected a number with a factorisation rows * cols no flatter than 1:16, "
        "got 1009 = 1 * 1009; use 1008 or 1010, or set expert_grid=(1, 1009)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        OmniMoEConfig(**(GOOD | {"num_experts": 1009}))
    assert OmniMoEConfig(**(GOOD | {"num_experts": 1009}), expert_grid=(1, 1009)).grid == (1, 1009)


@given(st.integers(1, 5000))
def test_every_expert_has_one_cell(num_experts):
    """The most nearly square exact grid, or an error: never a grid of another size."""
    factors = [r for r in range(1, num_experts + 1) if num_experts % r == 0 and r**2 <= num_experts]
    rows, cols = factors[-1], num_experts // factors[-1]
    if cols <= MAX_GRID_ASPECT * rows:
        assert nearest_square_grid(num_experts) == (rows, cols)
    else:
        with pytest.raises(ValueError, match=f"got {num_experts} = {rows} . {cols}") as error:
            nearest_square_grid(num_experts)
        below, above = map(int, re.search(r"use (\d+) or (\d+)", str(error.value)).groups())
        assert below < num_experts < above
        for usable in (below, above):
            rows, cols = nearest_square_grid(usable)
            assert rows * cols == usable

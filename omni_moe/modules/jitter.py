"""Multiplicative noise on the tokens that a router reads."""

import torch
from torch import Tensor


def jittered(tokens: Tensor, noise: float) -> Tensor:
    """Each element times a factor of its own, rounded to the dtype of the tokens.

    Args:
        tokens: floating point, any shape.
        noise: factors are uniform in [1 - noise, 1 + noise).
    """
    # Drawn in fp32, since bf16 has only four numbers from 0.99 to 1.01.
    factors = torch.empty_like(tokens, dtype=torch.float32).uniform_(1 - noise, 1 + noise)
    return (tokens * factors).to(tokens.dtype)

"""A PEER layer (He 2024, arXiv 2407.04153, Algorithm 1) in plain PyTorch, for comparison."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PeerLayer(nn.Module):
    """Experts of two vectors each, retrieved by product keys: `x -> Σ g act(x · down) up`.

    Each of several heads makes a query from the token, whose halves are scored against two sets of
    sqrt(N) keys that the heads share; the K / heads best sums of two scores choose the experts, and
    a softmax over them gives the weights. As in the paper's Algorithm 1 `down_embed` scores and
    `up_embed` projects back; queries are normalised over the batch.

    Args:
        hidden_size: H.
        side: sqrt(N), keys of a set.
        num_heads: how many queries a token makes.
        num_experts_per_token: K, of all heads together.
        key_size: of a half of a query.

    Raises:
        ValueError: K is no multiple of the heads, or more than the experts that they can choose.
    """

    def __init__(
        self,
        hidden_size: int,
        side: int,
        num_heads: int,
        num_experts_per_token: int,
        key_size: int = 128,
    ) -> None:
        super().__init__()
        if num_experts_per_token % num_heads or num_experts_per_token > num_heads * side**2:
            raise ValueError(
                f"num_experts_per_token: expected a multiple of {num_heads} heads, at most "
                f"{num_heads * side**2}, got {num_experts_per_token}"
            )
        self.num_heads = num_heads
        self.k = num_experts_per_token // num_heads
        self.query_proj = nn.Linear(hidden_size, num_heads * 2 * key_size, bias=False)
        self.query_norm = nn.BatchNorm1d(num_heads * 2 * key_size)
        self.keys = nn.Parameter(torch.randn(2, side, key_size) * key_size**-0.5)
        self.down_embed = nn.Embedding(side**2, hidden_size)
        self.up_embed = nn.Embedding(side**2, hidden_size)
        for embedding in (self.down_embed, self.up_embed):
            nn.init.normal_(embedding.weight, std=hidden_size**-0.5)

    def forward(self, tokens: Tensor, chunk: int | None = None) -> Tensor:
        """(T, H) to (T, H); behind the queries so many tokens at a time, by default all."""
        queries = self.query_norm(self.query_proj(tokens)).unflatten(-1, (2, self.num_heads, -1))
        if chunk is None or chunk >= len(tokens):
            return self._retrieve(tokens, queries)
        parts = zip(tokens.split(chunk), queries.split(chunk), strict=True)
        return torch.cat([self._retrieve(*part) for part in parts])

    def _retrieve(self, tokens: Tensor, queries: Tensor) -> Tensor:
        scores, indices = self.choose(queries)
        weights = scores.softmax(-1).flatten(-2)
        indices = indices.flatten(-2)
        down, up = self.down_embed(indices), self.up_embed(indices)
        activations = F.gelu(torch.matmul(down, tokens.unsqueeze(-1)).squeeze(-1))
        return torch.matmul((activations * weights).unsqueeze(-2), up).squeeze(-2)

    def choose(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and ids (T, heads, K / heads) for queries (T, 2, heads, key)."""
        side = self.keys.shape[1]
        best_x, rows = (queries[:, 0] @ self.keys[0].t()).topk(min(self.k, side), dim=-1)
        best_y, cols = (queries[:, 1] @ self.keys[1].t()).topk(min(self.k, side), dim=-1)
        sums = (best_x.unsqueeze(-1) + best_y.unsqueeze(-2)).flatten(-2)
        scores, positions = sums.topk(self.k, dim=-1)
        # The id of a position without an array of all of them.
        width = cols.shape[-1]
        ids = rows.gather(-1, positions // width) * side + cols.gather(-1, positions % width)
        return scores, ids

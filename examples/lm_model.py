"""A small byte-level transformer whose feed-forward layer is given: OmniMoE, or a dense MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_moe import OmniMoE, OmniMoEConfig
from omni_moe.ops import omni_mlp

NUM_BYTES = 256
# Each position's input is the sum of the embeddings of its byte and the two before it. At 200
# steps of 1024 bytes this takes the dense model from 3.04 to 2.46 bits per byte.
NUM_EMBEDDED = 3


class DenseMLP(nn.Module):
    """SwiGLU feed-forward layer, the same function as the shared MLP of OmniMoE."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return omni_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, hidden_size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_size)
        self.k_norm = nn.RMSNorm(head_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_size))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, S, head_size) each
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)
        mixed = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


def rotary_tables(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_size / 2) of the rotary angles."""
    frequencies = 10000.0 ** -torch.arange(0, 1, 2 / head_size, device=device)
    angles = torch.arange(length, device=device).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    def __init__(self, hidden_size: int, head_size: int, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, head_size)
        self.mlp_norm = nn.RMSNorm(hidden_size)
        self.mlp = mlp

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class ByteLM(nn.Module):
    """Pre-norm transformer over bytes: (B, S) ids in, (B, S, 256) fp32 logits out."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        head_size: int,
        make_mlp: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.embed = nn.Embedding(NUM_EMBEDDED * NUM_BYTES, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, head_size, make_mlp()) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size)
        self.head = nn.Linear(hidden_size, NUM_BYTES, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Unit-variance activations; residual branches start small, the logits at zero."""
        std = self.embed.embedding_dim**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight", "head.weight")):
                nn.init.zeros_(parameter)
            elif name == "embed.weight":
                nn.init.normal_(parameter, std=NUM_EMBEDDED**-0.5)
            elif name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        recent_ids = F.pad(ids, (NUM_EMBEDDED - 1, 0)).unfold(1, NUM_EMBEDDED, 1)  # (B, S, 3)
        tables = NUM_BYTES * torch.arange(NUM_EMBEDDED, device=ids.device)
        x = self.embed(recent_ids + tables).sum(-2)
        rotation = rotary_tables(ids.shape[1], self.head_size, ids.device)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x)).float()

    @torch.no_grad()
    def generate(
        self, prompt: bytes, num_bytes: int, window: int, temperature: float, seed: int
    ) -> bytes:
        """Continues `prompt`, seeing at most the last `window` bytes at each step."""
        device = self.embed.weight.device
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=device)
        for _ in range(num_bytes):
            probs = (self(ids[:, -window:])[:, -1] / temperature).softmax(-1)
            next_id = torch.multinomial(probs.cpu(), 1, generator=generator)
            ids = torch.cat((ids, next_id.to(device)), dim=1)
        return bytes(ids[0].tolist())


def dense_width(config: OmniMoEConfig) -> int:
    """Width of the dense MLP with as many active parameters as `config`, rounded up."""
    with torch.device("meta"):
        active = active_parameters(OmniMoE(config))
    return -(-active // (3 * config.hidden_size))


def active_parameters(module: nn.Module) -> int:
    """Parameters that take part in one token's output.

    All of them, except that of each OmniMoE layer's experts only K pairs of rows do. The router's
    gates and the shared MLP are always active. Of the byte embedding three rows are.
    """
    active = sum(parameter.numel() for parameter in module.parameters())
    for layer in module.modules():
        if isinstance(layer, OmniMoE):
            config = layer.config
            idle = config.num_experts - config.num_experts_per_token
            active -= 2 * idle * config.hidden_size
        elif isinstance(layer, ByteLM):
            active -= NUM_EMBEDDED * (NUM_BYTES - 1) * layer.embed.embedding_dim
    return active

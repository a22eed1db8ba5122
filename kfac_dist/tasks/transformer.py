"""The network of the task `char_transformer`: a decoder that normalises before each branch.

Its parameters are in `Linear`, `Embedding` and `LayerNorm` modules, for which there are curvature
blocks. A sequence is `[N, T]` or, embedded, `[N, T, width]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.tasks.networks import truncated_normal

_MLP_RATIO = 4  # hidden units of the fully connected branch, in widths


def _linear(fan_in: int, fan_out: int, *, scale: float = 1.0) -> nn.Linear:
    # Made without values, because torch's own initialisation would use up random numbers.
    layer = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
    truncated_normal(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(scale)
    nn.init.zeros_(layer.bias)
    return layer


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it.

    Queries, keys and values come, in this order, from the outputs of one layer, `qkv`.
    """

    def __init__(self, width: int, num_heads: int, branch_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _linear(width, 3 * width)
        self.projection = _linear(width, width, scale=branch_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[N, T, width]` to the same shape."""
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(inputs).chunk(3, dim=-1)
        )
        # Written out, because torch's fused attention lacks the forward mode of Fisher products.
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        length = inputs.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
        weights = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1)
        mixed = (weights @ values).transpose(1, 2).flatten(2)
        projected: Tensor = self.projection(mixed)
        return projected


class Block(nn.Module):
    """x + attention(norm(x)), then x + contract(gelu(expand(norm(x))))."""

    def __init__(self, width: int, num_heads: int, branch_scale: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, num_heads, branch_scale)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = _linear(width, _MLP_RATIO * width)
        self.contract = _linear(_MLP_RATIO * width, width, scale=branch_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[N, T, width]` to the same shape."""
        attended = inputs + self.attention(self.attention_norm(inputs))
        output: Tensor = attended + self.contract(F.gelu(self.expand(self.mlp_norm(attended))))
        return output


class CharTransformer(nn.Module):
    """Logits of the next character at each position of `[N, T]` codes, T at most `context`.

    Weights have standard deviation 1/sqrt(fan_in). Embeddings have 1/sqrt(width), so that their
    rows have about unit norm. The last layer of each of the 2 * num_blocks branches is divided by
    the square root of their number, so that the variance of their sum does not grow with it. With
    `tie_weights` the output layer shares the matrix of the token embedding.
    """

    def __init__(
        self,
        num_characters: int,
        *,
        context: int,
        width: int,
        num_heads: int,
        num_blocks: int,
        tie_weights: bool,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_characters, width)
        self.position_embedding = nn.Embedding(context, width)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        branch_scale = (2 * num_blocks) ** -0.5
        self.blocks = nn.Sequential(
            *(Block(width, num_heads, branch_scale) for _ in range(num_blocks))
        )
        self.norm = nn.LayerNorm(width)
        self.output = _linear(width, num_characters)
        if tie_weights:
            self.output.weight = self.token_embedding.weight

    def forward(self, codes: Tensor) -> Tensor:
        """Map int64 codes `[N, T]` to logits `[N, T, num_characters]`."""
        # Repeated for every case, because statistics need a row of each layer's input a case.
        positions = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        embedded = self.token_embedding(codes) + self.position_embedding(positions)
        logits: Tensor = self.output(self.norm(self.blocks(embedded)))
        return logits

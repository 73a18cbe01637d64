"""The perceiver resampler (Flamingo, arXiv 2204.14198): a few learned queries read an image's features.

Parameters are named and shaped as in released IP-Adapter-Plus files, which therefore load as they are.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Queries attend to the features and to themselves: keys and values are of both."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, features: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        features, queries = self.norm1(features), self.norm2(queries)
        key, value = self.to_kv(torch.cat([features, queries], 1)).chunk(2, -1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries), key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value, mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


def feed_forward(dim: int, factor: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * factor, bias=False),
        nn.GELU(),
        nn.Linear(dim * factor, dim, bias=False),
    )


class Resampler(nn.Module):
    """`queries` learned queries over features (batch, tokens, features), to (batch, queries, output)."""

    def __init__(
        self, features: int, dim: int, output: int, queries: int, depth: int, heads: int, head_dim: int = 0
    ):
        super().__init__()
        head_dim = head_dim or dim // heads
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in, self.proj_out, self.norm_out = (
            nn.Linear(features, dim),
            nn.Linear(dim, output),
            nn.LayerNorm(output),
        )
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, heads, head_dim), feed_forward(dim)]) for _ in range(depth)
        )

    def forward(self, features: Tensor, mask: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """`mask` (batch, tokens) is False where features are padding; `queries` (batch, n, dim) stand in for
        the learned ones."""
        features = self.proj_in(features)
        queries = self.latents.expand(len(features), -1, -1) if queries is None else queries
        if mask is not None:
            own = torch.ones(queries.shape[:2], dtype=torch.bool, device=mask.device)
            mask = torch.cat([mask, own], 1)[:, None, None]
        for block in self.layers:
            attention, forward = cast(nn.ModuleList, block)
            queries = queries + attention(features, queries, mask)
            queries = queries + forward(queries)
        return self.norm_out(self.proj_out(queries))

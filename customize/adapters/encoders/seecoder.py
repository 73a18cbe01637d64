"""SeeCoder, the semantic context encoder of Prompt-Free Diffusion (Xu et al., 2023, arXiv 2305.16223, section
3.3): one image to a context that takes the place of a prompt's text states.

A Swin transformer gives features at strides 8, 16 and 32 (res3, res4, res5), a decoder refines all of them
together, and queries read them: local ones a scale in each layer, global ones only the local ones. Parameters
are named and shaped as in the released files; `swin_layout.py` names those of the Swin transformer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig

SCALES = ("res3", "res4", "res5")
FREQUENCIES = 20  # of the position embedding of SeeCoder-PA


@dataclass
class SeeCoderConfig:
    """Sizes of the encoder; the defaults are those of the released files, which do not say all of them."""

    dim: int  # of the context, that of the text states
    swin: Mapping[str, Any]  # fields of transformers' SwinConfig
    global_queries: int = 4
    local_queries: int = 144
    decoder_layers: int = 6
    query_layers: int = 9
    heads: int = 8
    position_aware: bool = False  # SeeCoder-PA
    # The released decoder attends along the batch, by axes that are swapped. As it is used, with one image,
    # every token then sees itself alone, which is what False computes. True attends over the tokens, as the
    # paper says.
    decoder_attends: bool = False


def norm(dim: int) -> nn.GroupNorm:
    """In 32 groups, as released, or in fewer, so that each has two channels at least."""
    return nn.GroupNorm(math.gcd(32, dim // 2), dim)


class DecoderLayer(nn.Module):
    """A post-norm transformer layer over tokens (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int, attends: bool, width: int = 1024):
        super().__init__()
        self.attends = attends
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, width), nn.Linear(width, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        alone = x if self.attends else x.flatten(0, 1).unsqueeze(1)
        seen = self.self_attn(alone, alone, alone, need_weights=False)[0].view_as(x)
        x = self.norm1(x + self.dropout(seen))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class LateralConv(nn.Conv2d):
    """A convolution of one pixel and its norm, which the released files keep inside it."""

    def __init__(self, channels: int, dim: int):
        super().__init__(channels, dim, 1, bias=False)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Decoder(nn.Module):
    """Features of each scale (batch, channels, height, width), to the same of width `dim`."""

    def __init__(self, channels: Sequence[int], config: SeeCoderConfig):
        super().__init__()
        dim, sizes = config.dim, dict(zip(SCALES, channels, strict=True))
        self.inproj_layers = nn.ModuleDict(
            {tag: nn.Sequential(nn.Conv2d(size, dim, 1), norm(dim)) for tag, size in sizes.items()}
        )
        layers = [
            DecoderLayer(dim, config.heads, config.decoder_attends) for _ in range(config.decoder_layers)
        ]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.level_embed = nn.Parameter(torch.randn(len(SCALES), dim))
        self.lateral_layers = nn.ModuleDict({tag: LateralConv(size, dim) for tag, size in sizes.items()})

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        order = SCALES[::-1]
        projected = [self.inproj_layers[tag](features[tag]) for tag in order]
        tokens = [x.flatten(2).transpose(1, 2) + self.level_embed[i] for i, x in enumerate(projected)]
        joined = torch.cat(tokens, 1)
        for layer in cast(nn.ModuleList, self.transformer["layers"]):
            joined = layer(joined)
        parts = joined.split([x.shape[1] for x in tokens], 1)
        refined = {
            tag: x.transpose(1, 2).reshape(p.shape) for tag, x, p in zip(order, parts, projected, strict=True)
        }
        return [refined[tag] + self.lateral_layers[tag](features[tag]) for tag in SCALES]


class Attention(nn.Module):
    """Post-norm attention of queries over states; positions are added to queries and keys alone. `name` is
    what the released files call it."""

    def __init__(self, dim: int, heads: int, name: str):
        super().__init__()
        self.name, self.norm = name, nn.LayerNorm(dim)
        self.add_module(name, nn.MultiheadAttention(dim, heads, batch_first=True))

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.norm(x + self.get_submodule(self.name)(query, key, value, need_weights=False)[0])


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int = 2048):
        super().__init__()
        self.linear1, self.linear2, self.norm = (
            nn.Linear(dim, width),
            nn.Linear(width, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class Positions(nn.Module):
    """SeeCoder-PA's embedding of positions, 0 before training: sines and cosines of both coordinates, through
    an MLP; in training all positions are shifted by up to half a cell."""

    def __init__(self, dim: int):
        super().__init__()
        layers = [
            nn.Linear(4 * FREQUENCIES, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
        ]
        self.mlp = nn.Sequential(*layers)
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Of features (batch, channels, height, width), as (1, height * width, dim)."""
        sides = x.shape[-2:]
        shifts = (torch.rand(2) - 0.5).tolist() if self.training else (0.0, 0.0)
        frequencies = (min(sides) / 2) ** torch.linspace(0, 1, FREQUENCIES, device=x.device)
        angles = []
        for side, shift in zip(sides, shifts, strict=True):
            centred = torch.arange(side, device=x.device) + 0.5 - side / 2 + shift
            angles.append((centred / min(sides) * 2 * math.pi)[:, None] * frequencies)
        rows, columns = angles[0][:, None].expand(*sides, -1), angles[1][None].expand(*sides, -1)
        waves = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], -1)
        return self.mlp(waves.to(x.dtype)).flatten(0, 1)[None]


class QueryTransformer(nn.Module):
    """Features of three scales, each (batch, dim, height, width), to a context (batch, queries, dim)."""

    def __init__(self, config: SeeCoderConfig):
        super().__init__()
        dim, layers, heads = config.dim, range(config.query_layers), config.heads
        queries = config.global_queries + config.local_queries
        self.globals = config.global_queries
        self.pe_layer = Positions(dim) if config.position_aware else None
        self.transformer_selfatt_layers = nn.ModuleList(Attention(dim, heads, "self_attn") for _ in layers)
        self.transformer_crossatt_layers = nn.ModuleList(
            Attention(dim, heads, "multihead_attn") for _ in layers
        )
        self.transformer_feedforward_layers = nn.ModuleList(FeedForward(dim) for _ in layers)
        self.init_query, self.query_pos_embedding = nn.Embedding(queries, dim), nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(len(SCALES), dim)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        values = [x.flatten(2).transpose(1, 2) + self.level_embed.weight[i] for i, x in enumerate(features)]
        positions = [0.0 if self.pe_layer is None else self.pe_layer(x) for x in features]
        x = self.init_query.weight.expand(len(values[0]), -1, -1)
        where, count = self.query_pos_embedding.weight, self.globals
        for i in range(len(self.transformer_selfatt_layers)):
            scale, local = i % len(values), x[:, count:]
            keys = values[scale] + positions[scale]
            read = self.transformer_crossatt_layers[i](local, local + where[count:], keys, values[scale])
            x = torch.cat([x[:, :count], read], 1)
            x = self.transformer_selfatt_layers[i](x, x + where, x + where, x)
            x = self.transformer_feedforward_layers[i](x)
        return x


class SeeCoder(nn.Module):
    """Pixels in [0, 1], (batch, 3, height, width), to a context (batch, queries, dim)."""

    def __init__(self, config: SeeCoderConfig, imencoder: SwinBackbone | None = None):
        super().__init__()
        self.config = config
        self.imencoder = make_swin(config.swin) if imencoder is None else imencoder
        self.imencoder.swin.layernorm = nn.Identity()  # its output is not used, and released files lack it
        self.imdecoder = Decoder(self.imencoder.channels[1:], config)
        self.qtransformer = QueryTransformer(config)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.imencoder(pixels).feature_maps[1:]
        return self.qtransformer(self.imdecoder(dict(zip(SCALES, maps, strict=True))))


def make_swin(fields: Mapping[str, Any]) -> SwinBackbone:
    """An untrained Swin transformer that gives the features of all four stages."""
    stages = [f"stage{i + 1}" for i in range(len(fields["depths"]))]
    return SwinBackbone(SwinConfig(**fields, out_features=stages))

"""SeeCoder in its released layout (Prompt-Free Diffusion, arXiv 2305.16223), written out token by token for
one image, and a tiny checkpoint of random weights in that layout."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PREFIX = "ctx.image."
WINDOW, DEPTHS, HEADS = 2, (1, 2, 1, 1), (1, 2, 2, 4)
EMBED, DIM, QUERY_LAYERS = 4, 16, 4
GLOBALS, LOCALS = 4, 5  # the released global queries are 4


def checkpoint(position_aware: bool = False) -> dict[str, Tensor]:
    """Random tensors with the names and the kinds of shapes of a released file."""
    generator = torch.Generator().manual_seed(7)
    state = {}

    def add(name: str, *shape: int) -> None:
        state[PREFIX + name] = torch.randn(shape, generator=generator) * 0.4

    def linear(name: str, out: int, inside: int) -> None:
        add(f"{name}.weight", out, inside)
        add(f"{name}.bias", out)

    def norm(name: str, dim: int) -> None:
        add(f"{name}.weight", dim)
        add(f"{name}.bias", dim)

    def attention(name: str, dim: int) -> None:
        add(f"{name}.in_proj_weight", 3 * dim, dim)
        add(f"{name}.in_proj_bias", 3 * dim)
        linear(f"{name}.out_proj", dim, dim)

    add("imencoder.patch_embed.proj.weight", EMBED, 3, 4, 4)
    add("imencoder.patch_embed.proj.bias", EMBED)
    norm("imencoder.patch_embed.norm", EMBED)
    for i, depth in enumerate(DEPTHS):
        dim = EMBED * 2**i
        for j in range(depth):
            block = f"imencoder.layers.{i}.blocks.{j}"
            norm(f"{block}.norm1", dim)
            norm(f"{block}.norm2", dim)
            add(f"{block}.attn.relative_position_bias_table", (2 * WINDOW - 1) ** 2, HEADS[i])
            state[f"{PREFIX}{block}.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
            linear(f"{block}.attn.qkv", 3 * dim, dim)
            linear(f"{block}.attn.proj", dim, dim)
            linear(f"{block}.mlp.fc1", 4 * dim, dim)
            linear(f"{block}.mlp.fc2", dim, 4 * dim)
        if i < 3:
            add(f"imencoder.layers.{i}.downsample.reduction.weight", 2 * dim, 4 * dim)
            norm(f"imencoder.layers.{i}.downsample.norm", 4 * dim)
        norm(f"imencoder.norm{i}", dim)
    for i, tag in enumerate(("res3", "res4", "res5"), 1):
        add(f"imdecoder.inproj_layers.{tag}.0.weight", DIM, EMBED * 2**i, 1, 1)
        add(f"imdecoder.inproj_layers.{tag}.0.bias", DIM)
        norm(f"imdecoder.inproj_layers.{tag}.1", DIM)
        add(f"imdecoder.lateral_layers.{tag}.weight", DIM, EMBED * 2**i, 1, 1)
        norm(f"imdecoder.lateral_layers.{tag}.norm", DIM)
    add("imdecoder.level_embed", 3, DIM)
    for i in range(2):
        layer = f"imdecoder.transformer.layers.{i}"
        attention(f"{layer}.self_attn", DIM)
        linear(f"{layer}.linear1", 1024, DIM)
        linear(f"{layer}.linear2", DIM, 1024)
        norm(f"{layer}.norm1", DIM)
        norm(f"{layer}.norm2", DIM)
    for i in range(QUERY_LAYERS):
        attention(f"qtransformer.transformer_selfatt_layers.{i}.self_attn", DIM)
        attention(f"qtransformer.transformer_crossatt_layers.{i}.multihead_attn", DIM)
        linear(f"qtransformer.transformer_feedforward_layers.{i}.linear1", 2048, DIM)
        linear(f"qtransformer.transformer_feedforward_layers.{i}.linear2", DIM, 2048)
        for kind in ("selfatt", "crossatt", "feedforward"):
            norm(f"qtransformer.transformer_{kind}_layers.{i}.norm", DIM)
    for name in ("init_query", "query_pos_embedding"):
        add(f"qtransformer.{name}.weight", GLOBALS + LOCALS, DIM)
    add("qtransformer.level_embed.weight", 3, DIM)
    if position_aware:
        for i, inside in ((0, 80), (2, DIM), (4, DIM)):
            linear(f"qtransformer.pe_layer.mlp.{i}", DIM, inside)
    return state


class ByHand:
    """The context of one image by a checkpoint."""

    def __init__(self, state: dict[str, Tensor], decoder_attends: bool = False):
        self.state = {name.removeprefix(PREFIX): value for name, value in state.items()}
        self.decoder_attends = decoder_attends

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (spread + 1e-5).sqrt() * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """nn.MultiheadAttention, a query and a head at a time; tokens (n, dim)."""
        weights = self.state[f"{name}.in_proj_weight"].chunk(3)
        biases = self.state[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
        out, size = torch.zeros_like(q), q.shape[1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(len(q)):
                scores = torch.stack([q[i, part] @ k[j, part] / size**0.5 for j in range(len(k))])
                out[i, part] = sum(w * v[j, part] for j, w in enumerate(scores.softmax(0)))
        return self.linear(f"{name}.out_proj", out)

    # the Swin transformer, on grids (height, width, dim)

    def block(self, name: str, x: Tensor, heads: int, shift: int) -> Tensor:
        height, width, dim = x.shape
        inside = self.norm(f"{name}.norm1", x)
        tall, wide = -(-height // WINDOW) * WINDOW, -(-width // WINDOW) * WINDOW
        padded = torch.zeros(tall, wide, dim)
        padded[:height, :width] = inside
        rolled = padded.roll((-shift, -shift), (0, 1))

        def region(place: int, side: int) -> int:
            return (place >= side - WINDOW) + (place >= side - shift) if shift else 0

        qkv = self.linear(f"{name}.attn.qkv", rolled)
        table, out, size = (
            self.state[f"{name}.attn.relative_position_bias_table"],
            torch.zeros_like(rolled),
            dim // heads,
        )
        for r in range(tall):
            for c in range(wide):
                top, left = r // WINDOW * WINDOW, c // WINDOW * WINDOW
                near = [(top + a, left + b) for a in range(WINDOW) for b in range(WINDOW)]
                for h in range(heads):
                    q = qkv[r, c, h * size : (h + 1) * size]
                    scores = []
                    for y, z in near:
                        k = qkv[y, z, dim + h * size : dim + (h + 1) * size]
                        row = (r - y + WINDOW - 1) * (2 * WINDOW - 1) + c - z + WINDOW - 1
                        apart = (region(r, tall), region(c, wide)) != (region(y, tall), region(z, wide))
                        scores.append(q @ k / size**0.5 + table[row, h] - 100.0 * apart)
                    shares = torch.stack(scores).softmax(0)
                    values = [qkv[y, z, 2 * dim + h * size : 2 * dim + (h + 1) * size] for y, z in near]
                    out[r, c, h * size : (h + 1) * size] = sum(
                        s * v for s, v in zip(shares, values, strict=True)
                    )
        out = self.linear(f"{name}.attn.proj", out).roll((shift, shift), (0, 1))[:height, :width]
        x = x + out
        inner = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.mlp.fc2", inner)

    def swin(self, image: Tensor) -> dict[str, Tensor]:
        """An image (3, height, width) to grids at strides 4, 8, 16 and 32."""
        weight, bias = (self.state[f"imencoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
        x = torch.stack(
            [
                torch.stack(
                    [
                        (weight * image[:, r : r + 4, c : c + 4]).sum((1, 2, 3)) + bias
                        for c in range(0, image.shape[2], 4)
                    ]
                )
                for r in range(0, image.shape[1], 4)
            ]
        )
        x, found = self.norm("imencoder.patch_embed.norm", x), {}
        for i, depth in enumerate(DEPTHS):
            for j in range(depth):
                x = self.block(f"imencoder.layers.{i}.blocks.{j}", x, HEADS[i], WINDOW // 2 if j % 2 else 0)
            found[f"res{i + 2}"] = self.norm(f"imencoder.norm{i}", x)
            if i < 3:
                x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
                merged = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
                merged = self.norm(f"imencoder.layers.{i}.downsample.norm", merged)
                x = merged @ self.state[f"imencoder.layers.{i}.downsample.reduction.weight"].T
        return found

    # the decoder and the queries

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        """Of a grid, with 8 groups for 16 channels (32 for the released 768)."""
        groups = x.unflatten(-1, (8, 2))
        mean = groups.mean((0, 1, 3), keepdim=True)
        spread = groups.var((0, 1, 3), unbiased=False, keepdim=True)
        normal = ((groups - mean) / (spread + 1e-5).sqrt()).flatten(2)
        return normal * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def decoder(self, features: dict[str, Tensor]) -> list[Tensor]:
        order, grids, tokens = ("res5", "res4", "res3"), {}, []
        for i, tag in enumerate(order):
            name = f"imdecoder.inproj_layers.{tag}"
            x = features[tag] @ self.state[f"{name}.0.weight"][:, :, 0, 0].T + self.state[f"{name}.0.bias"]
            grids[tag] = self.group_norm(f"{name}.1", x)
            tokens.append(grids[tag].flatten(0, 1) + self.state["imdecoder.level_embed"][i])
        x = torch.cat(tokens)
        for i in range(2):
            name = f"imdecoder.transformer.layers.{i}"
            if self.decoder_attends:
                seen = self.attend(f"{name}.self_attn", x, x, x, 8)
            else:  # each token alone
                seen = torch.cat([self.attend(f"{name}.self_attn", t, t, t, 8) for t in x.split(1)])
            x = self.norm(f"{name}.norm1", x + seen)
            inner = self.linear(f"{name}.linear1", x).relu()
            x = self.norm(f"{name}.norm2", x + self.linear(f"{name}.linear2", inner))
        refined = dict(zip(order, x.split([len(t) for t in tokens]), strict=True))
        out = []
        for tag in ("res3", "res4", "res5"):
            lateral = features[tag] @ self.state[f"imdecoder.lateral_layers.{tag}.weight"][:, :, 0, 0].T
            lateral = self.group_norm(f"imdecoder.lateral_layers.{tag}.norm", lateral)
            out.append(refined[tag].view_as(grids[tag]) + lateral)
        return out

    def positions(self, height: int, width: int) -> Tensor:
        rows, least = [], min(height, width)
        for r in range(height):
            for c in range(width):
                waves = {"rs": [], "rc": [], "cs": [], "cc": []}
                for k in range(20):
                    frequency = (least / 2) ** (k / 19)
                    y, z = (
                        (p + 0.5 - side / 2) / least * 2 * math.pi for p, side in ((r, height), (c, width))
                    )
                    waves["rs"].append(math.sin(y * frequency))
                    waves["rc"].append(math.cos(y * frequency))
                    waves["cs"].append(math.sin(z * frequency))
                    waves["cc"].append(math.cos(z * frequency))
                rows.append([value for own in waves.values() for value in own])
        x = torch.tensor(rows)
        for i in (0, 2):
            x = F.silu(self.linear(f"qtransformer.pe_layer.mlp.{i}", x))
        return self.linear("qtransformer.pe_layer.mlp.4", x)

    def context(self, image: Tensor) -> Tensor:
        """(queries, dim) of an image (3, height, width) in [0, 1]."""
        maps = self.decoder(self.swin(image))
        name = "qtransformer"
        values = [x.flatten(0, 1) + self.state[f"{name}.level_embed.weight"][i] for i, x in enumerate(maps)]
        aware = any("pe_layer" in key for key in self.state)
        where = [self.positions(*x.shape[:2]) if aware else 0.0 for x in maps]
        first, local = self.state[f"{name}.init_query.weight"].split([GLOBALS, LOCALS])
        places = self.state[f"{name}.query_pos_embedding.weight"]
        for i in range(QUERY_LAYERS):
            layer = f"{name}.transformer_crossatt_layers.{i}"
            keys = values[i % 3] + where[i % 3]
            read = self.attend(f"{layer}.multihead_attn", local + places[GLOBALS:], keys, values[i % 3], 8)
            x = torch.cat([first, self.norm(f"{layer}.norm", local + read)])
            layer = f"{name}.transformer_selfatt_layers.{i}"
            read = self.attend(f"{layer}.self_attn", x + places, x + places, x, 8)
            x = self.norm(f"{layer}.norm", x + read)
            layer = f"{name}.transformer_feedforward_layers.{i}"
            inner = self.linear(f"{layer}.linear1", x).relu()
            x = self.norm(f"{layer}.norm", x + self.linear(f"{layer}.linear2", inner))
            first, local = x[:GLOBALS], x[GLOBALS:]
        return torch.cat([first, local])

"""What the denoiser learns from: rendered scenes as latents and text states.

The autoencoder's encoder is linear in blocks of 8 x 8 pixels, so latents are a matrix product; noise
stands in for the spread of the encoder's posterior and for what the matrix leaves out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from autoencoder import patches
from diffusers import AutoencoderKL
from supply import Piece, Supply
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from customize.stickers import Drawing, Scene, World, draw_scene
from customize.stickers.scene import ARRANGEMENTS, draw_caption, draw_factors
from recipe import autocast, part, scaled, to_pixels, worlds
from text_tower import token_ids

PIECE, KEPT = 1024, 48  # scenes that are made at a time, and how many of these pieces are kept
SHARES = (
    0.3,
    0.2,
    0.5,
)  # of the scenes: any drawing, the core vocabulary, the classes that the benchmark draws
PAIRS, EXTRAS = (
    0.27,
    0.4,
)  # shares of scenes with two things, and of the others with a factor beyond the background
SPREAD = 0.35  # of poses, until things are drawn as asked
NOISE = 0.02  # spread of the noise on latents


def benchmark_classes(world: World) -> list[Drawing]:
    """What pretraining may see of the classes of which one studio's drawing is held out: customization
    starts from them."""
    return [
        d for d in world.drawings() if world.classes[d.word]["core"] and world.classes[d.word]["held_out"]
    ]


def draw_training_scene(
    rng: np.random.Generator, world: World, pool: list[Drawing], spread: float, extras: float = EXTRAS
) -> Scene:
    """A scene of one drawing of `pool`; every fourth has a second thing, of another class, beside, above
    or partly over it."""
    if rng.random() >= PAIRS:
        return draw_factors(rng, world, pool, extras=extras, spread=spread)
    scene = draw_factors(rng, world, pool, extras=0, spread=spread)
    others = [drawing for drawing in pool if drawing.word != scene.subject.word]
    arrangement = ARRANGEMENTS[rng.choice(len(ARRANGEMENTS), p=(0.6, 0.2, 0.2))]
    return replace(scene, companion=others[rng.integers(len(others))], count=1, arrangement=arrangement)


def pixels_of(scenes: Sequence[Scene], world: World) -> Tensor:
    """(n, 3, SIDE, SIDE) in [-1, 1]."""
    return scaled(to_pixels([draw_scene(scene, world)[0] for scene in scenes]))


def blocks(pixels: Tensor) -> Tensor:
    """The autoencoder's patches and a constant, (n, height, width, 193)."""
    found = patches(pixels)
    return torch.cat([found, torch.ones_like(found[..., :1])], -1)


@torch.no_grad()
def fit_encoder(vae: AutoencoderKL, world: World, count: int = 32) -> tuple[Tensor, float]:
    """The matrix from blocks to the mean of the autoencoder's posterior by least squares, and its rms
    error."""
    rng = np.random.default_rng(0)
    pixels = pixels_of(
        [draw_training_scene(rng, world, world.drawings(core=True), 1.0) for _ in range(count)], world
    )
    x, y = blocks(pixels).flatten(0, 2), vae.encode(pixels).latent_dist.mean.permute(0, 2, 3, 1).flatten(0, 2)
    matrix = torch.linalg.lstsq(x.double(), y.double(), driver="gelsd").solution.float()
    return matrix, float((x @ matrix - y).square().mean().sqrt())


class Text:
    """The frozen text tower on `device`."""

    def __init__(self, device: torch.device | str):
        self.device = device
        self.tower = (
            CLIPTextModel.from_pretrained(part("text_encoder"), dtype=torch.float32).eval().to(device)
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """States of captions given as token numbers, (n, LENGTH, dim), float16."""
        with autocast(self.device):
            states = [self.tower(some.long()).last_hidden_state for some in ids.split(256)]
        return torch.cat([some.half() for some in states])

    def ids(self, captions: list[str]) -> Tensor:
        return token_ids(self.tokenizer, captions)

    def nothing(self) -> Tensor:
        """The states of no text, (LENGTH, dim)."""
        return self(self.ids([""]).to(self.device))[0].float()


class Encoder:
    """Scenes to latents, and captions to the numbers of their tokens."""

    def __init__(self):
        vae = AutoencoderKL.from_pretrained(part("vae")).eval()
        self.world, self.scaling = worlds(), vae.config.scaling_factor
        self.matrix, self.error = fit_encoder(vae, self.world)
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))
        self.pools = self.world.drawings(), self.world.drawings(core=True), benchmark_classes(self.world)

    def latents(self, pixels: Tensor) -> Tensor:
        mean = (blocks(pixels) @ self.matrix).permute(0, 3, 1, 2)
        return (mean + NOISE * torch.randn_like(mean)) * self.scaling

    def piece(self, rng: np.random.Generator, spread: float, count: int = PIECE) -> Piece:
        latents, ids = [], []
        for _ in range(count // 64):
            pools = [self.pools[i] for i in rng.choice(len(self.pools), 64, p=SHARES)]
            scenes = [draw_training_scene(rng, self.world, pool, spread) for pool in pools]
            latents.append(self.latents(pixels_of(scenes, self.world)).half())
            ids.append(
                token_ids(self.tokenizer, [draw_caption(rng, scene) for scene in scenes]).to(torch.int16)
            )
        return torch.cat(latents), torch.cat(ids)


def _start() -> Callable[[np.random.Generator, float], Piece]:
    return Encoder().piece


def _with_states(text: Text, piece: Piece) -> Piece:
    latents, ids = piece
    return latents, text(ids)


def supply(text: Text, seed: int, workers: int, spread: float = SPREAD) -> Supply:
    """Latents and text states of scenes."""
    large = torch.device(text.device).type != "cpu"
    kept, shows = (512, 2) if large else (KEPT, 6)
    return Supply(_start, seed, workers, text.device, kept, shows, spread, partial(_with_states, text))

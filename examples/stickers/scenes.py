"""What the denoiser learns from: rendered scenes as latents and text states, made by a process of its own.

The autoencoder's encoder is almost linear in 4 x 4 blocks of pixels, so latents are a matrix product; what that leaves out is
as large as the spread of the encoder's own posterior, and noise of that size stands in for both.
"""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, Full

import numpy as np
import torch
import torch.multiprocessing as processes
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from customize.stickers import Drawing, Scene, World, draw_scene
from customize.stickers.scene import ARRANGEMENTS, draw_caption, draw_factors
from recipe import autocast, part, worlds
from text_tower import LENGTH

SHARD, SHARDS = 8192, 6  # scenes in a shard, shards kept in memory: each scene is shown six times
SHARES = (0.05, 0.35, 0.6)  # of the scenes: any drawing, the core vocabulary, the classes that the benchmark draws
PAIRS, EXTRAS = 0.27, 0.3  # shares of scenes with two things, and of the others with a factor beyond the background
SPREAD = 0.35  # of poses, until things are drawn as asked
POSTERIOR = 0.018  # spread of the autoencoder's posterior, in its own units


def benchmark_classes(world: World) -> list[Drawing]:
    """What pretraining may see of the classes of which one studio's drawing is held out: customization starts from them."""
    return [d for d in world.drawings() if world.classes[d.word]["core"] and world.classes[d.word]["held_out"]]


def draw_training_scene(rng: np.random.Generator, world: World, pool: list[Drawing], spread: float) -> Scene:
    """A scene of one drawing of `pool`; every fourth has a second thing, of another class, beside, above or partly over it."""
    if rng.random() >= PAIRS:
        return draw_factors(rng, world, pool, extras=EXTRAS, spread=spread)
    scene = draw_factors(rng, world, pool, extras=0, spread=spread)
    others = [drawing for drawing in pool if drawing.word != scene.subject.word]
    arrangement = ARRANGEMENTS[rng.choice(len(ARRANGEMENTS), p=(0.6, 0.2, 0.2))]
    return replace(scene, companion=others[rng.integers(len(others))], count=1, arrangement=arrangement)


def pixels_of(scenes: Sequence[Scene], world: World) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1]."""
    pixels = np.stack([np.asarray(draw_scene(scene, world)[0]) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def blocks(pixels: Tensor) -> Tensor:
    """Blocks of 4 x 4 pixels and a constant, (n, 16, 16, 49)."""
    found = F.pixel_unshuffle(pixels, 4).permute(0, 2, 3, 1)
    return torch.cat([found, torch.ones_like(found[..., :1])], -1)


@torch.no_grad()
def fit_encoder(vae: AutoencoderKL, world: World) -> tuple[Tensor, float]:
    """The matrix (49, 12) from blocks to the mean of the autoencoder's posterior by least squares, and its rms error."""
    rng = np.random.default_rng(0)
    pixels = pixels_of([draw_training_scene(rng, world, world.drawings(core=True), 1.0) for _ in range(192)], world)
    x, y = blocks(pixels).flatten(0, 2), vae.encode(pixels).latent_dist.mean.permute(0, 2, 3, 1).flatten(0, 2)
    matrix = torch.linalg.lstsq(x.double(), y.double()).solution.float()
    return matrix, float((x @ matrix - y).square().mean().sqrt())


class Encoder:
    """Scenes to what the denoiser sees."""

    def __init__(self):
        vae = AutoencoderKL.from_pretrained(part("vae")).eval()
        self.world, self.scaling = worlds(), vae.config.scaling_factor
        self.matrix, self.error = fit_encoder(vae, self.world)
        self.text = CLIPTextModel.from_pretrained(part("text_encoder"), dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))
        self.pools = self.world.drawings(), self.world.drawings(core=True), benchmark_classes(self.world)

    @torch.no_grad()
    def read(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        with autocast():
            return self.text(ids).last_hidden_state.half()

    def latents(self, pixels: Tensor) -> Tensor:
        mean = (blocks(pixels) @ self.matrix).permute(0, 3, 1, 2)
        return (mean + POSTERIOR * torch.randn_like(mean)) * self.scaling

    def shard(self, rng: np.random.Generator, spread: float, count: int = SHARD) -> tuple[Tensor, Tensor]:
        latents, states = [], []
        for _ in range(count // 64):
            pools = [self.pools[i] for i in rng.choice(len(self.pools), 64, p=SHARES)]
            scenes = [draw_training_scene(rng, self.world, pool, spread) for pool in pools]
            latents.append(self.latents(pixels_of(scenes, self.world)).half())
            states.append(self.read([draw_caption(rng, scene) for scene in scenes]))
        return torch.cat(latents), torch.cat(states)


def _work(queue, seed: int, spread) -> None:
    """Fills the queue with shards; ends with the process that reads them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader, which ends this process
    torch.set_num_threads(1)
    os.nice(5)  # the denoiser comes first: it has six shards to go on with
    encoder, rng = Encoder(), np.random.default_rng(seed)
    while True:
        _offer(queue, encoder.shard(rng, spread.value))


def _offer(queue, shard: tuple[Tensor, Tensor]) -> None:
    """Puts a shard into the queue as soon as there is room; ends this process if the reader's was killed."""
    while processes.parent_process().is_alive():
        with suppress(Full):
            return queue.put(shard, timeout=5)
    os._exit(0)


class Shards:
    """The last `SHARDS` shards; the next one is made while these are trained on."""

    def __init__(self, seed: int, spread: float = SPREAD):
        context = processes.get_context("spawn")
        self.queue, self.spread = context.Queue(1), context.Value("d", spread)
        self.worker = context.Process(target=_work, args=(self.queue, seed, self.spread), daemon=True)
        self.worker.start()
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, stop: Callable[[], float]) -> bool:
        """Waits for the next shard; False if it is time to stop before there is one."""
        while stop() < 1:
            with suppress(Empty):
                latents, states = self.queue.get(timeout=1)
                self.kept = [*self.kept[-SHARDS + 1 :], (latents.clone(), states.clone())]
                return True
        return False

    def batches(self, size: int, empty: Tensor):
        """One pass in random order; a tenth of the texts is replaced by the state of no text."""
        latents, states = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        for chosen in torch.randperm(len(latents)).split(size):
            text = states[chosen].float()
            text[torch.rand(len(text)) < 0.1] = empty.float()
            yield latents[chosen].float(), text

    def close(self) -> None:
        self.worker.terminate()
        self.worker.join()

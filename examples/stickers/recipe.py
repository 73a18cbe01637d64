"""What the pretraining stages share: resumable training state, and endless rendered scenes."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from customize import stickers
from customize.stickers import World, draw_scene
from customize.stickers.scene import draw_caption, draw_factors

FURNACE = Path(".furnace")  # checkpoints, logs and parts of the next model; never committed


def autocast():
    """Products in bfloat16 where the processor computes in it; elsewhere it would be slower than float32."""
    able = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=able["avx512_bf16"] or able["amx_bf16"])


def until(minutes: float) -> Callable[[], float]:
    """A function that gives the share of these minutes that has passed: all of it once SIGINT, SIGTERM or SIGHUP came, so that
    the step is finished and saved; a second signal stops at once."""
    begin, asked = time.time(), []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask)
    return lambda: 1.0 if asked else (time.time() - begin) / 60 / minutes


def part(name: str) -> Path:
    """The folder of a trained part of the model: the furnace's, or else the one that ships."""
    return FURNACE / "model" / name if (FURNACE / "model" / name).exists() else stickers.MODEL / name


def shipped_images(name: str) -> int:
    """How many pictures or captions a shipped part was trained on."""
    log = stickers.MODEL / "training.json"
    return json.loads(log.read_text()).get(name, 0) if log.exists() else 0


class Run:
    """Trains `model` in resumable pieces: AdamW, warm-up, optional EMA, a checkpoint every `every` steps.

    `shipped` weights start a run that has no checkpoint, after a short warm-up, so a committed model can be continued; they are
    those of `model`, or of the part of it that ships.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        lr: float,
        warmup: int = 200,
        ema: float = 0.0,
        decay: float = 0.01,
        shipped: Path | None = None,
        part: nn.Module | None = None,
    ):
        if shipped is not None and shipped.exists():
            (part or model).load_state_dict({k: v.float() for k, v in load_file(shipped).items()})
        self.path, self.model, self.lr, self.warmup, self.decay_rate = FURNACE / f"{name}.pt", model, lr, warmup, ema
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr, betas=(0.9, 0.98), weight_decay=decay, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema else {}
        self.step, self.images, self.since, self.log = 0, shipped_images(name) if shipped else 0, 0, []
        self.start = self.last = time.time()
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.images = state["average"], state["step"], state["images"]
            self.since = self.step  # the optimizer is warm
            print(f"{name}: resumed at step {self.step}, {self.images} images", flush=True)

    def update(self, losses: dict[str, torch.Tensor], images: int, progress: float = 0.0) -> None:
        """One optimizer step on the sum of `losses`; `progress` (0 to 1) is the part of the rate's final decay that passed."""
        sum(losses.values()).backward()
        self.since += 1
        rate = self.lr * min(1.0, self.since / self.warmup) * min(1.0, max(1.0 - progress, 0.02))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.images += images
        if self.average:
            keep = min(self.decay_rate, (1 + self.step) / (10 + self.step))
            for k, v in self.model.state_dict().items():
                self.average[k].lerp_(v, 1 - keep) if v.is_floating_point() else self.average[k].copy_(v)
        self.log.append({k: v.item() for k, v in losses.items()})

    def report(self, every: int = 50) -> None:
        if self.step % every == 0:
            means = {k: float(np.mean([entry[k] for entry in self.log])) for k in self.log[-1]}
            now = time.time()
            terms = " ".join(f"{k} {v:.4f}" for k, v in means.items())
            print(f"step {self.step} images {self.images} {terms} {every / (now - self.last):.2f} steps/s", flush=True)
            self.log, self.last = [], now

    def save(self, every: int = 1) -> bool:
        if self.step % every:
            return False
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        partial = self.path.with_suffix(".partial")
        torch.save(state | {"step": self.step, "images": self.images}, partial)
        partial.rename(self.path)
        return True


def worlds() -> World:
    """The whole world if its atlas was built (`prepare.py --full .furnace/world`), else the part that ships."""
    full = FURNACE / "world"
    return World(full) if full.exists() else World()


def subjects(world: World, core_share: float, rng: np.random.Generator):
    """Drawings that pretraining may see: of the core vocabulary with probability `core_share`, else of the whole world."""
    core, every = world.drawings(core=True), world.drawings()
    while True:
        yield core if rng.random() < core_share else every


def render_batch(rng: np.random.Generator, world: World, pool: list, count: int, size: int, spread: float = 1.0):
    """Pixels in [-1, 1], shape (count, 3, size, size), and the captions."""
    scenes = [draw_factors(rng, world, pool, spread=spread) for _ in range(count)]
    pixels = np.stack([np.asarray(draw_scene(scene, world, size)[0]) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, [draw_caption(rng, scene) for scene in scenes]

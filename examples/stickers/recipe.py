"""What the pretraining stages share: resumable training state, settings of every stage, and the world
they draw on."""

import argparse
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
from customize.stickers import World

FURNACE = Path(".furnace")  # checkpoints, logs and parts of the next model; never committed


def autocast(device: torch.device | str = "cpu"):
    """Products in bfloat16 where the processor computes in it; elsewhere it would be slower than float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or computes_in_bfloat16())


def computes_in_bfloat16() -> bool:
    able = (
        torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    )  # torch 2.10 and newer tell
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def stage(
    minutes: float, batch_size: int, lr: float, threads: int = 2, **parser_options
) -> argparse.ArgumentParser:
    """The settings that every stage has."""
    parser = argparse.ArgumentParser(**parser_options)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that render scenes; on a GPU some four to eight"
    )
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The stage's settings from the command line, and its threads and seed."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    FURNACE.mkdir(exist_ok=True)
    return options


def until(minutes: float) -> Callable[[], float]:
    """A function that gives the share of these minutes that has passed: all of it once SIGINT, SIGTERM or
    SIGHUP came, so that the step is finished and saved; a second signal stops at once."""
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
    """How many images or captions a shipped part was trained on."""
    log = stickers.MODEL / "training.json"
    return json.loads(log.read_text()).get(name, 0) if log.exists() else 0


class Run:
    """Trains `model` in resumable pieces: AdamW, warm-up, optional EMA, a checkpoint every so many steps.

    `shipped` weights start a run that has no checkpoint, after a short warm-up, so a committed model can
    be continued; they are those of `model`, or of the part of it that ships. Weights of other shapes are
    left alone: the recipe has changed since.
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
        """`model` is on the device that it is trained on."""
        weights = load_file(shipped) if shipped is not None and shipped.exists() else {}
        own = (part or model).state_dict()
        started = {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in own.items()}
        if started:
            (part or model).load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})
        self.path, self.model, self.lr, self.warmup, self.decay_rate = (
            FURNACE / f"{name}.pt",
            model,
            lr,
            warmup,
            ema,
        )
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr,
            betas=(0.9, 0.98),
            weight_decay=decay,
            fused=True,
        )
        self.now = model.state_dict()  # the weights themselves, which training changes in place
        self.average = {k: v.detach().clone() for k, v in self.now.items()} if ema else {}
        self.step, self.images, self.since, self.log = 0, shipped_images(name) if started else 0, 0, []
        self.start = self.last = time.time()
        if self.path.exists():
            state = torch.load(self.path, map_location=next(model.parameters()).device, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.images = state["average"], state["step"], state["images"]
            self.since = self.step  # the optimizer is warm
            print(f"{name}: resumed at step {self.step}, {self.images} images", flush=True)

    def update(self, losses: dict[str, torch.Tensor], images: int, progress: float = 0.0) -> None:
        """One optimizer step on the sum of `losses`; `progress` (0 to 1) is the part of the rate's final
        decay that passed."""
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
            self._follow(min(self.decay_rate, (1 + self.step) / (10 + self.step)))
        self.log.append(
            {k: v.detach() for k, v in losses.items()}
        )  # read when reported: a GPU is not waited for

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        """Moves the running average towards the weights; what is counted in whole numbers is copied."""
        smooth = [k for k, v in self.now.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in smooth], [self.now[k] for k in smooth], 1 - keep)
        for k in self.now.keys() - set(smooth):
            self.average[k].copy_(self.now[k])

    def report(self, every: int = 50) -> None:
        if self.step % every == 0:
            means = {k: float(torch.stack([entry[k] for entry in self.log]).mean()) for k in self.log[-1]}
            now = time.time()
            terms = " ".join(f"{k} {v:.4f}" for k, v in means.items())
            print(
                f"step {self.step} images {self.images} {terms} {len(self.log) / (now - self.last):.2f} "
                "steps/s",
                flush=True,
            )
            self.log, self.last = [], now

    def save(self, every: int = 1) -> bool:
        if self.step % every:
            return False
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state | {"step": self.step, "images": self.images}, partial)
        partial.rename(self.path)
        return True


def worlds() -> World:
    """The whole world if its atlas was built (`prepare.py --full .furnace/world`), else the part that
    ships."""
    full = FURNACE / "world"
    return World(full) if full.exists() else World()


def to_pixels(images) -> torch.Tensor:
    """RGB images of one size as uint8, (n, 3, side, side)."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    )


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of 0 to 255 in [-1, 1], float32."""
    return pixels.float() / 127.5 - 1

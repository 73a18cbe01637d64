"""Stage 5: the judge of StickerBench. `python examples/stickers/judge.py [--minutes 30]`, resumable.

It learns from scenes of every drawing that ships, held-out ones included, and is used for evaluation only.
Images are softened at random, because what it will judge was drawn by a network and not by the renderer.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import decoded
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from scenes import Text
from supply import Piece, Supply
from torch import Tensor
from transformers import CLIPTokenizer
from unet import WEIGHTS, build, schedule

from customize.stickers import Scene, World, draw_scene
from customize.stickers.judge import FOLDER, Judge, verdicts_of
from customize.stickers.scene import ARRANGEMENTS, FACTORS, draw_caption, draw_factors
from recipe import FURNACE, Run, autocast, begin, part, scaled, stage, until
from recipe import to_pixels as whole_pixels
from text_tower import token_ids

PIECE, PAIRS = (
    512,
    0.35,
)  # scenes made at a time; share of those that get a second thing as the denoiser sees it
WEIGHTS_OF = {"drawing": 1.0}  # of the losses; of each factor 0.4


def targets(scenes: list[Scene], drawings: list) -> dict[str, torch.Tensor]:
    """Class indices for the factors; for the drawing, probabilities: a companion takes half."""
    index = {drawing: i for i, drawing in enumerate(drawings)}
    wanted = {
        name: torch.tensor([values.index(getattr(s, name)) for s in scenes])
        for name, values in FACTORS.items()
    }
    shown = torch.zeros(len(scenes), len(drawings))
    for i, scene in enumerate(scenes):
        for drawing in (scene.subject, scene.companion or scene.subject):
            shown[i, index[drawing]] += 0.5
    return wanted | {"drawing": shown}


class Wear:
    """What happens to images before the judge sees them, as it will judge what a network drew: an eighth goes
    through the autoencoder with noise on the latents, an eighth is noised and denoised, and any of all may be
    blurred or noisy."""

    def __init__(self, device: torch.device):
        self.vae = AutoencoderKL.from_pretrained(part("vae")).eval().requires_grad_(False).to(device)
        self.unet, self.schedule, self.text = denoiser().to(device), schedule(), Text(device)
        self.schedule.alphas_cumprod = self.schedule.alphas_cumprod.to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """(n, 3, SIDE, SIDE) in [-1, 1] to (n, 3, 64, 64)."""
        eighth = len(pixels) // 8
        coded, denoised, plain = pixels.split([eighth, eighth, len(pixels) - 2 * eighth])
        text = self.text(ids[eighth : 2 * eighth]).float()
        with autocast(pixels.device):
            coded, denoised = decoded(self.vae, coded, 0.3)[0], self.denoised(denoised, text)
        return worn(small(torch.cat([coded.float(), denoised.float(), plain]).clamp(-1, 1)))

    def denoised(self, pixels: Tensor, text: Tensor) -> Tensor:
        """The clean image that the denoiser sees in a noisy one, at up to half of all times."""
        latents = self.vae.encode(pixels).latent_dist.mode()
        t = torch.randint(50, 500, (len(pixels),), device=pixels.device)
        noisy = self.schedule.add_noise(latents, torch.randn_like(latents), t)
        velocity = self.unet(noisy, t, text).sample
        alpha = self.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return self.vae.decode(alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity).sample


def denoiser():
    """The furnace's denoiser, or else the one that ships."""
    unet, state = build(), FURNACE / "unet.pt"
    if state.exists():
        unet.load_state_dict(torch.load(state, map_location="cpu", weights_only=True)["average"])
    else:
        unet = unet.from_pretrained(WEIGHTS.parent)
    return unet.eval().requires_grad_(False)


def small(pixels: Tensor) -> Tensor:
    """As `to_pixels` makes them, but on a tensor: (n, 3, 64, 64)."""
    return F.interpolate(pixels, size=64, mode="bicubic", antialias=True).clamp(-1, 1)


def worn(pixels: Tensor) -> Tensor:
    """Blurs every third image and makes every third noisy."""
    shape = (len(pixels), 1, 1, 1)
    blurred, noisy = (torch.rand(shape, device=pixels.device) < 1 / 3 for _ in range(2))
    few = F.interpolate(pixels, size=int(torch.randint(28, 52, ())), mode="area")
    pixels = torch.where(blurred, F.interpolate(few, size=64, mode="bilinear"), pixels)
    amount = 0.2 * noisy * torch.rand(shape, device=pixels.device)
    return (pixels + amount * torch.randn_like(pixels)).clamp(-1, 1)


def scenes_of(
    rng: np.random.Generator, world: World, drawings: list, count: int, extras: float = 0.5
) -> list[Scene]:
    """Scenes with factors beyond the background; some of those with two things are like the denoiser's."""
    scenes = [draw_factors(rng, world, drawings, extras=extras) for _ in range(count)]
    return [
        replace(
            scene,
            companion=drawings[rng.integers(len(drawings))],
            count=1,
            arrangement=str(rng.choice(ARRANGEMENTS)),
        )
        if rng.random() < PAIRS
        else scene
        for scene in scenes
    ]


class Pieces:
    """Scenes of every drawing that ships, the token numbers of their captions, and what is in them."""

    def __init__(self):
        self.world = World()
        self.drawings = self.world.drawings(held_out=None)
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))

    def __call__(self, rng: np.random.Generator, spread: float) -> Piece:
        scenes = scenes_of(rng, self.world, self.drawings, PIECE)
        captions = [draw_caption(rng, scene) for scene in scenes]
        pixels = whole_pixels([draw_scene(scene, self.world)[0] for scene in scenes])
        return (
            pixels,
            token_ids(self.tokenizer, captions).to(torch.int16),
            *targets(scenes, self.drawings).values(),
        )


@torch.no_grad()
def measure(judge: Judge, world: World, count: int = 2000) -> dict[str, float]:
    """Accuracy on fresh scenes. The drawing: of scenes with the subject at its usual size, upright and in its
    own colours, as one of 537, and of all other scenes; the class; every factor, over scenes half of which
    have one beyond the background."""
    rng, drawings = np.random.default_rng(2**31), world.drawings(held_out=None)
    scenes = [draw_factors(rng, world, drawings, extras=0.5) for _ in range(count)]
    judge.eval()
    verdicts = verdicts_of(judge, [draw_scene(scene, world)[0] for scene in scenes])
    judge.train()
    plain = [
        i
        for i, s in enumerate(scenes)
        if not (s.tint or s.size or s.orientation or s.companion or s.count > 1)
    ]
    rest = sorted(set(range(count)) - set(plain))
    shown = [verdicts.shows(i, s.subject) for i, s in enumerate(scenes)]
    kept = [verdicts.shows_class(i, s.subject.word) for i, s in enumerate(scenes)]
    beside = [
        verdicts.shows_beside(i, s.companion.word) for i, s in enumerate(scenes) if s.companion is not None
    ]
    found = {
        "drawing": np.mean([shown[i] for i in plain]),
        "drawing, changed": np.mean([shown[i] for i in rest]),
        "class": np.mean([kept[i] for i in plain]),
        "companion": np.mean(beside),
        **{
            name: np.mean([verdicts.factor(i, name) == getattr(s, name) for i, s in enumerate(scenes)])
            for name in FACTORS
        },
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def main():
    parser = stage(30, batch_size=64, lr=2e-3)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = begin(parser)
    world, large = World(), options.device.type != "cpu"
    drawings = world.drawings(held_out=None)
    judge, wear = (
        Judge(len(drawings)).to(options.device, memory_format=torch.channels_last),
        Wear(options.device),
    )
    run = Run("judge", judge, options.lr, ema=0.995, shipped=FOLDER / "judge.safetensors")
    supply = Supply(Pieces, run.step + 4, options.workers, options.device, kept=256 if large else 8, shows=4)
    elapsed, names = until(options.minutes), (*FACTORS, "drawing")
    for pixels, ids, *wanted in supply.batches(options.batch_size, elapsed):
        seen = wear(scaled(pixels), ids)
        with autocast(options.device):
            logits = judge(seen)
            losses = {
                n: WEIGHTS_OF.get(n, 0.4) * F.cross_entropy(logits[n], w)
                for n, w in zip(names, wanted, strict=True)
            }
        run.update(losses, len(pixels), (elapsed() - 0.3) / 0.7)
        run.report(100)
        run.save(1000)
    supply.close()
    run.save()
    judge.load_state_dict(run.average)
    judge.cpu()
    options.output.mkdir(exist_ok=True)
    state = judge.eval().state_dict()
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()},
        options.output / "judge.safetensors",
    )
    judge.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state.items()})
    found = measure(judge, world, 4000) | {"scenes": run.images}
    (options.output / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()

"""What makes the embedded denoiser learn faster: `python examples/benchmarks/denoiser_recipes.py
[--scenes 8192]`

Each variant trains what ships on the same scenes, in the same order and from the same seed, and changes
one thing; after the first, the learning rate falls to 0. Then the loss over the subject's mask at four
noise levels, on the same fresh scenes and noises (so differences are paired), and the share of things
drawn as asked.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "stickers"))

import furnace
import scenes
import unet
from export import draw, recognised

from customize.losses import contrastive_flow, denoising
from customize.stickers import caption, draw_scene
from customize.stickers.scene import draw_caption, draw_factors
from recipe import Run, autocast, scaled, to_pixels

LEVELS = (100, 350, 600, 850)  # of 1,000 times
Loss = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # of prediction, target, a neighbour's target, and the signal's share


def plain(prediction: Tensor, target: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    return denoising(prediction, target)


def min_snr(prediction: Tensor, target: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """Min-SNR with gamma 5 for predicted velocities (arXiv 2303.09556), scaled to a mean weight of about
    one."""
    snr = alpha / (1 - alpha)
    return denoising(prediction, target) * 2.5 * snr.clamp(max=5) / (snr + 1)


def with_contrast(prediction: Tensor, target: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """Contrastive flow matching of weight .05 (arXiv 2506.05350)."""
    return denoising(prediction, target) + 0.05 * contrastive_flow(prediction, other)


def logit_normal(count: int) -> Tensor:
    return (torch.sigmoid(torch.randn(count)) * 1000).long()


VARIANTS: dict[
    str, tuple[Loss, Callable[[int], Tensor], float, bool]
] = {  # loss, times, learning rate, whether it falls to 0
    "as it was": (plain, unet.spread_times, 5e-4, False),
    "learning rate falls to 0": (plain, unet.spread_times, 5e-4, True),  # and in all that follow
    "contrastive flow matching": (with_contrast, unet.spread_times, 5e-4, True),
    "min-SNR": (min_snr, unet.spread_times, 5e-4, True),
    "logit-normal times": (plain, logit_normal, 5e-4, True),
    "twice the learning rate": (plain, unet.spread_times, 1e-3, True),
}


def fresh(encoder: scenes.Encoder, text: scenes.Text, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, text states and masks of scenes of one thing that no variant has seen."""
    rng, pool = np.random.default_rng(2**30), encoder.pools[1]
    drawn = [draw_factors(rng, encoder.world, pool, extras=0, spread=scenes.SPREAD) for _ in range(count)]
    shown = [draw_scene(scene, encoder.world) for scene in drawn]
    masks = torch.stack([torch.from_numpy(np.asarray(mask, np.float32) / 255)[None] for _, mask in shown])
    states = text(text.ids([draw_caption(rng, scene) for scene in drawn]))
    return encoder.latents(scaled(to_pixels([image for image, _ in shown]))), states.float(), masks


@torch.no_grad()
def masked_losses(model, scheduler, held: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(levels, scenes), with the same noise for every model."""
    latents, states, masks = held
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for level in LEVELS:
        t = torch.full((len(latents),), level)
        noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
        with autocast():
            parts = zip(noisy.split(64), t.split(64), states.split(64), strict=True)
            prediction = torch.cat([model(*part).sample.float() for part in parts])
        rows.append(denoising(prediction, target, masks))
    return torch.stack(rows)


def train(name: str, weights: dict, latents: Tensor, states: Tensor, batch: int) -> dict[str, Tensor]:
    """The running average of the weights after one pass over the scenes."""
    loss, times, lr, falls = VARIANTS[name]
    torch.manual_seed(0)
    model, scheduler = unet.build().to(memory_format=torch.channels_last), unet.schedule()
    model.load_state_dict(weights)
    run = Run(f"compare-{name.replace(' ', '-')}", model, lr, warmup=20, ema=0.98 if not falls else 0.5)
    pieces = list(zip(latents.split(batch), states.split(batch), strict=True))
    for step, (clean, text) in enumerate(pieces):
        t, noise = times(len(clean)), torch.randn_like(clean)
        noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
        with autocast():
            prediction = model(noisy, t, text.float()).sample.float()
        other = scheduler.get_velocity(clean.roll(1, 0), noise.roll(1, 0), t)
        terms = loss(prediction, target, other, scheduler.alphas_cumprod[t])
        run.update({"loss": terms.mean()}, len(clean), step / len(pieces) if falls else 0.0)
    return run.average


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(".furnace/recipes.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, text, scheduler = scenes.Encoder(), scenes.Text("cpu"), unet.schedule()
    latents, ids = encoder.piece(np.random.default_rng(2**29), scenes.SPREAD, options.scenes)
    latents, states, held = latents.float(), text(ids), fresh(encoder, text, 256)
    asked = furnace.single_scenes(encoder.world, 48)
    start = unet.UNet2DConditionModel.from_pretrained(unet.WEIGHTS.parent).state_dict()
    rows, reference = {}, None
    for name in ("what ships", *VARIANTS):
        weights = start if name == "what ships" else train(name, start, latents, states, options.batch_size)
        model = unet.build().eval()
        model.load_state_dict(weights)
        found = masked_losses(model, scheduler, held)
        reference = found if reference is None else reference
        change = found - reference
        images = draw(
            furnace.pipeline(weights, torch.device("cpu")), [caption(scene) for scene in asked], seed=100
        )
        rows[name] = {
            "loss": [round(float(value), 4) for value in found.mean(1)],
            "change": [round(float(value), 4) for value in change.mean(1)],
            "standard error": [round(float(value), 4) for value in change.std(1) / len(held[0]) ** 0.5],
            **{key: round(value, 3) for key, value in recognised(images, asked, encoder.world).items()},
        }
        print(name, rows[name], flush=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Where the time of pretraining the embedded model goes: `python examples/benchmarks/furnace_speed.py
[--compile]`

Scenes a second of each part, before (the autoencoder's encoder, float32) and now (linear latents, bfloat16
where the processor computes in it), in one run; and what a scene costs that the denoiser is shown six times.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parent.parent / "stickers"))

import scenes
import unet

import recipe
from customize.stickers.scene import draw_caption

BATCH, SHOWS = 32, 6


def rate(count: int, work: Callable[[], object], repeats: int) -> float:
    """Scenes a second; the first call is not counted."""
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return count * repeats / (time.perf_counter() - begin)


def denoiser_rate(
    latents: torch.Tensor, text: torch.Tensor, repeats: int, half: bool, compiled: bool = False
) -> float:
    """Scenes a second of training steps; `half` is bfloat16, if the processor computes in it."""
    run, schedule = unet.start(1e-4), unet.schedule()
    predict, chosen = torch.compile(run.model) if compiled else run.model, unet.autocast
    unet.autocast = chosen if half else lambda device: nullcontext()
    try:
        return rate(BATCH, lambda: run.update(unet.losses(predict, schedule, latents, text), BATCH), repeats)
    finally:
        unet.autocast = chosen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="also the compiled denoiser")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, text, rng = scenes.Encoder(), scenes.Text("cpu"), np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(recipe.part("vae")).eval()
    drawn = [
        scenes.draw_training_scene(rng, encoder.world, encoder.pools[1], scenes.SPREAD) for _ in range(64)
    ]
    ids, pixels = (
        text.ids([draw_caption(rng, scene) for scene in drawn]),
        scenes.pixels_of(drawn, encoder.world),
    )
    with torch.no_grad():
        rates = {
            "rendering": rate(64, lambda: scenes.pixels_of(drawn, encoder.world), options.repeats),
            "autoencoder": rate(64, lambda: vae.encode(pixels).latent_dist.sample(), options.repeats),
            "linear latents": rate(64, lambda: encoder.latents(pixels), options.repeats),
            "text tower, float32": rate(64, lambda: text.tower(ids), options.repeats),
            "text tower": rate(64, lambda: text(ids), options.repeats),
        }
    batch = encoder.latents(pixels)[:BATCH], text(ids)[:BATCH].float()
    rates["denoiser, float32"] = denoiser_rate(*batch, options.repeats, half=False)
    rates["denoiser"] = denoiser_rate(*batch, options.repeats, half=True)
    if options.compile:
        rates["denoiser, compiled"] = denoiser_rate(*batch, options.repeats, half=True, compiled=True)
    print(
        "bfloat16"
        if recipe.computes_in_bfloat16()
        else "float32 only: this processor does not compute in bfloat16"
    )
    for name, found in rates.items():
        print(f"{name:<20} {found:8.0f} scenes a second")
    before = ("rendering", "autoencoder", "text tower, float32", "denoiser, float32")
    now = (
        "rendering",
        "linear latents",
        "text tower",
        "denoiser, compiled" if options.compile else "denoiser",
    )
    for name, parts in (("before", before), ("now", now)):
        cost = {part: (SHOWS if part.startswith("denoiser") else 1) / rates[part] for part in parts}
        total = sum(cost.values())
        shares = ", ".join(f"{part} {100 * seconds / total:.0f} %" for part, seconds in cost.items())
        print(f"{name}: {SHOWS / total:.0f} scenes shown a second; of the time: {shares}")


if __name__ == "__main__":
    main()

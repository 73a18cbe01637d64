"""Where the time of pretraining the embedded model goes: `python examples/benchmarks/furnace_speed.py [--compile]`

Scenes a second of each part, before (the autoencoder's encoder, float32) and now (linear latents, bfloat16 where the processor
computes in it), in one run; and what a shard costs beside the denoiser's six passes over it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parent.parent / "stickers"))

import scenes
import unet

import recipe
from customize.stickers.scene import draw_caption

BATCH = 32


def rate(count: int, work: Callable[[], object], repeats: int) -> float:
    """Scenes a second; the first call is not counted."""
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return count * repeats / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also the compiled denoiser")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, rng = scenes.Encoder(), np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(recipe.part("vae")).eval()
    drawn = [scenes.draw_training_scene(rng, encoder.world, encoder.pools[1], scenes.SPREAD) for _ in range(64)]
    captions, pixels = [draw_caption(rng, scene) for scene in drawn], scenes.pixels_of(drawn, encoder.world)
    with torch.no_grad():
        rates = {
            "rendering": rate(64, lambda: scenes.pixels_of(drawn, encoder.world), options.repeats),
            "autoencoder": rate(64, lambda: vae.encode(pixels).latent_dist.sample(), options.repeats),
            "linear latents": rate(64, lambda: encoder.latents(pixels), options.repeats),
            "text tower": rate(64, lambda: encoder.read(captions), options.repeats),
        }
    run = unet.begin(1e-4)
    latents, text = encoder.latents(pixels)[:BATCH], encoder.read(captions)[:BATCH].float()
    for name, compiled in ({"denoiser": False} | ({"denoiser, compiled": True} if options.compile else {})).items():
        predict = torch.compile(run.model) if compiled else run.model

        def step(predict=predict):
            run.update(unet.losses(predict, unet.schedule(), latents, text), BATCH)

        rates[name] = rate(BATCH, step, options.repeats)
    for name, found in rates.items():
        print(f"{name:<20} {found:8.0f} scenes a second")
    best = max(found for name, found in rates.items() if name.startswith("denoiser"))
    for name, latent in (("before", "autoencoder"), ("now", "linear latents")):
        prepared = 1 / rates["rendering"] + 1 / rates[latent] + 1 / rates["text tower"]
        total = scenes.SHARDS / (best if name == "now" else rates["denoiser"]) + prepared
        parts = ", ".join(f"{part} {100 / rates[part] / total:.0f} %" for part in ("rendering", latent, "text tower"))
        print(f"{name}: {scenes.SHARDS / total:.0f} scenes a second; of the time: {parts}, the rest the denoiser")


if __name__ == "__main__":
    main()

"""Stage 1: the autoencoder. `python examples/stickers/autoencoder.py [--minutes 15]`, resumable.

A small AutoencoderKL, 4 x 4 pixels to 8 numbers. Besides reconstruction and a weak KL term, a quarter of the batches must decode
*shrunken* latents to the shrunken picture (EQ-VAE, arXiv 2502.09509), which makes latents smooth and easier to denoise.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from recipe import FURNACE, Run, render_batch, worlds


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=8,
        norm_num_groups=1,  # more groups would take each picture's own contrast and colour away
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=64,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction(output: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences to the neighbours, which keeps outlines sharp."""
    return F.l1_loss(output, pixels) + sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(pixels), strict=True))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    world, model = worlds(), build().to(memory_format=torch.channels_last)
    run = Run("autoencoder", model, options.lr, ema=0.995)
    rng = np.random.default_rng(run.step)
    pool, begin = world.drawings(), time.time()
    while (passed := (time.time() - begin) / 60 / options.minutes) < 1:
        pixels, _ = render_batch(rng, world, pool, options.batch_size, 64)
        posterior = model.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        latents = posterior.sample()
        if run.step % 4 == 0:
            latents, pixels = F.avg_pool2d(latents, 2), F.avg_pool2d(pixels, 2)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = {"reconstruction": reconstruction(model.decode(latents).sample, pixels), "kl": options.kl_weight * kl}
        run.update(loss, options.batch_size, progress=(passed - 0.6) / 0.4)
        run.report()
        run.save(200)
    run.save()
    model.load_state_dict(run.average)
    measure(model, *render_batch(rng, world, pool, 256, 64))


@torch.no_grad()
def measure(model, pixels, _):
    """Sets the scaling factor that gives latents unit variance, prints the error, and writes the diffusers folder."""
    latents = model.encode(pixels).latent_dist.mode()
    model.register_to_config(scaling_factor=1 / latents.std().item())
    error = (model.decode(latents).sample.clamp(-1, 1) - pixels).square().mean()
    print(f"PSNR {10 * torch.log10(4 / error):.2f} dB; latent std by channel {latents.std((0, 2, 3))}")
    model.save_pretrained(FURNACE / "model" / "vae")


if __name__ == "__main__":
    main()

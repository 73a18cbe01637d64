"""Stage 1: the autoencoder. `python examples/stickers/autoencoder.py [--minutes 60]`, resumable.

Its encoder is not trained: the weights of a stock AutoencoderKL are set so that it takes the principal components of 4 x 4
pixel patches (`set_encoder`). So latents are known before anything is trained, the denoiser can be trained at once, and the
decoder beside it, now or in a later session. The decoder sees latents with a little noise, as a denoiser leaves it.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from customize import stickers
from recipe import FURNACE, Run, render_batch, until, worlds

LATENTS, KEPT = 12, 100.0  # components; the constant that keeps the encoder's last normalisation from changing anything


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=LATENTS,
        norm_num_groups=1,  # more groups would take each picture's own contrast and colour away
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def components(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (LATENTS, 48) and mean (48,) of the linear code of patches; each number's spread is the square root of its
    component's, so that fine detail is not lost in noise. Pixels are (n, 3, height, width)."""
    patches = F.pixel_unshuffle(pixels, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    values, vectors = values.flip(0)[:LATENTS], vectors.flip(1)[:, :LATENTS]
    rows = vectors.T / values[:, None] ** 0.25
    return rows / ((patches - mean) @ rows.T).std(), mean


@torch.no_grad()
def set_encoder(model: AutoencoderKL, rows: Tensor, mean: Tensor) -> None:
    """Writes the linear code into the encoder's convolutions: residual branches off, two space-to-depth steps, and a
    normalisation whose statistics are those of constant channels, followed by SiLU where it is a straight line."""
    encoder = model.encoder
    for block in (*encoder.down_blocks, encoder.mid_block):
        for resnet in block.resnets:
            resnet.conv2.weight.zero_(), resnet.conv2.bias.zero_()
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight.zero_(), resnet.conv_shortcut.bias.zero_()
                for c in range(min(resnet.conv_shortcut.weight.shape[:2])):
                    resnet.conv_shortcut.weight[c, c] = 1
    first, second = (encoder.down_blocks[i].downsamplers[0].conv for i in (0, 1))
    for conv in (encoder.conv_in, first, second, encoder.conv_out):
        conv.weight.zero_(), conv.bias.zero_()
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
        for y in range(2):
            for x in range(2):
                first.weight[4 * c + 2 * y + x, c, y, x] = 1  # the padding is below and to the right
    code = rows.view(LATENTS, 3, 2, 2, 2, 2)  # colour, outer row, inner row, outer column, inner column
    for y in range(2):
        for x in range(2):
            second.weight[:LATENTS, :12, y, x] = code[:, :, y, :, x, :].flatten(1)
    second.bias[:LATENTS] = -(rows @ mean)
    width = encoder.conv_norm_out.num_channels
    constants = torch.full((width - LATENTS,), KEPT)
    constants[::2] *= -1
    encoder.down_blocks[2].resnets[0].conv_shortcut.bias[LATENTS:] = constants
    encoder.down_blocks[2].resnets[0].conv_shortcut.weight[LATENTS:] = 0
    spread, line = KEPT * ((width - LATENTS) / width) ** 0.5, 14.0
    encoder.conv_norm_out.weight.fill_(spread), encoder.conv_norm_out.bias.fill_(line)
    for c in range(LATENTS):
        encoder.conv_out.weight[c, c, 1, 1] = 1
        encoder.conv_out.bias[c] = -line
    encoder.conv_out.bias[LATENTS:] = -8.0  # log variance
    identity = torch.eye(2 * LATENTS)[:, :, None, None]
    model.quant_conv.weight.copy_(identity), model.quant_conv.bias.zero_()


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction(output: Tensor, pixels: Tensor) -> Tensor:
    """Absolute error of pixels and of their differences to the neighbours, which keeps outlines sharp."""
    return F.l1_loss(output, pixels) + sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(pixels), strict=True))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.05, help="largest spread of the noise on latents")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    world, model = worlds(), build()
    pool = world.drawings()
    set_encoder(model, *components(render_batch(np.random.default_rng(0), world, pool, 1024, 64)[0]))
    model.encoder.requires_grad_(False), model.quant_conv.requires_grad_(False)
    run = Run("decoder", model, options.lr, ema=0.995, shipped=stickers.MODEL / "vae" / "diffusion_pytorch_model.safetensors")
    model.save_pretrained(FURNACE / "model" / "vae")  # the encoder is ready: the denoiser's training may begin
    rng, elapsed = np.random.default_rng(run.step + 1), until(options.minutes)
    while (passed := elapsed()) < 1:
        pixels, _ = render_batch(rng, world, pool, options.batch_size, 64)
        with torch.no_grad():
            latents = model.encode(pixels).latent_dist.mode()
            latents = latents + options.noise * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
        run.update(
            {"reconstruction": reconstruction(model.decode(latents).sample, pixels)}, options.batch_size, (passed - 0.6) / 0.4
        )
        run.report()
        run.save(500)
    run.save()
    model.load_state_dict(run.average)
    measure(model, render_batch(rng, world, pool, 256, 64)[0])
    model.save_pretrained(FURNACE / "model" / "vae")


@torch.no_grad()
def measure(model: AutoencoderKL, pixels: Tensor) -> None:
    latents = model.encode(pixels).latent_dist.mode()
    error = (model.decode(latents).sample.clamp(-1, 1) - pixels).square().mean()
    print(f"PSNR {10 * torch.log10(4 / error):.2f} dB; latent spread {latents.std():.3f}, by channel {latents.std((0, 2, 3))}")


if __name__ == "__main__":
    main()

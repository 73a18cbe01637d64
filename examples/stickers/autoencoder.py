"""Stage 1: the autoencoder. `python examples/stickers/autoencoder.py [--minutes 60]`, resumable.

Its encoder is not trained: the weights of a stock AutoencoderKL are set so that it takes the principal
components of 8 x 8 pixel patches (`set_encoder`). So latents are known before anything is trained, the
denoiser can be trained at once, and the decoder beside it, now or in a later session. The decoder sees
latents with a little noise, as a denoiser leaves it.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from supply import Piece, Supply
from torch import Tensor

from customize import stickers
from customize.stickers import draw_scene
from customize.stickers.scene import SIDE, draw_factors
from recipe import FURNACE, Run, autocast, begin, scaled, stage, to_pixels, until, worlds

FACTOR = 8  # pixels of a patch's side
LATENTS, KEPT = (
    32,
    100.0,
)  # components; the constant that keeps the encoder's last normalisation from changing anything
WIDTHS = (16, 48, 64, 96)  # channels from the pixels to the latents: each level holds what is above it
PIECE = 512
WEIGHTS = stickers.MODEL / "vae" / "diffusion_pytorch_model.safetensors"


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        latent_channels=LATENTS,
        norm_num_groups=1,  # more groups would take each image's own contrast and colour away
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=SIDE,
        scaling_factor=1.0,
    )


def patches(pixels: Tensor) -> Tensor:
    """The pixels of each patch, colour by colour, (n, height, width, 192)."""
    return F.pixel_unshuffle(pixels, FACTOR).permute(0, 2, 3, 1)


def components(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (LATENTS, 192) and mean (192,) of the linear code of patches; each number's spread is the square
    root of its component's, so that fine detail is not lost in noise. Pixels are (n, 3, height, width)."""
    rows = patches(pixels).flatten(0, 2)
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    print(f"variance kept: {values.flip(0)[:LATENTS].sum() / values.sum():.4f}", flush=True)
    values, vectors = values.flip(0)[:LATENTS], vectors.flip(1)[:, :LATENTS]
    code = vectors.T / values[:, None] ** 0.25
    return code / (centred @ code.T).std(), mean


@torch.no_grad()
def set_encoder(model: AutoencoderKL, rows: Tensor, mean: Tensor) -> None:
    """Writes the linear code into the encoder's convolutions: residual branches off, three space-to-depth
    steps, and a normalisation whose statistics are those of constant channels, followed by SiLU where it is a
    straight line."""
    encoder = model.encoder
    for block in (*encoder.down_blocks, encoder.mid_block):
        for resnet in block.resnets:
            resnet.conv2.weight.zero_(), resnet.conv2.bias.zero_()
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight.zero_(), resnet.conv_shortcut.bias.zero_()
                for c in range(min(resnet.conv_shortcut.weight.shape[:2])):
                    resnet.conv_shortcut.weight[c, c] = 1
    steps = [encoder.down_blocks[i].downsamplers[0].conv for i in range(3)]
    for conv in (encoder.conv_in, *steps, encoder.conv_out):
        conv.weight.zero_(), conv.bias.zero_()
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
    for conv, channels in zip(steps[:2], (3, 12), strict=True):
        for c in range(channels):
            for y in range(2):
                for x in range(2):
                    conv.weight[4 * c + 2 * y + x, c, y, x] = 1  # the padding is below and to the right
    # colour, then the place in the patch, from halves of it to single pixels: rows, columns
    code = (
        rows.view(LATENTS, 3, 2, 2, 2, 2, 2, 2).permute(0, 1, 4, 7, 3, 6, 2, 5).flatten(1, 5)
    )  # (LATENTS, 48, 2, 2)
    steps[2].weight[: 2 * LATENTS, :48, :2, :2] = torch.cat(
        [code, -code]
    )  # what is there twice, with both signs, has no mean
    steps[2].bias[: 2 * LATENTS] = torch.cat([-(rows @ mean), rows @ mean])
    width, held = encoder.conv_norm_out.num_channels, 2 * LATENTS
    constants = torch.full((width - held,), KEPT)
    constants[::2] *= -1
    encoder.down_blocks[3].resnets[0].conv_shortcut.bias[held:] = constants
    encoder.down_blocks[3].resnets[0].conv_shortcut.weight[held:] = 0
    spread, line = KEPT * ((width - held) / width) ** 0.5, 14.0
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
    return F.l1_loss(output, pixels) + sum(
        F.l1_loss(a, b) for a, b in zip(edges(output), edges(pixels), strict=True)
    )


def images(rng: np.random.Generator, world, pool: list, count: int, spread: float = 1.0) -> Tensor:
    """Scenes of `pool`, uint8, (count, 3, SIDE, SIDE)."""
    return to_pixels(
        [draw_scene(draw_factors(rng, world, pool, spread=spread), world)[0] for _ in range(count)]
    )


def _start() -> Callable[[np.random.Generator, float], Piece]:
    world = worlds()
    pool = world.drawings()
    return lambda rng, spread: (images(rng, world, pool, PIECE, spread),)


def main():
    options = begin(stage(60, batch_size=8, lr=2e-3, threads=1))
    world, large, folder = worlds(), options.device.type != "cpu", FURNACE / "model" / "vae"
    pool = world.drawings()
    if folder.exists():  # signs of components are any machine's own: latents stay what they were
        model = AutoencoderKL.from_pretrained(folder)
    else:
        model = build()
        set_encoder(model, *components(scaled(images(np.random.default_rng(0), world, pool, 1024))))
    model.encoder.requires_grad_(False), model.quant_conv.requires_grad_(False)
    model.to(options.device)
    run = Run("decoder", model, options.lr, ema=0.995, shipped=WEIGHTS)
    model.save_pretrained(folder)  # the encoder is ready: the denoiser's training may begin
    supply = Supply(_start, run.step + 1, options.workers, options.device, kept=128 if large else 4, shows=4)
    elapsed = until(options.minutes)
    for (pixels,) in supply.batches(options.batch_size, elapsed):
        with autocast(options.device):
            output, pixels = decoded(model, scaled(pixels), 0.05)
        run.update(
            {"reconstruction": reconstruction(output.float(), pixels)}, len(pixels), (elapsed() - 0.5) / 0.5
        )
        run.report()
        run.save(500)
    supply.close()
    run.save()
    model.load_state_dict(run.average)
    model.cpu()
    measure(model, scaled(images(np.random.default_rng(5), world, pool, 256)))
    model.save_pretrained(folder)


def decoded(model: AutoencoderKL, pixels: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """The images through the autoencoder, with noise of up to this spread on the latents, and the images."""
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
        amount = noise * torch.rand(len(latents), 1, 1, 1, device=pixels.device)
        latents = latents + amount * torch.randn_like(latents)
    return model.decode(latents).sample, pixels


@torch.no_grad()
def measure(model: AutoencoderKL, pixels: Tensor) -> None:
    latents = model.encode(pixels).latent_dist.mode()
    error = (model.decode(latents).sample.clamp(-1, 1) - pixels).square().mean()
    print(
        f"PSNR {10 * torch.log10(4 / error):.2f} dB; latent spread {latents.std():.3f}, by channel "
        f"{latents.std((0, 2, 3))}"
    )


if __name__ == "__main__":
    main()

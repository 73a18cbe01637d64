"""Stage 3: the denoiser. `python examples/stickers/unet.py [--minutes 600]`, resumable. The averaged weights are what counts.

Where the processor computes in bfloat16 it is used for products; weights, optimizer and average stay float32.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from scenes import SPREAD, Encoder, Shards
from torch import Tensor

from customize.losses import contrastive_flow
from customize.stickers import MODEL
from recipe import Run, autocast, until

WEIGHTS = MODEL / "unet" / "diffusion_pytorch_model.safetensors"


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 6),  # the number of heads, in spite of its name
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=192,
    )


def schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


def spread_times(count: int) -> Tensor:
    """Random times, one in each of `count` equal intervals."""
    return ((torch.rand(()) + torch.arange(count) / count) % 1 * 1000).long()


def losses(predict: Callable, scheduler, latents: Tensor, text: Tensor, contrast: float = 0.0) -> dict[str, Tensor]:
    """The denoising loss of a batch, with contrastive flow matching if `contrast` is its weight."""
    t, noise = spread_times(len(latents)), torch.randn_like(latents)
    noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
    with autocast():
        prediction = predict(noisy.contiguous(memory_format=torch.channels_last), t, text).sample.float()
    terms = {"denoise": F.mse_loss(prediction, target)}
    if contrast:
        other = scheduler.get_velocity(latents.roll(1, 0), noise.roll(1, 0), t)
        terms["contrast"] = contrast * contrastive_flow(prediction, other).mean()
    return terms


def begin(lr: float, shipped: Path = WEIGHTS) -> Run:
    """The denoiser's run: its checkpoint, or else what ships."""
    model = build().to(memory_format=torch.channels_last)
    return Run("unet", model, lr, warmup=300, ema=0.9995, shipped=shipped)


def train(
    run: Run,
    shards: Shards,
    empty: Tensor,
    stop: Callable[[], float],
    batch_size: int = 32,
    decay: bool = False,
    compiled: bool = False,
) -> None:
    """Until `stop()`, the share of the work that is done, is 1."""
    predict, scheduler = torch.compile(run.model) if compiled else run.model, schedule()
    while shards.add(stop):
        for latents, text in shards.batches(batch_size, empty):
            run.update(losses(predict, scheduler, latents, text), len(latents), stop() if decay else 0.0)
            run.report()
            run.save(250)
            if stop() >= 1:
                break
    run.save()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to nothing over these minutes")
    parser.add_argument("--spread", type=float, default=SPREAD, help="range of poses, 1 is the whole of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="faster after two and a half minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = begin(options.lr)
    torch.manual_seed(run.step)
    empty, shards = Encoder().read([""])[0], Shards(run.step, options.spread)
    train(run, shards, empty, until(options.minutes), options.batch_size, options.decay, options.compile)
    shards.close()


if __name__ == "__main__":
    main()

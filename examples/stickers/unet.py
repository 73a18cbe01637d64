"""Stage 3: the denoiser. `python examples/stickers/unet.py [--minutes 600]`, resumable. The averaged weights
are what counts.

Where the processor computes in bfloat16 it is used for products; weights, optimizer and average stay float32.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import FACTOR, LATENTS
from diffusers import DDIMScheduler, UNet2DConditionModel
from scenes import SPREAD, Text, supply
from supply import Supply
from torch import Tensor

from customize.losses import contrastive_flow
from customize.stickers import MODEL
from customize.stickers.scene import SIDE
from recipe import Run, autocast, begin, stage, until

WEIGHTS = MODEL / "unet" / "diffusion_pytorch_model.safetensors"


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // FACTOR,
        in_channels=LATENTS,
        out_channels=LATENTS,
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


def spread_times(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random times, one in each of `count` equal intervals."""
    return ((torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1 * 1000).long()


def losses(
    predict: Callable, scheduler, latents: Tensor, text: Tensor, contrast: float = 0.0
) -> dict[str, Tensor]:
    """The denoising loss of a batch, with contrastive flow matching if `contrast` is its weight."""
    t, noise = spread_times(len(latents), latents.device), torch.randn_like(latents)
    noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
    with autocast(latents.device):
        prediction = predict(noisy.contiguous(memory_format=torch.channels_last), t, text).sample.float()
    terms = {"denoise": F.mse_loss(prediction, target)}
    if contrast:
        other = scheduler.get_velocity(latents.roll(1, 0), noise.roll(1, 0), t)
        terms["contrast"] = contrast * contrastive_flow(prediction, other).mean()
    return terms


def start(lr: float, device: torch.device | str = "cpu", shipped: Path = WEIGHTS) -> Run:
    """The denoiser's run: its checkpoint, or else what ships."""
    model = build().to(device, memory_format=torch.channels_last)
    return Run("unet", model, lr, warmup=300, ema=0.9995, shipped=shipped)


def train(
    run: Run,
    scenes: Supply,
    nothing: Tensor,
    stop: Callable[[], float],
    batch_size: int = 32,
    decay_from: float = 1.0,
    compiled: bool = False,
    contrast: float = 0.0,
    widen_to: float = 0.0,
) -> None:
    """Until `stop()`, the share of the work that is done, is 1; the learning rate falls from the share
    `decay_from` on. A tenth of the texts is replaced by `nothing`, the state of no text. Poses get as wide as
    `widen_to` in the second half."""
    predict, scheduler = torch.compile(run.model) if compiled else run.model, schedule()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(nothing.device)
    narrow = scenes.spread.value
    for latents, text in scenes.batches(batch_size, stop):
        scenes.spread.value = max(narrow, narrow + (2 * stop() - 1) * (widen_to - narrow))
        dropped = torch.rand(len(text), 1, 1, device=text.device) < 0.1
        text = torch.where(dropped, nothing, text.float())
        passed = (stop() - decay_from) / max(1 - decay_from, 1e-9)
        run.update(losses(predict, scheduler, latents.float(), text, contrast), len(latents), passed)
        run.report()
        run.save(2500 if nothing.is_cuda else 250)
    run.save()


def main():
    parser = stage(600, batch_size=32, lr=1e-3)
    parser.add_argument(
        "--decay_from", type=float, default=1.0, help="share of the time from which the rate falls"
    )
    parser.add_argument("--spread", type=float, default=SPREAD, help="range of poses, 1 is the whole of it")
    parser.add_argument(
        "--widen_to", type=float, default=0.0, help="range of poses at the end; it grows over the second half"
    )
    parser.add_argument("--contrast", type=float, default=0.0, help="weight of contrastive flow matching")
    parser.add_argument("--compile", action="store_true", help="faster after two and a half minutes")
    options = begin(parser)
    stop = until(options.minutes)
    run = start(options.lr, options.device)
    torch.manual_seed(run.step)
    text = Text(options.device)
    scenes = supply(text, run.step, options.workers, options.spread)
    choices = {"decay_from": options.decay_from, "compiled": options.compile}
    choices |= {"contrast": options.contrast, "widen_to": options.widen_to}
    train(run, scenes, text.nothing(), stop, options.batch_size, **choices)
    scenes.close()


if __name__ == "__main__":
    main()

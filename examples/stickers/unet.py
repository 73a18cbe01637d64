"""Stage 3: the denoiser. `python examples/stickers/unet.py [--minutes 600]`, resumable. The averaged weights are what counts.

Scenes are rendered and encoded in shards that are used a few times and then replaced; poses and factors widen as it learns.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from customize.stickers import MODEL, Drawing, World, draw_scene
from customize.stickers.scene import draw_caption, draw_factors
from recipe import Run, part, worlds
from text_tower import LENGTH

SHARD, SHARDS = 8192, 6  # scenes in a shard, shards kept in memory
SHARES = (0.05, 0.35, 0.6)  # of the scenes: any drawing, the core vocabulary, the classes that the benchmark draws


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


def benchmark_classes(world: World) -> list[Drawing]:
    """What pretraining may see of the classes of which one studio's drawing is held out. A CPU's hours go to these first:
    customization starts from them."""
    return [d for d in world.drawings() if world.classes[d.word]["core"] and world.classes[d.word]["held_out"]]


class Source:
    """Latents and text states of freshly rendered scenes."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.world = rng, worlds()
        self.vae = AutoencoderKL.from_pretrained(part("vae")).eval()
        self.text = CLIPTextModel.from_pretrained(part("text_encoder"), dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))
        self.pools = self.world.drawings(), self.world.drawings(core=True), benchmark_classes(self.world)
        self.empty = self.read([""])[0]
        self.shards: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def read(self, captions: list[str]) -> torch.Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        return self.text(ids).last_hidden_state.half()

    @torch.no_grad()
    def add_shard(self, images: int) -> None:
        """Replaces the oldest shard; poses reach their full range, and extra factors their full share, after 300,000 images."""
        ripe, latents, states = min(images / 300_000, 1.0), [], []
        for _ in range(SHARD // 64):
            pool = [self.pools[i] for i in self.rng.choice(len(self.pools), 64, p=SHARES)]
            scenes = [draw_factors(self.rng, self.world, p, extras=0.1 + 0.25 * ripe, spread=0.4 + 0.6 * ripe) for p in pool]
            pixels = np.stack([np.asarray(draw_scene(scene, self.world)[0]) for scene in scenes])
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append((self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor).half())
            states.append(self.read([draw_caption(self.rng, scene) for scene in scenes]))
        self.shards = [*self.shards[-SHARDS + 1 :], (torch.cat(latents), torch.cat(states))]

    def batches(self, size: int):
        """One pass over the shards in random order."""
        latents, states = (torch.cat(parts) for parts in zip(*self.shards, strict=True))
        for chosen in torch.randperm(len(latents)).split(size):
            text = states[chosen].float()
            text[torch.rand(len(text)) < 0.1] = self.empty.float()
            yield latents[chosen].float(), text


def spread_times(count: int) -> torch.Tensor:
    """Random times, one in each of `count` equal intervals."""
    return ((torch.rand(()) + torch.arange(count) / count) % 1 * 1000).long()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to nothing over these minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="a third faster after two and a half minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build().to(memory_format=torch.channels_last)
    run = Run("unet", model, options.lr, warmup=300, ema=0.999, shipped=MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(run.step)
    predict = torch.compile(model) if options.compile else model
    source, scheduler = Source(np.random.default_rng(run.step)), schedule()
    begin = time.time()
    passed = 0.0
    while passed < 1:
        source.add_shard(run.images)
        for latents, text in source.batches(options.batch_size):
            t, noise = spread_times(len(latents)), torch.randn_like(latents)
            noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            loss = F.mse_loss(predict(noisy, t, text).sample, target)
            run.update({"denoise": loss}, len(latents), passed if options.decay else 0.0)
            run.report()
            run.save(250)
            passed = (time.time() - begin) / 60 / options.minutes
            if passed >= 1:
                break
    run.save()


if __name__ == "__main__":
    main()

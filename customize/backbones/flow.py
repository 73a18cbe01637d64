"""Rectified-flow models: what all but Stable Diffusion 1.x, 2.x and XL share."""

import math
from typing import Literal

import torch
from torch import Tensor

from customize.backbones.base import Backbone, unsupported

TimestepSampling = Literal["uniform", "logit_normal", "shifted"]


class Flow(Backbone):
    """Rectified flow: straight lines from data at 0 to noise at 1, predicting their velocity."""

    denoiser_name = "transformer"
    call_arguments = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    text_length = 256
    timestep_sampling: TimestepSampling = "uniform"  # as the family's official training script draws times
    timestep_shift = 0.0  # of drawn times; 0: the scheduler's

    def __init__(self, pipe, name=""):
        super().__init__(pipe, name)
        scheduler, config = pipe.scheduler, pipe.scheduler.config
        is_flow = "shift" in config and not hasattr(scheduler, "alphas_cumprod")
        if not (is_flow or config.get("use_flow_sigmas")) or config.get("invert_sigmas"):
            raise unsupported(
                f"its scheduler is a {type(scheduler).__name__}, not one of flow from noise to data"
            )
        self.text_length = min(
            [self.text_length, *(tokenizer.model_max_length for tokenizer in self.tokenizers[-1:])]
        )

    def text_lengths(self) -> list[int]:
        return [*super().text_lengths()[:-1], self.text_length]

    def _configure_times(self, sampling: str, shift: float) -> None:
        if sampling != "auto":
            self.timestep_sampling = sampling  # type: ignore[assignment]
        self.timestep_shift = shift

    def draw_times(self, n: int) -> Tensor:
        """Times by `timestep_sampling`: `uniform`, or `logit_normal` (Esser et al., 2024, arXiv 2403.03206,
        section 3.1), both under the scheduler's own static shift; `shifted` is uniform under the shift that
        the pipeline draws with, which may depend on the image's size."""
        u = torch.rand(n, device=self.device)
        t = torch.special.ndtri(u).sigmoid() if self.timestep_sampling == "logit_normal" else u
        shift = self.timestep_shift or self._shift()
        return shift * t / (1 + (shift - 1) * t)

    def _shift(self) -> float:
        """The factor s of t -> s t / (1 + (s - 1) t)."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.get("shift", 1.0)
        return math.exp(self.dynamic_shift()) if self.timestep_sampling == "shifted" else 1.0

    def dynamic_shift(self) -> float:
        """mu of the pipeline's schedule for images of this run's resolution."""
        config, tokens = self.pipe.scheduler.config, (self.resolution // self.factor) ** 2
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (tokens - least) / (most - least)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return latents.lerp(noise, t.view(-1, 1, 1, 1)), noise - latents

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t.view(-1, 1, 1, 1) * prediction

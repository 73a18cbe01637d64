"""Rectified-flow models: what Stable Diffusion 3 and Flux share."""

import torch
from torch import Tensor

from customize.backbones.base import Backbone, unsupported


class Flow(Backbone):
    """Rectified flow: straight lines from data at 0 to noise at 1, predicting their velocity."""

    denoiser_name = "transformer"
    call_arguments = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    text_length = 256

    def __init__(self, pipe, name=""):
        super().__init__(pipe, name)
        scheduler, config = pipe.scheduler, pipe.scheduler.config
        if hasattr(scheduler, "alphas_cumprod") or "shift" not in config or config.get("invert_sigmas"):
            raise unsupported(
                f"its scheduler is a {type(scheduler).__name__}, not one of flow from noise to data"
            )
        self.text_length = min(
            [self.text_length, *(tokenizer.model_max_length for tokenizer in self.tokenizers[-1:])]
        )

    def text_lengths(self) -> list[int]:
        return [*super().text_lengths()[:-1], self.text_length]

    def draw_times(self, n: int) -> Tensor:
        """Logit-normal (Esser et al., 2024, arXiv 2403.03206, section 3.1), under the scheduler's own
        shift."""
        t = torch.sigmoid(torch.randn(n, device=self.device))
        config = self.pipe.scheduler.config
        shift = 1.0 if config.get("use_dynamic_shifting") else config.shift
        return shift * t / (1 + (shift - 1) * t)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return latents.lerp(noise, t.view(-1, 1, 1, 1)), noise - latents

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t.view(-1, 1, 1, 1) * prediction

"""Rectified-flow models: what all but Stable Diffusion 1.x, 2.x and XL share."""

import math

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

    def draw_times(self, n: int) -> Tensor:
        """Under the scheduler's static shift, as in the official scripts."""
        t, shift = super().draw_times(n), self.timestep_shift or self._shift()
        return shift * t / (1 + (shift - 1) * t)

    @property
    def shifts_by_size(self) -> bool:
        moves = self.timestep_sampling == "shifted" and not self.timestep_shift
        return moves and bool(self.pipe.scheduler.config.get("use_dynamic_shifting"))

    def _shift(self) -> float:
        """The factor s of t -> s t / (1 + (s - 1) t)."""
        config = self.pipe.scheduler.config
        as_drawn = self.timestep_sampling == "shifted"
        if config.get("use_dynamic_shifting"):
            return math.exp(self.dynamic_shift()) if as_drawn else 1.0
        return config.get("shift") or (config.get("flow_shift", 1.0) if as_drawn else 1.0)

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

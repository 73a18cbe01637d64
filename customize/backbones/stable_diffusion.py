"""Stable Diffusion 1.x, 2.x and XL: DDPM models with a UNet."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from customize.backbones.base import Backbone, Condition, unsupported
from customize.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")  # what DDPM models may be trained to predict


class DDPM(Backbone):
    """Discrete times, predicting the noise or the velocity."""

    def __init__(self, pipe, name=""):
        super().__init__(pipe, name)
        config = pipe.scheduler.config
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise unsupported(f"its scheduler is a {type(pipe.scheduler).__name__}, which knows no betas")
        if config.get("prediction_type", "epsilon") not in PREDICTIONS:
            raise unsupported(
                f"its prediction_type is '{config.prediction_type}', not one of {', '.join(PREDICTIONS)}"
            )
        # the pipeline's sampler may add noise in its own way (Euler does) or know no velocity (PNDM)
        self.noise = DDPMScheduler.from_config(config)

    def configure(self, *args, **options) -> None:
        super().configure(*args, **options)
        if self.timestep_sampling == "shifted" or self.timestep_shift:
            raise UserError(
                "--timestep_shift and --timestep_sampling shifted are for flow models (SD 3, Flux and "
                "later); leave them out here."
            )

    def draw_times(self, n: int) -> Tensor:
        if self.timestep_sampling == "uniform":
            return torch.randint(self.steps, (n,), device=self.device) / self.steps
        return self.nearest_times(super().draw_times(n))

    @property
    def steps(self) -> int:
        """How many times the model was trained at."""
        return self.noise.config.num_train_timesteps

    def index_of(self, t: Tensor) -> Tensor:
        """Times in [0, 1] to the model's own, 0 to `steps` - 1."""
        return (
            (t * self.steps + 1e-3).long().clamp(max=self.steps - 1)
        )  # k / steps * steps may lie just below k

    def nearest_times(self, t: Tensor) -> Tensor:
        return self.index_of(t) / self.steps

    @property
    def predicts_velocity(self) -> bool:
        return self.noise.config.prediction_type == "v_prediction"

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        index = self.index_of(t)
        target = self.noise.get_velocity(latents, noise, index) if self.predicts_velocity else noise
        return self.noise.add_noise(latents, noise, index), target

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        arguments = {"cross_attention_kwargs": condition.attention_arguments}
        return self.denoiser(
            noisy, self.index_of(t), **self._text_arguments(noisy, condition), **arguments
        ).sample

    def _text_arguments(self, noisy: Tensor, condition: Condition) -> dict:
        return condition.text

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        alpha = self.noise.alphas_cumprod.to(noisy)[self.index_of(t)].view(-1, 1, 1, 1)
        if self.predicts_velocity:
            return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()

    def snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        snr = compute_snr(self.noise, self.index_of(t))
        return snr.clamp(max=gamma) / (snr + 1 if self.predicts_velocity else snr)


class SD(DDPM):
    """Stable Diffusion 1.x and 2.x."""

    call_arguments = {"encoder_hidden_states": "prompt_embeds"}
    kohya_prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}

    def _encode_prompt(self, prompts):
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}


class SDXL(DDPM):
    """Stable Diffusion XL."""

    call_arguments = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    kohya_prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

    def _encode_prompt(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def _text_arguments(self, noisy, condition):
        """The text, and SDXL's size conditioning (arXiv 2307.01952, section 2.2): original size, crop and
        target size; without `sizes`, those of an image of this size that was not cropped."""
        text, size = condition.text, [side * self.pipe.vae_scale_factor for side in noisy.shape[-2:]]
        target = torch.tensor([size], device=noisy.device).expand(len(noisy), -1)
        whole = torch.cat([target, torch.zeros_like(target)], 1)
        sizes = whole if condition.sizes is None else condition.sizes.to(noisy.device)
        ids = torch.cat([sizes, target], 1)
        added = {"text_embeds": text["text_embeds"], "time_ids": ids}
        return {"encoder_hidden_states": text["encoder_hidden_states"], "added_cond_kwargs": added}

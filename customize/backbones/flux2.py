"""Flux.2: dev, and Klein."""

from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from customize.backbones.base import Condition, unsupported
from customize.backbones.flow import Flow
from customize.backbones.layers import ATTENTION, presets
from customize.errors import UserError


class Flux2(Flow):
    """Latents are patches of two by two, normalised by the autoencoder's batch statistics."""

    guidance_scale = 1.0  # that the guidance-distilled dev is given in training
    needs_chat_template = True
    takes_negative_prompt = False
    takes_references = 10
    text_length = 512
    embedding_names = ("mistral3",)
    packing = 2
    samples_posterior = False
    lora_presets = presets(
        [*ATTENTION, "to_qkv_mlp_proj", "to_out"],
        ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"],
    )

    @property
    def takes_guidance(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    def configure(self, guidance_scale=1.0, max_sequence_length=0, *times: Any, **named: Any) -> None:
        if max_sequence_length not in (0, self.text_length):
            raise UserError(
                "--max_sequence_length: Flux.2 also attends to the padding of its prompts, which must have "
                f"{self.text_length} tokens as in its pipeline; leave it out."
            )
        super().configure(guidance_scale, max_sequence_length, *times, **named)

    def _check_latents(self) -> None:
        packed = 4 * self.vae.config.latent_channels
        if self.latent_channels != packed:
            raise unsupported(
                f"the denoiser takes {self.latent_channels} channels, the autoencoder's patches have {packed}"
            )

    def latent_shape(self, side: int) -> tuple[int, int, int, int]:
        return 1, self.latent_channels, side // self.factor, side // self.factor

    def _posterior(self, pixels):
        mean, std = super()._posterior(pixels)
        return self.pipe._patchify_latents(mean), self.pipe._patchify_latents(std)

    def _normalised(self, latents):
        norm = self.vae.bn
        mean, variance = (own.view(1, -1, 1, 1).to(latents) for own in (norm.running_mean, norm.running_var))
        return (latents - mean) / torch.sqrt(variance + self.vae.config.batch_norm_eps)

    def _encode_prompt(self, prompts):
        embeds, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_length)
        return {"encoder_hidden_states": embeds}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        text, references = condition.text["encoder_hidden_states"], condition.shown
        packed = torch.cat([self.pipe._pack_latents(own) for own in (noisy, *references)], 1)
        ids = [self.pipe._prepare_latent_ids(noisy)]
        if references:
            shown = self.pipe._prepare_image_ids([own[:1] for own in references])
            ids.append(shown.expand(len(noisy), -1, -1))
        arguments = {
            "img_ids": torch.cat(ids, 1).to(noisy.device),
            "txt_ids": self.pipe._prepare_text_ids(text).to(noisy.device),
            "guidance": torch.full_like(t, self.guidance_scale) if self.takes_guidance else None,
            "joint_attention_kwargs": condition.attention_arguments,
        }
        velocity = self.denoiser(packed, timestep=t, encoder_hidden_states=text, **arguments).sample
        return velocity[:, : noisy[0, 0].numel()].mT.unflatten(2, noisy.shape[2:])

    def dynamic_shift(self) -> float:
        return compute_empirical_mu((self.resolution // self.factor) ** 2, num_steps=50)


class Flux2Klein(Flux2):
    """Klein has no guidance input; its base models use classifier-free guidance."""

    embedding_names = ("qwen3",)

    @property
    def takes_negative_prompt(self) -> bool:  # type: ignore[override]
        return not self.pipe.config.is_distilled

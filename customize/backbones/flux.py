"""Flux.1."""

import torch
from torch import Tensor

from customize.backbones.base import Condition
from customize.backbones.flow import Flow


class Flux(Flow):
    guidance_scale = 1.0  # that the guidance-distilled model is given in training
    takes_negative_prompt = False
    text_length = 512
    embedding_names = ("clip_l", "t5")

    @property
    def takes_guidance(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    @property
    def factor(self) -> int:
        return 2 * self.pipe.vae_scale_factor  # latents are packed two by two

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def _encode_prompt(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        b, c, h, w = noisy.shape
        guidance = torch.full_like(t, self.guidance_scale) if self.takes_guidance else None
        ids = {
            "img_ids": self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, noisy.dtype),
            "txt_ids": torch.zeros(
                condition.text["encoder_hidden_states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype
            ),
        }
        arguments = {"joint_attention_kwargs": condition.attention_arguments, "guidance": guidance, **ids}
        packed = self.pipe._pack_latents(noisy, b, c, h, w)
        velocity = self.denoiser(packed, timestep=t, **condition.text, **arguments).sample
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, h * scale, w * scale, scale)

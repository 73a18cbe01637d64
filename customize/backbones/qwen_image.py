"""Qwen-Image, Qwen-Image-Edit-Plus, and Krea 2, which has their autoencoder."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image
from torch import Tensor

from customize.backbones.base import Condition, joined, unsupported
from customize.backbones.flow import Flow
from customize.backbones.layers import ATTENTION, presets
from customize.errors import UserError


class VideoLatents(Flow):
    """A video autoencoder, which is given one frame; latents are normalised by channel."""

    packing = 2
    text_length = 512

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def _check_latents(self) -> None:
        if self.latent_channels != self.vae.config.z_dim:
            raise unsupported(
                f"the denoiser takes {self.latent_channels} channels, the autoencoder gives "
                f"{self.vae.config.z_dim}"
            )

    def _posterior(self, pixels):
        mean, std = super()._posterior(pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def _normalised(self, latents):
        config = self.vae.config
        mean, std = (
            torch.tensor(own).view(1, -1, 1, 1).to(latents)
            for own in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std


class QwenImage(VideoLatents):
    guidance_name = "true_cfg_scale"
    empty_prompt = " "
    embedding_names = ("qwen25vl",)
    call_arguments = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_hidden_states_mask": "prompt_embeds_mask",
    }
    lora_presets = presets(
        ATTENTION,
        ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"],
        ["img_mod.1", "txt_mod.1"],
    )

    @property
    def unused_layers(self) -> set[str]:
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        names = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return {f"{last}.{name}" for name in names}

    def _encode_prompt(self, prompts):
        return self._encoded(prompts, max_sequence_length=self.text_length)

    def _encoded(self, prompts: list[str], **options: Any) -> dict[str, Tensor]:
        """What the pipeline makes of the prompts, with a mask also where it leaves it out."""
        embeds, mask = self.pipe.encode_prompt(prompts, device=self.device, **options)
        whole = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": whole if mask is None else mask,
        }

    @classmethod
    def call_options(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Guidance needs a negative prompt, which may say nothing."""
        told = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        if told or arguments.get("true_cfg_scale", 4.0) <= 1:
            return {}
        prompt = arguments.get("prompt")
        empty = cls.empty_prompt
        return {"negative_prompt": [empty] * len(prompt) if isinstance(prompt, list) else empty}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        b, _, h, w = noisy.shape
        mask, images = condition.text["encoder_hidden_states_mask"], [noisy, *condition.shown]
        arguments = {
            "encoder_hidden_states": condition.text["encoder_hidden_states"],
            "encoder_hidden_states_mask": None if mask.all() else mask,  # as the pipeline gives it
            "img_shapes": [[(1, own.shape[2] // 2, own.shape[3] // 2) for own in images]] * b,
        }
        packed = torch.cat([self.pipe._pack_latents(own.contiguous(), *own.shape) for own in images], 1)
        velocity = self.denoiser(packed, timestep=t, **arguments).sample[:, : h * w // 4]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, h * scale, w * scale, scale).squeeze(2)


class QwenImageEditPlus(QwenImage):
    """Qwen-Image-Edit-Plus, which is always shown images. Its language model sees them too, so the
    embeddings of a prompt depend on them and are never cached."""

    takes_references = 3  # as many as its authors recommend
    needs_references = True
    reference_resolution = 1024
    text_length = 1024

    def configure(self, guidance_scale=1.0, max_sequence_length=0, *times: Any, **named: Any) -> None:
        if max_sequence_length:
            raise UserError(
                "--max_sequence_length: Qwen-Image-Edit-Plus reads prompts of any length; leave it out."
            )
        super().configure(guidance_scale, 0, *times, **named)

    @property
    def reference_factor(self) -> int:
        """The pipeline rounds the sides of references to multiples of 32 pixels."""
        return math.lcm(self.factor, 32)

    def _encode_prompt(self, prompts):
        raise UserError(
            "Qwen-Image-Edit-Plus reads each prompt together with images: train it with in_context, and draw "
            "with images of the subject (--subject_images)."
        )

    def encode_prompt_with_references(self, prompts: list[str], pixels: Tensor) -> dict[str, Tensor]:
        """One by one, as the pipeline takes one prompt at a time."""
        pairs = zip(prompts, pixels, strict=True)
        return joined([self._encoded([prompt], image=self._as_read(shown)) for prompt, shown in pairs])

    def _as_read(self, pixels: Tensor) -> list[Image.Image]:
        """References (count, 3, height, width) in [-1, 1] as the pipeline gives them to the language
        model."""
        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, pixels.shape[3] / pixels.shape[2])
        processor = self.pipe.image_processor
        return [processor.resize(image, height, width) for image in processor.postprocess(pixels)]


class Krea2(VideoLatents):
    """Krea 2; its text is the states of several layers of the encoder."""

    embedding_names = ("qwen3vl",)
    call_arguments = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_embeds_mask",
    }
    lora_presets = presets(["to_q", "to_k", "to_v", "to_out.0", "to_gate"], ["ff.up", "ff.down", "ff.gate"])

    def _encode_prompt(self, prompts):
        embeds, mask = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        b, c, h, w = noisy.shape
        length = condition.text["encoder_hidden_states"].shape[1]
        ids = self.pipe.prepare_position_ids(length, h // 2, w // 2, noisy.device)
        packed = self.pipe._pack_latents(noisy, b, c, h, w)
        velocity = self.denoiser(packed, timestep=t, position_ids=ids, **condition.text).sample
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, h * scale, w * scale).squeeze(2)

    def dynamic_shift(self) -> float:
        return 1.15 if self.pipe.config.is_distilled else super().dynamic_shift()

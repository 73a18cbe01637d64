"""Sana, and Lumina 2: both read their prompts by Gemma 2."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from customize.backbones.base import Condition
from customize.backbones.flow import Flow
from customize.backbones.layers import presets

TEXT = ("encoder_hidden_states", "encoder_attention_mask")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class GemmaText(Flow):
    """Prompts get an instruction in front of them, the pipeline's own negative prompt does not."""

    embedding_names = ("gemma2",)
    call_arguments = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }

    @property
    def _text_options(self) -> dict[str, Any]:
        return {"device": self.device, "max_sequence_length": self.text_length}

    def _encode_prompt(self, prompts):
        found = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **self._text_options)
        return dict(zip(TEXT, found[:2], strict=True))

    def _encode_negative(self):
        found = self.pipe.encode_prompt([""], do_classifier_free_guidance=True, **self._text_options)
        return dict(zip(TEXT, found[2:4], strict=True))


class Sana(GemmaText):
    """Sana; its autoencoder has no posterior, and a factor of 32."""

    text_length = 300
    lora_presets = presets(ATTENTION, ["ff.conv_inverted", "ff.conv_point"])

    @property
    def _text_options(self):
        """With the instruction that the pipeline's call uses, which `encode_prompt` alone leaves out."""
        call = inspect.signature(type(self.pipe).__call__).parameters
        return super()._text_options | {
            "complex_human_instruction": call["complex_human_instruction"].default
        }

    @classmethod
    def call_options(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Without the first, every image is drawn at about 1024 pixels; embeddings exclude a prompt."""
        embedded = {"negative_prompt": None} if "prompt_embeds" in arguments else {}
        return {"use_resolution_binning": False} | embedded

    def _posterior(self, pixels):
        latents = self.vae.encode(pixels).latent
        return latents, torch.zeros_like(latents)

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = 1000 * t * self.denoiser.config.timestep_scale
        return self.denoiser(noisy, timestep=time, **condition.text).sample


class Lumina2(GemmaText):
    """Time runs from noise at 0 to data at 1 inside the model, which predicts the way to the data."""

    text_length = 256
    lora_presets = presets(
        ATTENTION, ["feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"]
    )

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return -self.denoiser(noisy, timestep=1 - t, **condition.text).sample

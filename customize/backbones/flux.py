"""Flux.1, its Kontext, and Chroma."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from customize.backbones.base import Condition
from customize.backbones.flow import Flow


class Flux(Flow):
    guidance_scale = 1.0  # that the guidance-distilled model is given in training
    takes_negative_prompt = False
    text_length = 512
    embedding_names: tuple[str, ...] = ("clip_l", "t5")
    packing = 2

    @property
    def takes_guidance(self) -> bool:
        return bool(self.denoiser.config.get("guidance_embeds"))

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def _encode_prompt(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        _, _, h, w = noisy.shape
        arguments = self._arguments(noisy, t, condition.text)
        arguments |= {"joint_attention_kwargs": condition.attention_arguments}
        packed = self.pipe._pack_latents(noisy, *noisy.shape)
        if condition.references is not None:
            packed, arguments = self._with_references(packed, condition.references, arguments)
        velocity = self.denoiser(packed, timestep=t, **arguments).sample[:, : h * w // 4]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, h * scale, w * scale, scale)

    def _with_references(self, packed: Tensor, references: Tensor, arguments: dict) -> tuple[Tensor, dict]:
        raise NotImplementedError

    def _arguments(self, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> dict[str, Any]:
        """The denoiser's arguments beside latents and times."""
        b, _, h, w = noisy.shape
        place: dict[str, Any] = {"device": noisy.device, "dtype": noisy.dtype}
        ids = {
            "img_ids": self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, **place),
            "txt_ids": torch.zeros(text["encoder_hidden_states"].shape[1], 3, **place),
        }
        guidance = {"guidance": torch.full_like(t, self.guidance_scale)} if self.takes_guidance else {}
        return text | ids | guidance


class FluxKontext(Flux):
    """Flux.1 Kontext, which may be shown an image; `samples_posterior` as in its script."""

    samples_posterior = False
    takes_references = 1

    def _with_references(self, packed, references, arguments):
        """The image's tokens follow the noisy ones; their first coordinate is 1."""
        [shown] = references.unbind(1)
        b, _, h, w = shown.shape
        ids = self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, shown.device, shown.dtype)
        ids[..., 0] = 1
        packed = torch.cat([packed, self.pipe._pack_latents(shown, *shown.shape)], 1)
        return packed, arguments | {"img_ids": torch.cat([arguments["img_ids"], ids])}

    @classmethod
    def call_options(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Without these, every image is drawn at one megapixel."""
        height, width = (arguments.get(side) or 1024 for side in ("height", "width"))
        return {"max_area": height * width, "_auto_resize": False}


class Chroma(Flux):
    """Chroma: Flux.1 without CLIP and with classifier-free guidance. The mask of its text keeps one padding
    token."""

    takes_negative_prompt = True
    embedding_names = ("t5",)
    call_arguments = {"encoder_hidden_states": "prompt_embeds", "attention_mask": "prompt_attention_mask"}

    def _encode_prompt(self, prompts):
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": embeds, "attention_mask": mask}

    def _arguments(self, noisy, t, text):
        b, _, h, w = noisy.shape
        mask = text["attention_mask"]
        longer = self.pipe._prepare_attention_mask(b, h * w // 4, mask.dtype, mask)
        return super()._arguments(noisy, t, text) | {"attention_mask": longer}

    def enable_gradient_checkpointing(self, checkpoint: Callable | None = None) -> None:
        """diffusers' checkpointed call leaves the mask out of the single blocks, which changes the gradients:
        here it is bound to each of them."""
        super().enable_gradient_checkpointing(checkpoint)
        denoiser, stock = self.denoiser, self.denoiser._gradient_checkpointing_func
        singles, current = {*denoiser.single_transformer_blocks}, {}

        def remember(module: Any, args: tuple, kwargs: dict) -> None:
            current["attention_mask"] = kwargs["attention_mask"]

        def checkpointed(block: Any, *args: Any) -> Any:
            return stock(partial(block, **current) if block in singles else block, *args)

        denoiser.register_forward_pre_hook(remember, with_kwargs=True)
        denoiser._gradient_checkpointing_func = checkpointed

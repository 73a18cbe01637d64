"""The encoder of a reference UNet: what the denoiser itself makes of references (Face Fusion, arXiv
2409.19111).

Choices of this project: references are read with the empty prompt, and not noised unless that is asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from customize.adapters.attention import text_layers

Join = Literal["self", "cross"]
ReferenceNoise = Literal["none", "current"]
ATTENTION = {"self": "attn1", "cross": "attn2"}


@dataclass
class ReferenceStates:
    """What the UNet makes of references; one subject in each row."""

    states: dict[str, Tensor]  # by layer: (rows, references, pixels, width)
    mask: Tensor  # (rows, references, height, width): how far each shows the subject

    def spread(self, present: Tensor) -> "ReferenceStates":
        """Rows of the subjects that exist, placed among all (samples * subjects), zeros elsewhere; `present`
        (samples, subjects) says which exist."""

        def among_others(value: Tensor) -> Tensor:
            full = value.new_zeros(present.numel(), *value.shape[1:])
            full[present.flatten()] = value
            return full

        states = {name: among_others(value) for name, value in self.states.items()}
        return ReferenceStates(states, among_others(self.mask))


class ReferenceEncoder(nn.Module):
    """Features of references, which are latents with their mask as the last channel, (batch, references,
    pixels, channels + 1), to `ReferenceStates`. It owns no weights: it reads with the pipeline's UNet."""

    has_blank = False
    unet: Any
    text: Tensor
    pooled: Tensor | None

    def __init__(self, pipe: Any, join: Join, noise: ReferenceNoise):
        super().__init__()
        object.__setattr__(self, "unet", pipe.unet)  # past nn.Module: its weights are the pipeline's
        self.names = [name.replace("attn2", ATTENTION[join]) for name in text_layers(pipe.unet).values()]
        self.depends_on_step = noise == "current"
        self.factor = pipe.vae_scale_factor
        self.alphas = pipe.scheduler.alphas_cumprod.clone()  # not a buffer: half precision is too coarse
        with torch.no_grad():
            about = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            text = pipe.encode_prompt("", device=pipe.unet.device, **about)
        self.register_buffer("text", text[0].detach(), persistent=False)
        pooled = text[2].detach() if len(text) > 2 else None
        self.register_buffer("pooled", pooled, persistent=False)

    @property
    def feature_dim(self) -> int:
        """Width of the features that it reads."""
        return self.unet.config.in_channels + 1

    def features(self, latents: Tensor, mask: Tensor) -> Tensor:
        """Normalised latents (n, channels, height, width) and masks (n, 1, ...) at any size as features."""
        small = F.interpolate(mask, latents.shape[-2:], mode="area").to(latents)
        return torch.cat([latents, small], 1).flatten(2).transpose(1, 2)

    def bin_of(self, t: Tensor) -> Tensor:
        """Times in [0, 1] to the model's own, where the references are noised; else 0."""
        return (t * len(self.alphas) + 1e-3).long().clamp(max=len(self.alphas) - 1) * self.depends_on_step

    def middle_of(self, bins: Tensor) -> Tensor:
        return bins / len(self.alphas)

    def forward(self, features: Tensor, present: Tensor, t: Tensor) -> ReferenceStates:
        """`present` (batch, references) is False where one is padding; `t` (batch,) runs from 0, data, to 1,
        noise. Gradients end here, as the UNet is frozen."""
        side = round(features.shape[2] ** 0.5)
        images = features.flatten(0, 1).transpose(1, 2).unflatten(-1, (side, side))
        index = self.bin_of(t).repeat_interleave(present.shape[1])
        states = self.read(self.noised(images[:, :-1], index), index)
        mask = images[:, -1].unflatten(0, present.shape) * present[..., None, None]
        return ReferenceStates({k: v.unflatten(0, present.shape) for k, v in states.items()}, mask)

    def noised(self, latents: Tensor, index: Tensor) -> Tensor:
        """The latents at times `index`, if references are noised; when drawing, always by the same noise."""
        if not self.depends_on_step:
            return latents
        fixed = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
        noise = torch.randn_like(latents) if self.training else fixed.to(latents).expand_as(latents)
        alpha = self.alphas.to(index.device)[index].view(-1, 1, 1, 1).to(latents.dtype)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    @torch.no_grad()
    def read(self, latents: Tensor, index: Tensor) -> dict[str, Tensor]:
        """The states (n, pixels, width) that enter each of its layers for latents at times `index` (n,)."""
        count, side = len(latents), latents.shape[-1] * self.factor
        dtype, added = self.unet.dtype, None
        if self.pooled is not None:  # SDXL's size: of an image that was not cropped
            ids = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device, dtype=dtype)
            pooled = self.pooled.expand(count, -1).to(dtype)
            added = {"text_embeds": pooled, "time_ids": ids.expand(count, -1)}
        text = self.text.expand(count, -1, -1).to(dtype)
        with inputs_kept(self.unet, self.names) as kept:
            # past the hooks of the call, which may be a subject pipeline's own
            self.unet.forward(latents.to(dtype), index, text, added_cond_kwargs=added)
        return kept


@contextmanager
def inputs_kept(unet: UNet2DConditionModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Context in which a run of the UNet leaves the input of each named layer."""
    kept: dict[str, Tensor] = {}
    handles = [
        unet.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: kept.update({name: args[0]})
        )
        for name in names
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()

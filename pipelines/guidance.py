"""Attention at inference: maps of words as images, and guidance that holds the things of a prompt apart.

    with word_maps(pipe, "a fox next to a bus", ["fox", "bus"]) as maps:
        image = pipe("a fox next to a bus").images[0]
    maps["fox"][0].show()

    guidance = AttentionGuidance(pipe, "a red fox next to a blue bus", ["red fox", "blue bus"])
    pipe("a red fox next to a blue bus", **guidance.arguments)

Both work on stock Stable Diffusion and SDXL pipelines, on ours with subjects, and with LoRA and learned
words; the maps also on Stable Diffusion 3 and Flux.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from customize.attention_maps import AttentionRecorder, recorded_layers, word_positions
from customize.errors import UserError
from customize.losses.attention import attend_and_excite, attention_contrast

SCALE = 2.0**8  # of the loss, so that gradients in half precision are not rounded to zero
SIDE = 16  # of the maps that show objects best: small ones are coarse, large ones show texture
Kind = Literal["conform", "attend_and_excite"]


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    """The UNet or transformer of a pipeline."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


@contextmanager
def word_maps(
    pipe: DiffusionPipeline, prompts: str | Sequence[str], words: Sequence[str]
) -> Iterator[dict[str, list[Image.Image]]]:
    """Context in which a call of the pipeline with these prompts leaves, for each word, one gray image
    for each image drawn: its attention map, mean over steps and layers, white at its maximum.

    UserError if a prompt does not hold a word, or the model's attention cannot be read.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    denoiser, found = denoiser_of(pipe), dict[str, list[Image.Image]]()
    positions: dict[str, list[list[int]]] = {}
    sums: dict[str, Any] = dict.fromkeys(words, 0.0)

    def add(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.is_grad_enabled():  # attention guidance looks ahead
            return
        if not positions:  # only now the tokenizers know subjects' words
            positions.update({w: [word_positions(pipe, text, w) for text in texts] for w in words})
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        assert sample is not None
        guided = len(sample) % (2 * len(texts)) == 0 and _is_guided(pipe)
        images = len(sample) // (2 if guided else 1)
        for word in words:
            own = [places for places in positions[word] for _ in range(images // len(texts))]
            sums[word] = sums[word] + recorder.mean(own).detach().float().cpu()

    recorder = AttentionRecorder(denoiser, side=SIDE)
    with recorder, torch.no_grad():
        handle = denoiser.register_forward_hook(add, with_kwargs=True)
        try:
            yield found
        finally:
            handle.remove()
    found |= {word: [as_image(one) for one in total] for word, total in sums.items() if positions}


def _is_guided(pipe: Any) -> bool:
    return bool(getattr(pipe, "do_classifier_free_guidance", False))


def as_image(heat: Tensor) -> Image.Image:
    """A map (height, width) as a gray image, white at its maximum."""
    scaled = heat / heat.max().clamp(min=1e-12)
    return Image.fromarray((scaled * 255).round().to(torch.uint8).numpy())


def overlay(image: Image.Image, heat: Image.Image) -> Image.Image:
    """The image, dark where the word is not attended to."""
    bright = heat.resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.75), bright)


class AttentionGuidance:
    """A callback that moves the latents after each step, so that the things of a prompt are held apart.

    `groups` are phrases of the prompt, a thing and its attributes each ("red fox"). `kind` is "conform",
    a contrast of attention maps (Meral et al., 2024, arXiv 2312.06059), or "attend_and_excite", which
    raises the map of the least attended group (Chefer et al., 2023, arXiv 2301.13826). The latents move
    by the share `strength` of their norm in each step, which falls to half of it, in the first `until` of
    the steps. For one prompt; UserError if it does not hold a group, or the pipeline has no UNet.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompt: str,
        groups: Sequence[str],
        kind: Kind = "conform",
        strength: float = 0.01,
        until: float = 0.5,
    ):
        if not isinstance(denoiser_of(pipe), UNet2DConditionModel):
            raise UserError("attention guidance is for Stable Diffusion 1.x, 2.x and XL; leave it out here.")
        if len(groups) < 2:
            raise UserError("attention guidance holds two or more groups of words apart; name as many.")
        if kind not in ("conform", "attend_and_excite"):
            raise UserError(f"attention guidance: there is no '{kind}'; choose conform or attend_and_excite.")
        recorded_layers(denoiser_of(pipe))
        self.pipe, self.prompt, self.groups, self.kind = pipe, prompt, list(groups), kind
        self.strength, self.until = strength, until
        self.previous: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        names = ["latents", "prompt_embeds"]
        if hasattr(self.pipe, "text_encoder_2"):
            names += ["add_text_embeds", "add_time_ids"]
        return {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": names}

    def __call__(self, pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        times = pipe.scheduler.timesteps
        share = (step + 1) / len(times)
        if step == 0:
            self.previous = None
        if share >= self.until or step + 1 >= len(times):
            return {}
        latents = tensors["latents"].detach()
        with torch.enable_grad():
            moved = latents.clone().requires_grad_()
            loss = self.loss(pipe, moved, times[step + 1], tensors)
            [gradient] = torch.autograd.grad(SCALE * loss, moved)
        return {"latents": moved_against(latents, gradient, self.strength * (1 - 0.5 * share))}

    def loss(self, pipe: Any, latents: Tensor, time: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The loss at latents (images, channels, height, width) and the next time, summed over images."""
        images = len(latents)
        positions = [word_positions(pipe, self.prompt, group) for group in self.groups]
        flat = [place for own in positions for place in own]
        labels = torch.tensor([i for i, own in enumerate(positions) for _ in own], device=latents.device)
        text = tensors["prompt_embeds"][-images:].detach()
        added: dict[str, Any] = {}
        if "add_text_embeds" in tensors:
            pooled, ids = tensors["add_text_embeds"], tensors["add_time_ids"]
            added["added_cond_kwargs"] = {
                "text_embeds": pooled[-images:].detach(),
                "time_ids": ids[-images:].detach(),
            }
        with AttentionRecorder(pipe.unet, side=SIDE) as recorder:
            pipe.unet(
                pipe.scheduler.scale_model_input(latents, time), time, encoder_hidden_states=text, **added
            )
            maps = [recorder.of_tokens(flat, i - images) for i in range(images)]
        if self.kind == "attend_and_excite":
            groups = [torch.stack([own[labels == i].mean(0) for i in range(len(positions))]) for own in maps]
            return torch.stack([attend_and_excite(own) for own in groups]).sum()
        before = self.previous if self.previous is not None and len(self.previous) == images else None
        self.previous = torch.stack([own.detach() for own in maps])
        terms = [
            attention_contrast(own, labels, previous=None if before is None else before[i])
            for i, own in enumerate(maps)
        ]
        return torch.stack(terms).sum()


def moved_against(latents: Tensor, gradient: Tensor, share: float) -> Tensor:
    """Latents (images, channels, height, width), each moved against its gradient by a share of its norm, so
    that no image depends on the others of its batch. One without a finite gradient stays."""
    norms, lengths = (value.float().flatten(1).norm(dim=1) for value in (latents, gradient))
    usable = lengths.isfinite() & (lengths > 0)
    size = torch.where(usable, share * norms / lengths, 0.0)[:, None, None, None]
    step = torch.where(usable[:, None, None, None], gradient.float(), 0.0) * size
    return (latents.float() - step).to(latents.dtype)

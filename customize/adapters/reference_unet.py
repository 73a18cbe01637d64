"""The UNet as its own encoder of references (Face Fusion, "Fusion is all you need", arXiv 2409.19111).

References go through the denoiser itself, at every scale, and the states that enter its attention layers
there become further keys and values of the same layers where an image is drawn
(`customize/adapters/joined_attention.py`). Only the matrices that make these keys and values are trained.

Of the paper only reviews were read, not code. Choices of this project: references are read with the empty
prompt; keys and values start as those of the self-attention of their block.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.adapters.attention import is_installed, set_processors, text_layers
from customize.adapters.base import Adapter
from customize.adapters.encoders.image_encoder import ReferenceFit, squared
from customize.adapters.joined_attention import Joined, JoinedAttention, JoinedTokens, ReferenceBranch
from customize.errors import UserError
from customize.files import header, tensors_of
from customize.imaging import flatten, to_tensor
from customize.tensor_checks import check_finite, misfit

FILE = "reference_unet.safetensors"
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


class ReferenceUNet(nn.Module, Adapter):
    """A `ReferenceBranch` for each attention layer of one kind: self-attention, or that of the text (`join`).

    `resolution` is the side of references in pixels, as they are read; `noise` says whether they are noised
    to the time of the image that is drawn ("current") or not at all.
    """

    files = (FILE,)
    reads_images = True
    replaces_prompt = False
    has_words = False

    def __init__(self, pipe: Any, resolution: int, join: Join = "self", noise: ReferenceNoise = "none"):
        super().__init__()
        self.resolution, self.join, self.noise = resolution, join, noise
        self.encoder = ReferenceEncoder(pipe, join, noise)
        own = [pipe.unet.get_submodule(name.replace("attn2", "attn1")) for name in self.layer_names]
        self.branches = nn.ModuleDict({str(i): ReferenceBranch(attn) for i, attn in enumerate(own)})
        self.widths = [[name, attn.inner_dim] for name, attn in zip(self.layer_names, own, strict=True)]

    @property
    def changes_text(self) -> bool:
        return True  # it is dropped at random

    @property
    def layer_names(self) -> list[str]:
        """The layers that have branches, in the order in which they run."""
        return self.encoder.names

    def install(self, denoiser: UNet2DConditionModel) -> "ReferenceUNet":
        """Gives the denoiser's attention layers our processors, with this adapter's branches."""
        processors = {name: JoinedAttention() for name in denoiser.attn_processors}
        for name, branch in zip(self.layer_names, self.branches.values(), strict=True):
            processors[f"{name}.processor"] = JoinedAttention(name, branch)
        set_processors(denoiser, processors)
        return self

    def is_installed(self, denoiser: UNet2DConditionModel) -> bool:
        """Whether the denoiser has this adapter's branches; UserError if its processors are not ours."""
        return is_installed(denoiser, self.branches, self.layer_names)

    def pixels(self, images: Sequence[Image.Image], fit: ReferenceFit) -> Tensor:
        """Images as squares (n, 4, side, side): colours in [-1, 1], what is transparent in white, and as the
        mask the opacity in [0, 1]."""
        side = self.resolution, self.resolution
        squares = [squared(i.convert("RGBA"), fit).resize(side, Image.Resampling.BICUBIC) for i in images]
        colours = torch.stack([to_tensor(flatten(square)) for square in squares]) * 2 - 1
        return torch.cat([colours, torch.stack([to_tensor(s.getchannel("A")) for s in squares])], 1)

    @torch.no_grad()
    def features(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """What the encoder reads of the images of one subject, (references, pixels, channels + 1)."""
        pixels, vae = self.pixels(images, pipe.reference_fit).to(pipe._execution_device), pipe.vae
        overflows = vae.dtype == torch.float16 and vae.config.force_upcast  # XL's
        if overflows:
            vae.to(torch.float32)
        mean = vae.encode(pixels[:, :3].to(vae.dtype)).latent_dist.mean
        if overflows:
            vae.to(torch.float16)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = (mean - shift) * vae.config.scaling_factor
        return self.encoder.features(latents.to(pipe.unet.dtype), pixels[:, 3:])

    def injected(
        self,
        encoded: ReferenceStates,
        weight: Tensor,
        regions: Tensor | None = None,
        scales: dict[str, float] | None = None,
    ) -> Joined:
        """`encoded` is of samples * subjects; `weight` is (samples, subjects)."""
        states = {name: value.unflatten(0, weight.shape) for name, value in encoded.states.items()}
        tokens = JoinedTokens(states, encoded.mask.unflatten(0, weight.shape), weight, regions)
        return Joined(tokens, scales or {})

    def save(self, folder: Path) -> dict[str, Any]:
        about = {"resolution": self.resolution, "join": self.join, "noise": self.noise, "layers": self.widths}
        state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / FILE, {"format": "pt", "reference_unet": json.dumps(about)})
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Nothing: a subject pipeline loads it with `read`."""

    @staticmethod
    def read(path: Path, pipe: Any) -> "ReferenceUNet":
        """The adapter of a file, installed in a pipeline's UNet. UserError if it was made for another base
        model or is damaged."""
        about = _about(path)
        adapter = ReferenceUNet(pipe, about["resolution"], about["join"], about["noise"])
        state = tensors_of(path)
        if about["layers"] != adapter.widths:
            raise UserError(
                f"'{path}' was trained for another base model: its attention layers differ; load that base "
                "model."
            )
        if reason := misfit(state, adapter.state_dict()):
            raise UserError(f"'{path}' is damaged ({reason}); use an earlier checkpoint.")
        check_finite(state, path)
        adapter.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)
        return adapter.install(pipe.unet).eval().requires_grad_(False)


def _about(path: Path) -> dict[str, Any]:
    """What a file's header says; UserError if it is damaged or of another version."""
    try:
        about = json.loads(header(path)["reference_unet"])
        side = about["resolution"]
        known = about["join"] in get_args(Join) and about["noise"] in get_args(ReferenceNoise)
        known = known and type(side) is int and 0 < side <= 2**14 and isinstance(about["layers"], list)
    except (ValueError, RecursionError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"'{path}' is damaged (its header has no configuration); use an earlier checkpoint.")
    return about

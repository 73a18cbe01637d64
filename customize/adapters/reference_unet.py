"""The UNet as its own encoder of references (Face Fusion, "Fusion is all you need", arXiv 2409.19111).

References go through the denoiser itself, at every scale, and the states that enter its attention layers
there become further keys and values of the same layers where an image is drawn
(`customize/adapters/joined_attention.py`). Only the matrices that make these keys and values are trained.

Of the paper, which has no code, only reviews were read. That keys and values start as those of the
self-attention of their block is a choice of this project.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.adapters.attention import is_installed, set_processors
from customize.adapters.base import Adapter
from customize.adapters.encoders.image_encoder import ReferenceFit, squared
from customize.adapters.encoders.reference_unet import (
    Join,
    ReferenceEncoder,
    ReferenceNoise,
    ReferenceStates,
)
from customize.adapters.joined_attention import Joined, JoinedAttention, JoinedTokens, ReferenceBranch
from customize.errors import UserError
from customize.files import header, tensors_of
from customize.imaging import flatten, to_tensor
from customize.tensor_checks import check_finite, misfit

FILE = "reference_unet.safetensors"


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

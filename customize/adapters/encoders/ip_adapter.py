"""IP-Adapter's encoders (Ye et al., 2023, arXiv 2308.06721): visual tokens only; each reference is
encoded alone.

Parameters are named as in the released files: `proj` and `norm` of the plain adapter, the resampler's of
the Plus adapter.
"""

from typing import Any

import torch
from torch import Tensor, nn

from customize.adapters.encoders.image_encoder import ImageEncoder
from customize.adapters.encoders.output import Encoded
from customize.adapters.encoders.resampler import Resampler
from customize.errors import UserError
from customize.tensor_checks import misfit

RELEASED_DEPTH = 4  # blocks of the resampler in all Plus adapters
HEAD = 64  # width of an attention head in all Plus adapters: files do not say it, and every reader assumes it


class Projection(nn.Module):
    """The image_encoder's pooled embedding (n, 1, embed) to `tokens` tokens (n, tokens, dim)."""

    def __init__(self, embed: int, dim: int, tokens: int = 4):
        super().__init__()
        self.tokens = tokens
        self.proj, self.norm = nn.Linear(embed, tokens * dim), nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(features[:, 0]).unflatten(-1, (self.tokens, -1)))


class ImagePrompt(nn.Module):
    """`image_proj` is a `Projection` (plain) or a `Resampler` (Plus)."""

    location_dim = 0
    depends_on_step = False
    has_blank = True  # trained with a blank image in the place of none, which the unconditional half is given

    def __init__(self, image_proj: Projection | Resampler):
        super().__init__()
        self.image_proj = image_proj

    @property
    def plus(self) -> bool:
        return isinstance(self.image_proj, Resampler)

    @property
    def released(self) -> bool:
        """Whether stock diffusers can read it: stock assumes a resampler of four blocks for every Plus
        adapter."""
        return not isinstance(self.image_proj, Resampler) or len(self.image_proj.layers) == RELEASED_DEPTH

    @property
    def feature_dim(self) -> int:
        """Width of the features that it reads."""
        first = self.image_proj.proj_in if isinstance(self.image_proj, Resampler) else self.image_proj.proj
        return first.in_features

    @property
    def visual_dim(self) -> int:
        last = self.image_proj.norm_out if isinstance(self.image_proj, Resampler) else self.image_proj.norm
        return last.normalized_shape[0]

    def read(self, output: Any) -> Tensor:
        """The part of the image encoder's output that is used: the last hidden states but one (Plus), or
        the pooled embedding."""
        return output.hidden_states[-2] if self.plus else output.image_embeds.unsqueeze(1)

    def blank(self, image_encoder: ImageEncoder, pixels: Tensor) -> Tensor:
        """The features (1, tokens, features) of no image, as the unconditional half was trained: a black
        one for Plus, zeros for plain."""
        features = self.read(image_encoder(pixels[:1] * 0))
        return features if self.plus else features * 0

    def bin_of(self, t: Tensor) -> Tensor:
        """Always 0: the encoder does not depend on time."""
        return torch.zeros_like(t, dtype=torch.long)

    def middle_of(self, bins: Tensor) -> Tensor:
        return torch.zeros_like(bins)

    def forward(self, features: Tensor, present: Tensor, t: Tensor) -> Encoded:
        """Features (batch, references, tokens, features); `present` (batch, references) is False where one is
        padding."""
        tokens = self.image_proj(features.flatten(0, 1)).unflatten(0, present.shape)
        # attention without a mask is faster
        return Encoded(
            tokens.flatten(1, 2), None if present.all() else present.repeat_interleave(tokens.shape[2], 1)
        )


def from_released(state: dict[str, Tensor]) -> ImagePrompt:
    """The encoder for the `image_proj` part of a released file, with its weights; UserError for other kinds,
    KeyError or ValueError for a damaged one."""
    with torch.device("meta"):  # a damaged file may ask for more than memory holds
        made = (
            _projection(state)
            if "proj.weight" in state
            else _resampler(state)
            if "latents" in state
            else None
        )
    if made is None:
        raise UserError(
            "this IP-Adapter is neither a plain nor a Plus one (face and full-face adapters are not "
            "supported)."
        )
    if reason := misfit(state, made.state_dict()):
        raise ValueError(reason)
    made.load_state_dict(state, assign=True)
    return ImagePrompt(made)


def _projection(state: dict[str, Tensor]) -> Projection:
    (dim,) = state["norm.weight"].shape
    out, embed = state["proj.weight"].shape
    if not dim or not out or out % dim:
        raise ValueError(f"proj.weight has {out} rows, norm.weight {dim}")
    return Projection(embed, dim, out // dim)


def _resampler(state: dict[str, Tensor]) -> Resampler:
    _, queries, dim = state["latents"].shape
    output, _ = state["proj_out.weight"].shape
    _, features = state["proj_in.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    return Resampler(
        features, dim, output, queries, depth, state["layers.0.0.to_q.weight"].shape[0] // HEAD, HEAD
    )

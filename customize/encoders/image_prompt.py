"""IP-Adapter's encoders (Ye et al., 2023, arXiv 2308.06721): visual tokens only, each reference on its own.

Parameters are named as in the released files: `proj` and `norm` of the plain adapter, the resampler's of the Plus one.
"""

from torch import Tensor, nn

from customize.encoders.encoded import Encoded
from customize.encoders.perceiver import Resampler
from customize.encoders.tower import ImageTower
from customize.errors import UserError

HEAD = 64  # width of an attention head in all Plus adapters: files do not say it, and every reader assumes it


class Projection(nn.Module):
    """The tower's pooled embedding (n, 1, embed) to `tokens` tokens (n, tokens, dim)."""

    def __init__(self, embed: int, dim: int, tokens: int = 4):
        super().__init__()
        self.tokens = tokens
        self.proj, self.norm = nn.Linear(embed, tokens * dim), nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(features[:, 0]).unflatten(-1, (self.tokens, -1)))


class ImagePrompt(nn.Module):
    """`image_proj` is a `Projection` (plain) or a `Resampler` (Plus)."""

    place_dim = 0

    def __init__(self, image_proj: Projection | Resampler):
        super().__init__()
        self.image_proj = image_proj

    @property
    def plus(self) -> bool:
        return isinstance(self.image_proj, Resampler)

    @property
    def feature_dim(self) -> int:
        """Width of the features that it reads."""
        first = self.image_proj.proj_in if isinstance(self.image_proj, Resampler) else self.image_proj.proj
        return first.in_features

    @property
    def visual_dim(self) -> int:
        last = self.image_proj.norm_out if isinstance(self.image_proj, Resampler) else self.image_proj.norm
        return last.normalized_shape[0]

    def read(self, output) -> Tensor:
        """What is used of the image tower's output: its last hidden states but one, or its pooled embedding."""
        return output.hidden_states[-2] if self.plus else output.image_embeds.unsqueeze(1)

    def blank(self, tower: ImageTower, pixels: Tensor) -> Tensor:
        """The features (1, tokens, features) of no picture, as the unconditional half was trained: a black one for Plus, zeros
        for plain."""
        features = self.read(tower(pixels[:1] * 0))
        return features if self.plus else features * 0

    def forward(self, features: Tensor, present: Tensor, t: Tensor) -> Encoded:
        """Features (batch, references, tokens, features); `present` (batch, references) is False where one is padding."""
        tokens = self.image_proj(features.flatten(0, 1)).unflatten(0, present.shape)
        # attention without a mask is faster
        return Encoded(tokens.flatten(1, 2), None if present.all() else present.repeat_interleave(tokens.shape[2], 1))


def from_released(state: dict[str, Tensor]) -> ImagePrompt:
    """The encoder for the `image_proj` part of a released file, with its weights; UserError for other kinds."""
    if "proj.weight" in state:
        dim = len(state["norm.weight"])
        tokens, embed = len(state["proj.weight"]) // dim, state["proj.weight"].shape[1]
        made: Projection | Resampler = Projection(embed, dim, tokens)
    elif "latents" in state:
        _, queries, dim = state["latents"].shape
        heads = len(state["layers.0.0.to_q.weight"]) // HEAD
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        features, output = state["proj_in.weight"].shape[1], len(state["proj_out.weight"])
        made = Resampler(features, dim, output, queries, depth, heads, HEAD)
    else:
        raise UserError("this IP-Adapter is neither a plain nor a Plus one (face and full-face adapters are not supported).")
    made.load_state_dict(state)
    return ImagePrompt(made)

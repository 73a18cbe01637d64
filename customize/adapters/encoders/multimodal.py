"""CustomContrast's multimodal feature-injection (MFI) encoder (Chen et al., 2025, arXiv 2409.05606,
section 3.2).

Images of a subject become visual tokens, for the visual cross-attention of every layer, and S+: a
pseudo-word for each block of cross-attention layers, which depends on the denoising time. The paper gives
the parts and their wiring. Their sizes, the normalisation of the fusion and the input of the location
maps are choices of this project.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from customize.adapters.encoders.output import Encoded
from customize.adapters.encoders.resampler import Resampler

LARGEST = dict.fromkeys(
    ("image_layers", "text_blocks", "depth", "feature_layers", "time_bins"), 1000
)  # what is gone through one by one


OCTAVES = 8  # Fourier features of a number in [0, 1]: sines and cosines of so many octaves


@dataclass
class MultimodalConfig:
    """Sizes of the encoder. `image_dim`, `image_layers`, `text_dims` and `text_blocks` follow from the
    models it is made for."""

    image_dim: int  # width of the image encoder
    image_layers: int  # its number of layers
    visual_dim: int  # width of the visual tokens, best that of the text states
    text_dims: list[int]  # width of each text encoder's embeddings
    text_blocks: int  # blocks of cross-attention layers, each with a pseudo-word
    dim: int = 768
    depth: int = 4
    heads: int = 12
    visual_queries: int = 16
    feature_layers: int = 4  # layers of the image_encoder that the visual branch reads, evenly spaced
    time_bins: int = 10  # times that S+ can tell apart: at inference its text is encoded once for each
    projection: int = 256  # of the two CLS states, for their contrast
    words: bool = True  # S+; without it only visual tokens
    fusion: bool = True  # text-refined visual tokens
    location: bool = True  # location maps

    def check(self) -> None:
        """ValueError for sizes that no encoder has, such as those of a damaged file."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, list[int]):
                sizes = value if field.type == list[int] and isinstance(value, list) else [value]
                if not all(
                    type(size) is int and 0 < size <= LARGEST.get(field.name, 2**20) for size in sizes
                ):
                    raise ValueError(f"its {field.name} is {value!r:.80}")
            elif not isinstance(value, bool):
                raise ValueError(f"its {field.name} is {value!r:.80}")
        if self.dim % self.heads:
            raise ValueError(f"its dim, {self.dim}, is no multiple of its heads, {self.heads}")


def evenly(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers of an image encoder, evenly spaced to the last but one; 1 is the first."""
    last = max(layers - 1, 1)
    return sorted({max(round(last * (i + 1) / count), 1) for i in range(count)})


def fourier(x: Tensor) -> Tensor:
    """Numbers in [0, 1], shape (...), to (..., 2 * OCTAVES)."""
    angle = x.unsqueeze(-1) * torch.pi * 2.0 ** torch.arange(OCTAVES, device=x.device)
    return torch.cat([angle.sin(), angle.cos()], -1)


def silent(layer: nn.Linear) -> nn.Linear:
    """The layer with all of its weights at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def embedding(features: int, dim: int) -> nn.Sequential:
    """Fourier features to an embedding that is zero before training."""
    return nn.Sequential(nn.Linear(features, dim), nn.SiLU(), silent(nn.Linear(dim, dim)))


class TextualQFormer(nn.Module):
    """Features (batch, tokens, image_dim) and times (batch,) to states of S+ (batch, text_blocks, dim)
    and a CLS state (batch, dim).

    All pseudo-words share one learned query, to which time and block are added; a second query is CLS.
    """

    def __init__(self, config: MultimodalConfig):
        super().__init__()
        self.text_blocks = config.text_blocks
        self.resampler = Resampler(config.image_dim, config.dim, config.dim, 2, config.depth, config.heads)
        self.when_and_where = embedding(4 * OCTAVES, config.dim)

    def forward(self, features: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        block = torch.arange(self.text_blocks + 1, device=t.device) / self.text_blocks  # 0 is CLS
        known = torch.cat(
            [fourier(t)[:, None].expand(-1, len(block), -1), fourier(block).expand(len(t), -1, -1)], -1
        )
        word, cls = self.resampler.latents.unbind(1)
        queries = torch.cat([cls, word.expand(self.text_blocks, -1)]) + self.when_and_where(
            known.to(features.dtype)
        )
        states = self.resampler(features, mask, queries)
        return states[:, 1:], states[:, 0]


class Fusion(nn.Module):
    """Text-refined visual tokens: v x (1 + alpha x mean_T(A) V), A = softmax(Q(text) K(v) / sqrt(d)), alpha 0
    at the start."""

    def __init__(self, dim: int, visual_dim: int):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(dim, dim, bias=False), nn.Linear(visual_dim, dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, textual: Tensor, visual: Tensor) -> Tensor:
        scores = self.to_q(textual) @ self.to_k(visual).transpose(1, 2) / textual.shape[-1] ** 0.5
        read = (
            scores.softmax(-1).mean(1).unsqueeze(-1) * visual.shape[1]
        )  # 1 for a token that is read as much as others
        return visual * (1 + self.alpha * read)


class MultimodalEncoder(nn.Module):
    """Features of references (batch, references, tokens, features) to `Encoded`."""

    released = False  # saved in a layout of our own
    depends_on_step = False  # S+ changes between time bins, and is encoded once for each
    has_blank = False

    def __init__(self, config: MultimodalConfig):
        super().__init__()
        self.config = config
        self.layers = evenly(config.image_layers, config.feature_layers)
        dim, projection = config.dim, config.projection
        self.visual = Resampler(
            self.feature_dim, dim, config.visual_dim, config.visual_queries + 1, config.depth, config.heads
        )
        self.project_visual = nn.Linear(config.visual_dim, projection, bias=False)
        if config.words:
            self.textual = TextualQFormer(config)
            # S+ starts as an ordinary word
            self.heads = nn.ModuleList(
                silent(nn.Linear(dim, width, bias=False)) for width in config.text_dims
            )
            self.project_textual = nn.Linear(dim, projection, bias=False)
            self.fusion = Fusion(dim, config.visual_dim) if config.fusion else None
        if config.location:
            self.time, self.who = embedding(2 * OCTAVES, dim), nn.Linear(config.visual_dim, dim)

    @property
    def feature_dim(self) -> int:
        """Width of the features that it reads."""
        return self.config.image_dim * len(self.layers)

    @property
    def visual_dim(self) -> int:
        return self.config.visual_dim

    @property
    def location_dim(self) -> int:
        return self.config.dim if self.config.location else 0

    def read(self, output: Any) -> Tensor:
        """The part of the image encoder's output that is used: hidden states of several layers, (images,
        tokens, layers * image_dim)."""
        return torch.cat([output.hidden_states[layer] for layer in self.layers], -1)

    def bin_of(self, t: Tensor) -> Tensor:
        """Times in [0, 1] to the number of their bin."""
        return (t * self.config.time_bins).long().clamp(max=self.config.time_bins - 1)

    def middle_of(self, bins: Tensor) -> Tensor:
        return (bins + 0.5) / self.config.time_bins

    def forward(self, features: Tensor, present: Tensor, t: Tensor) -> Encoded:
        """`present` (batch, references) is False where a reference is padding; `t` (batch,) runs from 0,
        data, to 1, noise."""
        mask = present.repeat_interleave(features.shape[2], 1)
        features = features.flatten(1, 2)
        states = self.visual(features, mask)
        visual, cls = states[:, 1:], states[:, 0]
        encoded = Encoded(visual, visual_cls=self.project_visual(cls))
        t = self.middle_of(self.bin_of(t))
        if self.config.words:
            # the last of the layers read is the last but one of the image_encoder
            words, textual_cls = self.textual(features[..., -self.config.image_dim :], mask, t)
            encoded.words = [head(words) for head in self.heads]
            encoded.textual_cls = self.project_textual(textual_cls)
            if self.fusion is not None:
                encoded.visual = self.fusion(words, visual)
        if self.config.location:
            encoded.location_embedding = self.time(fourier(t).to(cls.dtype)) + self.who(cls)
        return encoded

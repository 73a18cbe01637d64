"""Losses on attention maps, which hold the things of a prompt apart in the image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from customize.losses.contrastive import supervised_contrast


def smoothed(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Maps (..., height, width) under a Gaussian filter of 3 x 3 pixels, with reflected borders."""
    steps = torch.arange(-1, 2, device=maps.device, dtype=maps.dtype)
    line = (-(steps**2) / (2 * sigma**2)).exp()
    kernel = (line[:, None] * line[None]) / line.sum() ** 2
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    padded = F.pad(flat, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).view(maps.shape)


def attend_and_excite(maps: Tensor) -> Tensor:
    """The neglect of the word that is attended to least: max over words of 1 - max over pixels of its map
    (Chefer et al., 2023, arXiv 2301.13826, eq. 1). `maps` (words, height, width) in [0, 1]."""
    return (1 - smoothed(maps).flatten(1).amax(1)).amax()


def attention_contrast(
    maps: Tensor, labels: Tensor, temperature: float = 0.5, previous: Tensor | None = None
) -> Tensor:
    """CONFORM's contrast of attention maps (Meral et al., 2024, arXiv 2312.06059): maps of the tokens of
    one thing and its attributes are positives, those of other things negatives.

    `maps` (tokens, height, width), `labels` (tokens,) the number of each token's thing; `previous` are
    the maps of the step before, with the same labels.
    """
    both = maps if previous is None else torch.cat([maps, previous])
    each = labels if previous is None else torch.cat([labels, labels])
    return supervised_contrast(smoothed(both).flatten(1), each, temperature)

"""Crops, buckets of aspect ratios, and images as tensors."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from customize.errors import UserError
from customize.imaging import to_tensor

Bucket = tuple[int, int]  # height, width


def check_resolution(resolution: int, factor: int, flag: str = "--resolution") -> None:
    """UserError, naming `flag`, unless `resolution` is a positive multiple of `factor`, both in pixels."""
    if resolution <= 0 or resolution % factor:
        lower = max(resolution // factor, 0) * factor
        valid = f"{lower} or {lower + factor}" if lower else f"{factor}"
        raise UserError(
            f"{flag} {resolution} is not a positive multiple of {factor}; the nearest valid is {valid}."
        )


def buckets(resolution: int, factor: int) -> list[Bucket]:
    """(height, width) pairs of about resolution² pixels, in multiples of `factor`, from 1:2 to 2:1, the
    square included.

    Sides go in steps of about resolution/16: finer ones would leave each image of a small set alone in its
    bucket.
    """
    step, found = factor * max(1, round(resolution / 16 / factor)), set()
    for short in range(resolution, math.floor(resolution / math.sqrt(2)) - 1, -step):
        long = round(resolution**2 / short / factor) * factor
        if long <= 2 * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The (height, width) whose aspect ratio is nearest in logarithm to that of `size` (width, height)."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - ratio))


def fit(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize to cover height x width at the same aspect ratio, and crop the centre."""
    return ImageOps.fit(image, (width, height), resample)


def sizes_of(size: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """For an image of `size` (width, height) that `fit` brings to height x width: its original height and
    width, and the top and left of the crop in the resized image, (4,) in pixels."""
    scale = max(height / size[1], width / size[0])
    top, left = (
        max(round((side * scale - wanted) / 2), 0) for side, wanted in ((size[1], height), (size[0], width))
    )
    return torch.tensor([size[1], size[0], top, left])


def mask_weight(
    mask: Image.Image, height: int, width: int, outside: float, flip: bool = False
) -> torch.Tensor:
    """Loss weight (1, height, width) of each place: 1 inside the mask, `outside` elsewhere."""
    return outside + (1 - outside) * to_tensor(fit(mask, height, width, Image.Resampling.BILINEAR), flip)

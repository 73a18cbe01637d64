"""The field's metrics as functions of features: one row for each image or prompt, of any norm (cosines
normalise)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional import pairwise_cosine_similarity


def subject_score(generated: Tensor, references: Tensor) -> float:
    """CLIP-I, DINO and DINOv2: the mean cosine of every generated image (n, d) with every real one (m, d),
    -1 to 1 (Ruiz et al., 2023, arXiv 2208.12242, section 4.1)."""
    _same_width(generated, references)
    return pairwise_cosine_similarity(generated, references, zero_diagonal=False).mean().item()


def ceiling_score(references: Tensor) -> float:
    """The score of real images of the subject (m, d): the mean cosine of each with every *other* one; 1
    for a single image."""
    count = len(references)
    if count == 1:
        return 1.0
    cosines = pairwise_cosine_similarity(references, references, zero_diagonal=True)
    return (cosines.sum() / (count * (count - 1))).item()


def prompt_score(images: Tensor, texts: Tensor) -> float:
    """CLIP-T: the mean cosine of each image (n, d) with its own prompt (n, d), -1 to 1, neither clipped nor
    scaled."""
    if images.shape != texts.shape:
        raise ValueError(
            f"images and prompts pair one to one: {tuple(images.shape)} is not {tuple(texts.shape)}"
        )
    return torch.cosine_similarity(images, texts, dim=-1).mean().item()


def drift(before: Tensor, after: Tensor) -> float:
    """How far the prior moved, 0 to 1: the mean of (1 - cosine) / 2 between what the base model (n, d) and
    the customized one (n, d) draw from the same noise for a prompt without the subject."""
    if before.shape != after.shape:
        raise ValueError(
            f"the images before and after pair one to one: {tuple(before.shape)} is not {tuple(after.shape)}"
        )
    return ((1 - torch.cosine_similarity(before, after, dim=-1)) / 2).mean().item()


def diversity(features: Tensor) -> float:
    """The mean distance (1 - cosine, 0 to 2) between two images of one prompt, for features (prompts,
    images, d)."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"diversity needs (prompts, two or more images, width), not {tuple(features.shape)}")
    count = features.shape[1]
    distances = [1 - pairwise_cosine_similarity(some, some, zero_diagonal=False) for some in features]
    return (torch.stack([d.sum() - d.trace() for d in distances]) / (count * (count - 1))).mean().item()


def copy_rate(generated: Tensor, training: Tensor, other_views: Tensor) -> float:
    """How much more the images (n, d) resemble the training image (m, d) nearest to them than another
    true view of the subject in the scene that was asked for (n, d), a difference of cosines: above 0 they
    copy."""
    _same_width(generated, training)
    if generated.shape != other_views.shape:
        raise ValueError(
            f"images and other views pair one to one: {tuple(generated.shape)} is not "
            f"{tuple(other_views.shape)}"
        )
    nearest = pairwise_cosine_similarity(generated, training, zero_diagonal=False).amax(1)
    return (nearest - torch.cosine_similarity(generated, other_views, dim=-1)).mean().item()


def nearest_score(generated: Tensor, references: Tensor | None = None) -> float:
    """The mean cosine of each image (n, d) with the nearest reference (m, d); without references, with
    the nearest other image, which measures how similar real images are."""
    cosines = pairwise_cosine_similarity(generated, references, zero_diagonal=False)
    if references is None:
        cosines.fill_diagonal_(-1.0 if len(generated) > 1 else 1.0)
    return cosines.amax(1).mean().item()


def multi_subject_score(crops: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """For images of several subjects: an image counts as its worst subject, so that a missing subject is
    noticed. `crops[s]` (n, d) shows where subject `s` should be in each image, `references[s]` (m, d) are
    its real images."""
    if len(crops) != len(references):
        raise ValueError(f"{len(crops)} subjects were cropped but {len(references)} have references")
    each = [
        pairwise_cosine_similarity(c, r, zero_diagonal=False).mean(1)
        for c, r in zip(crops, references, strict=True)
    ]
    return torch.stack(each).amin(0).mean().item()


def subject_only(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The subject on white, cropped to its mask (L, 255 where the subject is): for the masked variants of the
    scores.

    A mask without a subject gives the image as it is.
    """
    inside = mask.point(lambda value: 255 * (value > 127))
    if inside.getbbox() is None:
        return image.convert("RGB")
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), mask).crop(
        inside.getbbox()
    )


def confidence_interval(
    values: Sequence[float], level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentiles of the mean over subjects; one subject gives its value twice."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values, float), (samples, len(values)))
    low, high = np.quantile(drawn.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _same_width(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"features of width {a.shape[-1]} cannot be compared with those of width {b.shape[-1]}"
        )

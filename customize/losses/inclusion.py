"""Inclusive words (ITI-GEN, Zhang et al., 2023, arXiv 2309.05569): prompts of an attribute's categories must
differ as the images of these categories do, and still mean what the prompt means."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attribute_directions(images: Tensor, texts: Tensor) -> Tensor:
    """Directional alignment (eq. 3): mean over pairs of categories i < j of

        1 - cos(images_i - images_j, texts_i - texts_j)

    `images` and `texts` (categories, dim) are mean unit vectors of the categories' images and prompts in one
    space; two or more categories.
    """
    wanted, found = _differences(images), _differences(texts)
    return (1 - F.cosine_similarity(wanted, found, dim=-1)).mean()


def attribute_differences(images: Tensor, texts: Tensor) -> Tensor:
    """As `attribute_directions`, with lengths (ours, not of the paper): mean over pairs i < j of

    |images_i - images_j - (texts_i - texts_j)|^2 / |images_i - images_j|^2
    """
    wanted, found = _differences(images), _differences(texts)
    squares = wanted.square().sum(-1).clamp(min=1e-12)
    return ((wanted - found).square().sum(-1) / squares).mean()


def _differences(vectors: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    return vectors[first] - vectors[second]


def semantic_consistency(texts: Tensor, original: Tensor, least: float = 0.8) -> Tensor:
    """Semantic consistency (eq. 4): mean of max(0, least - cos(text, original)).

    `texts` (prompts, dim) hold inclusive words, `original` (dim,) is the prompt without them.
    """
    return (least - F.cosine_similarity(texts, original, dim=-1)).clamp(min=0).mean()

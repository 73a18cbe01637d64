"""Contrast between the targets of denoising: Contrastive Flow Matching (Stoica et al., 2025, arXiv
2506.05350)."""

from torch import Tensor

from customize.losses.denoising import denoising


def contrastive_flow(prediction: Tensor, other_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Minus the mean squared error to the target of another sample, shape (batch,): the paper's second term,
    unweighted.

    `prediction` and `other_target` are (batch, channels, height, width), `mask` as in `denoising`.
    `other_target` is what the latents and the noise of another sample give at this sample's time. With the
    denoising error, the best prediction is (target - weight * mean of the other targets) / (1 - weight), so
    the weight must be below 1.
    """
    return -denoising(prediction, other_target, mask)

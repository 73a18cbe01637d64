"""The diffusion loss."""

import torch.nn.functional as F
from torch import Tensor


def denoising(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, shape (batch,), for tensors (batch, channels, height, width).

    `mask` (batch, 1, H, W) of any size weights the pixels, values from 0 to 1. The result is the weighted
    mean, so that a small subject counts as much as a large one.
    """
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if mask is None:
        return error.flatten(1).mean(1)
    weight = F.interpolate(mask.float(), size=error.shape[-2:], mode="area")
    return (error * weight).flatten(1).mean(1) / weight.flatten(1).mean(1).clamp(min=1e-6)

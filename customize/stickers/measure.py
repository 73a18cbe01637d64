"""How much of a drawing is in a picture: a measure that needs no trained judge."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SCALES = (0.5, 0.57, 0.64, 0.72, 0.8, 0.88)  # of the picture's side
ANGLES = (-15, -7.5, 0, 7.5, 15)  # degrees


def masked_correlation(picture: Image.Image, sprite: np.ndarray) -> float:
    """The best correlation (-1 to 1) of a drawing with a picture over place, scale, tilt and mirroring.

    `sprite` is RGBA uint8, (size, size, 4). Colours count: one mean over all channels is taken out, weighted by the
    drawing's alpha. A real scene of the drawing gives about 0.9.
    """
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255).permute(2, 0, 1)
    side = pixels.shape[-1]
    weights, templates = _templates(sprite, side)
    return float(_correlate(pixels, templates, weights).max())


def _templates(sprite: np.ndarray, side: int) -> tuple[Tensor, Tensor]:
    """Weights (n, 1, 2 side, 2 side) that sum to one third (a third for each channel), and colours (n, 3, ...)."""
    weights, colours = [], []
    for scale in SCALES:
        small = Image.fromarray(sprite).resize((round(scale * side),) * 2, Image.Resampling.LANCZOS)
        for angle in ANGLES:
            turned = small.rotate(angle, Image.Resampling.BICUBIC)
            for picture in (turned, turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
                pixels = torch.zeros(4, 2 * side, 2 * side)
                part = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)
                pixels[:, : part.shape[1], : part.shape[2]] = part
                weights.append(pixels[3:] / (3 * pixels[3:].sum()).clamp(min=1e-6))
                colours.append(pixels[:3])
    return torch.stack(weights), torch.stack(colours)


def _correlate(pixels: Tensor, colours: Tensor, weights: Tensor) -> Tensor:
    """Weighted correlation of a picture (3, s, s) with each template at every place where its middle is inside."""
    side = pixels.shape[-1]
    padded = torch.zeros(3, 2 * side, 2 * side)
    padded[:, side // 2 : side // 2 + side, side // 2 : side // 2 + side] = pixels

    def slide(image: Tensor, kernel: Tensor) -> Tensor:
        """Sums of image times kernel at every shift, over channels."""
        product = torch.fft.rfft2(image) * torch.fft.rfft2(kernel).conj()
        return torch.fft.irfft2(product.sum(1), s=image.shape[-2:])

    mean_template = (weights * colours).sum((1, 2, 3))[:, None, None]
    var_template = (weights * colours**2).sum((1, 2, 3))[:, None, None] - mean_template**2
    mean = slide(padded[None], weights.expand(-1, 3, -1, -1))
    var = slide(padded[None] ** 2, weights.expand(-1, 3, -1, -1)) - mean**2
    product = slide(padded[None], weights * colours) - mean * mean_template
    inside = slide((padded.sum(0) > 0).float().expand(1, 3, -1, -1), weights.expand(-1, 3, -1, -1)) > 0.75
    correlation = product / (var.clamp(min=1e-5) * var_template.clamp(min=1e-5)).sqrt()
    return torch.where(inside, correlation, torch.tensor(-1.0))

"""Diagnostics of contrastive training: numbers and an image for every validation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customize.losses.contrastive import cosines
from customize.runs.output import save_image


def view_retrieval(anchors: Tensor, positives: Tensor, identity: Tensor) -> list[float]:
    """For each layer of Z (layers, n, dim) the share of first views whose most similar second view is of
    their subject."""
    nearest = cosines(anchors, positives).argmax(-1)
    return [float((identity[found] == identity).float().mean()) for found in nearest]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two samples without many ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def appearance_correlation(
    anchors: Tensor, positives: Tensor, image_embeds: Tensor, identity: Tensor
) -> float:
    """Spearman's correlation, over pairs of different subjects, of the cosine of their Z (mean over layers)
    with that of their images: 1 if subjects are as unlike in S+ as they look; NaN where there are no two
    pairs to compare."""
    other = (identity[:, None] != identity).cpu().numpy()
    if other.sum() < 4:  # each pair is there twice
        return float("nan")
    learned = cosines(anchors, positives).mean(0).detach().cpu().numpy()
    return rank_correlation(learned[other], cosines(image_embeds, image_embeds).detach().cpu().numpy()[other])


def similarity_image(
    anchors: Tensor, positives: Tensor, image_embeds: Tensor, side: int = 240
) -> Image.Image:
    """Two matrices side by side, black for the lowest and white for the highest cosine of each: S+ of first
    against second views (mean over layers), and the images themselves."""
    page = Image.new("L", (2 * side + side // 20, side), 255)
    for i, matrix in enumerate((cosines(anchors, positives).mean(0), cosines(image_embeds, image_embeds))):
        values = matrix.float().cpu().numpy()
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
        image = Image.fromarray((values * 255).astype(np.uint8))
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), (i * (side + side // 20), 0))
    return page


def gradient_ratios(losses: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """For each term beside `denoise`, the norm of its gradient over that of the diffusion loss."""

    def norm(loss: Tensor) -> float:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return float(torch.stack([g.float().norm() for g in found if g is not None]).norm())

    base = norm(losses["denoise"])
    return {
        f"{name} gradient": norm(loss) / max(base, 1e-12)
        for name, loss in losses.items()
        if name != "denoise"
    }


def write_similarity(
    folder: Path, step: int, anchors: Tensor, positives: Tensor, image_embeds: Tensor
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_image(similarity_image(anchors, positives, image_embeds), folder / f"similarity-{step:06d}.png")

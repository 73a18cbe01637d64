"""Negative-guided subject fidelity (SFO, 2025, arXiv 2506.03621)."""

import torch.nn.functional as F
from torch import Tensor


def subject_fidelity(
    positive: Tensor,
    negative: Tensor,
    reference_positive: Tensor,
    reference_negative: Tensor,
    beta: float = 1000.0,
) -> Tensor:
    """-log sigmoid(-beta [(positive - negative) - (reference_positive - reference_negative)]), mean over the
    batch.

    All are denoising errors (batch,) under one condition, noise and time: of an image of the subject, and of
    one that is not quite it; by the model that is trained, and by the reference model. Training lowers the
    error of the subject more than that of the other, compared with the reference.
    """
    gained = (positive - negative) - (reference_positive - reference_negative).detach()
    return F.softplus(beta * gained).mean()

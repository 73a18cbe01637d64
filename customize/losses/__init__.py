"""Losses: tensors in, one tensor out. None knows a batch, a model or a configuration."""

from customize.losses.contrastive import appearance_contrast, cross_modal_contrast
from customize.losses.contrastive_flow import contrastive_flow
from customize.losses.denoising import denoising

__all__ = ["appearance_contrast", "contrastive_flow", "cross_modal_contrast", "denoising"]

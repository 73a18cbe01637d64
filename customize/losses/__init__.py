"""Losses: tensors in, one tensor out. None knows a batch, a model or a configuration."""

from customize.losses.denoising import denoising

__all__ = ["denoising"]

"""Diffusers pipelines of what was trained."""

from customize.checkpoint import load_pipeline

__all__ = ["load_pipeline"]

"""Metrics of subject fidelity and prompt fidelity for generated images."""

from customize.metrics.encoders import ClipEncoder, MetricEncoder, load_clip, load_dino, load_sticker_clip
from customize.metrics.scores import (
    ceiling_score,
    confidence_interval,
    copy_rate,
    diversity,
    drift,
    multi_subject_score,
    nearest_score,
    prompt_score,
    subject_only,
    subject_score,
)

__all__ = [
    "ClipEncoder",
    "MetricEncoder",
    "ceiling_score",
    "confidence_interval",
    "copy_rate",
    "diversity",
    "drift",
    "load_clip",
    "load_dino",
    "load_sticker_clip",
    "multi_subject_score",
    "nearest_score",
    "prompt_score",
    "subject_only",
    "subject_score",
]

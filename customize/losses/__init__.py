"""Losses: tensors in, one tensor out. None knows a batch, a model or a configuration."""

from customize.losses.attention import attend_and_excite, attention_contrast
from customize.losses.context import context_attention, context_embedding
from customize.losses.contrastive import (
    appearance_contrast,
    cross_modal_contrast,
    direction_contrast,
    info_nce,
    nearest_word_contrast,
    supervised_contrast,
)
from customize.losses.contrastive_flow import contrastive_flow
from customize.losses.denoising import denoising
from customize.losses.fidelity import subject_fidelity
from customize.losses.inclusion import attribute_differences, attribute_directions, semantic_consistency

__all__ = [
    "appearance_contrast",
    "attend_and_excite",
    "attention_contrast",
    "attribute_differences",
    "attribute_directions",
    "context_attention",
    "context_embedding",
    "contrastive_flow",
    "cross_modal_contrast",
    "denoising",
    "direction_contrast",
    "info_nce",
    "nearest_word_contrast",
    "semantic_consistency",
    "subject_fidelity",
    "supervised_contrast",
]

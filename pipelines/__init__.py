"""Diffusers pipelines of what was trained."""

from customize.checkpoint import load_pipeline
from customize.pipelines.subject import SubjectSDPipeline, SubjectSDXLPipeline, load_subject_pipeline

__all__ = ["SubjectSDPipeline", "SubjectSDXLPipeline", "load_pipeline", "load_subject_pipeline"]

"""Diffusers pipelines of trained runs."""

from customize.pipelines.load import load_pipeline, load_subject_pipeline
from customize.pipelines.subject import SubjectSDPipeline, SubjectSDXLPipeline

__all__ = ["SubjectSDPipeline", "SubjectSDXLPipeline", "load_pipeline", "load_subject_pipeline"]

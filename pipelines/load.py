"""Pipelines of what was trained, by the names of their runs."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from customize import embedded
from customize.adapters import holds
from customize.backbones.load import load_base
from customize.errors import UserError
from customize.pipelines.subject import SubjectMixin, SubjectSDPipeline, SubjectSDXLPipeline
from customize.runs.checkpoint import load, open_run
from customize.runs.folder import INFO, STAGED, read_info


def load_pipeline(run: str | Path, dtype: torch.dtype = torch.float32, **options) -> DiffusionPipeline:
    """A diffusers pipeline that draws what a run has learned; `run` may also be a base model (folder, hub id,
    `stickers`).

    `options` go to diffusers' `from_pretrained`. Raises UserError for folders that are neither, and for runs
    whose files are missing, changed or do not fit their base model.
    """
    folder = Path(run)
    if not (folder / INFO).exists() and not (folder / STAGED).exists():
        if folder.exists() and not (folder / "model_index.json").exists():
            read_info(folder)
        return load_base(str(run), dtype, **options)
    info = open_run(folder)
    revision = {k: v for k in ("revision", "variant") if (v := info["config"].get(k))}
    pipe = load_base(info["base_model"], dtype, **(revision | options))
    load(folder, pipe, info)
    return pipe


KINDS = {StableDiffusionPipeline: SubjectSDPipeline, StableDiffusionXLPipeline: SubjectSDXLPipeline}


def with_subjects(pipe: DiffusionPipeline) -> Any:
    """A pipeline that also takes subjects, of the same components; UserError for kinds without
    cross-attention of a UNet."""
    if isinstance(pipe, SubjectMixin):
        return pipe
    if type(pipe) not in KINDS:
        raise UserError(
            f"subjects need a Stable Diffusion 1.x, 2.x or XL base model, not a {type(pipe).__name__}."
        )
    options = {"requires_safety_checker": False} if type(pipe) is StableDiffusionPipeline else {}
    if type(pipe) is StableDiffusionXLPipeline:
        options = {
            "force_zeros_for_empty_prompt": pipe.config.force_zeros_for_empty_prompt,
            "add_watermarker": False,
        }
    made = KINDS[type(pipe)](**pipe.components, **options)
    made._progress_bar_config = getattr(pipe, "_progress_bar_config", {})
    return made


def load_subject_pipeline(
    run: str | Path,
    adapter: str | Path = "",
    image_encoder: str = "",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A pipeline that draws subjects from images, without tuning.

    `run` is a run of custom_contrast or ip_adapter, or a base model (folder, hub id, `stickers`); with a base
    model, or a run of a method that trains no encoder (LoRA, words), `adapter` names the encoder (run, file,
    released IP-Adapter), by default that of the embedded stickers.
    """
    pipe = with_subjects(load_pipeline(run, dtype, **options))
    folder = Path(run)
    base = read_info(folder)["base_model"] if (folder / INFO).exists() else str(run)
    if not adapter and holds(folder, "subject"):
        adapter = run
    elif not adapter and embedded.is_embedded(base):
        adapter = embedded.NAME
    if not adapter:
        raise UserError(
            f"'{run}' has no subject encoder: name one, a run of custom_contrast or ip_adapter, or a file."
        )
    pipe.load_subject_adapter(adapter, image_encoder)
    return pipe

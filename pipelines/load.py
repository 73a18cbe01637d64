"""Loading pipelines of runs and base models."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.models.controlnets import MultiControlNetModel

from customize import embedded
from customize.adapters import holds_encoder
from customize.adapters.encoders.image_encoder import ReferenceFit
from customize.backbones.families import family_of
from customize.backbones.load import load_base
from customize.errors import UserError, nearest
from customize.pipelines.in_context import with_references
from customize.pipelines.subject import TASKS, SubjectMixin, Task
from customize.quiet import quietly
from customize.runs.checkpoint import load, open_run
from customize.runs.folder import INFO, STAGED, base_options, info_of, read_info


def load_pipeline(
    run: str | Path, dtype: torch.dtype = torch.float32, base_model: str = "", **options: Any
) -> DiffusionPipeline:
    """A diffusers pipeline that draws what a run has learned; `run` may also be a base model (folder, hub id,
    one .safetensors file, `stickers`).

    `base_model` takes the place of the one that the run names, as when its folder has moved. `options` go to
    `customize.backbones.load.load_base`: `vae_name`, `single_file_config`, and those of diffusers'
    `from_pretrained`. Raises UserError for folders that are neither, and for runs
    whose files are missing, changed or do not fit their base model.
    """
    if not isinstance(run, str | Path):
        raise UserError(
            f"load_pipeline takes the name of one run or base model, not a {type(run).__name__}; load more "
            "LoRA files into the pipeline with pipe.load_lora_weights."
        )
    folder = Path(run)
    with quietly():
        if not (folder / INFO).exists() and not (folder / STAGED).exists():
            if folder.is_dir() and not (folder / "model_index.json").exists():
                read_info(folder)
            return load_base(base_model or str(run), dtype, **options)
        info = open_run(folder)
        kept = base_options(info["config"])
        if base_model and not embedded.is_single_file(base_model):
            kept.pop("single_file_config", None)
        pipe = load_base(base_model or info["base_model"], dtype, **(kept | options))
        load(folder, pipe, info)
        return pipe


def with_subjects(pipe: DiffusionPipeline) -> Any:
    """A pipeline that also takes subjects, of the same components and for the same task; UserError for
    kinds without cross-attention of a UNet."""
    if isinstance(pipe, SubjectMixin):
        return pipe
    for kinds in TASKS.values():
        if type(pipe) in kinds:
            return _of_components(kinds[type(pipe)], pipe)
    raise UserError(
        f"subjects need a Stable Diffusion 1.x, 2.x or XL base model, not a {type(pipe).__name__}."
    )


def _of_components(kind: Any, pipe: DiffusionPipeline, **more: Any) -> Any:
    """A pipeline of another class with the components and the settings of this one."""
    _, names = kind._get_signature_keys(kind)
    settings = {name: pipe.config[name] for name in names if name in pipe.config}
    unwanted = {"requires_safety_checker": False, "add_watermarker": False}
    settings |= {name: value for name, value in unwanted.items() if name in names}
    made = kind(**pipe.components, **settings, **more)
    made._progress_bar_config = getattr(pipe, "_progress_bar_config", {})
    return made


def _for_task(pipe: DiffusionPipeline, task: str, controlnet: Any) -> Any:
    """The pipeline with subjects of a task, from the text-to-image pipeline of a base model."""
    more = {"controlnet": controlnet} if task == "controlnet" else {}
    channels = getattr(getattr(pipe, "unet", None), "config", {}).get("in_channels")
    if task == "inpainting" and channels not in (None, 4, 9):
        raise UserError(
            f"task 'inpainting': diffusers draws it with latents of 4 channels, and this base model's have "
            f"{channels}; use another base model."
        )
    for stock, kind in zip(TASKS["text-to-image"], TASKS[task].values(), strict=True):
        if type(pipe) is stock:
            return _of_components(kind, pipe, **more)
    return with_subjects(pipe)  # which refuses it


def _check_task(task: str, controlnet: Any) -> None:
    if task not in TASKS:
        raise UserError(f"task: there is no '{task}'; choose {', '.join(TASKS)}.{nearest(task, TASKS)}")
    if task == "controlnet" and controlnet is None:
        raise UserError("task 'controlnet' needs a ControlNet: give one as controlnet=ControlNetModel(...).")
    if task != "controlnet" and controlnet is not None:
        raise UserError(f"controlnet is for task='controlnet', and the task is '{task}'.")
    for model in controlnet if isinstance(controlnet, list | tuple) else [controlnet]:
        if not isinstance(model, ControlNetModel | MultiControlNetModel | None):
            raise UserError(
                f"controlnet must be a ControlNetModel of diffusers, or a list of them, not a "
                f"{type(model).__name__}."
            )


def load_subject_pipeline(
    run: str | Path,
    adapter: str | Path = "",
    image_encoder: str = "",
    dtype: torch.dtype = torch.float32,
    task: Task = "text-to-image",
    controlnet: Any = None,
    reference_fit: ReferenceFit | Literal[""] = "",
    base_model: str = "",
    **options: Any,
) -> Any:
    """A pipeline that draws subjects from images, without tuning.

    `run` is a run of custom_contrast, ip_adapter, reference_unet or seecoder (whose image takes the place of
    the prompt), or a base model (folder, hub id, `stickers`); Flux.2, Flux.1 Kontext and
    Qwen-Image-Edit-Plus, and runs on them, are shown the images themselves. Else, with a base model, or a run
    of a method that trains no encoder (LoRA, words), `adapter` names the encoder (run, file, released
    IP-Adapter or SeeCoder), by default that of the embedded stickers. The pipeline's call is that of
    diffusers' pipeline for the `task`; "controlnet" needs `controlnet`, a ControlNetModel or a list of them.
    `reference_fit` says how references that are not square become square: "stretch", "pad" or "crop"; empty:
    as in the run. `base_model` and `options` go to `load_pipeline`. UserError for a task that does not exist
    and for a base model or an encoder that does not fit.
    """
    _check_task(task, controlnet)
    info = info_of(run)
    if "dual_path" in info:
        raise UserError(f"'{run}' draws with a hard path, which goes with prompts alone; use load_pipeline.")
    stock = load_pipeline(run, dtype, base_model, **options)
    if family_of(stock).takes_references:
        if task != "text-to-image" or adapter:
            raise UserError(f"'{run}' reads subject_images without an encoder: leave task and adapter out.")
        untrained = {"reference_resolution": family_of(stock).reference_resolution}
        return with_references(stock, info.get("in_context", untrained)["reference_resolution"])
    pipe = _for_task(stock, task, controlnet)
    base = info["base_model"]
    if not adapter and holds_encoder(run):
        adapter = run
    elif not adapter and embedded.is_embedded(base):
        adapter = embedded.NAME
    if not adapter:
        raise UserError(
            f"'{run}' has no subject encoder: name one, a run of custom_contrast, ip_adapter, reference_unet "
            "or seecoder, or a file."
        )
    pipe.load_subject_adapter(adapter, image_encoder, reference_fit)
    return pipe

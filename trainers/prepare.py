"""Before training: loading the base model and drawing class images."""

import itertools
import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from customize.adapters.lora_reading import load_lora
from customize.backbones.base import Backbone
from customize.backbones.families import as_called, wrap
from customize.backbones.layers import ASSISTANT, activate_assistant
from customize.backbones.load import load_base
from customize.backbones.quantize import check_quantization
from customize.data.concepts import Concept, DataConfig
from customize.data.crops import check_resolution
from customize.data.images import ImageFile, find_images
from customize.errors import UserError, shortened
from customize.files import remove
from customize.runs.folder import base_options
from customize.runs.output import is_own_image, own_text, save_image
from customize.trainers.settings import ModelConfig

RECIPE = "Class image"  # what the PNG files of class images hold of how they were drawn


PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def precision(accelerator: Accelerator) -> torch.dtype:
    """The type of frozen weights."""
    return PRECISIONS.get(accelerator.mixed_precision, torch.float32)


def check_quantizations(model_config: ModelConfig, accelerator: Accelerator) -> None:
    """UserError for a quantisation that does not run on this machine."""
    for name in ("quantize", "quantize_text_encoder"):
        if (kind := getattr(model_config, name)) != "none":
            check_quantization(f"--{name}", kind, accelerator.device, precision(accelerator))


def load_backbone(
    model_config: ModelConfig, data_config: Any, accelerator: Accelerator, empty: bool = False
) -> Backbone:
    """The frozen base model in the training precision (its autoencoder in float32), with the weights that are
    to be quantised so; all but the denoiser is on the device. If `empty`, it has no weights and is on the
    meta device. UserError for a quantisation that does not run here."""
    check_quantizations(model_config, accelerator)
    dtype = precision(accelerator)
    name = model_config.pretrained_model_name_or_path
    backbone = wrap(load_base(name, dtype, empty=empty, **base_options(vars(model_config))), name)
    backbone.is_empty = empty
    names = ("guidance_scale", "max_sequence_length", "timestep_sampling", "timestep_shift")
    backbone.configure(**{name: getattr(model_config, name) for name in names})
    data_config.resolution = data_config.resolution or backbone.native_resolution
    check_resolution(data_config.resolution, backbone.factor)
    backbone.resolution = data_config.resolution
    if backbone.is_distilled:
        warnings.warn(
            f"'{name}' is distilled to few steps, which training blurs: train on the base model that it was "
            "made from, and draw with this one (customize generate RUN --base_model).",
            stacklevel=2,
        )
    decode_whole(backbone.vae.float())
    if empty:
        return backbone
    backbone.quantize(model_config.quantize, model_config.quantize_text_encoder, accelerator.device)
    with backbone.denoiser_left_out():
        return backbone.to(accelerator.device)


def add_assistant(backbone: Backbone, name: str) -> None:
    """Loads the LoRA, a run or a file, that is active in training and left out of drawing and of what is
    saved. UserError for what is no LoRA of this base model's denoiser."""
    load_lora(Path(name), backbone.pipe, ASSISTANT)
    if any(ASSISTANT in (getattr(own, "peft_config", None) or {}) for own in backbone.text_encoders):
        raise UserError(f"--assistant_lora: '{name}' also changes the text encoder; name one that does not.")
    backbone.requires_grad_(False)
    activate_assistant(backbone.denoiser)


def decode_whole(vae: Any) -> None:
    """Makes the autoencoder decode in its own precision even under autocast: SDXL's overflows in float16."""
    decode = vae.decode

    def decoded(latents: torch.Tensor, *args, **options):
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **options)

    vae.decode = decoded


def class_images(
    backbone: Backbone,
    concept: Concept,
    index: int,
    folder: Path,
    count: int,
    config: DataConfig,
    seed: int,
    batch_size: int = 4,
) -> list[ImageFile]:
    """The concept's prior images. What `folder` lacks of `count` is drawn by the base model from the class
    prompt, so call this before any adapter is added.

    The user's own images there are used as they are. Images that an earlier run has drawn are drawn anew if
    it had another class prompt, resolution or base model; whatever its seed, they are used again. In a dry
    run, whose base model is empty, nothing is drawn or written: `stand_ins` replace what is missing.
    """
    if backbone.is_empty:
        return stand_ins(concept, index, folder, count, config)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = json.dumps(
        {
            "class_prompt": concept.class_prompt,
            "resolution": config.resolution,
            "base_model": backbone.fingerprint(),
        }
    )
    remove_others(folder, recipe, concept.class_prompt)
    read = partial(
        find_images,
        folder,
        concept.class_prompt,
        index,
        True,
        config.strict,
        config.max_pixels,
        allow_outside_files=config.allow_outside_files,
    )
    have = read() if any(not path.name.startswith(".") for path in folder.iterdir()) else []
    pipe = backbone.pipe
    pipe.set_progress_bar_config(disable=True)
    free = (i for i in itertools.count() if not (folder / f"class-{i:05d}.png").exists())
    wanted = list(itertools.islice(free, max(count - len(have), 0)))
    batches = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    if batches:
        backbone.to(backbone.device)  # the denoiser too
    for numbers in tqdm(batches, desc=f"class images of '{concept.class_prompt}'"):
        generators = [torch.Generator().manual_seed(seed + i) for i in numbers]
        options = {"height": config.resolution, "width": config.resolution, "generator": generators}
        arguments = {"prompt": [concept.class_prompt] * len(numbers), **options}
        images = pipe(**as_called(pipe, arguments)).images
        for i, image in zip(numbers, images, strict=True):
            save_image(image, folder / f"class-{i:05d}.png", texts={RECIPE: recipe})
    return (have if len(have) >= count else read())[:count]


def stand_ins(concept: Concept, index: int, folder: Path, count: int, config: DataConfig) -> list[ImageFile]:
    """The class images that are there, and for each missing one the first image of the subject, whose size it
    will have; stand-ins have no digest."""
    options: dict[str, Any] = {"strict": config.strict, "max_pixels": config.max_pixels}
    options["allow_outside_files"] = config.allow_outside_files
    is_used = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    have = find_images(folder, concept.class_prompt, index, True, **options) if is_used else []
    own = find_images(concept.instance_data_dir, concept.class_prompt, index, **options)[0]
    missing = replace(own, caption=concept.class_prompt, mask=None, is_prior=True, digest="")
    return (have + [missing] * (count - len(have)))[:count]


def remove_others(folder: Path, recipe: str, prompt: str) -> None:
    """Removes class images that an earlier run drew under other conditions, with a warning. Images
    without a recipe, of earlier versions, stay."""
    paths = [path for path in sorted(folder.glob("class-*.png")) if is_own_image(path)]
    others = [path for path in paths if own_text(path, RECIPE) not in ("", recipe)]
    if others:
        warnings.warn(
            f"{len(others)} class images in '{folder}' are of another class prompt, resolution or base "
            f"model; they are drawn anew from '{shortened(prompt)}'.",
            stacklevel=2,
        )
        remove(others)

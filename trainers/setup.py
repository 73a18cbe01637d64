"""What every run begins with: its base model, and settings that can be checked at once."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from customize.backbone import Backbone, wrap
from customize.config import at_least_one
from customize.data import check_resolution
from customize.errors import UserError
from customize.loading import load_base
from customize.trainers.session import drop_old_checkpoints
from customize.trainers.settings import TrainConfig
from customize.trainers.state import latest_checkpoint


@dataclass
class ModelConfig:
    """Which base model, and what is kept of its work."""

    pretrained_model_name_or_path: str = field(
        default="stickers", metadata={"help": "a diffusers folder, a hub id, or stickers (embedded)"}
    )
    revision: str = field(default="", metadata={"help": "revision of the model on the hub"})
    variant: str = field(default="", metadata={"help": "variant of the weight files, such as fp16"})
    cache_latents: bool = field(default=True, metadata={"help": "encode pictures and prompts once, then free the encoders"})
    cache_dir: str = field(
        default="", metadata={"help": "keep the encoded pictures and prompts in this folder; empty: in memory"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "upload the finished run"})
    hub_model_id: str = field(default="", metadata={"help": "the repository to upload to, as USER/NAME"})


def check_settings(model: ModelConfig, data: Any, settings: TrainConfig) -> None:
    if model.push_to_hub and not model.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id USER/NAME.")
    if settings.validation_metric == "score" and not settings.validation_prompt:
        raise UserError("--validation_metric score needs --validation_prompt, prompts of the subject to draw and rate.")
    if settings.early_stopping_patience and settings.validation_metric == "loss" and not data.holdout:
        raise UserError("--early_stopping_patience needs --holdout N, pictures kept from training for the validation loss.")
    output = Path(settings.output_dir)
    earlier = latest_checkpoint(output) or any((folder / "run.json").exists() for folder in (output, output / "best"))
    if earlier and not settings.resume_from_checkpoint and not settings.overwrite_output_dir:
        raise UserError(
            f"'{output}' holds an earlier run; choose another --output_dir, go on with --resume_from_checkpoint latest, "
            "or replace it with --overwrite_output_dir."
        )
    numbers = ("num_validation_images", "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
    at_least_one(settings, (*numbers, "validation_steps", "checkpointing_steps"))


def clear_output(settings: TrainConfig, accelerator: Accelerator) -> None:
    """Removes what an earlier run left that this one replaces: only once all that it needs was found."""
    if settings.resume_from_checkpoint or not accelerator.is_main_process:
        return
    output = Path(settings.output_dir)
    drop_old_checkpoints(output, keep=0)
    shutil.rmtree(output / "best", ignore_errors=True)
    (output / "validation.jsonl").unlink(missing_ok=True)


def load_backbone(model: ModelConfig, data: Any, accelerator: Accelerator) -> Backbone:
    """The frozen base model in the training precision (its autoencoder in float32), on the device."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    options = {k: v for k in ("revision", "variant") if (v := getattr(model, k))}
    backbone = wrap(load_base(model.pretrained_model_name_or_path, dtype, **options), model.pretrained_model_name_or_path)
    data.resolution = data.resolution or backbone.native_resolution
    check_resolution(data.resolution, backbone.factor)
    backbone.resolution = data.resolution
    decode_whole(backbone.vae.float())
    return backbone.to(accelerator.device)


def decode_whole(vae) -> None:
    """Pictures drawn under autocast are still decoded in the autoencoder's own precision: XL's overflows in float16."""
    decode = vae.decode

    def decoded(latents: torch.Tensor, *args, **options):
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **options)

    vae.decode = decoded

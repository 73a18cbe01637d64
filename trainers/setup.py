"""What every run begins with: its base model, and settings that can be checked at once."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from customize import stickers
from customize.backbone import Backbone, wrap
from customize.data import check_resolution
from customize.errors import UserError
from customize.files import remove
from customize.loading import load_base
from customize.output import locked, make_folder, refuse_model
from customize.run_folder import (
    INFO,
    check_free,
    check_inputs,
    checkpoint_step,
    checkpoints,
    clear,
    only_a_run,
    put_in_place,
    read_info,
    samples,
)
from customize.trainers.session import resumed_folder
from customize.trainers.settings import TrainConfig


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
    hub_private_repo: bool = field(
        default=True, metadata={"help": "upload to a private repository; --no_hub_private_repo makes a new one public"}
    )


def check_settings(model: ModelConfig, data: Any, settings: TrainConfig) -> None:
    if model.push_to_hub and not model.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id USER/NAME.")
    if settings.validation_metric == "score" and not settings.validation_prompt:
        raise UserError("--validation_metric score needs --validation_prompt, prompts of the subject to draw and rate.")
    if settings.early_stopping_patience and settings.validation_metric == "loss" and not data.holdout:
        raise UserError("--early_stopping_patience needs --holdout N, pictures kept from training for the validation loss.")


@contextmanager
def claimed_output(model: ModelConfig, settings: TrainConfig, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the output folder is this run's alone: it can be written, holds nothing that is not a run's, and no earlier run
    that was not given up. `config` holds all settings. UserError otherwise, on the first process.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        yield
        return
    output, flag = Path(settings.output_dir), "--output_dir"
    base = model.pretrained_model_name_or_path
    refuse_model(output, flag, str(stickers.MODEL) if base == "stickers" else base)
    with locked(make_folder(output, flag), flag):
        put_in_place(output)
        check_free(output, settings.overwrite_output_dir, resumes_here(settings), flag)
        resumed_folder(settings)  # says so if there is none
        if settings.resume_from_checkpoint and not settings.overwrite_output_dir:
            check_progress(settings)
        if settings.overwrite_output_dir:
            check_inputs(output, config)
        yield


def resumes_here(settings: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint in its own output folder."""
    where, output = settings.resume_from_checkpoint, Path(settings.output_dir).resolve()
    return where == "latest" or (bool(where) and Path(where).resolve().parent == output)


def check_progress(settings: TrainConfig) -> None:
    """UserError if resuming would leave less than the output folder holds: a result or a checkpoint of a later step."""
    output = Path(settings.output_dir)
    another = "choose another --output_dir, or replace what is there with --overwrite_output_dir."
    done = read_info(output).get("step", 0) if (output / INFO).exists() else 0
    if done > settings.max_train_steps:
        raise UserError(
            f"'{output}' was trained for {done} steps, more than --max_train_steps {settings.max_train_steps}; {another}"
        )
    later = [path for path in later_results(settings) if checkpoint_step(path) is not None]
    if later:
        raise UserError(f"--resume_from_checkpoint: '{output}' holds {later[0].name}, which is later; {another}")


def later_results(settings: TrainConfig) -> list[Path]:
    """What the output folder holds of steps after the checkpoint that is resumed: checkpoints, samples, and the best step."""
    output, start = Path(settings.output_dir), checkpoint_step(Path(settings.resume_from_checkpoint).resolve())
    if start is None:  # `latest`, after which there is no checkpoint
        return []
    later = [path for path in checkpoints(output) if (checkpoint_step(path) or 0) > start]
    later += [path for path in samples(output / "samples") if int(path.stem.rpartition("-")[2]) > start]
    best = output / "best"
    return later + ([best] if only_a_run(best) and read_info(best).get("step", 0) > start else [])


def clear_output(settings: TrainConfig, accelerator: Accelerator) -> None:
    """Removes what an earlier run left that this one replaces: only once all that it needs was found."""
    if not accelerator.is_main_process:
        return
    if not resumes_here(settings):
        clear(Path(settings.output_dir))
    elif settings.overwrite_output_dir:
        remove(later_results(settings))


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

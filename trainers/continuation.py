"""Resuming a run: settings that are not given stay as they were; others are applied or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from customize import embedded
from customize.config import Flag, is_of_type
from customize.errors import UserError, shortened
from customize.runs.folder import read_info
from customize.trainers.claim import resumed_folder
from customize.trainers.settings import TrainConfig

# Settings that a resumed run applies as they are given: they change neither what is trained nor in which
# order. Every other setting must be as it was.
MAY_CHANGE = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit"),
    *("validation_prompt", "num_validation_images", "validation_steps", "validation_images"),
    *("validation_inference_steps", "validation_guidance_scale"),
    *("validation_clip", "validation_dino", "early_stopping_patience", "report_to", "export_kohya"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
    *("gradient_checkpointing", "enable_xformers_memory_efficient_attention", "allow_tf32"),
    *("cache_latents", "cache_dir", "dataloader_num_workers", "sample_batch_size"),
    *("max_pixels", "strict", "allow_outside_files", "dry_run", "memory_limit"),
}
# Paths of what is compared by its contents: it may have moved.
COMPARED = {"instance_data_dir", "class_data_dir", "concepts_list", "train_data_dir", "domain_encoder"}
PLACES = ("single_file_config", "pretrained_vae_model_name_or_path")  # of parts of the base model
# of each command
OWN = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "push_to_hub",
    "dry_run",
    "memory_limit",
}


def earlier_settings(given: Mapping[str, Any], known: Mapping[str, Flag]) -> dict[str, Any]:
    """The settings of the resumed run that still exist; empty for a fresh start.

    UserError if one has the wrong type. Other faults of the checkpoint are reported once the output
    folder is claimed.
    """
    names = ("output_dir", "resume_from_checkpoint")
    asked = TrainConfig(**{name: given[name] for name in names if name in given})
    try:
        folder = resumed_folder(asked)
        then = read_info(folder)["config"] if folder and folder.is_dir() else {}
    except UserError:
        return {}
    kept = {name: value for name, value in then.items() if name in known and name not in OWN}
    if "max_train_steps" in given:
        kept.pop("num_train_epochs", None)
    for name, value in kept.items():
        if not is_of_type(value, known[name].type):
            raise UserError(f"'{folder}' is damaged (its {name} is {shortened(repr(value))}).")
    return kept


def check_same_settings(folder: Path | None, config: Mapping[str, Any], known: Mapping[str, Flag]) -> None:
    """UserError naming the first setting that differs from the resumed run and cannot be changed."""
    then = read_info(folder)["config"] if folder and folder.is_dir() else {}
    for name, value in config.items() if then else ():
        before = then.get(name, known[name].default)
        if name in MAY_CHANGE | COMPARED or before == value or _same_base(name, before, value):
            continue
        raise UserError(
            f"--{name} {shortened(str(value)) or 'empty'}: '{folder}' was written with "
            f"{shortened(str(before)) or 'none'}, which a resumed run cannot change; leave the flag out, or "
            "start a new run."
        )


def _same_base(name: str, before: Any, value: Any) -> bool:
    same = name in ("pretrained_model_name_or_path", *PLACES)
    return same and embedded.lasting_name(before) == embedded.lasting_name(value)


def check_same_inputs(folder: Path | None, info: Mapping[str, Any]) -> None:
    """UserError if the images, the captions, the base model or a domain encoder are not those of the resumed
    run."""
    then = read_info(folder) if folder and folder.is_dir() else {}

    def differs(name: str) -> bool:
        return name in then and name in info and then[name] != info[name]

    if differs("dataset"):
        before, now = set(then["dataset"]), set(info["dataset"])
        counts = f"{len(now - before)} new or changed, {len(before - now)} missing"
        raise UserError(
            f"--resume_from_checkpoint: the images are not those that '{folder}' was trained on ({counts}); "
            "put them back, or start a new run."
        )
    if differs("captions"):
        raise UserError(
            f"--resume_from_checkpoint: the captions are not those that '{folder}' was trained on; put them "
            "back, or start a new run."
        )
    if then and then.get("concept_weights") != info.get("concept_weights"):
        raise UserError(
            f"--resume_from_checkpoint: the weights of the concepts are not those that '{folder}' was "
            "trained with; put them back, or start a new run."
        )
    if differs("domain_encoder"):
        raise UserError(
            f"--domain_encoder: it is not the one that '{folder}' was trained with; give that one, or "
            "start a new run."
        )
    if differs("base_fingerprint"):
        raise UserError(
            f"--resume_from_checkpoint: the base model's weights are not those that '{folder}' was trained "
            "on; put them back, or start a new run."
        )

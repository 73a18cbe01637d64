"""Base models: from a name to the diffusers pipeline."""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import nn

from customize import stickers
from customize.backbone import BACKBONES
from customize.errors import UserError
from customize.tokens import WordsSD3Pipeline


def load_base(name: str, dtype: torch.dtype = torch.float32, **options) -> DiffusionPipeline:
    """The diffusers pipeline of a base model: a folder, a hub id, or `stickers`, the embedded one.

    Only safetensors are read. `options` go to diffusers (`revision`, `variant`). Raises UserError for a missing or
    incomplete folder and for a kind of pipeline that no backbone wraps.
    """
    folder = stickers.MODEL if name == "stickers" else Path(name)
    if folder.exists():
        _check_folder(folder)
    elif name.startswith((".", "/", "~")):
        raise UserError(
            f"--pretrained_model_name_or_path: there is no folder '{name}'; give a diffusers folder, a hub id or 'stickers'."
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder) if folder.exists() else name,
            dtype=dtype,
            use_safetensors=True,
            **options,
            **({"safety_checker": None, "requires_safety_checker": False} if _has_checker(folder) else {}),
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--pretrained_model_name_or_path: '{name}' could not be loaded as a diffusers pipeline ({reason})."
        ) from error
    if isinstance(pipe, StableDiffusion3Pipeline):
        pipe = WordsSD3Pipeline(**pipe.components)
    if getattr(pipe, "safety_checker", None) is not None:  # of a hub id: it would paint pictures black
        pipe.safety_checker = None
        pipe.register_to_config(requires_safety_checker=False)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipe


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"--pretrained_model_name_or_path: '{folder}' has no model_index.json; give the folder of a diffusers pipeline."
        )
    listed = _read_index(index)
    kind = listed.get("_class_name")
    if kind not in BACKBONES:
        raise UserError(f"--pretrained_model_name_or_path: '{folder}' is a {kind}; supported are {', '.join(BACKBONES)}.")
    for part, value in listed.items():
        needed = isinstance(value, list) and value[0] is not None and part != "safety_checker"
        if needed and not (folder / part).is_dir():
            raise UserError(f"base model '{folder}' lacks its component '{part}'; download the folder '{part}' too.")


def _has_checker(folder: Path) -> bool:
    """Whether the checkpoint names a safety checker, which training has no use for."""
    index = folder / "model_index.json"
    return index.is_file() and "safety_checker" in _read_index(index)


def _read_index(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}); download it again.") from error

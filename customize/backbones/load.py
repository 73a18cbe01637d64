"""Base models: from a name to a complete diffusers pipeline."""

import inspect
import json
import math
import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import is_torchvision_available

from customize import embedded
from customize.backbones.families import BACKBONES
from customize.backbones.single_file import SingleFile
from customize.backbones.text import SUFFIXES, clip_skip_works, text_parts
from customize.errors import UserError, first_line, nearest, shortened
from customize.tensor_checks import load_whole, reads_weights, without_weights

FLAG = "--pretrained_model_name_or_path"
INDEX = "model_index.json"


LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


CONFIGURATIONS = ["*.json", "*.txt", "*.model", "*.jinja"]  # all files of a model but its weights


UNUSED = "safety_checker"  # it would paint images black, and training has no use for it


def load_base(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    vae_name: str = "",
    single_file_config: str = "",
    empty: bool = False,
    **options,
) -> DiffusionPipeline:
    """The diffusers pipeline of a base model: a folder, a hub id, one file, or `stickers`, the embedded one.

    Only safetensors are read. `vae_name` is the folder or hub id of an autoencoder to use instead of the
    model's. `single_file_config`: the folder or hub id that says how the model in a single file is built, and
    gives what the file lacks; empty: the one that diffusers knows for such a file. `options` go to diffusers
    (`revision`, `variant`). An `empty` pipeline has models without weights, of the meta device; their
    configurations are enough.

    Raises UserError for a missing or incomplete folder or file, for weights that do not all load or are not
    finite, for settings that diffusers cannot use, and for a kind of pipeline that no backbone wraps.
    """
    if not isinstance(name, str | Path):
        raise UserError(
            f"{FLAG}: a base model is named by text, not by a {type(name).__name__}; give a folder or a "
            "hub id."
        )
    if empty:
        with without_weights():
            return load_base(name, dtype, vae_name, single_file_config, **options)
    _check_options(options)
    file = None
    if embedded.is_single_file(name):
        file = SingleFile.read(name, single_file_config, options.get("revision"))
    elif single_file_config:
        raise UserError(f"--single_file_config is for a base model in one file; leave it out for '{name}'.")
    folder = file.folder if file else _folder(str(name), options)
    if vae_name:
        options["vae"] = _autoencoder(vae_name, dtype)
    listed = _components(folder)
    _check_torchvision(str(name), listed)
    if not reads_weights():
        options.pop("variant", None)  # of weight files
    try:
        kinds = _model_kinds(listed, options)
        if file:
            file.check_kind(_read_object(folder / INDEX)["_class_name"])
        if file and reads_weights():
            file.complete(kinds)
        models = {
            part: file.component(part, kind, dtype)
            if file and reads_weights() and file.holds(part, kind)
            else _model(folder / part, kind, dtype, options)
            for part, kind in kinds.items()
        }
        unused = {UNUSED: None, "requires_safety_checker": False} if UNUSED in listed else {}
        pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **(options | models | unused)
        )
    except Exception as error:  # the libraries' loaders raise all kinds
        raise _failed(str(name), error) from error
    if file and (settings := file.scheduler_settings()):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    pipe.register_to_config(_name_or_path=str(name))
    _check_parts(str(name), pipe)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    _let_clip_skip(pipe)
    return pipe


def _let_clip_skip(pipe: Any) -> None:
    """Makes the option clip_skip of the pipeline's call work with this version of transformers."""
    stock = pipe.encode_prompt

    @wraps(stock)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        with clip_skip_works(getattr(pipe, "text_encoder", None)):
            return stock(*args, **kwargs)

    pipe.encode_prompt = encode_prompt


OPTIONS = {
    *("revision", "variant", "device_map", "max_memory", "token", "cache_dir", "force_download", "proxies"),
    *("local_files_only", "low_cpu_mem_usage", "offload_folder", "offload_state_dict", "mirror"),
    *("vae", "unet", "transformer", "scheduler", "feature_extractor", "image_encoder"),
    *(f"{part}{suffix}" for part in ("tokenizer", "text_encoder") for suffix in SUFFIXES),
}  # that diffusers' loader knows; it passes over all others


def _check_options(options: Mapping[str, Any]) -> None:
    for option in options:
        if option not in OPTIONS:
            told = " It is called dtype here." if option == "torch_dtype" else nearest(option, OPTIONS)
            raise UserError(f"'{option}' is no option of loading a pipeline; leave it out.{told}")


def _autoencoder(name: str, dtype: torch.dtype) -> AutoencoderKL:
    try:
        return load_whole(AutoencoderKL, name, dtype=dtype)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise UserError(
            f"--pretrained_vae_model_name_or_path: '{name[:200]}' could not be loaded as an autoencoder "
            f"({first_line(error)})."
        ) from error


def _failed(name: str, error: Exception) -> Exception:
    """The error to raise for an error of the libraries; lack of memory stays what it is."""
    if isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
        return error
    reason = first_line(error).split(". ")[0].rstrip(".")
    remedy = (
        "mend or download the folder again"
        if os.path.exists(embedded.folder_of(name))  # also of names that no file can have
        else f"check its spelling and your connection, give a folder, or '{embedded.NAME}', which needs none"
    )
    return UserError(
        f"{FLAG}: '{shortened(name, 200)}' could not be loaded as a diffusers pipeline "
        f"({shortened(reason, 200)}); {remedy}."
    )


def _folder(name: str, options: dict[str, Any]) -> Path:
    """The base model's folder; that of a hub id is downloaded first."""
    folder = Path(embedded.folder_of(name))
    try:
        if folder.exists():
            return folder
        if name.startswith((".", "/", "~")):
            raise UserError(
                f"{FLAG}: there is no folder '{name}'; give a diffusers folder, a hub id or 'stickers'."
            )
        if not reads_weights():
            revision = options.get("revision")
            return Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGURATIONS))
        return Path(DiffusionPipeline.download(name, use_safetensors=True, **({UNUSED: None} | options)))
    except Exception as error:
        raise _failed(name, error) from error


def _components(folder: Path) -> dict[str, list]:
    """Library and class of each component that model_index.json lists and that is used."""
    index = folder / INDEX
    if not index.exists():
        raise UserError(
            f"{FLAG}: '{folder}' has no model_index.json; give the folder of a diffusers pipeline."
        )
    listed = _read_object(index)
    kind = listed.get("_class_name")
    if not isinstance(kind, str) or kind not in BACKBONES:
        raise UserError(f"{FLAG}: '{folder}' is a {kind}; supported are {', '.join(BACKBONES)}.")
    found = {part: value for part, value in listed.items() if _is_component(value)}
    for part in found.keys() - {UNUSED}:
        if not (folder / part).is_dir():
            raise UserError(
                f"base model '{folder}' lacks its component '{part}'; download the folder '{part}' too."
            )
        _check_settings(folder / part)
    return found


def _check_torchvision(name: str, listed: dict[str, list]) -> None:
    """UserError for a processor of images or videos that transformers builds with torchvision, without it."""
    for part, (library, kind_name) in listed.items():
        kind = getattr(LIBRARIES.get(library), kind_name, None)
        reads_videos = (
            isinstance(kind, type)
            and issubclass(kind, ProcessorMixin)
            and "video_processor" in cast(Any, kind).get_attributes()
        )
        # what transformers leaves out for lack of a library is a placeholder that names it
        needed = reads_videos or "torchvision" in getattr(kind, "_backends", ())
        if needed and not is_torchvision_available():
            raise UserError(
                f"base model '{name}': its {part} needs torchvision: pip install 'customize[edit]' "
                "(or torchvision)."
            )


def _check_settings(folder: Path) -> None:
    """UserError unless the component's settings are JSON objects: a string in their place would be looked
    up on the hub."""
    for path in filter(Path.exists, map(folder.joinpath, SETTINGS)):
        kind = _read_object(path).get("_class_name", "SchedulerMixin")
        if path.name == "scheduler_config.json" and not hasattr(diffusers, str(kind)):
            raise UserError(f"'{path}' has an unknown class, {kind}; give one of diffusers.")


def _is_component(value: Any) -> bool:
    """Whether an entry of model_index.json is a pair of names. Other lists are settings; two nulls are an
    absent component."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"'{path}' is no ordinary file; download it again.")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({error}); download it again.") from error
    if not isinstance(listed, dict):
        raise UserError(f"'{path}' is damaged (it is a {type(listed).__name__}); download it again.")
    return listed


def _model_kinds(listed: dict[str, list], options: dict[str, Any]) -> dict[str, type]:
    """The classes of the components with weights; UserError for a class that the libraries do not have."""
    found = {}
    for part, (library, name) in listed.items():
        if part == UNUSED or part in options:
            continue
        kind = getattr(LIBRARIES.get(library), name, None)
        if not isinstance(kind, type):
            raise ValueError(f"its {part} is a {library}.{name}, which is not known")
        if issubclass(kind, ModelMixin | PreTrainedModel):
            found[part] = kind
    return found


def _model(folder: Path, kind: type, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    """A component with all of its weights: diffusers and transformers leave those that a file lacks at
    random."""
    variant = options.get("variant")
    named = (
        {"variant": variant}
        if variant and any(f".{variant}" in path.name for path in folder.iterdir())
        else {}
    )
    placed = {"device_map": options["device_map"]} if "device_map" in options else {}
    return load_whole(kind, folder, dtype=dtype, **named, **placed)


def _check_parts(name: str, pipe: DiffusionPipeline) -> None:
    """UserError if the pipeline lacks what a backbone needs, or holds something else in its place."""
    types = pipe._get_signature_types()
    for part in ("unet", "transformer", "vae", "scheduler"):
        held = getattr(pipe, part, None)
        if part in types and not (
            isinstance(held, SchedulerMixin) if part == "scheduler" else isinstance(held, types[part])
        ):
            raise UserError(
                f"{FLAG}: '{name}' has a {type(held).__name__} as its {part}; give a base model of the "
                "usual kind."
            )
    tokenizers, encoders = text_parts(pipe)
    if not encoders or not all(hasattr(tokenizer, "model_max_length") for tokenizer in tokenizers):
        raise UserError(f"{FLAG}: '{name}' lacks a text encoder or its tokenizer; download the whole model.")
    for part in (pipe.scheduler, pipe.vae, *tokenizers):
        if setting := _odd_setting(part):
            raise UserError(
                f"{FLAG}: the {type(part).__name__} of '{name}' has {setting}; download its configuration "
                "anew."
            )


def _odd_setting(part: Any) -> str:
    """A setting whose type is not that of its default, as a message names it; empty if there is none."""
    if not hasattr(part, "config"):
        length = part.model_max_length
        return "" if _is_alike(length, 1.0) else f"model_max_length {length!r}"
    for name, parameter in inspect.signature(type(part).__init__).parameters.items():
        value = part.config.get(name, parameter.default)
        several = isinstance(value, list | tuple) and "tuple" in str(
            parameter.annotation
        )  # one for each block
        given = value if several else [value]
        if value != parameter.default and not all(_is_alike(own, parameter.default) for own in given):
            return f"{name} {value!r}"
    return ""


def _is_alike(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return value is None or isinstance(value, bool)
    if isinstance(default, int | float):
        number = isinstance(value, int if isinstance(default, int) else int | float) and not isinstance(
            value, bool
        )
        return number and math.isfinite(value)
    return not isinstance(default, str) or value is None or isinstance(value, str)

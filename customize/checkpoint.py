"""A run's parts on disk: diffusers' own file for each part that has one (see `run_folder` for all of them)."""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import convert_state_dict_to_diffusers
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from customize.backbone import Backbone
from customize.errors import UserError
from customize.files import header, tensors_of
from customize.loading import load_base
from customize.lora import check_lora, folded_metadata, folded_state, has_lora, kohya_state, with_text_model
from customize.output import LOCK
from customize.run_folder import FORMAT, INFO, KOHYA, LORA, STAGED, check_files, put_in_place, read_info, staged
from customize.subject import SubjectAdapter, save_adapter
from customize.tensor_checks import load_whole, misfit
from customize.tokens import SUFFIXES, ConceptTokens, load_words

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def save(
    folder: Path,
    backbone: Backbone,
    tokens: ConceptTokens | None,
    info: dict,
    kohya: bool = False,
    adapter: SubjectAdapter | None = None,
) -> None:
    """Writes what was trained, and `run.json` with `info`, into `folder`, in the place of what an earlier run wrote there."""
    with staged(folder, {"format": FORMAT, **info}) as (new, described):
        _save_lora(new, backbone, kohya)
        _save_components(new, backbone)
        described["words"] = _save_words(new, tokens) if tokens is not None else {}
        if adapter is not None:
            save_adapter(adapter, new)
        described["libraries"] = {name: version(name) for name in LIBRARIES}


def _adapted(backbone: Backbone) -> Iterator[tuple[str, nn.Module]]:
    """Components with LoRA, by the pipeline's name for them."""
    names = [f"text_encoder{suffix}" for suffix, _ in zip(SUFFIXES, backbone.text_encoders, strict=False)]
    for name, module in zip([backbone.denoiser_name, *names], [backbone.denoiser, *backbone.text_encoders], strict=True):
        if has_lora(module):
            yield name, module


def _save_lora(folder: Path, backbone: Backbone, kohya: bool) -> None:
    arguments: dict = {}
    flat: dict[str, Tensor] = {}
    for name, module in _adapted(backbone):
        state = folded_state(module)
        if name.startswith("text_encoder"):
            state = {with_text_model(key): value for key, value in state.items()}
        if backbone.denoiser_name == "unet":
            # diffusers renames attention layers alone, and its loader then misreads a file with both kinds of names
            renamed = convert_state_dict_to_diffusers(state).items()
            state = {key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for key, v in renamed}
        arguments |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": folded_metadata(module)}
        flat |= kohya_state(module, _kohya_prefix(name, backbone)) if kohya else {}
    if arguments:
        type(backbone.pipe).save_lora_weights(folder, weight_name=LORA, **arguments)
    if flat:
        save_file(flat, folder / KOHYA, {"format": "pt", "ss_network_module": "networks.lora"})


def _kohya_prefix(name: str, backbone: Backbone) -> str:
    if backbone.denoiser_name != "unet":
        raise UserError("--export_kohya is for UNet models; other tools read the diffusers file of this one.")
    if name == "unet":
        return "lora_unet"
    return "lora_te" if len(backbone.text_encoders) == 1 else {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[name]


def _save_components(folder: Path, backbone: Backbone) -> None:
    """Components that were trained as a whole."""
    parts = {backbone.denoiser_name: backbone.denoiser} | {
        f"text_encoder{s}": e for s, e in zip(SUFFIXES, backbone.text_encoders, strict=False)
    }
    for name, module in parts.items():
        if not has_lora(module) and any(p.requires_grad for p in module.parameters()):
            module.save_pretrained(folder / name, safe_serialization=True)
            _forget_place(folder / name / "config.json")


def _forget_place(path: Path) -> None:
    """Takes the folder that a component was loaded from out of its configuration: it names the user's machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _save_words(folder: Path, tokens: ConceptTokens) -> dict[str, str]:
    """One file a word, with one key, the word, or a key for each of several text encoders; returns their names."""
    files = {}
    for i, (word, vectors) in enumerate(tokens.by_word().items()):
        safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in word)[:50]  # names have at most 255 bytes
        files[word] = "learned_embeds.safetensors" if len(tokens.words) == 1 else f"learned_embeds-{i}{safe}.safetensors"
        state = {word: next(iter(vectors.values()))} if len(vectors) == 1 else vectors
        save_file({k: v.detach().float().cpu().contiguous() for k, v in state.items()}, folder / files[word], {"word": word})
    return files


def open_run(run: Path) -> dict[str, Any]:
    """`run.json` of a finished run or a checkpoint, all of whose files are there as they were written; UserError if not."""
    if (run / STAGED / INFO).exists():
        _finish_writing(run)
    info = read_info(run)
    check_files(run, info)
    return info


def _finish_writing(run: Path) -> None:
    """Puts in place what a kill left on its way there, unless another program is at it."""
    try:
        with FileLock(run / LOCK).acquire(timeout=0):
            put_in_place(run)
    except (Timeout, OSError):
        return


def load(run: Path, pipe: DiffusionPipeline, info: Mapping[str, Any] | None = None) -> None:
    """Gives a pipeline what a run trained: LoRA and learned words, through diffusers' own loaders."""
    info = info or open_run(run)
    if (run / LORA).exists():
        check_lora(pipe, tensors_of(run / LORA), str(run / LORA), header(run / LORA))
        pipe.load_lora_weights(str(run), weight_name=LORA)
    for word, name in info["words"].items():
        load_words(pipe, word, tensors_of(run / name))


def load_pipeline(run: str | Path, dtype: torch.dtype = torch.float32, **options) -> DiffusionPipeline:
    """A diffusers pipeline that draws what a run has learned; `run` may also be a base model (folder, hub id, `stickers`).

    `options` go to diffusers' `from_pretrained`. Raises UserError for folders that are neither, and for runs whose files are
    missing, changed or do not fit their base model.
    """
    folder = Path(run)
    if not (folder / INFO).exists() and not (folder / STAGED).exists():
        if folder.exists() and not (folder / "model_index.json").exists():
            read_info(folder)
        return load_base(str(run), dtype, **options)
    info = open_run(folder)
    revision = {k: v for k in ("revision", "variant") if (v := info["config"].get(k))}
    pipe = load_base(info["base_model"], dtype, **(revision | options))
    for name, part in pipe.components.items():
        if isinstance(part, ModelMixin | PreTrainedModel) and (folder / name).is_dir():
            setattr(pipe, name, trained_component(folder / name, part, dtype))
    load(folder, pipe, info)
    return pipe


def trained_component(folder: Path, base: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A component that was trained as a whole; UserError if it is not whole, or not of the shape of the base model's."""
    try:
        part = load_whole(type(base), folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"'{folder}' could not be loaded ({reason}); use an earlier checkpoint.") from error
    if reason := misfit(part.state_dict(), base.state_dict()):
        raise UserError(f"'{folder}' does not fit this base model ({reason}); load the base model it was trained on.")
    return part.eval()

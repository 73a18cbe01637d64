"""The folder a run leaves: diffusers' own file for each part that has one, and `run.json`, which says how it was made.

run.json                              format, base model, method, resolved configuration, library versions
pytorch_lora_weights.safetensors      LoRA in diffusers' layout, alpha folded in
learned_embeds[-WORD].safetensors     learned words
subject.safetensors                   a subject encoder; ip_adapter.safetensors if it is of IP-Adapter's kind
unet/, transformer/, text_encoder/    only where a whole component was trained
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from customize.backbone import Backbone
from customize.errors import UserError
from customize.files import tensors_of
from customize.loading import load_base
from customize.lora import folded_metadata, folded_state, has_lora, kohya_state, with_text_model
from customize.subject import ADAPTER_FILES, SubjectAdapter, save_adapter
from customize.tokens import SUFFIXES, ConceptTokens, load_words

FORMAT = 1
LORA = "pytorch_lora_weights.safetensors"
KOHYA = "lora_kohya.safetensors"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` only when all is written and flushed to disk.

    Raises UserError when the disk is full; what stood there before is then untouched.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(
                f"the disk is full: '{folder}' was not written, earlier checkpoints are intact; free some space."
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def save(
    folder: Path,
    backbone: Backbone,
    tokens: ConceptTokens | None,
    info: dict,
    kohya: bool = False,
    adapter: SubjectAdapter | None = None,
) -> None:
    """Writes what was trained, and `run.json` with `info`, into `folder`, in the place of what an earlier run wrote there."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / "saving") as new:
        _save_lora(new, backbone, kohya)
        _save_components(new, backbone)
        words = _save_words(new, tokens) if tokens is not None else {}
        if adapter is not None:
            save_adapter(adapter, new)
        libraries = {name: version(name) for name in LIBRARIES}
        (new / "run.json").write_text(json.dumps({"format": FORMAT, **info, "words": words, "libraries": libraries}, indent=2))
    earlier = _earlier(folder)
    for path in (folder / "saving").iterdir():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
        earlier.discard(folder / path.name)
    (folder / "saving").rmdir()
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _earlier(folder: Path) -> set[Path]:
    """What an earlier run, perhaps of another method, left in its folder: loaders would take it for a part of the new one."""
    if not (folder / "run.json").exists():
        return set()
    names = [LORA, KOHYA, *ADAPTER_FILES, "unet", "transformer", *(f"text_encoder{suffix}" for suffix in SUFFIXES)]
    return {path for name in names if (path := folder / name).exists()} | set(folder.glob("learned_embeds*.safetensors"))


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


def _save_words(folder: Path, tokens: ConceptTokens) -> dict[str, str]:
    """One file a word, with one key, the word, or a key for each of several text encoders; returns their names."""
    files = {}
    for i, (word, vectors) in enumerate(tokens.by_word().items()):
        safe = "".join(c if c.isalnum() else "_" for c in word)
        files[word] = "learned_embeds.safetensors" if len(tokens.words) == 1 else f"learned_embeds-{i}{safe}.safetensors"
        state = {word: next(iter(vectors.values()))} if len(vectors) == 1 else vectors
        save_file({k: v.detach().float().cpu().contiguous() for k, v in state.items()}, folder / files[word], {"word": word})
    return files


def read_info(run: Path) -> dict:
    """`run.json` of a run folder; UserError if it is missing, unreadable or of a later format."""
    try:
        info = json.loads((run / "run.json").read_text())
    except FileNotFoundError:
        raise UserError(f"'{run}' is not a run folder: it has no run.json; give the --output_dir of a training run.") from None
    except ValueError as error:
        raise UserError(f"'{run / 'run.json'}' is damaged ({error}); use an earlier checkpoint.") from error
    if info.get("format", 0) > FORMAT:
        raise UserError(
            f"'{run}' was written by a later version (format {info['format']}, known is {FORMAT}): pip install -U customize."
        )
    return info


def load(run: Path, pipe: DiffusionPipeline) -> None:
    """Gives a pipeline what a run trained: LoRA and learned words, through diffusers' own loaders."""
    info = read_info(run)
    if (run / LORA).exists():
        tensors_of(run / LORA)  # says so if it is damaged
        pipe.load_lora_weights(str(run), weight_name=LORA)
    for word, name in info["words"].items():
        load_words(pipe, word, tensors_of(run / name))


def load_pipeline(run: str | Path, dtype: torch.dtype = torch.float32, **options) -> DiffusionPipeline:
    """A diffusers pipeline that draws what a run has learned; `run` may also be a base model (folder, hub id, `stickers`).

    `options` go to diffusers' `from_pretrained`. Raises UserError for folders that are neither.
    """
    folder = Path(run)
    if not (folder / "run.json").exists():
        if folder.exists() and not (folder / "model_index.json").exists():
            read_info(folder)
        return load_base(str(run), dtype, **options)
    info = read_info(folder)
    revision = {k: v for k in ("revision", "variant") if (v := info["config"].get(k))}
    pipe = load_base(info["base_model"], dtype, **(revision | options))
    for name, part in pipe.components.items():
        if isinstance(part, ModelMixin | PreTrainedModel) and (folder / name).is_dir():
            setattr(pipe, name, type(part).from_pretrained(folder / name, dtype=dtype, use_safetensors=True).eval())
    load(folder, pipe)
    return pipe

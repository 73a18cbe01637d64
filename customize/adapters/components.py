"""Components of the base model (the denoiser, text encoders) that are trained as a whole."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from customize.adapters.base import Adapter
from customize.backbones.base import Backbone
from customize.backbones.quantize import quantized_names
from customize.backbones.text import COMPONENTS
from customize.errors import UserError, first_line
from customize.tensor_checks import load_whole, misfit

WHOLE = (
    "--quantize and --quantize_text_encoder hold frozen weights, which cannot be trained as a whole; leave "
    "them out, or train LoRA."
)


class Components(Adapter):
    """The denoiser and, if they are named, text encoders, trained in float32; each is saved as a diffusers
    folder. UserError for one whose weights are quantised."""

    files = COMPONENTS

    def __init__(self, backbone: Backbone, text_encoders: Sequence[nn.Module] = ()):
        self.backbone = backbone
        self.trained: list[Any] = [backbone.denoiser, *text_encoders]
        for module in self.trained:
            if quantized_names(module):
                raise UserError(WHOLE)
            module.float().requires_grad_(True)

    @property
    def changes_text(self) -> bool:
        return len(self.trained) > 1

    def save(self, folder: Path) -> dict:
        components: dict[str, Any] = self.backbone.components()
        for name, module in components.items():
            if any(module is own for own in self.trained):
                module.save_pretrained(folder / name, safe_serialization=True)
                _forget_place(folder / name / "config.json")
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        for name, part in pipe.components.items():
            if isinstance(part, ModelMixin | PreTrainedModel) and (folder / name).is_dir():
                setattr(pipe, name, trained_component(folder / name, part, part.dtype))


def _forget_place(path: Path) -> None:
    """Removes the folder that a component was loaded from from its configuration, as it names the user's
    machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def trained_component(folder: Path, base: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A component that was trained as a whole; UserError if weights are missing or their shapes are not
    those of the base model."""
    try:
        part = load_whole(type(base), folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = first_line(error)
        raise UserError(f"'{folder}' could not be loaded ({reason}); use an earlier checkpoint.") from error
    if reason := misfit(part.state_dict(), base.state_dict()):
        raise UserError(
            f"'{folder}' does not fit this base model ({reason}); load the base model it was trained on."
        )
    return part.eval()

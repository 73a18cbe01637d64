"""LoRA files of any layout, read into a pipeline or as updates of its layers."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from customize.adapters.lora_files import LORA, check_lora
from customize.backbones.text import COMPONENTS
from customize.errors import UserError, first_line
from customize.files import header, tensors_of
from customize.tensor_checks import check_finite


@dataclass(frozen=True)
class Update:
    """up @ down is added to a layer's weight, both flattened to matrices: down (rank, in), up (out,
    rank), float32; `shape` is that of down in the file, for convolutions."""

    down: Tensor
    up: Tensor
    shape: tuple[int, ...]

    @property
    def delta(self) -> Tensor:
        return self.up @ self.down


Layers = dict[tuple[str, str], Update]  # by component and layer


def load_lora(path: Path, pipe: DiffusionPipeline, name: str = "") -> str:
    """Loads a LoRA file, of any layout that diffusers loads, or that of a run, into a pipeline; returns
    the adapter's name. UserError for what is no LoRA or of another base model."""
    file = path / LORA if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"'{path}' holds no LoRA: give a run with {LORA}, or a LoRA file.")
    state, any_pipe = tensors_of(file), _as_any(pipe)
    check_finite(state, file, "use another copy")
    if all(key.partition(".")[0] in COMPONENTS for key in state):
        check_lora(pipe, state, str(file), header(file))
    name = name or adapter_name(file.with_suffix(""), pipe)
    try:
        any_pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except Exception as error:  # the library raises all kinds
        raise UserError(
            f"'{path}' is no LoRA of this base model ({first_line(error)}); name the base model that it was "
            "made for."
        ) from error
    if not any(name in names for names in any_pipe.get_list_adapters().values()):
        raise UserError(
            f"'{path}' has no layer of this base model; it begins with '{next(iter(state), '')}'."
        )
    return name


def read_lora(path: Path, pipe: DiffusionPipeline) -> Layers:
    """The updates of a LoRA, as `load_lora` reads it. The pipeline is as before afterwards. UserError
    also for a DoRA."""
    name = load_lora(path, pipe, "to_be_merged")
    try:
        layers = {
            (part, layer_name): layer
            for part, module in pipe.components.items()
            if part in COMPONENTS and module is not None
            for layer_name, layer in module.named_modules()
            if isinstance(layer, LoraLayer) and name in layer.lora_A
        }
        if any(name in layer.lora_magnitude_vector for layer in layers.values()):
            raise UserError(f"'{path}' is a DoRA, whose updates cannot be added up; merge LoRAs.")
        return {key: _update(layer, name) for key, layer in layers.items()}
    finally:
        any_pipe = _as_any(pipe)
        if any(own != name for names in any_pipe.get_list_adapters().values() for own in names):
            any_pipe.delete_adapters(name)
        else:
            any_pipe.unload_lora_weights()  # the layers themselves too, which LoRA may be added to again


def _as_any(pipe: DiffusionPipeline) -> Any:
    return pipe


def _update(layer: Any, name: str) -> Update:
    down, up = (part[name].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
    return Update(down.flatten(1), layer.scaling[name] * up.flatten(1), tuple(down.shape))


def adapter_name(folder: Path, pipe: DiffusionPipeline) -> str:
    """A name for a run's LoRA in a pipeline: its folder's name with only letters, digits and underscores."""
    name = re.sub(r"\W+", "_", folder.resolve().name) or "run"
    if hasattr(nn.ModuleDict(), name):  # such as half or train: peft keeps adapters in a ModuleDict
        name += "_run"
    taken = {own for names in pipe.get_list_adapters().values() for own in names}
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return next(own for own in itertools.chain([name], numbered) if own not in taken)

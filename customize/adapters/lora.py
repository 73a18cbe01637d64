"""LoRA (low-rank adapters, Hu et al., 2021, arXiv 2106.09685) of the denoiser and the text encoders,
through peft."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from customize.adapters.base import Adapter
from customize.adapters.lora_files import (
    LORA,
    MAGNITUDE,
    check_lora,
    diffusers_state,
    folded_metadata,
    layers_of,
)
from customize.adapters.lora_reading import Layers, adapter_name, read_lora
from customize.backbones.base import Backbone
from customize.backbones.layers import PRESETS, activate_assistant
from customize.config import check_ranges, option
from customize.errors import UserError
from customize.files import header, tensors_of

TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass
class LoraFields:
    """Fields of every method that trains LoRA."""

    rank: int = option(8, "rank of the LoRA matrices", least=1, essential=True)
    lora_alpha: float = option(0.0, "LoRA is scaled by lora_alpha / rank; 0 means rank", least=0)
    lora_dropout: float = option(0.0, "dropout before the LoRA matrices", least=0, below=1)
    lora_layers: str = option(
        "attention",
        "attention, attention+ff, all (convolutions too), or comma-separated names of modules, * for any "
        "part; NAME:0.5 trains them at half the learning rate",
    )
    use_dora: bool = option(False, "DoRA: also learn the magnitude of each weight vector")
    pretrained_lora: str = option(
        "", "LoRA to start from, a run or a file of any layout, of the same rank; empty: start from nothing"
    )


def add_lora(
    module: ModelMixin,
    settings: LoraFields,
    targets: list[str] | None = None,
    presets: Mapping[str, list[str]] = PRESETS,
    without: Collection[str] = (),
) -> None:
    """Adds trainable float32 LoRA to the layers that `lora_layers` (or `targets`) names; presets leave out
    those `without`. It is zero at the start."""
    preset = targets or presets.get(settings.lora_layers)
    rates = dict.fromkeys(preset, 1.0) if preset else _rates(settings.lora_layers)
    wanted = list(rates)
    own = layers_of(module)
    layers = [name for name in own if not preset or name not in without]
    # a preset's `proj_out` is that of a block, never the model's own last layer
    found = {
        t: [n for n in layers if fnmatchcase(n, f"*.{t}") or (fnmatchcase(n, t) and not preset)]
        for t in wanted
    }
    missing = [t for t, names in found.items() if not names]
    if missing and (not preset or len(missing) == len(wanted)):
        raise UserError(
            f"--lora_layers: no layer is named {', '.join(missing)}; use one of {', '.join(presets)}."
        )
    names = sorted({n for names in found.values() for n in names})
    if preset and not targets and set(missing) == {*wanted} - {*presets["attention"]} != set():
        raise UserError(
            f"--lora_layers {settings.lora_layers}: this model has no layers beyond those of 'attention'; "
            "use attention, or name modules."
        )
    check_ranges(settings)
    check_rank(settings.rank, [own[name] for name in names])
    module.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.lora_alpha or settings.rank,
            lora_dropout=settings.lora_dropout,
            use_dora=settings.use_dora,
            init_lora_weights=True,
            target_modules=names,
        )
    )
    cast_training_params(module, dtype=torch.float32)
    activate_assistant(module)
    for target, named in found.items():  # of a layer that several name, the last counts
        for parameter in (p for name in named for p in module.get_submodule(name).parameters()):
            parameter.lr_scale = rates[target]  # type: ignore[attr-defined]


def _rates(text: str) -> dict[str, float]:
    """The names in `lora_layers`, each with the factor of its learning rate."""
    found = {}
    for entry in text.split(","):
        name, _, rate = entry.strip().partition(":")
        try:
            found[name] = float(rate or 1)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < 1000:
            raise UserError(f"--lora_layers: '{entry.strip()}' has no rate above 0; write NAME:0.5.")
    return found


def with_own_rates(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups, split by the factors of the learning rate that `lora_layers` names."""
    found = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(getattr(parameter, "lr_scale", 1.0), []).append(parameter)
        found += [group | {"params": own, "lr": scale * group["lr"]} for scale, own in parts.items()]
    return found


def check_rank(rank: int, layers: Iterable[nn.Linear | nn.Conv2d]) -> None:
    """UserError for a rank above that of every layer, which would cost memory without a use."""
    largest = max(map(_largest_rank, layers))
    if rank > largest:
        raise UserError(f"--rank {rank} is more than any layer of this model has; choose {largest} at most.")


def _largest_rank(layer: nn.Linear | nn.Conv2d) -> int:
    """That of the weight; a quantised one does not show its shape."""
    if isinstance(layer, nn.Linear):
        return min(layer.out_features, layer.in_features)
    return min(len(layer.weight), layer.weight[0].numel())


def has_lora(module: ModelMixin) -> bool:
    """Whether LoRA of the module is trained."""
    return "default" in (getattr(module, "peft_config", None) or {})


class Lora(Adapter):
    """LoRA of the denoiser and, if they are named, of text encoders; saved as one file of diffusers'
    layout."""

    files = (LORA,)

    def __init__(self, backbone: Backbone, settings: LoraFields, text_encoders: Sequence[ModelMixin] = ()):
        self.backbone = backbone
        start = settings.pretrained_lora
        given = read_lora(Path(start), backbone.pipe) if start else {}
        add_lora(backbone.denoiser, settings, presets=backbone.lora_presets, without=backbone.unused_layers)
        for encoder in text_encoders:
            add_lora(encoder, settings, TEXT_ATTENTION)
        if given:
            self._start_from(given, start)

    @torch.no_grad()
    def _start_from(self, given: Layers, where: str) -> None:
        """Takes the updates of a LoRA; UserError unless all of its layers are trained here, at its rank."""
        trained = {
            (part, name): layer
            for part, module in self.backbone.components().items()
            for name, layer in module.named_modules()
            if isinstance(layer, LoraLayer) and "default" in layer.lora_A
        }
        for key, update in given.items():
            if key[1] in self.backbone.unused_layers:  # other tools train them too, without effect
                continue
            if key not in trained:
                raise UserError(
                    f"--pretrained_lora: '{where}' has the layer '{key[1]}' of the {key[0]}, which is not "
                    "trained here; give the --lora_layers that it was trained with."
                )
            layer: Any = trained[key]
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if len(down) != len(update.down):
                raise UserError(
                    f"--pretrained_lora: '{where}' has rank {len(update.down)}; give --rank "
                    f"{len(update.down)}."
                )
            down.copy_(update.down.view_as(down))
            up.copy_((update.up / layer.scaling["default"]).view_as(up))

    @property
    def changes_text(self) -> bool:
        return any(has_lora(encoder) for encoder in self.backbone.text_encoders)

    def save(self, folder: Path) -> dict:
        arguments: dict[str, Any] = {}
        for name, module in adapted(self.backbone).items():
            arguments[f"{name}_lora_layers"] = diffusers_state(
                module, name, self.backbone.denoiser_name == "unet"
            )
            arguments[f"{name}_lora_adapter_metadata"] = folded_metadata(module)
        type(self.backbone.pipe).save_lora_weights(folder, weight_name=LORA, **arguments)
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        file = folder / LORA
        if file.exists():
            state = tensors_of(file)
            check_lora(pipe, state, str(file), header(file))
            pipe.load_lora_weights(str(folder), weight_name=LORA, adapter_name=adapter_name(folder, pipe))
            _load_magnitudes(pipe, state)


@torch.no_grad()
def _load_magnitudes(pipe: DiffusionPipeline, state: Mapping[str, Tensor]) -> None:
    """DoRA's magnitudes of text encoders, which transformers' loader leaves out."""
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if not part.startswith("text_encoder") or not rest.endswith(MAGNITUDE):
            continue
        encoder, layer = getattr(pipe, part), rest.removesuffix(MAGNITUDE)
        known = layer if layer in dict(encoder.named_modules()) else layer.removeprefix("text_model.")
        *_, magnitude = encoder.get_submodule(known).lora_magnitude_vector.values()
        magnitude.weight.copy_(value)


def adapted(backbone: Backbone) -> dict[str, ModelMixin]:
    """The components that have LoRA, by the pipeline's names for them."""
    return {name: module for name, module in backbone.components().items() if has_lora(module)}

"""LoRA files in diffusers' layout: the tensors and header to write, and a check against the base model
before loading."""

import json
import math
from collections import defaultdict
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from customize.backbones.text import COMPONENTS
from customize.errors import UserError
from customize.tensor_checks import check_finite

MAGNITUDE = ".lora_magnitude_vector"  # end of the keys of DoRA's magnitudes

# of a LoRA file's keys, in diffusers' older layout (UNets) and in peft's: which tensor of a layer it is
ENDINGS = {
    ".lora.down.weight": ("older", "down"),
    ".lora.up.weight": ("older", "up"),
    ".lora_linear_layer.down.weight": ("older", "down"),
    ".lora_linear_layer.up.weight": ("older", "up"),
    ".lora_A.weight": ("peft", "down"),
    ".lora_B.weight": ("peft", "up"),
    MAGNITUDE: ("", "magnitude"),
}


LORA = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # diffusers' entry of the header


def lora_scale(module: ModelMixin) -> float:
    config = module.peft_config["default"]
    return config.lora_alpha / config.r


def folded_state(module: ModelMixin) -> dict[str, Tensor]:
    """The LoRA tensors in peft's names, float32 on the CPU, with alpha / rank multiplied into `lora_B`.

    Readers that know no alpha (ComfyUI ignores the header) then apply the right scale, as alpha equals
    the rank.
    """
    scale, state = lora_scale(module), get_peft_model_state_dict(module)
    scaled = {name: value * scale if ".lora_B." in name else value for name, value in state.items()}
    return {name: value.detach().float().cpu().contiguous() for name, value in scaled.items()}


def folded_metadata(module: ModelMixin) -> dict:
    """The adapter's configuration for the file's header, after folding."""
    config = module.peft_config["default"].to_dict()
    shown = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return shown | {"lora_alpha": config["r"]}


def diffusers_state(module: ModelMixin, name: str, older_names: bool) -> dict[str, Tensor]:
    """`folded_state` in the names that diffusers' loader expects for the component `name`; of UNet models
    in its older ones."""
    state = folded_state(module)
    if name.startswith("text_encoder"):
        state = {with_text_model(key): value for key, value in state.items()}
    if not older_names:
        return state
    # diffusers renames attention layers alone, and its loader then misreads a file with both kinds of
    # names
    renamed = convert_state_dict_to_diffusers(state).items()
    return {key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for key, v in renamed}


def with_text_model(path: str) -> str:
    """CLIP's canonical key: transformers 5.6 dropped `text_model.`, which every reader of LoRA files
    expects."""
    return path if path.startswith("text_model.") else f"text_model.{path}"


def check_lora(
    pipe: DiffusionPipeline, state: dict[str, Tensor], where: str, header: dict[str, str] | None = None
) -> None:
    """UserError unless every layer in a LoRA file exists in the pipeline, with both matrices and matching
    widths, and all values are finite. With the file's `header`, the layers must also be those that it
    lists."""
    about = _described(header, where) if header and METADATA in header else None
    if reason := _misfit(pipe, state, about):
        raise UserError(
            f"'{where}' does not fit this base model ({reason}); load the base model it was trained on."
        )
    check_finite(state, where)


def _misfit(pipe: DiffusionPipeline, state: dict[str, Tensor], about: dict[str, dict] | None) -> str:
    """What is wrong with the file, or nothing."""
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    layouts = set()
    for key, value in state.items():
        part, layer, layout, kind = _named(key)
        if not kind:
            return f"it has an unknown tensor '{key}'"
        if not value.is_floating_point():
            return f"'{key}' is of {value.dtype}"
        found[part][layer][kind] = value
        layouts |= {layout} - {""}
    if not found:
        return "it is empty"
    if len(layouts) > 1:  # diffusers' loader misreads such a file
        return "its names are of two layouts"
    reasons = (
        _misfit_of_part(part, getattr(pipe, part, None), layers, about) for part, layers in found.items()
    )
    return next(filter(None, reasons), "")


def _named(key: str) -> tuple[str, str, str, str]:
    """Part, layer, layout and kind of a LoRA file's tensor; the kind is empty if it is none."""
    part, _, rest = key.partition(".")
    for ending, (layout, kind) in ENDINGS.items():
        if part in COMPONENTS and rest.endswith(ending):
            return part, rest.removesuffix(ending), layout, kind
    return part, rest, "", ""


def _misfit_of_part(
    part: str, module: nn.Module | None, found: dict[str, dict[str, Tensor]], about: dict[str, dict] | None
) -> str:
    if module is None:
        return f"it has no {part}"
    own = layers_of(module)
    if len({"magnitude" in tensors for tensors in found.values()}) > 1:
        return f"some layers of the {part} lack their magnitudes"
    for name, tensors in found.items():
        layer = own.get(name, own.get(name.removeprefix("text_model.")))
        if layer is None:
            return f"its {part} has no layer '{name}'"
        if reason := _misfit_of_layer(layer, tensors):
            return f"'{part}.{name}' {reason}"
    return _misfit_of_header(part, own, found, about) if about is not None else ""


def layers_of(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layers that LoRA can be added to, by their names in the untouched module."""
    named = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    return {name.removesuffix(".base_layer"): layer for name, layer in named if ".lora_" not in name}


def _misfit_of_layer(layer: nn.Linear | nn.Conv2d, tensors: dict[str, Tensor]) -> str:
    if missing := {"down", "up"} - tensors.keys():
        return f"lacks its {min(missing)} matrix"
    shapes = {kind: tuple(value.shape) for kind, value in tensors.items()}
    rank = next(iter(shapes["down"]), 0)
    wanted: dict[str, tuple[int, ...]]
    if isinstance(layer, nn.Linear):
        out = layer.out_features
        wanted = {"down": (rank, layer.in_features), "up": (out, rank), "magnitude": (out,)}
    else:
        out, _, *kernel = layer.weight.shape
        wanted = {
            "down": (rank, layer.in_channels, *kernel),
            "up": (out, rank, 1, 1),
            "magnitude": (1, out, 1, 1),
        }
    wrong = [kind for kind, shape in shapes.items() if shape != wanted[kind]]
    return (
        f"is {shapes[wrong[0]]} where {wanted[wrong[0]]} is needed"
        if wrong
        else ""
        if rank
        else "is of rank 0"
    )


def _misfit_of_header(
    part: str, own: dict, found: dict[str, dict[str, Tensor]], about: dict[str, dict]
) -> str:
    """A layer that the header lists and the file lacks would be drawn untrained."""
    if part not in about:
        return f"its header does not describe the {part}"
    targets, ranks = about[part]["target_modules"], {len(tensors["down"]) for tensors in found.values()}
    listed = {name for name in own if any(name == t or name.endswith(f".{t}") for t in targets)}
    if listed != {name if name in own else name.removeprefix("text_model.") for name in found}:
        return f"the layers of its {part} are not those that its header lists"
    if ranks != {about[part]["r"]}:
        return f"the rank of its {part} is not the header's"
    dora = any("magnitude" in tensors for tensors in found.values())
    return (
        "" if dora == about[part]["use_dora"] else f"the magnitudes of its {part} are not as its header says"
    )


def _described(header: dict[str, str], where: str) -> dict[str, dict]:
    """The settings of LoRA in a file's header, by part; UserError if they are damaged."""
    try:
        about = json.loads(header[METADATA])
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in about.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        for part in parts.values():
            _check_settings(part)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"'{where}' is damaged (its header: {error}); use an earlier checkpoint.") from error
    return dict(parts)


def _check_settings(part: dict[str, Any]) -> None:
    LoraConfig(**part)  # it raises for unknown names
    rank, alpha, targets = part["r"], part["lora_alpha"], part["target_modules"]
    sound = (
        type(rank) is int
        and isinstance(alpha, int | float)
        and math.isfinite(alpha)
        and isinstance(part["use_dora"], bool)
    )
    if not sound or not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError("r, lora_alpha, use_dora or target_modules is of another type")

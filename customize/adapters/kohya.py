"""LoRA in kohya's layout, which A1111 and ComfyUI read: an export beside diffusers' file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from customize.adapters.base import Adapter
from customize.adapters.lora import adapted
from customize.adapters.lora_files import with_text_model
from customize.adapters.lora_reading import Layers
from customize.adapters.merging import FoldedLora
from customize.backbones.base import Backbone
from customize.errors import UserError

KOHYA = "lora_kohya.safetensors"


class KohyaLora(Adapter):
    """The LoRA of a backbone, or those of `folded` adapters, once more in kohya's layout; pipelines load
    diffusers' file instead."""

    files = (KOHYA,)

    def __init__(self, backbone: Backbone, folded: Sequence[FoldedLora] = ()):
        if not backbone.kohya_prefixes:
            raise UserError(
                "--export_kohya is for UNet models; other tools read the diffusers file of this one."
            )
        self.backbone, self.folded = backbone, folded

    def save(self, folder: Path) -> dict:
        flat: dict[str, Tensor] = {}
        prefixes = self.backbone.kohya_prefixes
        for adapter in self.folded:
            flat |= kohya_layers(adapter.updates(), prefixes)
        for name, module in {} if self.folded else adapted(self.backbone).items():
            flat |= kohya_state(module, prefixes[name])
        if flat:
            save_file(flat, folder / KOHYA, {"format": "pt", "ss_network_module": "networks.lora"})
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Nothing: diffusers' file holds the same LoRA."""


def kohya_state(module: ModelMixin, prefix: str) -> dict[str, Tensor]:
    """The layout of kohya's sd-scripts with true alphas: `PREFIX_path_with_underscores.lora_down.weight`,
    `.alpha`, ...

    `prefix` is lora_unet, lora_te (Stable Diffusion), lora_te1 or lora_te2 (XL).
    """
    config, out = module.peft_config["default"], {}
    for name, value in get_peft_model_state_dict(module).items():
        layer, _, kind = name.partition(".lora_")
        key = _key(prefix, layer)
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(kind, "dora_scale")
        value = value.detach().float().cpu()
        if part == "dora_scale":  # (out, 1) of a linear layer, (out, 1, 1, 1) of a convolution
            value = value.reshape(-1, *[1] * (module.get_submodule(layer).weight.ndim - 1))
        out[f"{key}.{part}"] = value.contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(config.lora_alpha))
    return out


def kohya_layers(layers: Layers, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The same of dense updates; each alpha is the layer's rank."""
    out = {}
    for (part, layer), update in layers.items():
        key, up = _key(prefixes[part], layer), update.up.cpu()
        out[f"{key}.lora_down.weight"] = update.down.view(-1, *update.shape[1:]).cpu().contiguous()
        out[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * (len(update.shape) - 2)).contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(up.shape[1]))
    return out


def _key(prefix: str, layer: str) -> str:
    path = with_text_model(layer) if prefix.startswith("lora_te") else layer
    return f"{prefix}_{path.replace('.', '_')}"

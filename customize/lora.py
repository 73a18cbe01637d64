"""Low-rank adapters through peft, and their files in the layouts other tools read."""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from customize.config import check_ranges, option
from customize.errors import UserError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in"]  # of a UNet's residual and transformer blocks
PRESETS = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + CONVOLUTIONS,
}
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass
class LoraFields:
    """Fields of every method that trains LoRA."""

    rank: int = option(8, "rank of the LoRA matrices", least=1)
    lora_alpha: float = option(0.0, "LoRA is scaled by lora_alpha / rank; 0 means rank", least=0)
    lora_dropout: float = option(0.0, "dropout before the LoRA matrices", least=0, below=1)
    lora_layers: str = option("attention", "attention, attention+ff, all (convolutions too), or comma-separated module names")
    use_dora: bool = option(False, "also learn the weights' magnitudes (DoRA)")


def add_lora(module: ModelMixin, settings: LoraFields, targets: list[str] | None = None) -> None:
    """Adds trainable float32 LoRA to the layers that `lora_layers` (or `targets`) names; it is zero at the start."""
    preset = targets or PRESETS.get(settings.lora_layers)
    wanted = preset or [name.strip() for name in settings.lora_layers.split(",")]
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    # a preset's `proj_out` is that of a block, never the model's own last layer
    found = {t: [n for n in layers if n.endswith("." + t) or (n == t and not preset)] for t in wanted}
    missing = [t for t, names in found.items() if not names]
    if missing and (not preset or len(missing) == len(wanted)):
        raise UserError(f"--lora_layers: no layer is named {', '.join(missing)}; use one of {', '.join(PRESETS)}.")
    check_ranges(settings)
    module.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.lora_alpha or settings.rank,
            lora_dropout=settings.lora_dropout,
            use_dora=settings.use_dora,
            init_lora_weights=True,
            target_modules=sorted({n for names in found.values() for n in names}),
        )
    )
    cast_training_params(module, dtype=torch.float32)


def has_lora(module: ModelMixin) -> bool:
    return bool(getattr(module, "peft_config", None))


def lora_scale(module: ModelMixin) -> float:
    config = module.peft_config["default"]
    return config.lora_alpha / config.r


def folded_state(module: ModelMixin) -> dict[str, Tensor]:
    """The LoRA tensors in peft's names, float32 on the CPU, with alpha / rank multiplied into `lora_B`.

    Readers that know no alpha (ComfyUI ignores the header) then apply the right scale, as alpha equals rank.
    """
    scale, state = lora_scale(module), get_peft_model_state_dict(module)
    scaled = {name: value * scale if ".lora_B." in name else value for name, value in state.items()}
    return {name: value.detach().float().cpu().contiguous() for name, value in scaled.items()}


def folded_metadata(module: ModelMixin) -> dict:
    """The adapter's configuration for the file's header, after folding."""
    config = module.peft_config["default"].to_dict()
    shown = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return shown | {"lora_alpha": config["r"]}


def kohya_state(module: ModelMixin, prefix: str) -> dict[str, Tensor]:
    """The layout of kohya's sd-scripts with true alphas: `PREFIX_path_with_underscores.lora_down.weight`, `.alpha`, ...

    `prefix` is lora_unet, lora_te (Stable Diffusion), lora_te1 or lora_te2 (XL).
    """
    config, out = module.peft_config["default"], {}
    for name, value in get_peft_model_state_dict(module).items():
        path, _, kind = name.partition(".lora_")
        key = (
            f"{prefix}_{with_text_model(path).replace('.', '_')}"
            if prefix.startswith("lora_te")
            else f"{prefix}_{path.replace('.', '_')}"
        )
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(kind, "dora_scale")
        value = value.detach().float().cpu()
        out[f"{key}.{part}"] = (value[:, None] if part == "dora_scale" else value).contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(config.lora_alpha))
    return out


def with_text_model(path: str) -> str:
    """CLIP's canonical key: transformers 5.6 dropped `text_model.`, which every reader of LoRA files expects."""
    return path if path.startswith("text_model.") else f"text_model.{path}"

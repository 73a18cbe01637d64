"""The families of base models, by the name of their diffusers pipeline."""

from typing import Any

from diffusers import DiffusionPipeline

from customize.backbones.base import Backbone
from customize.backbones.flux import Chroma, Flux, FluxKontext
from customize.backbones.flux2 import Flux2, Flux2Klein
from customize.backbones.qwen_image import Krea2, QwenImage
from customize.backbones.sana import Lumina2, Sana
from customize.backbones.sd3 import SD3
from customize.backbones.stable_diffusion import SD, SDXL
from customize.backbones.z_image import ZImage
from customize.errors import UserError

BACKBONES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
    "FluxKontextPipeline": FluxKontext,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
    "Krea2Pipeline": Krea2,
    "ChromaPipeline": Chroma,
    "SanaPipeline": Sana,
    "Lumina2Pipeline": Lumina2,
}


def family_of(pipe: Any) -> type[Backbone]:
    """The class of a pipeline's backbone."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in BACKBONES:
            return BACKBONES[kind.__name__]
    raise UserError(f"no backbone wraps a {type(pipe).__name__}; supported are {', '.join(BACKBONES)}.")


def wrap(pipe: DiffusionPipeline, name: str = "") -> Backbone:
    """The backbone for a pipeline that is already loaded."""
    return family_of(pipe)(pipe, name)

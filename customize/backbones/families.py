"""The families of base models, by the name of their diffusers pipeline."""

from diffusers import DiffusionPipeline

from customize.backbones.base import Backbone
from customize.backbones.flux import Flux
from customize.backbones.sd3 import SD3
from customize.backbones.stable_diffusion import SD, SDXL
from customize.errors import UserError

BACKBONES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
}


def wrap(pipe: DiffusionPipeline, name: str = "") -> Backbone:
    """The backbone for a pipeline that is already loaded."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in BACKBONES:
            return BACKBONES[kind.__name__](pipe, name)
    raise UserError(f"no backbone wraps a {type(pipe).__name__}; supported are {', '.join(BACKBONES)}.")

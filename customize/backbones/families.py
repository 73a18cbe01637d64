"""The families of base models, by the name of their diffusers pipeline."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from diffusers import DiffusionPipeline

from customize.backbones.base import Backbone
from customize.backbones.flux import Chroma, Flux, FluxKontext
from customize.backbones.flux2 import Flux2, Flux2Klein
from customize.backbones.hidream import HiDream
from customize.backbones.qwen_image import Krea2, QwenImage, QwenImageEditPlus
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
    "QwenImageEditPlusPipeline": QwenImageEditPlus,
    "ZImagePipeline": ZImage,
    "Krea2Pipeline": Krea2,
    "ChromaPipeline": Chroma,
    "SanaPipeline": Sana,
    "Lumina2Pipeline": Lumina2,
    "HiDreamImagePipeline": HiDream,
}


def family_of(pipe: Any) -> type[Backbone]:
    """The class of a pipeline's backbone, also of one that draws from images; `Backbone` if none fits."""
    names = (kind.__name__.replace("Img2Img", "") for kind in type(pipe).__mro__)
    return next((BACKBONES[name] for name in names if name in BACKBONES), Backbone)


def as_called(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a text-to-image pipeline as this one names them, with what it needs beside them.

    UserError for an argument that it does not take, such as a negative prompt, and where it needs images.
    """
    family = family_of(pipe)
    if family.needs_references and not (arguments.get("subject_images") or arguments.get("image")):
        raise UserError(
            f"a {type(pipe).__name__} draws from images alone: name those of the subject with "
            "--subject_images."
        )
    given = {family.guidance_name if k == "guidance_scale" else k: v for k, v in arguments.items()}
    known = signature(pipe.__call__).parameters
    takes_all = any(own.kind is Parameter.VAR_KEYWORD for own in known.values())
    if unknown := [name for name in given if name not in known and not takes_all]:
        raise UserError(f"--{unknown[0]}: a {type(pipe).__name__} takes none; leave it out.")
    family.prepare_call(pipe, given)
    return given | family.call_options(given)


def wrap(pipe: DiffusionPipeline, name: str = "") -> Backbone:
    """The backbone for a pipeline that is already loaded."""
    if (family := family_of(pipe)) is Backbone:
        raise UserError(f"no backbone wraps a {type(pipe).__name__}; supported are {', '.join(BACKBONES)}.")
    return family(pipe, name)

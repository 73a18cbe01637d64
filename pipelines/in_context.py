"""Pipelines of models that are shown images themselves, called as those with a subject encoder:

pipe = load_subject_pipeline("runs/in_context")
pipe("a dog on the beach", subject_images=["a.png", "b.png"]).images[0]
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    QwenImageEditPlusPipeline,
)
from PIL import Image
from torch import Tensor

from customize.adapters.encoders.image_encoder import squared
from customize.backbones.families import family_of
from customize.errors import UserError
from customize.imaging import flatten, to_tensor
from customize.pipelines.inputs import opened
from customize.prompts import WORDS, without_words

Stock: Any = object  # a stock pipeline: the mixin is only ever used beside one


def reference_image(image: Any, side: int) -> Image.Image:
    """A reference as a square of `side` pixels, padded with white, as in training."""
    return squared(flatten(opened(image)), "pad").resize((side, side), Image.Resampling.LANCZOS)


def reference_pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """References as pixels (n, 3, side, side) in [-1, 1]."""
    return torch.stack([to_tensor(reference_image(image, side)) * 2 - 1 for image in images])


class InContextMixin(Stock):
    """Adds `subject_images` to the call of a stock pipeline that takes `image`; without them it is the stock
    one."""

    reference_resolution = 512

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.__mro__[2].__call__  # type: ignore[misc]
        parameters = [p for p in inspect.signature(stock).parameters.values() if p.name != "image"]
        more = inspect.Parameter("subject_images", inspect.Parameter.KEYWORD_ONLY, default=None)

        @wraps(stock)
        def call(self: Any, prompt: Any = None, **options: Any) -> Any:
            if images := options.pop("subject_images", None):
                options["image"] = self._shown(images)
                prompt = without_words(prompt) if isinstance(prompt, str) else [*map(without_words, prompt)]
            elif family_of(self).needs_references and options.get("image") is None:
                raise UserError(
                    "subject_images: this model draws from images alone; give one of the subject."
                )
            return self._drawn(stock, prompt=prompt, **options)

        call.__signature__ = inspect.Signature([*parameters, more])  # type: ignore[attr-defined]
        cls.__call__ = call  # type: ignore[method-assign]

    def _drawn(self, stock: Callable, **options: Any) -> Any:
        """The stock pipeline's call."""
        return stock(self, **options)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Saves the pipeline as the stock one, which stock diffusers reads."""
        _as(type(self).__mro__[2], self).save_pretrained(save_directory, *args, **options)

    def _shown(self, images: Any) -> Any:
        """References of one subject, a list or a dictionary of its word to a list, as the pipeline takes
        them."""
        if isinstance(images, Mapping):
            if list(images) != [WORDS[0]]:
                raise UserError(
                    f"subject_images: this model is shown one subject, {WORDS[0]}, not {', '.join(images)}."
                )
            images = images[WORDS[0]]
        listed = list(images) if isinstance(images, list | tuple) else [images]
        if len(listed) > (most := family_of(self).takes_references):
            raise UserError(f"subject_images: this model is shown {most} at most, not {len(listed)}.")
        shown = [reference_image(image, self.reference_resolution) for image in listed]
        return shown if most > 1 else shown[0]


class InContextFlux2Pipeline(InContextMixin, Flux2Pipeline): ...


class InContextFlux2KleinPipeline(InContextMixin, Flux2KleinPipeline): ...


class InContextFluxKontextPipeline(InContextMixin, FluxKontextPipeline): ...


class InContextQwenImageEditPlusPipeline(InContextMixin, QwenImageEditPlusPipeline):
    """References keep the resolution of the run; the language model is shown them at the stock pipeline's."""

    def _drawn(self, stock: Callable, **options: Any) -> Any:
        """The stock call, but for the constant by which it resizes references for the autoencoder: a copy of
        the function has its own, so that other pipelines keep theirs."""
        call: Any = inspect.unwrap(stock)
        own = call.__globals__ | {"VAE_IMAGE_SIZE": self.reference_resolution**2}
        with torch.no_grad():
            return FunctionType(call.__code__, own, call.__name__, call.__defaults__)(self, **options)


KINDS: dict[Any, Any] = {
    kind.__mro__[2]: kind
    for kind in (
        InContextFlux2Pipeline,
        InContextFlux2KleinPipeline,
        InContextFluxKontextPipeline,
        InContextQwenImageEditPlusPipeline,
    )
}


def with_references(pipe: DiffusionPipeline, resolution: int) -> Any:
    """A pipeline of the same components that is shown `subject_images` at so many pixels a side; UserError
    for a kind that is shown none."""
    if isinstance(pipe, InContextMixin):
        return pipe
    if type(pipe) not in KINDS:
        raise UserError(f"a {type(pipe).__name__} is shown no images of subjects.")
    made = _as(KINDS[type(pipe)], pipe)
    made.reference_resolution = resolution
    return made


def _as(kind: Any, pipe: Any) -> Any:
    """A pipeline of another class with the components and settings of this one."""
    _, names = kind._get_signature_keys(kind)
    return kind(**pipe.components, **{name: pipe.config[name] for name in names if name in pipe.config})

"""The inputs of a call with subjects: parsed and checked."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.errors import UserError, shortened
from customize.imaging import TooLarge, checked_image, read_image
from customize.prompts import WORDS, without_words

Reference = Image.Image | str | Path


MAX_PIXELS = 10**8  # of a reference or a mask


Subjects = dict[str, Tensor]  # features (references, tokens, features) by word


def texts_of(prompt: str | list[str] | None) -> list[str] | None:
    return [prompt] if isinstance(prompt, str) else prompt


def by_name(call: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    found = inspect.signature(call).bind(*args, **kwargs).arguments
    others = found.pop("kwargs", {})  # what the call itself takes as **kwargs
    return found | others


def without_subjects(text: str | list[str]) -> str | list[str]:
    """A text, or several, for an adapter that gives no words."""
    return without_words(text) if isinstance(text, str) else [without_words(one) for one in text]


def each_prompt(images: Any, count: int) -> list[Any]:
    """The subjects of each prompt: those given for all of them, or one entry a prompt."""
    if isinstance(images, str) or not isinstance(images, Sequence):
        return [images] * count
    own = [
        entry is None or (isinstance(entry, Mapping | Sequence | Tensor) and not isinstance(entry, str))
        for entry in images
    ]
    if not any(own):
        return [images] * count
    if not all(own):
        raise UserError(
            "subject_images: for a prompt each, every entry must be a list or dictionary of images, or None."
        )
    if len(images) != count:
        raise UserError(
            f"subject_images has {len(images)} entries for {count} prompts: give one for each, or one for "
            "all."
        )
    return list(images)


def single_images(images: Any) -> list[Any]:
    """The one image of each row, for an encoder that takes the place of the prompt: of one image, of a
    dictionary that gives one to `<s>`, or of a list of lists of one. UserError for several images in a
    row."""
    nested = (
        isinstance(images, list | tuple)
        and bool(images)
        and all(isinstance(row, list | tuple | Mapping) for row in images)
    )
    found = []
    for row in images if nested else [images]:
        if isinstance(row, Mapping):
            if [*row] != [WORDS[0]]:
                raise UserError(
                    f"subject_images: one image takes the place of the prompt; give {WORDS[0]} alone."
                )
            row = row[WORDS[0]]
        row = list(row) if isinstance(row, list | tuple) else [row]
        if len(row) != 1:
            raise UserError(
                f"subject_images: one image takes the place of the prompt, not {len(row)}; give one, or a "
                "list of lists of one."
            )
        found += row
    return found


def refuse_subject_options(scale: Any, masks: Any, maps: Sequence[str]) -> None:
    """UserError for what does not go with an image in the place of the prompt."""
    used = {"subject_scale": scale != 1.0, "subject_masks": masks is not None, "attention_maps": bool(maps)}
    for name in (name for name, is_used in used.items() if is_used):
        raise UserError(f"{name}: the image takes the place of the prompt and has no words; leave it out.")


def opened(image: Any, kind: str = "reference") -> Image.Image:
    """An image, or the image in a file, upright and in 8 bits. UserError if it is neither, or too large.
    No address is fetched."""
    if not isinstance(image, Image.Image | str | Path):
        raise UserError(f"a {kind} must be an image or the path of one, not {type(image).__name__}.")
    named = f"the {kind}" if isinstance(image, Image.Image) else f"the {kind} '{shortened(str(image))}'"
    if isinstance(image, str) and "://" in image:
        raise UserError(f"{named} is an address: download the image, and give the path of its file.")
    try:
        return (
            checked_image(image, MAX_PIXELS)
            if isinstance(image, Image.Image)
            else read_image(Path(image), MAX_PIXELS)
        )
    except TooLarge as error:
        raise UserError(f"{named} has {error}: shrink it to at most {MAX_PIXELS}.") from error
    except Exception as error:  # PIL's decoders raise all kinds
        raise UserError(
            f"{named} cannot be read as an image ({error}); give a PNG, JPEG or WebP file."
        ) from error


def check_length(prompt: str, subjects: Iterable[str], tokenizer: Any) -> None:
    """UserError if a subject's word lies beyond what the text encoder reads; the tokenizer must know
    these words."""
    read = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    for word in subjects:
        if tokenizer.convert_tokens_to_ids(word) not in read:
            most = tokenizer.model_max_length
            raise UserError(
                f"{word} lies beyond the {most} tokens that are read of '{shortened(prompt)}': say it "
                "earlier."
            )


def side_by_side(present: Tensor, height: int, width: int) -> Tensor:
    """Regions (prompts, subjects, height, width): columns of equal width, from left to right, for the
    subjects that are `present` (prompts, subjects)."""
    column = (
        torch.arange(width, device=present.device) * present.sum(1, keepdim=True) // width
    )  # (prompts, width)
    regions = (column[:, None] == (present.cumsum(1) - 1)[..., None]) & present[..., None]
    return regions[:, :, None].expand(-1, -1, height, -1)


Scale = float | Mapping[str, float]


def scales_of(scale: Scale, layers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
    """The weight of each subject, in the order of `WORDS`, and the scale of each layer.

    `scale` is one number for all, or numbers by subject, or by the beginning of layers' names, of which the
    longest that fits counts. UserError for what is no number of at least 0, and for a key that is neither a
    subject's word nor the beginning of a layer's name.
    """
    for number in scale.values() if isinstance(scale, Mapping) else [scale]:
        known = isinstance(number, int | float) and not isinstance(number, bool)
        if not known or not 0 <= number < math.inf:
            raise UserError(
                f"subject_scale must be a number of at least 0, or such numbers by subject or by layer, not "
                f"{number!r}."
            )
    by_name = dict(scale) if isinstance(scale, Mapping) else {}
    subjects = [float(by_name.pop(word, 1.0)) for word in WORDS]
    for prefix in by_name:
        if not any(layer.startswith(prefix) for layer in layers):
            raise UserError(
                f"subject_scale: '{prefix}' is neither a subject's word ({', '.join(WORDS)}) nor the "
                f"beginning of a layer's name ({', '.join(layers)})."
            )
    if not isinstance(scale, Mapping):
        return subjects, dict.fromkeys(layers, float(scale))
    scales = {}
    for layer in layers:
        fitting = [prefix for prefix in by_name if layer.startswith(prefix)]
        scales[layer] = float(by_name[max(fitting, key=len)]) if fitting else 1.0
    return subjects, scales

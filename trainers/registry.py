"""The methods by name. Nothing heavy is imported here: `customize methods` must answer at once."""

from importlib import import_module
from typing import NamedTuple

from customize.errors import UserError, nearest


class Entry(NamedTuple):
    """Where a method lives ("module:Class") and what it learns, in one line."""

    path: str
    summary: str


METHODS: dict[str, Entry] = {
    "dreambooth": Entry(
        "customize.trainers.methods.dreambooth:DreamBooth",
        "LoRA (or the whole denoiser) on a rare word, with prior preservation (Ruiz et al., 2023)",
    ),
    "textual_inversion": Entry(
        "customize.trainers.methods.textual_inversion:TextualInversion",
        "vectors of a new word, nothing else (Gal et al., 2023)",
    ),
    "pivotal_tuning": Entry(
        "customize.trainers.methods.pivotal_tuning:PivotalTuning",
        "a new word and LoRA together",
    ),
    "custom_contrast": Entry(
        "customize.trainers.methods.custom_contrast:CustomContrast",
        "an encoder of images, no tuning per subject, taught by contrast between subjects (Chen et "
        "al., 2025)",
    ),
    "ip_adapter": Entry(
        "customize.trainers.methods.ip_adapter:IPAdapter",
        "an encoder of images: visual tokens alone (Ye et al., 2023)",
    ),
}


def find_entry(name: str) -> Entry:
    """The entry of a method, without importing the method."""
    if name not in METHODS:
        raise UserError(
            f"There is no method '{name}': `customize methods` lists them.{nearest(name, METHODS)}"
        )
    return METHODS[name]


def find_method(name: str) -> type:
    """The class of a method; imports its module."""
    module, attribute = find_entry(name).path.split(":")
    return getattr(import_module(module), attribute)

"""Concepts: subjects to learn, each with its folder of images and its prompt."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from customize.config import option
from customize.data.images import ImageFile, find_images
from customize.errors import UserError, nearest, shortened
from customize.reading import parsed_json, read_text


@dataclass
class DataConfig:
    """The images to learn from, and how they become tensors."""

    instance_data_dir: str = option("", "folder of images of the subject", essential=True)
    instance_prompt: str = option("", "caption of images that have no caption file", essential=True)
    concepts_list: str = option(
        "",
        "JSON file for several subjects: a list of {instance_prompt, class_prompt, instance_data_dir, "
        "class_data_dir, weight}; images of weight 2 are shown twice as often as those of weight 1",
    )
    class_prompt: str = option(
        "", 'prompt of the class for prior preservation, such as "a photo of a dog"', essential=True
    )
    class_data_dir: str = option(
        "", "folder of class images for prior preservation; empty: class_images in --output_dir"
    )
    resolution: int = option(
        0,
        "side of the square crop in pixels (buckets have about its area); 0: what the model was trained at",
        least=0,
        essential=True,
    )
    smaller_resolutions: list[int] = option(
        [],
        "more resolutions in pixels, below --resolution: each batch is cropped to one of all at random; an "
        "image is not enlarged to those that it does not fill",
        least=1,
    )
    use_aspect_ratio_buckets: bool = option(
        False, "crop to the nearest of several aspect ratios instead of to a square"
    )
    random_flip: bool = option(False, "mirror images at random")
    caption_dropout: float = option(
        0.0,
        "share of showings in which an image of the subject is trained without its caption, as the "
        "unconditional half of classifier-free guidance is drawn; 0.1 is usual, 0 is off",
        least=0,
        below=1,
    )
    masked_loss: bool = option(
        True, "weight the loss by masks: NAME.mask.png beside NAME.jpg, or the image's alpha channel"
    )
    unmasked_weight: float = option(0.1, "loss weight of pixels outside the mask", least=0, most=1)
    holdout: int = option(0, "number of images kept from training for the validation loss", least=0)
    max_pixels: int = option(100_000_000, "images with more pixels are refused", least=1)
    strict: bool = option(False, "stop at an unreadable image instead of skipping it with a warning")
    allow_outside_files: bool = option(
        False, "read files outside the folders that name them in metadata.jsonl"
    )
    dataloader_num_workers: int = option(
        0, "processes that load images; 0 loads them in the main process", least=0, most=1024
    )


@dataclass
class Concept:
    """One subject: the folders of its images and of its class's images, and their prompts. Its images are
    shown as often as `weight` says, relative to those of other concepts."""

    instance_data_dir: str
    instance_prompt: str
    class_prompt: str = ""
    class_data_dir: str = ""
    weight: float = 1.0


TEXTS = "instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir"
GREATEST = 1000  # weight of a concept
FAR_APART = 100  # times the smallest weight of a concept: the largest one at most


def read_concepts(config: DataConfig) -> list[Concept]:
    """The concepts of `concepts_list`, or the one that the single flags describe; UserError if neither or
    both are given, for a malformed list, and for weights that are too far apart."""
    path = config.concepts_list
    if bool(path) == bool(config.instance_data_dir):
        raise UserError(
            "Name the images' folder with --instance_data_dir, or else several with --concepts_list."
        )
    if not path:
        return [Concept(**{name: getattr(config, name) for name in TEXTS})]
    try:
        rows = parsed_json(read_text(Path(path)))
    except ValueError as error:
        raise UserError(f"--concepts_list {path} is not valid JSON ({error}); mend the file.") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"--concepts_list {path} must hold a JSON list of one or more concepts; put [ and ] around them."
        )
    found = [_concept(row, f"Concept {number} of --concepts_list {path}") for number, row in enumerate(rows)]
    weights = [concept.weight for concept in found]
    if max(weights) > FAR_APART * min(weights):
        raise UserError(
            f"--concepts_list {path}: the weights {min(weights):g} and {max(weights):g} are too far apart; "
            f"make the largest at most {FAR_APART} times the smallest."
        )
    return found


def _concept(row: object, where: str) -> Concept:
    known = [f.name for f in fields(Concept)]
    if not isinstance(row, dict) or not all(isinstance(row.get(key, ""), str) for key in TEXTS):
        raise UserError(f"{where} must be an object with text for each of the keys {', '.join(TEXTS)}.")
    for key in row.keys() - set(known):
        raise UserError(
            f"{where} has the unknown key '{shortened(key)}'; correct or remove "
            f"it.{nearest(shortened(key), known)}"
        )
    for key in ("instance_data_dir", "instance_prompt"):
        if key not in row:
            raise UserError(f"{where} lacks the key '{key}'; add it.")
    if not _is_weight(row.get("weight", 1)):
        given = shortened(repr(row["weight"]))
        raise UserError(f"{where}: weight must be a number above 0 and at most {GREATEST}, not {given}.")
    return Concept(**row)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= GREATEST


def read_concept_images(concepts: list[Concept], config: DataConfig) -> list[ImageFile]:
    """The instance images of all concepts."""
    return [
        image
        for i, concept in enumerate(concepts)
        for image in find_images(
            concept.instance_data_dir,
            concept.instance_prompt,
            i,
            False,
            config.strict,
            config.max_pixels,
            allow_outside_files=config.allow_outside_files,
        )
    ]

"""Training data for encoders: many subjects, each with two reference views and one target image with its
caption.

The sources are rendered sticker scenes (embedded), a folder of folders, and Hugging Face `datasets`.
Items hold `pixels` (3, H, W) in [-1, 1], the target; `references` (subjects, 2, 3, h, w), normalised for
the image encoder, the second view of each subject cut out on white where a mask is known; `prompt`, with
each subject's word before its noun; `identity`, the number of the first subject; `shows_target`, whether
the second reference is the target itself, as for subjects with two images; and `regions` (subjects, H,
W), where each subject may be, 1 everywhere if unknown. Only rendered scenes have second subjects
(`second_subject_rate`) and regions (`region_rate`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from customize.config import option
from customize.data.crops import fit, mask_weight, sizes_of
from customize.data.dataset import to_device
from customize.data.images import nothing_counts
from customize.errors import UserError, shortened
from customize.imaging import NOTHING, flatten, to_tensor
from customize.prompts import WORDS

Pixels = Callable[[Sequence[Image.Image]], torch.Tensor]


WORD = WORDS[0]


@dataclass
class ReferenceConfig:
    """The subjects that an encoder learns from."""

    train_data_dir: str = option(
        "",
        "folder with one folder of images for each subject (NAME.txt: captions with <s>, one a line; "
        "NAME.mask.png: mask)",
        essential=True,
    )
    dataset_name: str = option(
        "",
        "a Hugging Face dataset of subjects: hub id, or imagefolder, parquet or webdataset with --data_files",
        essential=True,
    )
    dataset_config_name: str = option("", "configuration of the dataset --dataset_name")
    data_files: str = option("", "files of the dataset --dataset_name, a path or pattern")
    image_column: str = option(
        "image", "column of images: a list of views in each row, or one view with --subject_column"
    )
    mask_column: str = option(
        "", "column of masks, white where the subject is; a list where images are lists"
    )
    caption_column: str = option(
        "text", "column of captions; of a list of captions for one image, one is drawn at each showing"
    )
    subject_column: str = option(
        "", "column that names the subject; rows of one subject must follow each other"
    )
    streaming: bool = option(True, "read the dataset while training, without downloading it whole")
    shuffle_buffer: int = option(
        1000, "subjects among which a stream is shuffled; 0: in their order", least=0
    )
    instance_prompt: str = option(
        "a photo of <s>", "caption of images that have none; {} is the subject's name", essential=True
    )
    resolution: int = option(
        0, "side of the target images in pixels; 0: what the model was trained at", least=0, essential=True
    )
    holdout: int = option(
        0, "subjects, two or more, kept from training for the validation loss and the diagnostics", least=0
    )
    segment_rate: float = option(
        0.5, "share of first references that are cut out on white, as far as masks are known", least=0, most=1
    )
    unmasked_weight: float = option(
        0.5, "loss weight of what lies outside the target's mask, where one is known", least=0, most=1
    )
    augment: bool = option(
        False, "turn, shift, scale and mirror references on white (rendered scenes vary by themselves)"
    )
    noun_dropout: float = option(
        0.5,
        "stickers: share of captions that do not name the class, so that images must tell",
        least=0,
        most=1,
    )
    second_subject_rate: float = option(
        0.0, "stickers: share of scenes with a second subject, <s2>, and references of it", least=0, most=1
    )
    restyle_rate: float = option(
        0.0,
        "stickers: share of scenes whose subject is redrawn in a style of no studio (other colours, fills, "
        "outline and shape)",
        least=0,
        most=1,
    )
    region_rate: float = option(
        0.5,
        "stickers: share of scenes with two subjects in which the region of each is given",
        least=0,
        most=1,
    )
    world: str = option("", "stickers: an atlas folder of the whole world; empty: the drawings that ship")
    max_pixels: int = option(100_000_000, "images with more pixels are refused", least=1)
    strict: bool = option(False, "stop at an unreadable image instead of skipping it with a warning")
    allow_outside_files: bool = option(
        False, "read files outside the folder of the metadata.jsonl or dataset that names them"
    )
    dataloader_num_workers: int = option(
        0,
        "processes that load images (a stream: 1 at most); 0 loads in the main process",
        least=0,
        most=1024,
    )


@dataclass(frozen=True)
class View:
    """One image of a subject."""

    image: Image.Image
    mask: Image.Image | None = None
    caption: str = ""

    @property
    def cut_out(self) -> Image.Image:
        """The subject alone on white, if its mask is known: transparent where there is nothing of it."""
        image = flatten(self.image)
        if self.mask is None:
            return image
        alone = Image.composite(image, Image.new("RGB", image.size, "white"), self.mask)
        alone.putalpha(self.mask.convert("L").point(lambda value: 255 if value else 0))
        return alone


def item(
    target: View,
    subjects: Sequence[Sequence[View]],
    prompt: str,
    identity: int,
    rng: np.random.Generator,
    config: ReferenceConfig,
    pixels: Pixels,
    regions: torch.Tensor | None = None,
    shows_target: bool = False,
) -> dict:
    """`subjects` holds two views of each; `regions` (subjects, H, W) says where each may be."""
    shown = []
    for first, second in subjects:
        shown += [
            first.cut_out if rng.random() < config.segment_rate else flatten(first.image),
            second.cut_out,
        ]
    if config.augment:
        shown = [moved(image, rng) for image in shown]
    side = config.resolution, config.resolution
    image = to_tensor(fit(flatten(target.image), *side)) * 2 - 1
    weight = (
        torch.ones(1, *side)
        if target.mask is None
        else mask_weight(target.mask, *side, config.unmasked_weight)
    )
    if not weight.any():
        raise nothing_counts(f"the image of '{shortened(prompt)}', as it is cropped,")
    references = pixels(shown).unflatten(0, (-1, 2))
    regions = torch.ones(len(subjects), *side) if regions is None else regions
    about = {"prompt": prompt, "identity": identity, "shows_target": shows_target, "regions": regions}
    sizes = sizes_of(target.image.size, *side)
    return {"pixels": image, "mask": weight, "references": references, "sizes": sizes} | about


def moved(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random view: turned by up to 15 degrees, scaled, shifted and perhaps mirrored, on white."""
    side = min(max(image.size), 4096)  # the square of a panorama would not fit in memory
    square = ImageOps.pad(image, (side, side), color=NOTHING)
    square = ImageOps.mirror(square) if rng.random() < 0.5 else square
    scale, (x, y) = rng.uniform(0.7, 1.1), rng.uniform(-0.1, 0.1, 2) * side
    angle = np.deg2rad(rng.uniform(-15, 15))
    a, b = np.cos(angle) / scale, np.sin(angle) / scale
    half = side / 2
    matrix = (a, b, half - a * (half + x) - b * (half + y), -b, a, half + b * (half + x) - a * (half + y))
    nothing = (255, 255, 255, 0)[: len(square.getbands())]  # PIL reads NOTHING as opaque here
    return square.transform(
        (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=nothing
    )


def named(prompt: str) -> str:
    """The caption, if it holds the subject's word; UserError otherwise."""
    if WORD not in prompt:
        caption = shortened(prompt)
        raise UserError(
            f"the caption '{caption}' does not say {WORD}: write it before the subject's noun, as in 'a "
            f"{WORD} dog'."
        )
    return prompt


class References(Dataset):
    """Endless items by position: the same position gives the same item for the same seed."""

    config: ReferenceConfig


def drawn(rng: np.random.Generator, count: int) -> list[int]:
    """Indices of a target and two references among `count` images, all different if there are enough."""
    order = rng.permutation(count).tolist()
    return (order * 3)[:3] if count < 3 else order[:3]


def collate_references(items: Sequence[dict]) -> dict:
    """A batch: `pixels` (B, 3, H, W), `mask` (B, 1, H, W), `sizes` (B, 4), `references` (B, subjects, 2, 3,
    h, w), `present` (B, subjects), which is False where an image has fewer subjects than others, `identity`
    and `shows_target` (B,), `prompt` (a list), and `regions` (B, subjects, H, W) if any image has several
    subjects."""
    stacked = ("pixels", "mask", "sizes")
    batch: dict = {name: torch.stack([entry[name] for entry in items]) for name in stacked}
    several = any(len(entry["references"]) > 1 for entry in items)
    for name in ("references", "regions") if several else ("references",):
        batch[name] = pad_sequence([entry[name] for entry in items], batch_first=True)
    batch["present"] = pad_sequence(
        [torch.ones(len(entry["references"]), dtype=torch.bool) for entry in items], batch_first=True
    )
    batch["identity"] = torch.tensor([entry["identity"] for entry in items], dtype=torch.long)
    batch["shows_target"] = torch.tensor([entry["shows_target"] for entry in items], dtype=torch.bool)
    return batch | {"prompt": [entry["prompt"] for entry in items]}


def held_out_batches(items: Any, count: int, size: int, device: torch.device) -> list[dict]:
    """The first `count` items on the device, in batches of about `size` but at least two, as subjects are
    compared."""
    parts = np.array_split(range(count), min(-(-count // size), max(count // 2, 1))) if count else []
    return [to_device(collate_references([items[i] for i in part]), device) for part in parts]

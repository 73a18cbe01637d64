"""What a method learns from: concepts, and their pictures as cropped, masked tensors."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from customize.config import option
from customize.errors import UserError, nearest, shortened
from customize.pictures import Picture, nothing_counts, read_picture
from customize.reading import parsed_json, read_text

Bucket = tuple[int, int]  # height, width
Key = tuple[int, Bucket, bool]  # index of the picture, bucket to crop it to, whether to mirror it


@dataclass
class DataConfig:
    """What to learn from, and how pictures become tensors."""

    instance_data_dir: str = option("", "folder of pictures of the subject")
    instance_prompt: str = option("", "caption of every picture that has none of its own")
    concepts_list: str = option(
        "", "JSON list of {instance_prompt, class_prompt, instance_data_dir, class_data_dir}, one a concept"
    )
    class_prompt: str = option("", 'caption of the class (prior) pictures, e.g. "a photo of a dog"')
    class_data_dir: str = option("", "folder of class (prior) pictures")
    resolution: int = option(
        0, "side of the square crop in pixels (buckets have about its area); 0: what the model was trained at", least=0
    )
    use_aspect_ratio_buckets: bool = option(False, "crop to the nearest of several aspect ratios instead of to a square")
    random_flip: bool = option(False, "mirror pictures at random")
    masked_loss: bool = option(True, "weight the loss by the masks that are found (NAME.mask.png, or the alpha channel)")
    unmasked_weight: float = option(0.1, "loss weight of what lies outside the mask", least=0, most=1)
    holdout: int = option(0, "number of pictures kept from training for the validation loss", least=0)
    max_pixels: int = option(100_000_000, "pictures with more pixels are refused", least=1)
    strict: bool = option(False, "stop at an unreadable picture instead of skipping it with a warning")
    allow_outside_files: bool = option(False, "read files outside the folders that name them in metadata.jsonl")
    dataloader_num_workers: int = option(
        0, "processes that load pictures; 0 loads them in the main process", least=0, most=1024
    )


@dataclass
class Concept:
    """One subject: where its pictures and those of its class lie, and how they are captioned."""

    instance_data_dir: str
    instance_prompt: str
    class_prompt: str = ""
    class_data_dir: str = ""


def read_concepts(config: DataConfig) -> list[Concept]:
    """The concepts of `concepts_list`, or the one of the four single flags; UserError if neither or both are given."""
    path = config.concepts_list
    if bool(path) == bool(config.instance_data_dir):
        raise UserError("Name the pictures' folder with --instance_data_dir, or else several with --concepts_list.")
    if not path:
        return [Concept(**{f.name: getattr(config, f.name) for f in fields(Concept)})]
    try:
        rows = parsed_json(read_text(Path(path)))
    except ValueError as error:
        raise UserError(f"--concepts_list {path} is not valid JSON ({error}); mend the file.") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--concepts_list {path} must hold a JSON list of one or more concepts; put [ and ] around them.")
    return [_concept(row, f"Concept {number} of --concepts_list {path}") for number, row in enumerate(rows)]


def _concept(row: object, where: str) -> Concept:
    known = [f.name for f in fields(Concept)]
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise UserError(f"{where} must be an object with text for each of the keys {', '.join(known)}.")
    for key in row.keys() - set(known):
        raise UserError(
            f"{where} has the unknown key '{shortened(key)}'; correct or remove it.{nearest(shortened(key), known)}"
        )
    for key in ("instance_data_dir", "instance_prompt"):
        if key not in row:
            raise UserError(f"{where} lacks the key '{key}'; add it.")
    return Concept(**row)


def check_resolution(resolution: int, factor: int) -> None:
    """UserError unless `resolution` is a positive multiple of `factor`, both in pixels."""
    if resolution <= 0 or resolution % factor:
        lower = max(resolution // factor, 0) * factor
        valid = f"{lower} or {lower + factor}" if lower else f"{factor}"
        raise UserError(f"--resolution {resolution} is not a positive multiple of {factor}; the nearest valid is {valid}.")


def buckets(resolution: int, factor: int) -> list[Bucket]:
    """(height, width) pairs of about resolution² pixels, in multiples of `factor`, from 1:2 to 2:1, the square included.

    Sides go in steps of about resolution/16: finer ones would leave each picture of a small set alone in its bucket.
    """
    step, found = factor * max(1, round(resolution / 16 / factor)), set()
    for short in range(resolution, math.floor(resolution / math.sqrt(2)) - 1, -step):
        long = round(resolution**2 / short / factor) * factor
        if long <= 2 * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The (height, width) whose aspect ratio is nearest in logarithm to that of `size` (width, height)."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - ratio))


def fit(image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Resize to cover height x width at the same aspect ratio, and crop the centre."""
    return ImageOps.fit(image, (width, height), resample)


class SubjectDataset(Dataset):
    """Pictures as tensors; indexed by a key (index, (height, width), flip), as `Batches` yields them."""

    def __init__(self, pictures: Sequence[Picture], config: DataConfig, factor: int):
        """`factor`: what the sides of the model's pictures must be multiples of, in pixels."""
        check_resolution(config.resolution, factor)
        square = [(config.resolution, config.resolution)]
        self.pictures, self.config = list(pictures), config
        self.buckets = buckets(config.resolution, factor) if config.use_aspect_ratio_buckets else square

    def __len__(self) -> int:
        return len(self.pictures)

    def bucket_of(self, index: int) -> Bucket:
        return nearest_bucket(self.pictures[index].size, self.buckets)

    def __getitem__(self, key: Key) -> dict:
        """`pixels` (3, H, W) in [-1, 1], loss weight `mask` (1, H, W) in [unmasked_weight, 1], and what the picture is."""
        index, bucket, flip = key
        picture = self.pictures[index]
        image, mask = read_picture(picture)
        pixels = to_tensor(fit(image, *bucket), flip) * 2 - 1
        weight = torch.ones(1, *bucket)
        if mask is not None and self.config.masked_loss:
            weight = mask_weight(mask, *bucket, self.config.unmasked_weight, flip)
            if not weight.any():
                raise nothing_counts(f"{picture.path}, as it is cropped,")
        about = {"prompt": picture.caption, "index": index, "concept": picture.concept, "is_prior": picture.is_prior}
        return {"pixels": pixels, "mask": weight, **about}


def to_tensor(image: Image.Image, flip: bool = False) -> torch.Tensor:
    """A picture, mirrored if `flip`, as (channels, height, width) in [0, 1]."""
    array = np.array(ImageOps.mirror(image) if flip else image, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()


def mask_weight(mask: Image.Image, height: int, width: int, outside: float, flip: bool = False) -> torch.Tensor:
    """Loss weight (1, height, width) of each place: 1 inside the mask, `outside` elsewhere."""
    return outside + (1 - outside) * to_tensor(fit(mask, height, width, Image.Resampling.BILINEAR), flip)


def collate(items: Sequence[dict]) -> dict:
    """A batch of B items: `pixels` (B, 3, H, W) or their latents' moments `mean` and `std`, `mask` (B, 1, H, W), `index`,
    `concept`, `is_prior` (B), `prompt` a list."""
    tensors = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
    batch: dict = {name: torch.stack([item[name] for item in items]) for name in tensors}
    batch |= {name: torch.tensor([item[name] for item in items], dtype=torch.long) for name in ("index", "concept")}
    batch["is_prior"] = torch.tensor([item["is_prior"] for item in items], dtype=torch.bool)
    return batch | {"prompt": [item["prompt"] for item in items]}


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }


def split_holdout(pictures: Sequence[Picture], count: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """(train, held out): `count` instance pictures drawn at random, such that each concept keeps one or more for training."""
    rng = np.random.default_rng(seed)
    instances = [index for index in rng.permutation(len(pictures)).tolist() if not pictures[index].is_prior]
    concepts = group(instances, lambda index: pictures[index].concept)
    spare = [index for members in concepts.values() for index in members[1:]]
    if not 0 <= count <= len(spare):
        raise UserError(f"--holdout {count} leaves a concept without a picture for training; choose 0 to {len(spare)}.")
    held = set(rng.permutation(spare)[:count].tolist())
    halves = [[picture for index, picture in enumerate(pictures) if (index in held) == is_held] for is_held in (False, True)]
    return halves[0], halves[1]


def group(indices: Iterable[int], key: Callable[[int], Any]) -> dict[Any, list[int]]:
    """The indices by their key, in their order."""
    groups: dict[Any, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return groups

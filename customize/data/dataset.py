"""Images of the subject as cropped, masked tensors, and batches of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from customize.data.concepts import DataConfig
from customize.data.crops import (
    Bucket,
    buckets,
    check_resolution,
    fills,
    fit,
    mask_weight,
    nearest_bucket,
    sizes_of,
)
from customize.data.images import ImageFile, nothing_counts, read_image_file
from customize.errors import UserError
from customize.imaging import to_tensor

Key = tuple[int, Bucket, bool]  # index of the image, bucket to crop it to, whether to mirror it


class SubjectDataset(Dataset):
    """Images as tensors; indexed by a key (index, (height, width), flip), as `BucketBatches` yields
    them."""

    def __init__(self, images: Sequence[ImageFile], config: DataConfig, factor: int):
        """`factor`: what the sides of the model's images must be multiples of, in pixels."""
        self.images, self.config = list(images), config
        shapes = [
            buckets(side, factor) if config.use_aspect_ratio_buckets else [(side, side)]
            for side in resolutions(config, factor)
        ]
        # the buckets of the largest resolution, each with its nearest shape at every resolution
        self.buckets = {
            (height, width): tuple(nearest_bucket((width, height), own) for own in shapes)
            for height, width in shapes[0]
        }

    def __len__(self) -> int:
        return len(self.images)

    def buckets_of(self, index: int) -> tuple[Bucket, ...]:
        """What an image may be cropped to, one bucket for each resolution that it fills, the largest first;
        that of the smallest resolution if it fills none."""
        size = self.images[index].size
        own = self.buckets[nearest_bucket(size, self.buckets)]
        return tuple(bucket for bucket in own if fills(size, bucket)) or own[-1:]

    def bucket_of(self, index: int) -> Bucket:
        """The largest of `buckets_of`."""
        return self.buckets_of(index)[0]

    def __getitem__(self, key: Key) -> dict:
        """`pixels` (3, H, W) in [-1, 1], loss weight `mask` (1, H, W) in [unmasked_weight, 1], `sizes` (4,)
        as of `sizes_of`, and what the image is."""
        index, bucket, flip = key
        file = self.images[index]
        image, mask = read_image_file(file)
        pixels = to_tensor(fit(image, *bucket), flip) * 2 - 1
        weight = torch.ones(1, *bucket)
        if mask is not None and self.config.masked_loss:
            weight = mask_weight(mask, *bucket, self.config.unmasked_weight, flip)
            if not weight.any():
                raise nothing_counts(f"{file.path}, as it is cropped,")
        about = {
            "prompt": file.caption,
            "index": index,
            "concept": file.concept,
            "is_prior": file.is_prior,
            "is_flipped": flip,
        }
        return {"pixels": pixels, "mask": weight, "sizes": sizes_of(file.size, *bucket), **about}


def resolutions(config: DataConfig, factor: int) -> list[int]:
    """The resolutions of a run, the largest first; UserError for one that is no multiple of `factor`, for a
    smaller one that is not smaller, and for one that is named twice."""
    check_resolution(config.resolution, factor)
    for side in config.smaller_resolutions:
        check_resolution(side, factor, "smaller_resolutions")
        if side >= config.resolution:
            raise UserError(
                f"--smaller_resolutions {side} is not below --resolution {config.resolution}; leave it out, "
                "or raise --resolution."
            )
        if config.smaller_resolutions.count(side) > 1:
            raise UserError(f"--smaller_resolutions names {side} twice; name it once.")
    return [config.resolution, *sorted(config.smaller_resolutions, reverse=True)]


def collate(items: Sequence[dict]) -> dict:
    """A batch of B items: `pixels` (B, 3, H, W) or their latents' moments `mean` and `std`, `mask` (B, 1,
    H, W), `sizes` (B, 4), `index`, `concept`, `is_prior`, `is_flipped` (B), `prompt` a list."""
    tensors = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
    batch: dict = {name: torch.stack([item[name] for item in items]) for name in tensors}
    kinds = {"index": torch.long, "concept": torch.long, "is_prior": torch.bool, "is_flipped": torch.bool}
    batch |= {name: torch.tensor([item[name] for item in items], dtype=kind) for name, kind in kinds.items()}
    return batch | {"prompt": [item["prompt"] for item in items]}


@dataclass
class Captioned(Dataset):
    """The items of a `SubjectDataset` or `LatentDataset`, each with the caption that it is shown with."""

    dataset: Any

    def __getitem__(self, showing: tuple[Key, str]) -> dict:
        key, caption = showing
        return self.dataset[key] | {"prompt": caption}


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def split_holdout(
    images: Sequence[ImageFile], count: int, seed: int
) -> tuple[list[ImageFile], list[ImageFile]]:
    """(train, held out): `count` instance images drawn at random, such that each concept keeps one or
    more for training."""
    rng = np.random.default_rng(seed)
    instances = [index for index in rng.permutation(len(images)).tolist() if not images[index].is_prior]
    concepts = group(instances, lambda index: images[index].concept)
    spare = [index for members in concepts.values() for index in members[1:]]
    if not 0 <= count <= len(spare):
        raise UserError(
            f"--holdout {count} leaves a concept without an image for training; choose 0 to {len(spare)}."
        )
    held = set(rng.permutation(spare)[:count].tolist())
    halves = [
        [image for index, image in enumerate(images) if (index in held) == is_held]
        for is_held in (False, True)
    ]
    return halves[0], halves[1]


def group(indices: Iterable[int], key: Callable[[int], Any]) -> dict[Any, list[int]]:
    """The indices by their key, in their order."""
    groups: dict[Any, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return groups

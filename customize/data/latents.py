"""Latents that are computed once."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from customize.backbones.base import Backbone
from customize.cache import TensorCache, fingerprint, key_of
from customize.data.crops import Bucket
from customize.data.dataset import Key, SubjectDataset


class LatentDataset(Dataset):
    """A `SubjectDataset` whose images were encoded: items hold the latents' `mean` and `std` in place of
    `pixels`, and the mask at the latents' size."""

    def __init__(self, dataset: SubjectDataset, backbone: Backbone, cache: TensorCache):
        self.images, self.config = dataset.images, dataset.config
        self.buckets_of, self.bucket_of = dataset.buckets_of, dataset.bucket_of
        self.model = key_of("latents of sRGB images", fingerprint(backbone.vae))
        keys = list(all_keys(dataset))
        with tqdm(keys, desc="encoding images", disable=not keys) as bar:
            self.items = {key: self._encode(dataset, key, backbone, cache) for key in bar}

    def _encode(self, dataset: SubjectDataset, key: Key, backbone: Backbone, cache: TensorCache) -> dict:
        index, bucket, flip = key
        item = dataset[key]

        def moments():
            return {
                name: value[0].cpu()
                for name, value in backbone.moments(item["pixels"][None].to(backbone.device)).items()
            }

        name = key_of(self.model, dataset.images[index].digest, bucket, flip)
        latent = cache.get(name, moments)
        mask = F.interpolate(item.pop("mask")[None], size=latent["mean"].shape[-2:], mode="area")[0]
        item.pop("pixels")
        return item | {"mask": mask, **latent}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict:
        return self.items[key]


def all_keys(dataset: SubjectDataset) -> Iterable[Key]:
    """Every key that `BucketBatches` can ask for: prior images are cropped to the buckets of their
    concept's instances."""
    used: dict[int, set[Bucket]] = {}
    for i, image in enumerate(dataset.images):
        if not image.is_prior:
            used.setdefault(image.concept, set()).update(dataset.buckets_of(i))
    for i, image in enumerate(dataset.images):
        for bucket in sorted(used[image.concept]) if image.is_prior else dataset.buckets_of(i):
            for flip in (False, True) if dataset.config.random_flip else (False,):
                yield i, bucket, flip

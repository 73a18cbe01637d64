"""Training data for methods that learn one or a few subjects."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from customize import embedded
from customize.cache import TensorCache
from customize.data.batches import BucketBatches, CaptionedBatches
from customize.data.concepts import Concept, DataConfig, read_concept_images, read_concepts
from customize.data.dataset import (
    Captioned,
    SubjectDataset,
    collate,
    resolutions,
    split_holdout,
    to_device,
)
from customize.data.images import ImageFile, read_image_file
from customize.data.latents import LatentDataset
from customize.data.training_data import Preparation, Source, TrainingData
from customize.errors import UserError, shortened


@dataclass
class SubjectData(TrainingData):
    """`dataset` is a `SubjectDataset` or a `LatentDataset`."""

    dataset: Any
    weights: Sequence[float] = ()  # of the concepts; none: equal

    def batches(self, start: int, size: int, seed: int, rank: int = 0, world: int = 1) -> DataLoader:
        config = self.dataset.config
        order = BucketBatches(self.dataset, size, seed, start, rank, world, config.random_flip, self.weights)
        shown = CaptionedBatches(order, config.caption_dropout)
        workers = config.dataloader_num_workers
        return loader(Captioned(self.dataset), workers, seed, batch_sampler=shown, collate_fn=collate)

    def batches_in_epoch(self, size: int) -> float:
        return BucketBatches(self.dataset, size, 0, weights=self.weights).batches_in_epoch

    def described(self) -> dict[str, Any]:
        weights = {"concept_weights": list(self.weights)} if len(set(self.weights)) > 1 else {}
        return super().described() | weights


def loader(dataset: Dataset, workers: int, seed: int, **options: Any) -> DataLoader:
    """A DataLoader with its own generator; otherwise starting it would draw from training's generator."""
    return DataLoader(dataset, num_workers=workers, generator=torch.Generator().manual_seed(seed), **options)


@dataclass
class SubjectImages(Source):
    """The images of all concepts; `images` also hold the class images of the prior loss, once a method has
    added them."""

    config: DataConfig
    concepts: list[Concept]
    images: list[ImageFile]
    held_out: list[ImageFile] = field(default_factory=list)

    Config = DataConfig

    @classmethod
    def read(cls, config: Any, base: str, seed: int) -> Source:
        concepts = read_concepts(config)
        return cls(
            config, concepts, *split_holdout(read_concept_images(concepts, config), config.holdout, seed)
        )

    @property
    def captions(self) -> Sequence[str]:
        own = (image.captions for image in self.images if not image.is_prior)
        return list(dict.fromkeys(itertools.chain.from_iterable(own)))

    def check(self, backbone: Any) -> None:
        resolutions(self.config, backbone.factor)
        if self.config.smaller_resolutions and backbone.shifts_by_size:
            raise UserError(
                "--timestep_sampling shifted goes by --resolution alone; leave --smaller_resolutions out, or "
                "give the shift with --timestep_shift."
            )
        for concept in self.concepts:
            backbone.check_length(f"class prompt '{shortened(concept.class_prompt)}'", concept.class_prompt)
        for image in (*self.images, *self.held_out):
            for caption in image.captions:
                backbone.check_length(f"caption of '{image.path}'", caption)
        if embedded.is_embedded(backbone.name):
            embedded.warn_of_photographs([read_image_file(image)[0] for image in self.images])

    def prepare(self, method: Any, preparation: Preparation) -> TrainingData:
        backbone, cache, images = method.backbone, preparation.cache, [*self.images, *self.held_out]
        check_captions(method, images)
        instances = [image for image in self.images if not image.is_prior]
        method.use_images(instances)
        train: Any = SubjectDataset(self.images, self.config, backbone.factor)
        held: Any = SubjectDataset(self.held_out, self.config, backbone.factor)
        if cache is not None:
            train, held = LatentDataset(train, backbone, cache), LatentDataset(held, backbone, cache)
            cache_text(method, images, preparation.validation_prompts, cache)
            if not preparation.validation_prompts:
                backbone.vae.cpu()  # nothing is encoded or decoded any more
        priors = len(self.images) - len(instances)
        told = f"{len(instances)} image{'s' * (len(instances) > 1)}"
        if any(image.more_captions for image in instances):
            told += f" with {sum(len(image.captions) for image in instances)} captions"
        texts = sorted(f"{image.digest} {image.concept} {image.caption_text}" for image in self.images)
        return SubjectData(
            train,
            [concept.weight for concept in self.concepts],
            size=told + (f" and {priors} of the class" if priors else ""),
            held_out=held_out_batches(held, backbone.device),
            digests=sorted(image.digest for image in self.images),
            captions=[*texts, *(concept.class_prompt for concept in self.concepts)],
        )


def check_captions(method: Any, images: Sequence[ImageFile]) -> None:
    """UserError for a caption that is too long with the learned words in it, or that holds none of them,
    and for a word that no caption holds."""
    words = method.learned_words
    for image, caption in ((own, caption) for own in images for caption in own.captions):
        method.backbone.check_length(f"caption of '{image.path}'", caption)
        if words and not image.is_prior and not any(word in caption for word in words):
            told, needed = shortened(caption), " or ".join(words)
            raise UserError(
                f"--instance_prompt: the caption '{told}' of '{image.path}' does not contain {needed}."
            )
        if not image.is_prior:
            method.check_caption(caption)
    said = [caption for image in images if not image.is_prior for caption in image.captions]
    for word in words:
        if not any(word in caption for caption in said):
            raise UserError(
                f"--placeholder_token: no caption says {word}, so it would learn nothing; leave it out."
            )


def cache_text(
    method: Any, images: Iterable[ImageFile], validation_prompts: Iterable[str], cache: TensorCache
) -> None:
    """Encodes all prompts of the training and frees the text encoders, if training does not change them."""
    if not method.trains_text:
        captions = (caption for image in images for caption in image.captions)
        prompts = [*captions, *method.prompts(), *validation_prompts, ""]
        method.backbone.cache_prompts(prompts, cache)
        method.backbone.release_text_encoders()


def held_out_batches(dataset: SubjectDataset | LatentDataset, device: torch.device) -> list[dict]:
    """One batch for each held-out image, with the first of its captions, on the device."""
    items = [dataset[i, dataset.bucket_of(i), False] for i in range(len(dataset))]
    return [to_device(collate([item]), device) for item in items]

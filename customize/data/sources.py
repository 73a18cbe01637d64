"""The three sources of training data for encoders: rendered scenes, folders, and Hugging Face datasets."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from customize import embedded
from customize.data.batches import IndexBatches
from customize.data.folders import Folders, read_folders
from customize.data.images import ImageFile
from customize.data.references import ReferenceConfig, References, collate_references, held_out_batches
from customize.data.rendered import Rendered
from customize.data.streams import Streamed, first_epoch, read_rows, split_rows
from customize.data.subject_images import loader
from customize.data.training_data import Preparation, Source, TrainingData
from customize.errors import UserError


@dataclass
class ReferenceData(TrainingData):
    dataset: References
    epoch: int = 0  # subjects in one, 0 if there is no end

    def batches_in_epoch(self, size: int) -> int:
        return -(-self.epoch // size)

    def batches(self, start: int, size: int, seed: int, rank: int = 0, world: int = 1) -> DataLoader:
        positions, workers = (
            IndexBatches(size, start, rank, world),
            self.dataset.config.dataloader_num_workers,
        )
        return loader(self.dataset, workers, seed, batch_sampler=positions, collate_fn=collate_references)


@dataclass
class StreamedData(TrainingData):
    dataset: Streamed  # of this process alone

    def batches(self, start: int, size: int, seed: int, rank: int = 0, world: int = 1) -> DataLoader:
        workers = min(
            self.dataset.config.dataloader_num_workers, 1
        )  # several would each read it from its beginning
        stream = self.dataset.after(start * size)
        return loader(stream, workers, seed, batch_size=size, collate_fn=collate_references)


@dataclass
class ReferenceSource(Source):
    """Subjects with several images each."""

    config: ReferenceConfig
    seed: int

    Config = ReferenceConfig

    @property
    def concepts(self) -> list:
        return []

    @classmethod
    def read(cls, config: Any, base: str, seed: int) -> Source:
        if config.train_data_dir and config.dataset_name:
            raise UserError("Name the subjects with --train_data_dir or with --dataset_name, not with both.")
        count = config.holdout
        if count == 1:
            raise UserError(
                f"--holdout {count} leaves nothing to compare a subject with: hold out 2 or more, or 0."
            )
        if config.train_data_dir:
            subjects = read_folders(config)
            if count >= len(subjects):
                raise UserError(
                    f"--holdout {count} leaves no subject for training; there are {len(subjects)}."
                )
            return FolderSubjects(config, seed, subjects)
        if config.dataset_name:
            held_rows, rows = split_rows(read_rows(config), config.subject_column, count)
            return StreamedSubjects(config, seed, rows, held_rows)
        if not embedded.is_embedded(base):
            raise UserError(
                "Name the subjects to learn from: --train_data_dir (a folder for each) or --dataset_name."
            )
        return RenderedSubjects(config, seed)


@dataclass
class RenderedSubjects(ReferenceSource):
    def prepare(self, method: Any, preparation: Preparation) -> TrainingData:
        pixels, count = method.reference_pixels, self.config.holdout
        held = held_out_batches(
            Rendered(self.config, pixels, self.seed, validation=True),
            count,
            preparation.batch_size,
            method.backbone.device,
        )
        return ReferenceData(
            Rendered(self.config, pixels, self.seed), size="rendered scenes without an end", held_out=held
        )


@dataclass
class FolderSubjects(ReferenceSource):
    subjects: Sequence[tuple[str, Sequence[ImageFile]]]

    def prepare(self, method: Any, preparation: Preparation) -> TrainingData:
        pixels, count = method.reference_pixels, self.config.holdout
        order = np.random.default_rng(self.seed).permutation(len(self.subjects)).tolist()
        held, train = (
            Folders(self.config, [self.subjects[i] for i in part], pixels, self.seed)
            for part in (order[:count], order[count:])
        )
        batches = held_out_batches(held, count, preparation.batch_size, method.backbone.device)
        images = [image for _, images in self.subjects for image in images]
        return ReferenceData(
            train,
            size=f"{len(train.subjects)} subjects with {sum(len(own) for _, own in train.subjects)} images",
            held_out=batches,
            digests=[digest_of(image.digest for image in images)],
            captions=[image.caption_text for image in images],
            epoch=len(train.subjects),
        )


@dataclass
class StreamedSubjects(ReferenceSource):
    rows: Any
    held_rows: list[dict]

    def prepare(self, method: Any, preparation: Preparation) -> TrainingData:
        pixels, count = method.reference_pixels, self.config.holdout
        kept = first_epoch(Streamed(self.config, self.held_rows, pixels, self.seed)) if count else []
        if count and len(kept) < 2:
            raise UserError(
                f"--holdout {count}: fewer than two of the first {count} subjects can be used; hold out more."
            )
        place = preparation.rank, preparation.world
        held = held_out_batches(kept, len(kept), preparation.batch_size, method.backbone.device)
        train = Streamed(self.config, self.rows, pixels, self.seed, *place)
        return StreamedData(train, size="a stream of subjects", held_out=held)


def digest_of(digests: Iterable[str]) -> str:
    """One sha256 of many."""
    return hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()

"""The order in which training sees images: endless batches that are a pure function of seed and
position."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from customize.data.crops import Bucket
from customize.data.dataset import Key, SubjectDataset, group
from customize.errors import UserError


@dataclass(eq=False)
class BucketBatches(Sampler[list[Key]]):
    """Endless batches of keys, a pure function of the arguments, so that a run resumes exactly at batch
    `start`.

    An epoch shows every instance image once, in batches of one bucket; the last batch of a bucket is
    filled with that bucket's images again. If there are prior images, `batch_size` of them follow in
    each batch, each of the same concept as the instance image it pairs with. Process `rank` of `world`
    takes batches rank, rank + world, ... UserError if there is no instance image, or some concepts have
    prior images and others none.
    """

    dataset: SubjectDataset
    batch_size: int
    seed: int
    start: int = 0  # batches that each process has used already
    rank: int = 0
    world: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        images = self.dataset.images
        self.instances = [index for index, image in enumerate(images) if not image.is_prior]
        priors = [index for index, image in enumerate(images) if image.is_prior]
        self.priors = group(priors, lambda index: images[index].concept)
        if not self.instances or self.batch_size < 1:
            raise UserError(
                "There is nothing to train on; give one or more instance images and a positive "
                "--train_batch_size."
            )
        if priors and {images[index].concept for index in self.instances} - set(self.priors):
            raise UserError(
                "Some concepts have class images and others none; give a class_data_dir to all or to none."
            )

    def __iter__(self) -> Iterator[list[Key]]:
        return itertools.islice(self._all(), self.rank + self.start * self.world, None, self.world)

    def _all(self) -> Iterator[list[Key]]:
        """The batches of all processes, from the first."""
        cycles = {
            concept: _cycle(members, (self.seed, concept, 1)) for concept, members in self.priors.items()
        }
        for epoch in itertools.count():
            rng = np.random.default_rng((self.seed, epoch))
            for bucket, chunk in self._chunks(rng):
                concepts = [self.dataset.images[index].concept for index in chunk] if cycles else []
                indices = chunk + [next(cycles[concept]) for concept in concepts]
                flips = rng.random(len(indices)) < 0.5 if self.flip else [False] * len(indices)
                yield [(index, bucket, bool(flip)) for index, flip in zip(indices, flips, strict=True)]

    @property
    def batches_in_epoch(self) -> int:
        return len(self._chunks(np.random.default_rng(0)))

    def _chunks(self, rng: np.random.Generator) -> list[tuple[Bucket, list[int]]]:
        """One epoch's instance images in chunks of batch_size, shuffled."""
        groups = group(rng.permutation(self.instances).tolist(), self.dataset.bucket_of)
        chunks = [
            (bucket, [members[k % len(members)] for k in range(first, first + self.batch_size)])
            for bucket, members in groups.items()
            for first in range(0, len(members), self.batch_size)
        ]
        return [chunks[k] for k in rng.permutation(len(chunks))]


def _cycle(members: list[int], seed: tuple[int, ...]) -> Iterator[int]:
    """Endless: all members in a random order, again and again."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(members).tolist()


class IndexBatches(Sampler[list[int]]):
    """Endless batches of positions, beginning with batch `start`; process `rank` of `world` takes each
    `world`-th batch."""

    def __init__(self, batch_size: int, start: int = 0, rank: int = 0, world: int = 1):
        self.batch_size, self.start, self.rank, self.world = batch_size, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for i in itertools.count(self.start):
            begin = (i * self.world + self.rank) * self.batch_size
            yield list(range(begin, begin + self.batch_size))

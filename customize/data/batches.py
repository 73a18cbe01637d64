"""The order in which training sees images: endless batches that are a pure function of seed and
position."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler

from customize.data.captions import one_of
from customize.data.crops import Bucket
from customize.data.dataset import Key, SubjectDataset, group
from customize.data.images import ImageFile
from customize.errors import UserError

Showing = tuple[Key, str]  # the image as it is cropped, and its caption
MOST_EPOCHS = 100  # that are counted for the mean length of one


@dataclass(eq=False)
class BucketBatches(Sampler[list[Key]]):
    """Endless batches of keys, a pure function of the arguments, so that a run resumes exactly at batch
    `start`.

    An epoch shows every instance image once, in batches of one bucket; the last batch of a bucket is
    filled with that bucket's images again. Images that may have several sizes form batches with those that
    may have the same, and each batch takes one of these at random. With `weights` of the concepts, images
    of the smallest weight are shown once in an epoch and the others more often. If there are prior images,
    `batch_size` of them follow in each batch, each of the same concept as the instance image it pairs with.
    Process `rank` of `world` takes batches rank, rank + world, ... UserError if there is no instance image,
    or some concepts have prior images and others none.
    """

    dataset: SubjectDataset
    batch_size: int
    seed: int
    start: int = 0  # batches that each process has used already
    rank: int = 0
    world: int = 1
    flip: bool = False
    weights: Sequence[float] = ()  # of the concepts; none: equal

    def __post_init__(self) -> None:
        images = self.dataset.images
        self.instances = [index for index, image in enumerate(images) if not image.is_prior]
        priors = [index for index, image in enumerate(images) if image.is_prior]
        self.priors = group(priors, lambda index: images[index].concept)
        self.buckets = {index: self.dataset.buckets_of(index) for index in self.instances}
        self.shares = _shares(group(self.instances, lambda index: images[index].concept), self.weights)
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
            for buckets, chunk in self._chunks(rng, epoch):
                bucket = buckets[0 if len(buckets) == 1 else int(rng.integers(len(buckets)))]
                concepts = [self.dataset.images[index].concept for index in chunk] if cycles else []
                indices = chunk + [next(cycles[concept]) for concept in concepts]
                flips = rng.random(len(indices)) < 0.5 if self.flip else [False] * len(indices)
                yield [(index, bucket, bool(flip)) for index, flip in zip(indices, flips, strict=True)]

    @property
    def batches_in_epoch(self) -> float:
        """The mean over epochs; under weights that are no multiples of the smallest, they differ."""
        epochs = min(math.lcm(*(rate.denominator for rate, _ in self.shares.values())), MOST_EPOCHS)
        groups = [group(self._shown(epoch), self.buckets.__getitem__) for epoch in range(epochs)]
        return sum(-(-len(own) // self.batch_size) for found in groups for own in found.values()) / epochs

    def _shown(self, epoch: int) -> list[int]:
        """The instance images of an epoch, each as often as it is shown."""
        if not self.shares:
            return self.instances
        return [i for i in self.instances for _ in range(times_shown(epoch, *self.shares[i]))]

    def _chunks(self, rng: np.random.Generator, epoch: int) -> list[tuple[tuple[Bucket, ...], list[int]]]:
        """One epoch's instance images in chunks of batch_size, shuffled, with the buckets of each chunk."""
        groups = group(rng.permutation(self._shown(epoch)).tolist(), self.buckets.__getitem__)
        chunks = [
            (buckets, [members[k % len(members)] for k in range(first, first + self.batch_size)])
            for buckets, members in groups.items()
            for first in range(0, len(members), self.batch_size)
        ]
        return [chunks[k] for k in rng.permutation(len(chunks))]


def times_shown(epoch: int, rate: Fraction, place: Fraction) -> int:
    """How often an epoch shows an image that is shown `rate` times in the mean. After any number of epochs
    the sum is exact within one; `place` in [0, 1) says when the fraction becomes a whole showing."""
    return math.floor((epoch + 1) * rate + place) - math.floor(epoch * rate + place)


def _shares(concepts: dict[int, list[int]], weights: Sequence[float]) -> dict[int, tuple[Fraction, Fraction]]:
    """The rate and place of each image for `times_shown`; none if all weights are equal. The places of a
    concept's images are spread evenly, so that its epochs are equally long within one showing."""
    if len(set(weights)) < 2:
        return {}
    exact = [Fraction(str(weight)) for weight in weights]
    return {
        index: (exact[concept] / min(exact), Fraction(k, len(members)))
        for concept, members in concepts.items()
        for k, index in enumerate(members)
    }


@dataclass(eq=False)
class CaptionedBatches(Sampler[list[Showing]]):
    """The batches of `order`, each image with one of its captions at random. An instance image has none,
    "", with probability `dropout`. The choice is a pure function of the seed and the batch's number."""

    order: BucketBatches
    dropout: float = 0.0

    def __iter__(self) -> Iterator[list[Showing]]:
        images, order = self.order.dataset.images, self.order
        if not self.dropout and all(len(image.captions) == 1 for image in images):
            yield from ([(key, images[key[0]].caption) for key in keys] for keys in order)
            return
        numbers = itertools.count(order.rank + order.start * order.world, order.world)
        for number, keys in zip(numbers, order, strict=False):
            rng = np.random.default_rng((order.seed, number, 2))
            yield [(key, self._caption(images[key[0]], rng)) for key in keys]

    def _caption(self, image: ImageFile, rng: np.random.Generator) -> str:
        if not image.is_prior and self.dropout and rng.random() < self.dropout:
            return ""
        return one_of(image.captions, rng)


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

"""The contract of training data: the loop's input, whatever its source.

A `Source` reads the user's settings before a model is loaded. Once the method exists, it prepares
`TrainingData`. A method names its source; the loop only knows `TrainingData`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from customize.cache import TensorCache


@dataclass(kw_only=True)
class TrainingData:
    """Subclasses implement `batches`."""

    size: str = ""  # how much it is, in words
    # collated batches, on the device, for the validation loss
    held_out: list[dict] = field(default_factory=list)
    # sha256 of the images that are trained on, as far as they are files
    digests: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)  # of these images, and prompts of their concepts

    def described(self) -> dict[str, Any]:
        """The entries of `run.json` that a resumed run must agree with."""
        if not self.digests:
            return {}
        texts = hashlib.sha256("\0".join(self.captions).encode())
        return {"dataset": self.digests, "captions": texts.hexdigest()}

    def batches_in_epoch(self, size: int) -> float:
        """Batches of `size` items, over all processes, in which every item is shown once or more, in the
        mean over epochs; 0 if the data has no end."""
        return 0

    def batches(self, start: int, size: int, seed: int, rank: int = 0, world: int = 1) -> DataLoader:
        """Endless batches of `size` items, a pure function of the arguments, from batch `start` of process
        `rank` of `world`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Preparation:
    """The inputs of `Source.prepare` besides the method."""

    batch_size: int  # of the held-out batches, where they hold several items
    cache: TensorCache | None  # for latents and prompt embeddings, if they may be computed once
    validation_prompts: Sequence[str]  # that are drawn while training
    rank: int = 0
    world: int = 1


class Source:
    """The data that the user's settings name, found and checked before a model is loaded."""

    Config: ClassVar[type]  # the dataclass of these settings

    @property
    def captions(self) -> Sequence[str]:
        """The different captions of the subjects' images, where they are few."""
        return ()

    @classmethod
    def read(cls, config: Any, base: str, seed: int) -> "Source":
        """The source that the settings name; `base` is the base model's name, `seed` decides which items
        are held out.

        UserError for missing or broken data.
        """
        raise NotImplementedError

    def check(self, backbone: Any) -> None:
        """UserError for data that this base model cannot be trained on."""

    def prepare(self, method: Any, preparation: Preparation) -> TrainingData:
        """The training data, with everything encoded once that training does not change."""
        raise NotImplementedError

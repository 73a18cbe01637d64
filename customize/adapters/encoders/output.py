"""The output of a subject encoder, whichever it is."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Encoded:
    """One subject in each row: tokens for the visual branches and, from encoders that have them, words,
    CLS states and a location embedding."""

    visual: Tensor  # (batch, tokens, dim)
    mask: Tensor | None = None  # (batch, tokens): False where a token is padding
    words: list[Tensor] = field(
        default_factory=list
    )  # for each text encoder (batch, slots, dim): what S+ adds to its start
    location_embedding: Tensor | None = None  # (batch, dim): time and subject, for the location maps
    visual_cls: Tensor | None = None  # (batch, projection)
    textual_cls: Tensor | None = None  # (batch, projection)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """A copy with `change` applied to every tensor."""
        names = ("mask", "location_embedding", "visual_cls", "textual_cls")
        optional = {name: None if (value := getattr(self, name)) is None else change(value) for name in names}
        return Encoded(change(self.visual), words=[change(words) for words in self.words], **optional)

    def spread(self, present: Tensor) -> "Encoded":
        """Rows of the subjects that exist, placed among all (samples * subjects); `present` (samples,
        subjects) says which exist. The others are zeros, and none of their tokens counts as padding, as
        attention needs at least one key."""

        def among_others(value: Tensor) -> Tensor:
            full = value.new_full((present.numel(), *value.shape[1:]), value.dtype == torch.bool)
            full[present.flatten()] = value
            return full

        return self.each(among_others)

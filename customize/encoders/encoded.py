"""What a subject encoder gives, whichever it is."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Encoded:
    """One subject a row: tokens for the visual branches and, of encoders that have them, words, CLS states and place."""

    visual: Tensor  # (batch, tokens, dim)
    mask: Tensor | None = None  # (batch, tokens): False where a token is padding
    words: list[Tensor] = field(default_factory=list)  # for each text encoder (batch, slots, dim): what S+ adds to its start
    place: Tensor | None = None  # (batch, dim): time and subject, for the location maps
    visual_cls: Tensor | None = None  # (batch, projection)
    textual_cls: Tensor | None = None  # (batch, projection)

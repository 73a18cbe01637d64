"""Text and subject tokens for each step of a pipeline's call."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from customize.adapters.subject import add_subject_words
from customize.pipelines.inputs import Subjects
from customize.prompts import WORDS


@dataclass
class SubjectCall:
    """The subjects of one call: a row for each prompt, a column for each of the first `WORDS`. What
    depends on time is computed once for each time bin of the encoder."""

    adapter: Any  # a SubjectAdapter or a ReferenceUNet
    features: Tensor  # (prompts, subjects, references, tokens, features)
    references: Tensor  # (prompts, subjects, references): which there are
    strengths: Tensor  # (subjects,): weight of each subject's visual branch
    scales: dict[str, float]  # of the visual branch by layer
    cached: bool  # whether keys and values are kept between steps
    images: int = 1  # of each prompt
    # from the latent height and width of the images, where the call gives masks
    make_regions: Callable[[int, int], Tensor] | None = None
    regions: Tensor | None = None  # (prompts, subjects, height, width), once a step has shown that size
    # features (1, 1, tokens, features) that the unconditional half sees, of encoders that have it
    blank: Tensor | None = None
    block_texts: dict[int, Tensor] = field(default_factory=dict)  # (text_blocks, prompts, length, dim)
    pooled: dict[int, Tensor] = field(default_factory=dict)  # of XL: (prompts, dim)
    _encoded: dict[int, Any] = field(default_factory=dict)
    _injected: dict[tuple[int, bool], Any] = field(default_factory=dict)

    @property
    def present(self) -> Tensor:
        """Which subjects each prompt has, (prompts, subjects)."""
        return self.references.any(-1)

    @property
    def weight(self) -> Tensor:
        """The weight of each subject's visual branch, (prompts, subjects)."""
        return self.present.to(self.features.dtype) * self.strengths

    def encoded(self, bins: int) -> Any:
        """All subjects of the call in a time bin, encoded: (prompts * subjects, ...)."""
        if bins not in self._encoded:
            if self.adapter.encoder.depends_on_step:  # earlier steps would fill the memory
                self._encoded.clear()
                self._injected.clear()
            encoder, features = self.adapter.encoder, self.features[self.present]
            t = encoder.middle_of(torch.full((len(features),), float(bins), device=features.device))
            self._encoded[bins] = encoder(features, self.references[self.present], t).spread(self.present)
        return self._encoded[bins]

    def injected(self, bins: int, guided: bool) -> Any:
        """The input of the attention processors in a time bin, with or without an unconditional half."""
        if (bins, guided) not in self._injected:
            texts = self.block_texts.get(bins)
            made = self.adapter.injected(
                self.encoded(bins), self.weight, regions=self.regions, scales=self.scales
            )
            made.tokens = made.tokens.repeat(self.images)
            made.block_texts = None if texts is None else texts.repeat_interleave(self.images, 1)
            if guided and self.blank is not None:
                made.tokens = made.tokens.with_unconditional(self._blank_tokens())
            made.cache = {} if self.cached else None
            self._injected[bins, guided] = made
        return self._injected[bins, guided]

    def _blank_tokens(self) -> Tensor:
        one = torch.ones(1, 1, dtype=torch.bool, device=self.features.device)
        return self.adapter.encoder(self.blank, one, torch.zeros(1, device=self.features.device)).visual

    def pooled_text(self, bins: int, text_embeds: Tensor, samples: int) -> Tensor | None:
        """SDXL's pooled text (samples, dim), with the subjects' words of this time bin in the conditional
        half."""
        if bins not in self.pooled:
            return None
        own = self.pooled[bins].repeat_interleave(self.images, 0)
        return torch.cat([text_embeds[: samples - len(own)], own])


@lru_cache(maxsize=8)
def _with_words(tokenizer: Any, added: frozenset) -> Any:
    copied = copy.deepcopy(tokenizer)
    add_subject_words([copied])
    return copied


def with_words(tokenizer: Any) -> Any:
    """A copy of a tokenizer that knows the subjects' words. The pipeline's own tokenizer stays unchanged,
    as other words may be loaded into it later."""
    return _with_words(tokenizer, frozenset(tokenizer.get_added_vocab().items()))


def stack_references(subjects: Sequence[Subjects]) -> tuple[Tensor, Tensor]:
    """Features (prompts, subjects, references, tokens, features), and which references there are."""
    columns = 1 + max(WORDS.index(word) for found in subjects for word in found)
    most = max(len(own) for found in subjects for own in found.values())
    any_one = next(own for found in subjects for own in found.values())
    features = any_one.new_zeros(len(subjects), columns, most, *any_one.shape[1:])
    present = torch.zeros(features.shape[:3], dtype=torch.bool, device=features.device)
    for row, found in enumerate(subjects):
        for word, own in found.items():
            column = WORDS.index(word)
            features[row, column, : len(own)], present[row, column, : len(own)] = own, True
    return features, present

"""Textual Inversion: only the vectors of a new word are learned (Gal et al., 2023, arXiv 2208.01618)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from customize.adapters.output_words import OutputWords
from customize.adapters.words import LearnedWords
from customize.backbones.base import Backbone, Condition
from customize.config import check_ranges, option
from customize.errors import UserError
from customize.runs.checkpoint import open_run
from customize.trainers.methods.base import Method, MethodConfig

# Prompts after the paper's appendix: neutral contexts, so that the word comes to mean the subject alone.
TEMPLATES = {
    "object": [
        "a photo of a {}",
        "a close-up photo of a {}",
        "a bright photo of the {}",
        "a dark photo of the {}",
        "a cropped photo of the {}",
        "a good photo of a {}",
        "a rendition of a {}",
        "a depiction of the {}",
    ],
    "style": [
        "a painting in the style of {}",
        "a rendering in the style of {}",
        "a cropped painting in the style of {}",
        "a close-up painting in the style of {}",
        "a large painting in the style of {}",
        "a small painting in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
    ],
}


@dataclass
class WordFields:
    """Fields of every method that learns words."""

    placeholder_token: str = option(
        "", "the new word, such as <dog>; several words are joined by +", essential=True
    )
    initializer_token: str = option(
        "", "the word that the new word starts from, such as dog; several are joined by +", essential=True
    )
    num_vectors: int = option(1, "vectors of each new word", least=1)
    pretrained_words: str = option(
        "", "run that learned these words, whose vectors are the start instead of --initializer_token's"
    )

    @property
    def starting_word(self) -> str:
        return self.initializer_token


def word_defaults(given: Mapping[str, Any]) -> dict[str, str]:
    """The default caption, if a single word is learned."""
    word = str(given.get("placeholder_token", ""))
    return {"instance_prompt": f"a photo of {word}"} if word and "+" not in word else {}


@dataclass
class TextualInversionConfig(WordFields, MethodConfig):
    learnable_property: Literal["none", "object", "style"] = option(
        "none",
        "object or style: images without a caption file get random prompts of that kind in every step; none: "
        "--instance_prompt",
    )
    optimize: Literal["input", "output"] = option(
        "input",
        "which vectors of the word are learned. input: those that the text encoder reads; output (ConES): "
        "those that it gives the denoiser, without a gradient through the encoder",
    )


def new_words(backbone: Backbone, config: WordFields, kind: Any = LearnedWords, **options: Any) -> Any:
    """The words that `config` names, as an adapter of this kind; UserError if the numbers of names and
    starting words differ."""
    words, starts = config.placeholder_token.split("+"), config.initializer_token.split("+")
    if not all(word.strip() for word in words + starts) or len(set(words)) != len(starts):
        raise UserError(
            "--placeholder_token and --initializer_token must name as many (different) words each, such as "
            "'<dog>' and 'dog'."
        )
    check_ranges(config)
    made = kind(backbone, dict(zip(words, starts, strict=True)), config.num_vectors, **options)
    if config.pretrained_words:
        made.start_from(Path(config.pretrained_words), open_run(Path(config.pretrained_words)))
    return made


class TextualInversion(Method):
    Config = TextualInversionConfig
    needs_captions = True
    defaults = {"learning_rate": 5e-3, "max_train_steps": 1500}
    embedded_defaults = {
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "max_train_steps": 500,
        "train_batch_size": 4,
        "num_vectors": 4,
    }

    def __init__(self, backbone, config: TextualInversionConfig, concepts):
        super().__init__(backbone, config, concepts)
        self.tokens = new_words(
            backbone, config, OutputWords if config.optimize == "output" else LearnedWords
        )
        self.adapters.append(self.tokens)

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return super().defaults_for(base, given) | word_defaults(given)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        if self.config.learnable_property == "none":
            return super().condition(batch, t)
        pairs = zip(batch["prompt"], batch["concept"].tolist(), strict=True)
        return super().condition(batch | {"prompt": [self._template(*pair) for pair in pairs]}, t)

    def _template(self, prompt: str, concept: int) -> str:
        """A random prompt for the learned property, in place of the instance prompt."""
        if prompt != self.concepts[concept].instance_prompt:
            return prompt
        templates = TEMPLATES[self.config.learnable_property]
        word = next(word for word in self.tokens.words if word in prompt)
        return templates[int(torch.randint(len(templates), ()))].format(word)

"""Textual Inversion: only the vectors of a new word are learned (Gal et al., 2023, arXiv 2208.01618)."""

from dataclasses import dataclass

from customize.adapters.words import LearnedWords
from customize.config import check_ranges, option
from customize.errors import UserError
from customize.trainers.methods.base import Method, MethodConfig


@dataclass
class WordFields:
    """Fields of every method that learns words."""

    placeholder_token: str = option("", "the new word, such as <dog>; several are joined by +")
    initializer_token: str = option("", "the word it starts from, such as dog; several are joined by +")
    num_vectors: int = option(1, "vectors of each new word", least=1)

    @property
    def starting_word(self) -> str:
        return self.initializer_token


@dataclass
class TextualInversionConfig(WordFields, MethodConfig):
    pass


def new_words(backbone, config: WordFields) -> LearnedWords:
    """The words that `config` names; UserError where names and starting words do not fit together."""
    words, starts = config.placeholder_token.split("+"), config.initializer_token.split("+")
    if not all(word.strip() for word in words + starts) or len(set(words)) != len(starts):
        raise UserError(
            "--placeholder_token and --initializer_token must name as many (different) words each, such as "
            "'<dog>' and 'dog'."
        )
    check_ranges(config)
    return LearnedWords(backbone, dict(zip(words, starts, strict=True)), config.num_vectors)


class TextualInversion(Method):
    Config = TextualInversionConfig

    def __init__(self, backbone, config: TextualInversionConfig, concepts):
        super().__init__(backbone, config, concepts)
        self.tokens = new_words(backbone, config)
        self.adapters.append(self.tokens)

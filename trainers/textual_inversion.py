"""Textual Inversion: only the vectors of a new word are learned (Gal et al., 2023, arXiv 2208.01618)."""

from dataclasses import dataclass, field

from customize.config import at_least_one
from customize.errors import UserError
from customize.tokens import ConceptTokens
from customize.trainers.method import Method, MethodConfig


@dataclass
class WordFields:
    """Fields of every method that learns words."""

    placeholder_token: str = field(default="", metadata={"help": "the new word, such as <dog>; several are joined by +"})
    initializer_token: str = field(
        default="", metadata={"help": "the word it starts from, such as dog; several are joined by +"}
    )
    num_vectors: int = field(default=1, metadata={"help": "vectors of each new word"})


@dataclass
class TextualInversionConfig(WordFields, MethodConfig):
    pass


def new_words(backbone, config: WordFields) -> ConceptTokens:
    """The words that `config` names; UserError where names and starting words do not fit together."""
    words, starts = config.placeholder_token.split("+"), config.initializer_token.split("+")
    if not all(words) or not all(starts) or len(set(words)) != len(starts):
        raise UserError(
            "--placeholder_token and --initializer_token must name as many (different) words each, such as '<dog>' and 'dog'."
        )
    at_least_one(config, ["num_vectors"])
    return ConceptTokens(backbone, dict(zip(words, starts, strict=True)), config.num_vectors)


class TextualInversion(Method):
    Config = TextualInversionConfig

    def __init__(self, backbone, config: TextualInversionConfig, concepts):
        super().__init__(backbone, config, concepts)
        self.tokens = new_words(backbone, config)

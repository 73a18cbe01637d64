"""Learned words: vectors that stand in for placeholder words in every text encoder."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from customize.adapters.base import Adapter
from customize.adapters.embedding_hooks import substitute
from customize.backbones.text import ENCODER_NAMES, embedding_table, expand_words, expanded, text_parts
from customize.errors import UserError
from customize.files import tensors_of
from customize.tensor_checks import check_finite

OUTPUTS = "output_embeds.safetensors"  # of words that are learned behind the text encoder


def pieces(word: str, count: int) -> list[str]:
    """The tokens of a word with several vectors, named as diffusers names them: <dog>, <dog>_1, ..."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def add_words(tokenizer: Any, words: list[str]) -> None:
    """Makes each of `words` one token; raises UserError if one is a token already."""
    for word in words:
        tokens = tokenizer.tokenize(word)
        if word in tokenizer.get_vocab() or (len(tokens) == 1 and tokens != [tokenizer.unk_token]):
            another = f"<my-{word.strip('<>')}>"
            raise UserError(
                f"--placeholder_token: '{word}' is in the tokenizer's vocabulary already; choose another, "
                f"such as '{another}'."
            )
    tokenizer.add_tokens(words)


class LearnedWords(nn.Module, Adapter):
    """`words` maps each placeholder, such as "<dog>", to the word whose embedding it starts from.

    Each text encoder gets `num_vectors` trained vectors for each word, shape (words * num_vectors, dim),
    float32. They replace embeddings on the fly; the encoder's own table stays unchanged, bit for bit.
    """

    files = ("learned_embeds*.safetensors",)

    def __init__(self, backbone, words: dict[str, str], num_vectors: int = 1):
        super().__init__()
        self.words, self.num_vectors = list(words), num_vectors
        self.names = backbone.embedding_names[: len(backbone.text_encoders)]
        self.vectors = nn.ParameterList()
        tokens = [piece for word in self.words for piece in pieces(word, num_vectors)]
        for tokenizer, encoder in zip(backbone.tokenizers, backbone.text_encoders, strict=True):
            start = torch.tensor([_start(tokenizer, word) for word in words.values()]).repeat_interleave(
                num_vectors
            )
            add_words(tokenizer, tokens)
            _check_found(tokenizer, self.words, num_vectors)
            table = embedding_table(encoder)
            self.vectors.append(
                nn.Parameter(table.weight[start.to(table.weight.device)].detach().float().clone())
            )
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
            index = len(self.vectors) - 1
            substitute(table, ids, partial(self._current, index))

    def current(self) -> list[Tensor]:
        """The vectors of all words for each text encoder, (words * num_vectors, dim)."""
        return list(self.vectors)

    def _current(self, index: int) -> Tensor:
        return self.current()[index]

    @torch.no_grad()
    def start_from(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Takes the vectors of the words of a run; UserError unless it learned the same words, with as many
        vectors, on a base model of the same text encoders."""
        if (folder / OUTPUTS).exists() and OUTPUTS not in self.files:
            raise UserError(
                f"--pretrained_words: '{folder}' was trained with --optimize output; only such runs "
                "go on from it."
            )
        for word in self.words:
            if word not in info.get("words", {}):
                known = ", ".join(info.get("words", {})) or "no words"
                raise UserError(f"--pretrained_words: '{folder}' has learned {known}, not '{word}'.")
            found = tensors_of(folder / info["words"][word])
            for name, own in self.by_word()[word].items():
                value = found[name] if len(self.names) > 1 and name in found else next(iter(found.values()))
                if value.shape != own.shape:
                    raise UserError(
                        f"--pretrained_words: '{word}' of '{folder}' is {tuple(value.shape)}, and here "
                        f"{tuple(own.shape)}; give the run's --num_vectors and base model."
                    )
                own.copy_(value)  # a view of the parameter

    @property
    def changes_text(self) -> bool:
        return True

    def save(self, folder: Path) -> dict[str, dict[str, str]]:
        """One file a word, with one key, the word, or a key for each of several text encoders."""
        files = {}
        for i, (word, vectors) in enumerate(self.by_word().items()):
            safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in word)[
                :50
            ]  # names have at most 255 bytes
            files[word] = (
                "learned_embeds.safetensors"
                if len(self.words) == 1
                else f"learned_embeds-{i}{safe}.safetensors"
            )
            state = {word: next(iter(vectors.values()))} if len(vectors) == 1 else vectors
            save_file(
                {k: v.detach().float().cpu().contiguous() for k, v in state.items()},
                folder / files[word],
                {"word": word, "encoders": ",".join(vectors)},
            )
        return {"words": files}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        for word, name in info["words"].items():
            load_words(pipe, word, tensors_of(folder / name))

    def by_word(self) -> dict[str, dict[str, Tensor]]:
        """For each word, the vectors (num_vectors, dim) by text encoder: `clip_l`, `clip_g`, `t5`."""
        with torch.no_grad():
            vectors = self.current()
        split = [own.detach().split(self.num_vectors) for own in vectors]
        return {
            word: {name: parts[i] for name, parts in zip(self.names, split, strict=True)}
            for i, word in enumerate(self.words)
        }


def _check_found(tokenizer: Any, words: list[str], num_vectors: int) -> None:
    """UserError unless all vectors of each word are found in a prompt. A tokenizer that lower-cases
    finds only the first vector of a word with capitals."""
    for word in words:
        found = tokenizer(expanded(word, tokenizer), add_special_tokens=False).input_ids
        if found != tokenizer.convert_tokens_to_ids(pieces(word, num_vectors)):
            raise UserError(
                f"--placeholder_token: the tokenizer does not find all {num_vectors} vectors of '{word}' in "
                f"a prompt; write it without capitals and signs, such as '<{_plain(word)}>'."
            )


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") or "subject"


def _start(tokenizer, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(
            f"--initializer_token: '{word}' is empty for the tokenizer; give a word such as the subject's "
            "class."
        )
    return ids[-1]


def load_words(pipe: DiffusionPipeline, word: str, vectors: dict[str, Tensor]) -> None:
    """Gives a pipeline a learned word; `vectors` as in `LearnedWords.by_word`, or those of the only text
    encoder under any name.

    UserError if they are of another base model or damaged, or if the pipeline knows the word already.
    """
    tokenizers, encoders = text_parts(pipe)
    if reason := _misfit(encoders, vectors):
        raise UserError(
            f"the learned word '{word}' does not fit this base model ({reason}); load the base model it "
            "was trained on."
        )
    check_finite(vectors, word)
    names = pieces(word, len(next(iter(vectors.values()))))
    if any(tokenizer.get_vocab().keys() & names for tokenizer in tokenizers):
        raise UserError(
            f"the pipeline knows the word '{word}' already; load the base model anew for this one."
        )
    ordered = [vectors[name] for name in _names(encoders)] if len(encoders) > 1 else vectors.values()
    expand_words(pipe)
    for tokenizer, encoder, matrix in zip(tokenizers, encoders, ordered, strict=True):
        tokenizer.add_tokens(names)
        ids = tokenizer.convert_tokens_to_ids(names)
        if max(ids) >= embedding_table(encoder).num_embeddings:
            encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        rows = embedding_table(encoder).weight.data
        rows[ids] = matrix.to(rows)


def _names(encoders: list) -> list[str]:
    """The encoders' names in files of learned words."""
    return [
        "t5" if isinstance(encoder, T5EncoderModel) else ENCODER_NAMES[i]
        for i, encoder in enumerate(encoders)
    ]


def _misfit(encoders: list, vectors: dict[str, Tensor]) -> str:
    """What is wrong with the vectors of a word, or nothing."""
    names = _names(encoders) if len(encoders) > 1 else list(vectors)[:1]
    if not vectors or set(names) != vectors.keys():
        made_for = ", ".join(map(repr, vectors)) or "no text encoder"
        return f"it is for {made_for}, the model has {len(encoders)} text encoders"
    for encoder, name in zip(encoders, names, strict=True):
        shape, width = tuple(vectors[name].shape), embedding_table(encoder).embedding_dim
        if len(shape) != 2 or not shape[0] or shape[1] != width:
            return f"'{name}' is {shape}, not (vectors, {width})"
        if not vectors[name].is_floating_point():
            return f"'{name}' is of {vectors[name].dtype}"
    return (
        ""
        if len({len(matrix) for matrix in vectors.values()}) == 1
        else "its text encoders have different numbers of vectors"
    )

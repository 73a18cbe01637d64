"""Vectors in the place of words, while a text encoder runs; its embedding table stays as it is, bit for
bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from customize.backbones.text import embedding_table


@dataclass(eq=False)
class _Substitution:
    ids: Tensor  # (words,)
    vectors: Callable[[], Tensor]  # (words, dim), or (rows, words, dim) for vectors of each prompt's own


def substitute(table: Any, ids: Tensor, vectors: Callable[[], Tensor]) -> Callable[[], None]:
    """From now on the embedding layer returns `vectors()` wherever one of `ids` stands; returns what ends
    that.

    `ids` (words,) may lie beyond the table. `vectors()` is (words, dim), or (rows, words, dim), in which
    row r of a batch of prompts reads its own; gradients flow into it. Several substitutions in one table
    hold side by side.
    """
    active = table.__dict__.setdefault("substitutions", [])
    if not active:
        table.substitution_hooks = (
            table.register_forward_pre_hook(_look_up),
            table.register_forward_hook(_replace),
        )
    own = _Substitution(ids, vectors)
    active.append(own)

    def end() -> None:
        active.remove(own)
        if not active:
            for handle in table.substitution_hooks:
                handle.remove()

    return end


def _same(vectors: Tensor) -> Tensor:
    return vectors


def _look_up(table, args):
    """Remembers the ids; for those beyond the table any row is looked up."""
    table.asked = args[0]
    return (args[0].clamp(max=table.num_embeddings - 1),)


def _replace(table, args, embedded):
    for own in table.substitutions:
        found = table.asked.unsqueeze(-1) == own.ids.to(table.asked.device)  # (rows, length, words)
        vectors = found.to(embedded.dtype) @ own.vectors().to(embedded.dtype)
        embedded = torch.where(found.any(-1, keepdim=True), vectors, embedded)
    return embedded


@contextmanager
def replaced_words(
    tokenizers: Sequence, encoders: Sequence, words: list[str], vectors: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, row r of a batch of prompts reads `vectors[encoder][r, word]` wherever one of `words`
    stands.

    `vectors` holds (rows, words, dim) for each text encoder; gradients flow into them. Embedding tables
    may be exchanged between two uses, as loading learned words does.
    """
    with ExitStack() as stack:
        for tokenizer, encoder, own in zip(tokenizers, encoders, vectors, strict=True):
            stack.enter_context(_pooled_at_end(tokenizer, encoder))
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
            stack.callback(substitute(embedding_table(encoder), ids, partial(_same, own)))
        yield


@contextmanager
def _pooled_at_end(tokenizer, encoder) -> Iterator[None]:
    """CLIP configurations with eos_token_id 2 (those of XL) pool at the largest token id; added words
    have larger ids than the end of the text, so the true end-of-text token is set meanwhile."""
    mistaken = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == 2]
    for module in mistaken:
        module.eos_token_id = tokenizer.eos_token_id
    try:
        yield
    finally:
        for module in mistaken:
            module.eos_token_id = 2

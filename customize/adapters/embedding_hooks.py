"""Vectors in the place of words while a text encoder runs. The embedding table itself stays unchanged,
bit for bit."""

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
    """Makes the embedding layer return `vectors()` wherever one of `ids` occurs; returns a function that
    ends this.

    `ids` (words,) may lie beyond the table. `vectors()` is (words, dim), or (prompts, words, dim) where
    each prompt of a batch has its own; gradients flow into it. Several substitutions of one table work
    together.
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
    """Stores the ids; for ids beyond the table, the last row is looked up."""
    table.asked = args[0]
    return (args[0].clamp(max=table.num_embeddings - 1),)


def _replace(table, args, embedded):
    for own in table.substitutions:
        found = table.asked.unsqueeze(-1) == own.ids.to(table.asked.device)  # (rows, length, words)
        vectors = found.to(embedded.dtype) @ own.vectors().to(embedded.dtype)
        vectors = vectors * getattr(table, "embed_scale", 1.0)  # Gemma's tables scale what they look up
        embedded = torch.where(found.any(-1, keepdim=True), vectors, embedded)
    return embedded


@contextmanager
def replaced_words(
    tokenizers: Sequence, encoders: Sequence, words: list[str], vectors: Sequence[Tensor]
) -> Iterator[None]:
    """Context in which prompt i of a batch reads `vectors[encoder][i, word]` wherever one of `words`
    occurs.

    `vectors` holds (prompts, words, dim) for each text encoder; gradients flow into them. Embedding
    tables may be exchanged between two uses, as loading learned words does.
    """
    with ExitStack() as stack:
        for tokenizer, encoder, own in zip(tokenizers, encoders, vectors, strict=True):
            stack.enter_context(_pooled_at_end(tokenizer, encoder))
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
            stack.callback(substitute(embedding_table(encoder), ids, partial(_same, own)))
        yield


@contextmanager
def _pooled_at_end(tokenizer, encoder) -> Iterator[None]:
    """CLIP configurations with eos_token_id 2 (those of SDXL) pool at the largest token id. Added words
    have larger ids than the end-of-text token, so the real end-of-text id is set in the meantime."""
    mistaken = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == 2]
    for module in mistaken:
        module.eos_token_id = tokenizer.eos_token_id
    try:
        yield
    finally:
        for module in mistaken:
            module.eos_token_id = 2

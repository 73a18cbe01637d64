"""A learned word tuned for one prompt, so that the rest of the prompt counts (CoRe's optimization at test
time, Wu et al., 2024, arXiv 2408.15914, section 3.4).

    with context_tuned(pipe, "<dog> in the snow at night", {"<dog>": "dog"}, steps=10):
        image = pipe("<dog> in the snow at night").images[0]
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from customize.adapters.embedding_hooks import substitute
from customize.adapters.words import pieces
from customize.attention_maps import word_positions
from customize.backbones.families import wrap
from customize.backbones.text import embedding_table, text_parts
from customize.context import ContextPair
from customize.errors import UserError
from customize.randomness import fixed_randomness

WEIGHTS = 1.5e-4, 0.05  # of the context embedding and the context attention loss, as in training
SCALE = 2.0**12  # of the loss, so that gradients in half precision are not rounded to zero; Adam ignores it


@contextmanager
def context_tuned(
    pipe: DiffusionPipeline,
    prompt: str,
    words: Mapping[str, str],
    steps: int = 10,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> Iterator[None]:
    """Context in which `words`, learned words of the pipeline with the words of their classes, have vectors
    that were tuned by `steps` of both context losses for this prompt. Afterwards they are as before.

    UserError if the prompt says none of them, or the pipeline has not learned one.
    """
    said = {word: own for word, own in words.items() if word in prompt}
    if not said:
        raise UserError(f"context tuning: the prompt says none of the learned words ({', '.join(words)}).")
    for word in said:
        if any(word not in tokenizer.get_vocab() for tokenizer in text_parts(pipe)[0]):
            raise UserError(f"context tuning: '{word}' is no learned word of this pipeline.")
        word_positions(pipe, prompt, word)
    with ExitStack() as stack:
        vectors = [stack.enter_context(_own_vectors(pipe, word)) for word in said]
        with fixed_randomness(seed), torch.enable_grad():
            _tune(wrap(pipe, ""), prompt, said, vectors, steps, learning_rate)
        yield


@contextmanager
def _own_vectors(pipe: DiffusionPipeline, word: str) -> Iterator[list[nn.Parameter]]:
    """Parameters that stand in for a word's vectors in every text encoder."""
    found = []
    with ExitStack() as stack:
        for tokenizer, encoder in zip(*text_parts(pipe), strict=True):
            known = tokenizer.get_vocab()
            count = next(n for n in range(1, len(known)) if pieces(word, n + 1)[-1] not in known)
            ids, table = (
                torch.tensor(tokenizer.convert_tokens_to_ids(pieces(word, count))),
                embedding_table(encoder),
            )
            own = nn.Parameter(table.weight[ids.to(table.weight.device)].detach().float().clone())
            stack.callback(substitute(table, ids, partial(_value, own)))
            found.append(own)
        yield found


def _value(own: Tensor) -> Tensor:
    return own


def _tune(
    backbone: Any,
    prompt: str,
    words: Mapping[str, str],
    vectors: list[list[nn.Parameter]],
    steps: int,
    rate: float,
) -> None:
    parameters = [parameter for own in vectors for parameter in own]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    shape = backbone.latent_shape(backbone.native_resolution)
    for step in range(steps):
        word = list(words)[step % len(words)]
        pair = ContextPair(prompt.replace(word, "{}"), word, words[word])
        t = backbone.nearest_times(backbone.draw_times(1))
        noise = torch.randn(shape).to(backbone.device, backbone.denoiser.dtype)
        embedding, attention = pair.losses(backbone, noise, t)
        total = SCALE * (WEIGHTS[0] * embedding + WEIGHTS[1] * attention)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
            continue  # float16 overflows now and then
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

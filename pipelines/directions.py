"""Directions at inference: what NoiseCLR has found is added to any prompt.

    with directed(pipe, [Direction("runs/directions", 3, 1.5)]):
        image = pipe("a fox on green grass").images[0]

Works on every pipeline whose prompts have one length, also with subjects, LoRA and learned words.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from customize.adapters.directions import check_directions, direction_text, load_directions
from customize.backbones.base import Backbone
from customize.backbones.families import wrap
from customize.errors import UserError


class Direction(NamedTuple):
    """Direction `number`, from 0, of a run of noiseclr. `strength` multiplies its effect, as a guidance scale
    does a prompt's; negative: the other way."""

    run: str | Path
    number: int
    strength: float


def parse_direction(text: str) -> Direction:
    """A direction as RUN:NUMBER=STRENGTH; UserError for another text, and for a run that does not exist."""
    found = re.fullmatch(r"(.+):(\d{1,6})=([+-]?\d{1,4}(?:\.\d+)?)", text)
    if not found:
        raise UserError(f"--direction: write '{text}' as RUN:NUMBER=STRENGTH, such as runs/directions:3=1.5.")
    if not Path(found[1]).is_dir():
        raise UserError(f"--direction: there is no run '{found[1]}'; correct its path.")
    return Direction(found[1], int(found[2]), float(found[3]))


@contextmanager
def directed(pipe: DiffusionPipeline, directions: Sequence[Direction]) -> Iterator[None]:
    """Context in which the pipeline's images follow `directions` beside their prompt:

        eps'(x) = eps(x) + sum_i strength_i (eps(x, d_i) - eps(x, nothing))

    where eps(x) is the output that the pipeline asks for, of both halves under classifier-free guidance. A
    step takes one more pass of the denoiser for each direction, and one for all of them together; the passes
    are made without injected subjects. UserError for a run without such a direction or of another base
    model, and for a model whose prompts differ in length.
    """
    backbone = wrap(pipe)
    backbone.place = backbone.place.to(pipe._execution_device)
    check_directions(backbone)
    with steered(backbone, _vectors(backbone, directions), [own.strength for own in directions]):
        yield


@contextmanager
def steered(backbone: Backbone, vectors: Sequence[Tensor], strengths: Sequence[float]) -> Iterator[None]:
    """As `directed`, for directions of these vectors (directions, dim) for each text encoder."""
    texts = [_texts(backbone, vectors)]

    def steer(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if torch.is_grad_enabled():  # attention guidance looks ahead
            return output
        length = kwargs["encoder_hidden_states"].shape[1]
        if backbone.text_length and length != texts[0][0]["encoder_hidden_states"].shape[1]:
            texts[0] = _texts(backbone, vectors, length)
        without, *others = (module.forward(*args, **with_text(kwargs, own))[0] for own in texts[0])
        total = output[0]
        for strength, other in zip(strengths, others, strict=True):
            total = total + strength * (other - without)
        return (total, *output[1:]) if isinstance(output, tuple) else type(output)(sample=total)

    handle = backbone.denoiser.register_forward_hook(steer, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _texts(backbone: Backbone, vectors: Sequence[Tensor], length: int = 0) -> list[dict[str, Tensor]]:
    """The text arguments of no prompt and of each direction; `length`: tokens of the whole text, 0: as the
    base model has them."""
    own = backbone.text_length
    try:
        nothing = backbone.encode_unconditional()
        if length:  # T5 or a language model reads what others leave
            backbone.text_length += length - nothing["encoder_hidden_states"].shape[1]
            nothing = backbone.encode_unconditional()
        text = direction_text(backbone, vectors)
    finally:
        backbone.text_length = own
    return [
        nothing,
        *({name: value[i : i + 1] for name, value in text.items()} for i in range(len(vectors[0]))),
    ]


def _vectors(backbone: Backbone, directions: Sequence[Direction]) -> list[Tensor]:
    """The vectors (directions, dim) of these directions for each text encoder."""
    found = []
    for run, number, _ in directions:
        vectors = load_directions(Path(run), backbone)
        if number >= len(vectors[0]):
            raise UserError(f"'{run}' has the directions 0 to {len(vectors[0]) - 1}, not {number}.")
        found.append([own[number] for own in vectors])
    return [torch.stack(own).to(backbone.device) for own in zip(*found, strict=True)]


def with_text(kwargs: Mapping[str, Any], text: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a denoiser's call, with `text`, of one prompt, in the place of the prompts' and
    without injected subjects. UserError where the prompts have another length."""
    made = dict(kwargs) | ({"cross_attention_kwargs": None} if "cross_attention_kwargs" in kwargs else {})
    added = dict(kwargs.get("added_cond_kwargs") or {})
    for name, value in text.items():
        held = made if name in made else added
        given = held[name]
        if name == "attention_mask":  # Chroma's, which goes on over the image
            value = torch.cat([value.expand(len(given), -1), given[:, value.shape[1] :]], 1)
        if given.shape[1:] != value.shape[1:]:
            raise UserError(
                f"directions: a prompt has {given.shape[1]} tokens here and a direction {value.shape[1]}; "
                "draw with a run that has no hard path."
            )
        held[name] = value.to(given).expand_as(given)
    return made | ({"added_cond_kwargs": added} if added else {})

"""Directions: vectors that stand in for a whole prompt, whose effect on the denoiser's output is added to
that of any other prompt (NoiseCLR, Dalva and Yanardag, 2024, arXiv 2312.05390)."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.adapters.base import Adapter
from customize.adapters.embedding_hooks import replaced_words
from customize.backbones.base import Backbone
from customize.backbones.families import wrap
from customize.backbones.text import embedding_table
from customize.errors import UserError
from customize.files import tensors_of
from customize.tensor_checks import check_finite, misfit

FILE = "directions.safetensors"
WORD = "<direction>"  # in whose place a direction's vector is read


class Directions(nn.Module, Adapter):
    """`vectors` holds, for each text encoder, the trained vectors of all directions: (count, dim), float32.
    They start as random as the encoder's embeddings are spread."""

    files = (FILE,)

    def __init__(self, backbone: Backbone, count: int):
        super().__init__()
        self.names = backbone.embedding_names[: len(backbone.text_encoders)]
        self.vectors = nn.ParameterList()
        for encoder in backbone.text_encoders:
            table = embedding_table(encoder).weight.detach().float()
            noise = torch.randn(count, table.shape[1]).to(table.device)
            self.vectors.append(nn.Parameter(table.mean(0) + table.std(0) * noise))

    @property
    def changes_text(self) -> bool:
        return True

    def save(self, folder: Path) -> dict[str, Any]:
        state = dict(zip(self.names, self.vectors, strict=True))
        save_file(
            {name: own.detach().float().cpu().contiguous() for name, own in state.items()}, folder / FILE
        )
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Only checks them: `customize.pipelines.directions` draws with those that a call names."""
        if (folder / FILE).exists():
            load_directions(folder, wrap(pipe))


def load_directions(folder: Path, backbone: Backbone) -> list[Tensor]:
    """The vectors (count, dim) of a run's directions for each text encoder; UserError for a folder without
    them, and for those that are damaged or of another base model."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"'{folder}' has no directions: name a run of noiseclr.")
    state = tensors_of(path)
    count = len(next(iter(state.values()), ()))
    names = backbone.embedding_names[: len(backbone.text_encoders)]
    tables = [embedding_table(encoder) for encoder in backbone.text_encoders]
    wanted = {
        name: torch.empty(count, table.embedding_dim, device="meta")
        for name, table in zip(names, tables, strict=True)
    }
    if reason := misfit(state, wanted):
        raise UserError(
            f"the directions of '{folder}' do not fit this base model ({reason}); use the base model they "
            "were trained on."
        )
    check_finite(state, path)
    return [state[name] for name in names]


def direction_text(backbone: Backbone, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The denoiser's text arguments, batch first, for n directions: their vectors (n, dim) for each text
    encoder, each the only word of its prompt. Gradients flow into them."""
    for tokenizer in backbone.tokenizers:
        if WORD not in tokenizer.get_vocab():
            tokenizer.add_tokens([WORD])
    own = [value.unsqueeze(1) for value in vectors]
    with replaced_words(backbone.tokenizers, list(backbone.text_encoders), [WORD], own):
        return backbone.encode_prompt([WORD] * len(own[0]))


def check_directions(backbone: Backbone) -> None:
    """UserError for a base model in whose calls a direction's text could not take the place of any prompt's:
    its prompts differ in length, or its pipeline passes them under other names."""
    with torch.no_grad():
        texts = [backbone.encode_prompt([prompt]) for prompt in ("a", "a photo of a dog")]
    lengths = {text["encoder_hidden_states"].shape[1] for text in texts}
    known = {*signature(backbone.denoiser.forward).parameters, "text_embeds"}  # SDXL's among other arguments
    if len(lengths) > 1 or not texts[0].keys() <= known:
        raise UserError(
            "directions need a base model that gives all prompts one length (Stable Diffusion, Flux, Krea 2, "
            "Chroma, Sana, Lumina 2); use one of these."
        )

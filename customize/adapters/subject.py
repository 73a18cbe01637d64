"""The subject adapter: an encoder of reference images, and the attention branches through which its
tokens enter.

It is saved as one file: `subject.safetensors` with the configuration in its header, or for IP-Adapter's
encoders the released IP-Adapter layout, which stock diffusers reads.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.adapters.attention import (
    Injected,
    SubjectTokens,
    TextGate,
    install,
    is_installed,
    make_branches,
    stacks,
    text_layers,
)
from customize.adapters.base import Adapter
from customize.adapters.embedding_hooks import replaced_words
from customize.adapters.encoders.image_encoder import ImageEncoder, image_encoder_of
from customize.adapters.encoders.ip_adapter import HEAD, ImagePrompt, Projection
from customize.adapters.encoders.multimodal import MultimodalConfig, MultimodalEncoder
from customize.adapters.encoders.output import Encoded
from customize.adapters.encoders.resampler import Resampler
from customize.adapters.words import add_words
from customize.backbones.text import text_parts
from customize.errors import UserError
from customize.prompts import WORDS

FILE, RELEASED = "subject.safetensors", "ip_adapter.safetensors"
Encode = Callable[[list[str]], dict[str, Tensor]]


class SubjectAdapter(nn.Module, Adapter):
    """`encoder` is a `MultimodalEncoder` or an `ImagePrompt`; a branch is made for each text layer of
    `denoiser`.

    `starts` are the embeddings (dim,) that S+ starts from, one for each text encoder, if the encoder
    gives words.
    """

    files = (FILE, RELEASED)
    reads_images = True
    replaces_prompt = False

    @property
    def changes_text(self) -> bool:
        return True  # S+ is in the prompts, and the text is dropped at random

    def __init__(self, denoiser, encoder: Any, starts: Sequence[Tensor] = (), text_gate: TextGate = "none"):
        super().__init__()
        self.encoder, self.text_gate = encoder, text_gate
        self.starts = nn.ParameterList(start.detach().float().clone() for start in starts)
        self.branches = make_branches(denoiser, encoder.visual_dim, encoder.location_dim)
        self.layers = layer_widths(denoiser)

    def install(self, denoiser: UNet2DConditionModel) -> "SubjectAdapter":
        """Gives the denoiser's attention layers our processors, with this adapter's branches."""
        install(denoiser, self.branches, self.text_gate)
        return self

    def is_installed(self, denoiser: UNet2DConditionModel) -> bool:
        """Whether the denoiser has this adapter's branches; UserError if its processors are not ours."""
        return is_installed(denoiser, self.branches)

    @property
    def layer_names(self) -> list[str]:
        """The layers that have branches, in the order in which they run."""
        return [name for name, _ in self.layers.values()]

    def features(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """What the encoder reads of the images of one subject, (references, tokens, features), by the
        pipeline's image encoder."""
        image_encoder: Any = image_encoder_of(pipe, pipe.reference_fit)
        pixels = image_encoder.pixels(images).to(pipe._execution_device, pipe.unet.dtype)
        return self.encoder.read(image_encoder(pixels))

    @property
    def has_words(self) -> bool:
        return len(self.starts) > 0

    @property
    def text_blocks(self) -> int:
        return self.encoder.config.text_blocks

    def word_vectors(self, encoded: Encoded, weight: Tensor) -> list[Tensor]:
        """S+ for each text encoder, (text_blocks, samples, subjects, dim). A subject of weight 0 gets the
        starting word."""
        rows, subjects = weight.shape
        here = (weight != 0).view(rows, subjects, 1, 1)
        offsets = [words.unflatten(0, (rows, subjects)) * here for words in encoded.words]
        return [(start + own).permute(2, 0, 1, 3) for start, own in zip(self.starts, offsets, strict=True)]

    def texts(
        self,
        encode: Encode,
        tokenizers: Sequence,
        text_encoders: Sequence,
        prompts: list[str],
        vectors: list[Tensor],
    ) -> dict[str, Tensor]:
        """The denoiser's text arguments with S+ of every block in the prompts, (text_blocks, prompts,
        ...), encoded in one batch."""
        subjects = vectors[0].shape[2]
        with replaced_words(
            tokenizers, text_encoders, list(WORDS[:subjects]), [v.flatten(0, 1) for v in vectors]
        ):
            found = encode(prompts * self.text_blocks)
        return {name: value.unflatten(0, (self.text_blocks, len(prompts))) for name, value in found.items()}

    def injected(
        self,
        encoded: Encoded,
        weight: Tensor,
        block_texts: Tensor | None = None,
        regions: Tensor | None = None,
        scales: dict[str, float] | None = None,
    ) -> Injected:
        """`encoded` is of samples * subjects; `weight` is (samples, subjects)."""
        shape = tuple(weight.shape)
        mask, place = (
            None if x is None else x.unflatten(0, shape) for x in (encoded.mask, encoded.location_embedding)
        )
        tokens = SubjectTokens(encoded.visual.unflatten(0, shape), weight, mask, place, regions)
        return Injected(tokens, block_texts, scales or {})

    def save(self, folder: Path, half: bool = False) -> dict:
        """Writes the one file; in float16 if `half`."""
        dtype = torch.float16 if half else torch.float32
        if isinstance(self.encoder, ImagePrompt):
            state = {f"image_proj.{k}": v for k, v in self.encoder.image_proj.state_dict().items()}
            state |= {f"ip_adapter.{k}": v for k, v in self.branches.state_dict().items()}
            path, header = folder / (RELEASED if self.encoder.released else FILE), {"format": "pt"}
        else:
            state = self.state_dict()
            about = {
                "config": to_header(asdict(self.encoder.config)),
                "text_gate": self.text_gate,
                "layers": self.layers,
            }
            path, header = folder / FILE, {"format": "pt", "subject": json.dumps(about)}
        save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}, path, header)
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Nothing: a subject pipeline loads it together with its image encoder."""


def to_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's sizes by their names in files, where `text_blocks` is called slots."""
    return {"slots" if name == "text_blocks" else name: value for name, value in config.items()}


def from_header(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"text_blocks" if name == "slots" else name: value for name, value in config.items()}


def layer_widths(denoiser: UNet2DConditionModel) -> dict[str, list]:
    """Name and width of each cross-attention layer, by its released number. Adapters for one base model
    agree in them."""
    return {
        number: [name, denoiser.get_submodule(name).inner_dim]
        for number, name in text_layers(denoiser).items()
    }


def add_subject_words(tokenizers: Sequence) -> None:
    """Makes each of `WORDS` one token, where it is none yet."""
    for tokenizer in tokenizers:
        known = tokenizer.get_vocab()
        add_words(tokenizer, [word for word in WORDS if word not in known])


def multimodal(
    pipe: DiffusionPipeline, image_encoder: ImageEncoder, start: str, text_gate: TextGate = "none", **sizes
) -> SubjectAdapter:
    """CustomContrast's adapter for a pipeline and an image encoder, untrained; `sizes` are fields of
    `MultimodalConfig`.

    `start` is the word that S+ starts from. The pipeline's tokenizers learn the subjects' words, for
    training. UserError if `start` is empty for a tokenizer.
    """
    tokenizers, encoders = text_parts(pipe)
    tables = [encoder.get_input_embeddings().weight for encoder in encoders]
    config = MultimodalConfig(
        image_dim=image_encoder.width,
        image_layers=image_encoder.depth,
        visual_dim=pipe.unet.config.cross_attention_dim,
        text_dims=[table.shape[1] for table in tables],
        text_blocks=len(stacks(pipe.unet)),
        **sizes,
    )
    starts = []
    if config.words:
        for tokenizer, table in zip(tokenizers, tables, strict=True):
            ids = tokenizer(start, add_special_tokens=False).input_ids
            if not ids:
                raise UserError(
                    f"--initializer_token: '{start}' is empty for the tokenizer; give a word such as photo."
                )
            starts.append(table[ids[-1]])
        add_subject_words(tokenizers)
    return SubjectAdapter(pipe.unet, MultimodalEncoder(config), starts, text_gate).install(pipe.unet)


def image_prompt(
    pipe: DiffusionPipeline, image_encoder: ImageEncoder, plus: bool = True, **sizes
) -> SubjectAdapter:
    """IP-Adapter's adapter, untrained; `sizes` (dim, depth, heads, queries) are those of the Plus
    resampler."""
    output = pipe.unet.config.cross_attention_dim
    embed = image_encoder.vision.config.projection_dim
    made = (
        Resampler(image_encoder.width, output=output, head_dim=HEAD, **sizes)
        if plus
        else Projection(embed, output)
    )
    return SubjectAdapter(pipe.unet, ImagePrompt(made)).install(pipe.unet)

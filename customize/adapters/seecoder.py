"""The adapter of SeeCoder (Prompt-Free Diffusion, arXiv 2305.16223): an image in the place of the prompt.

Its file is in the layout of the released ones, `ctx.image.*`; what tensors do not say stands in the header of
files of this project, and in released ones is what the released code says.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.adapters.base import Adapter
from customize.adapters.encoders.image_encoder import ReferenceFit, squared
from customize.adapters.encoders.seecoder import SeeCoder, SeeCoderConfig
from customize.adapters.encoders.swin_layout import from_authors, sizes_of, to_authors
from customize.errors import UserError, first_line
from customize.files import header, tensors_of
from customize.imaging import flatten, to_tensor
from customize.tensor_checks import check_finite, misfit

FILE = "seecoder.safetensors"
PREFIX = "ctx.image."
RESOLUTION = 512  # side in pixels at which released encoders are shown an image here; they read any size
GUIDANCE = 2.0  # guidance scale of the released demo
SAID = ("global_queries", "heads", "decoder_attends")  # by the header alone


class SeeCoderAdapter(nn.Module, Adapter):
    """`resolution` is the side in pixels of the square that an image is read at."""

    files = (FILE,)
    reads_images = True
    replaces_prompt = True
    has_words = False

    def __init__(self, encoder: SeeCoder, resolution: int = RESOLUTION):
        super().__init__()
        self.encoder, self.resolution = encoder, resolution

    @property
    def changes_text(self) -> bool:
        return True

    def pixels(self, images: Sequence[Image.Image], fit: ReferenceFit) -> Tensor:
        """Images as squares (n, 3, side, side) in [0, 1], which is what the encoder reads; what is
        transparent becomes white."""
        side = self.resolution, self.resolution
        squares = [squared(flatten(image), fit).resize(side, Image.Resampling.BICUBIC) for image in images]
        return torch.stack([to_tensor(square) for square in squares])

    def features(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """The context of each image, (n, queries, dim)."""
        weight = next(self.parameters())
        with torch.no_grad():
            return self.encoder(self.pixels(images, pipe.reference_fit).to(weight.device, weight.dtype))

    def save(self, folder: Path) -> dict[str, Any]:
        about = {name: getattr(self.encoder.config, name) for name in SAID} | {"resolution": self.resolution}
        state = {k: v.detach().to("cpu", torch.float32) for k, v in self.encoder.state_dict().items()}
        swin = {k.removeprefix("imencoder."): v for k, v in state.items() if k.startswith("imencoder.")}
        state = {k: v for k, v in state.items() if not k.startswith("imencoder.")}
        state |= {f"imencoder.{k}": v for k, v in (to_authors(swin) | self._window_indices()).items()}
        named = {f"{PREFIX}{k}": v.contiguous() for k, v in state.items()}
        save_file(named, folder / FILE, {"format": "pt", "seecoder": json.dumps(about)})
        return {}

    def _window_indices(self) -> dict[str, Tensor]:
        """What the released code keeps among its tensors, though it follows from the window's size."""
        found = {}
        for i, stage in enumerate(self.encoder.imencoder.swin.encoder.layers):
            for j, block in enumerate(stage.blocks):
                index = block.attention.relative_position_bias.relative_position_index
                name = f"layers.{i}.blocks.{j}.attn.relative_position_index"
                found[name] = index.detach().cpu().view(round(index.numel() ** 0.5), -1).clone()
        return found

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Nothing: a subject pipeline loads it with `read`."""

    @staticmethod
    def read(path: Path, pipe: Any) -> "SeeCoderAdapter":
        """The adapter of a file, for a pipeline. UserError if it was made for another base model or is
        damaged."""
        state = {name.removeprefix(PREFIX): value for name, value in tensors_of(path).items()}
        try:
            about = json.loads(header(path).get("seecoder", "{}"))
            encoder = SeeCoder(config_of(state, {name: about[name] for name in SAID if name in about}))
            names = [name.removeprefix("imencoder.") for name in encoder.state_dict() if "imencoder." in name]
            swin = {k.removeprefix("imencoder."): v for k, v in state.items() if k.startswith("imencoder.")}
            renamed = {f"imencoder.{k}": v for k, v in from_authors(swin, names).items()}
            state = renamed | {k: v for k, v in state.items() if not k.startswith("imencoder.")}
            if reason := misfit(state, encoder.state_dict()):
                raise ValueError(reason)
            side = about.get("resolution", RESOLUTION)
        except (
            AttributeError,
            AssertionError,
            KeyError,
            ValueError,
            TypeError,
            IndexError,
            RuntimeError,
        ) as error:
            raise UserError(
                f"'{path}' is damaged or no SeeCoder ({first_line(error)}); download it again."
            ) from error
        if encoder.config.dim != pipe.unet.config.cross_attention_dim:
            raise UserError(
                f"'{path}' gives contexts of width {encoder.config.dim}, and this base model reads "
                f"{pipe.unet.config.cross_attention_dim}; load the base model that it was trained for."
            )
        check_finite(state, path)
        encoder.load_state_dict({name: value.float().clone() for name, value in state.items()})
        return SeeCoderAdapter(encoder, side).eval().requires_grad_(False)


def config_of(state: Mapping[str, Tensor], said: Mapping[str, Any]) -> SeeCoderConfig:
    """The sizes of an encoder, by the shapes of its tensors and by what its header says. KeyError for other
    files."""
    swin = sizes_of({k.removeprefix("imencoder."): v for k, v in state.items() if k.startswith("imencoder.")})
    queries, dim = state["qtransformer.init_query.weight"].shape
    first = said.get("global_queries", SeeCoderConfig.global_queries)

    def count(stack: str) -> int:
        return len({name.removeprefix(stack).split(".")[0] for name in state if name.startswith(stack)})

    return SeeCoderConfig(
        dim=dim,
        swin=swin,
        local_queries=queries - first,
        decoder_layers=count("imdecoder.transformer.layers."),
        query_layers=count("qtransformer.transformer_selfatt_layers."),
        position_aware=any("pe_layer" in name for name in state),
        **said,
    )


def text_of(context: Tensor, unet: Any) -> dict[str, Tensor]:
    """The denoiser's text arguments for contexts (batch, queries, dim): on SDXL, for which none was released,
    with zeros as the pooled text."""
    text = {"encoder_hidden_states": context}
    if unet.config.addition_embed_type == "text_time":
        size = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        text["text_embeds"] = context.new_zeros(len(context), size)
    return text

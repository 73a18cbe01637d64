"""SeeCoder: an encoder of one image that takes the place of the prompt (Prompt-Free Diffusion, Xu et al.,
2023, arXiv 2305.16223).

A Swin transformer, kept frozen, a decoder and a query transformer make of an image the states that the UNet
else reads of a prompt; the UNet is frozen too. The loss is the diffusion loss alone. What was read of the
paper does not say which image is shown in training: by default it is the target itself. The share of dropped
images, for which the context is zeros as at inference, and the small Swin are choices of this project.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import SwinBackbone

from customize.adapters.attention import text_layers
from customize.adapters.encoders.image_encoder import ReferenceFit
from customize.adapters.encoders.seecoder import SeeCoder, SeeCoderConfig
from customize.adapters.seecoder import SeeCoderAdapter, text_of
from customize.adapters.subject_files import adapter_file, kind_of
from customize.backbones.base import Backbone, Condition
from customize.config import check_ranges, option
from customize.data.sources import ReferenceSource
from customize.errors import UserError, first_line
from customize.trainers.methods.base import Method, MethodConfig, refuse_caches_and_exports

SMALL_SWIN = {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 4}
SIZES = ("decoder_layers", "query_layers", "global_queries", "local_queries", "heads", "position_aware")


@dataclass
class SeeCoderMethodConfig(MethodConfig):
    swin: str = option(
        "",
        "Swin transformer that reads the image, kept frozen: folder or hub id; empty: a new small one, "
        "trained too",
        essential=True,
    )
    pretrained_adapter: str = option(
        "", "SeeCoder to go on from: a run of seecoder, or a released file; its Swin transformer is frozen"
    )
    reference_fit: ReferenceFit = option(
        "stretch",
        "how reference images that are not square become square: stretch, pad with white, or crop the centre",
    )
    shown: Literal["target", "reference"] = option(
        "target", "the image that the encoder reads: the target itself, or another image of its subject"
    )
    dropout_image: float = option(
        0.1, "share of samples trained without an image, for classifier-free guidance", least=0, most=1
    )
    decoder_layers: int = option(6, "transformer layers of SeeCoder's decoder", least=1)
    query_layers: int = option(9, "layers of SeeCoder's query transformer", least=1)
    global_queries: int = option(4, "queries of SeeCoder that read the local ones", least=1)
    local_queries: int = option(144, "queries of SeeCoder that read the image", least=1)
    heads: int = option(8, "attention heads of SeeCoder's decoder and query transformer", least=1)
    position_aware: bool = option(False, "add positions to what SeeCoder's queries read (SeeCoder-PA)")


class SeeCoderMethod(Method):
    Config = SeeCoderMethodConfig
    Source = ReferenceSource
    defaults = {"train_batch_size": 16, "max_train_steps": 100_000, "learning_rate": 1e-4}
    embedded_defaults = {
        "max_train_steps": 1200,
        "learning_rate": 3e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
    }
    config: SeeCoderMethodConfig

    def __init__(self, backbone: Backbone, config: SeeCoderMethodConfig, concepts=()):
        super().__init__(backbone, config, list(concepts))
        check_ranges(config)
        try:
            text_layers(backbone.denoiser)
        except TypeError:
            raise UserError(
                "SeeCoderMethod needs a UNet (Stable Diffusion 1.x, 2.x, XL) as base model."
            ) from None
        self.adapter = self.start_from(config.pretrained_adapter) if config.pretrained_adapter else self.new()
        self.adapter.encoder.imencoder.requires_grad_(not (config.swin or config.pretrained_adapter))
        self.adapters.append(self.adapter)

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        if train_config.validation_prompt or train_config.validation_metric == "score":
            raise UserError("seecoder draws from images, not from validation prompts; leave them out.")
        refuse_caches_and_exports(model_config, train_config)
        defaults = {field.name: field.default for field in fields(method_config)}
        changed = [name for name in ("swin", *SIZES) if getattr(method_config, name) != defaults[name]]
        if method_config.pretrained_adapter and changed:
            raise UserError(f"--{changed[0]}: --pretrained_adapter has sizes of its own; leave it out.")

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        if source.config.second_subject_rate and method_config.shown == "reference":
            raise UserError(
                "--shown reference reads one subject of each image: leave --second_subject_rate out."
            )

    def new(self) -> SeeCoderAdapter:
        config, dim = self.config, self.backbone.denoiser.config.cross_attention_dim
        if dim % config.heads:
            raise UserError(f"--heads {config.heads} does not divide {dim}, the width of this model's text.")
        sizes = {name: getattr(config, name) for name in SIZES}
        made = SeeCoderConfig(dim, SMALL_SWIN, decoder_attends=True, **sizes)
        swin = load_swin(config.swin) if config.swin else None
        return SeeCoderAdapter(SeeCoder(made, swin), self.side)

    @property
    def side(self) -> int:
        return self.backbone.resolution or self.backbone.native_resolution

    def start_from(self, name: str) -> SeeCoderAdapter:
        path = adapter_file(name)
        if kind_of(path) != "seecoder":
            raise UserError(
                f"--pretrained_adapter: '{path}' is no SeeCoder; name a run of seecoder or a file."
            )
        found = SeeCoderAdapter.read(path, self.backbone.pipe)
        found.resolution = self.side
        return found.train().requires_grad_(True)

    def reference_pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """References as the encoder reads them, (n, 3, side, side) in [0, 1]."""
        return self.adapter.pixels(images, self.config.reference_fit)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        """A dropped image's context is zeros, as in the unconditional half at inference."""
        target, reference = batch["pixels"] / 2 + 0.5, batch["references"][:, 0, 0]
        context = self.adapter.encoder(target if self.config.shown == "target" else reference)
        dropped = torch.rand(len(t), device=t.device) < self.config.dropout_image * self.training
        return Condition(text_of(context * ~dropped.view(-1, 1, 1), self.backbone.denoiser))


def load_swin(name: str) -> SwinBackbone:
    """A Swin transformer that gives the features of all four stages; UserError if there is none of this
    name."""
    try:
        return SwinBackbone.from_pretrained(name, out_features=[f"stage{i}" for i in range(1, 5)])
    except Exception as error:  # the library raises all kinds
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise UserError(
            f"--swin: '{name}' could not be loaded as a Swin transformer ({first_line(error)})."
        ) from error

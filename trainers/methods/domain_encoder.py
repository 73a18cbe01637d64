"""Domain-agnostic tuning encoder: from images of any subject to a word and LoRA, for a few steps of tuning
(Arar et al., 2023, arXiv 2307.06925).

Trained over many subjects. L = L_diff + lambda_c L_c + lambda_r L_r: the contrast L_c draws the predicted
word to the nearest words of the vocabulary and away from those of other subjects; L_r holds offsets and
LoRA small. Cross-attention takes two paths, one of them with the nearest word and the original weights
(`--hard_path`). `domain_tuning` then learns a new subject from the run, in a dozen steps.

There is no public code. The sizes, k = 10 nearest words and the temperature .1 are choices of this project.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize import embedded
from customize.adapters.domain import DomainConfig, DomainEncoder, Predicted, layers_of
from customize.adapters.dual_path import install_paths, nearest_words
from customize.adapters.embedding_hooks import replaced_words
from customize.adapters.encoders.image_encoder import ImageEncoder, ReferenceFit, load_image_encoder
from customize.adapters.words import add_words, pieces
from customize.backbones.base import Backbone, Condition, Step
from customize.backbones.text import embedding_table
from customize.config import check_ranges, option
from customize.data.sources import ReferenceSource
from customize.errors import UserError
from customize.losses.contrastive import nearest_word_contrast
from customize.prompts import WORDS
from customize.trainers.methods.base import Method, MethodConfig, refuse_caches_and_exports

WORD = WORDS[0]


@dataclass
class DomainEncoderConfig(MethodConfig):
    image_encoder: str = option(
        "",
        "CLIP vision model that reads the references: folder, hub id or OWNER/NAME/FOLDER; empty: that of "
        "stickers",
        essential=True,
    )
    reference_fit: ReferenceFit = option(
        "stretch",
        "how reference images that are not square become square: stretch, pad with white, or crop the centre",
    )
    initializer_token: str = option("photo", "the word that predicted words start from")
    nearest_word_weight: float = option(
        0.01,
        "weight of the nearest-word contrast: predicted words near to ordinary ones, and unlike each other",
        least=0,
    )
    offset_weight: float = option(
        0.01, "weight of the mean square of predicted offsets and LoRA matrices", least=0
    )
    hard_path: float = option(
        0.25,
        "share of the hard path in cross-attention, with the nearest ordinary word and the original "
        "weights; 0 is off",
        least=0,
        below=1,
    )
    dropout_text: float = option(
        0.1, "share of samples trained without their prompt, for classifier-free guidance", least=0, most=1
    )
    num_vectors: int = option(1, "vectors of the predicted word", least=1)
    rank: int = option(4, "rank of the predicted LoRA matrices", least=1, essential=True)
    dim: int = option(768, "width of the encoder, a multiple of --heads", least=1)
    depth: int = option(4, "blocks of the encoder", least=1)
    heads: int = option(12, "attention heads of the encoder", least=1)


class DomainEncoding(Method):
    Config = DomainEncoderConfig
    Source = ReferenceSource
    defaults = {"train_batch_size": 16, "max_train_steps": 50_000, "learning_rate": 1e-4}
    embedded_defaults = {
        "learning_rate": 7e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "max_train_steps": 1000,
        "num_vectors": 4,
        "rank": 8,
        "dim": 192,
        "depth": 2,
        "heads": 6,
        "unmasked_weight": 0.3,
    }

    def __init__(self, backbone: Backbone, config: DomainEncoderConfig, concepts: Any = ()):
        super().__init__(backbone, config, list(concepts))
        check_ranges(config)
        if config.dim % config.heads:
            raise UserError(f"--dim {config.dim} must be a multiple of --heads {config.heads}.")
        self.image_encoder = image_encoder_of(backbone, config.image_encoder, config.reference_fit)
        self.words = pieces(WORD, config.num_vectors)
        starts = []
        for tokenizer, encoder in zip(backbone.tokenizers, backbone.text_encoders, strict=True):
            ids = tokenizer(config.initializer_token, add_special_tokens=False).input_ids
            if not ids:
                raise UserError("--initializer_token is empty for the tokenizer; give a word such as photo.")
            starts.append(embedding_table(encoder).weight[ids[-1]])
            add_words(tokenizer, self.words)
        self.adapter = DomainEncoder(
            DomainConfig(
                image_dim=self.image_encoder.width,
                text_dims=[len(start) for start in starts],
                layers=layers_of(backbone),
                starting_word=config.initializer_token,
                num_vectors=config.num_vectors,
                rank=config.rank,
                dim=config.dim,
                depth=config.depth,
                heads=config.heads,
            ),
            starts,
        ).install(backbone.denoiser)
        if config.hard_path:
            install_paths(backbone.denoiser, config.hard_path, backbone.tokenizers[0].model_max_length)
        self.adapters.append(self.adapter)

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        if train_config.validation_prompt or train_config.validation_metric == "score":
            raise UserError("domain_encoder draws no validation images: domain_tuning does; leave them out.")
        refuse_caches_and_exports(model_config, train_config)

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        if source.config.second_subject_rate:
            raise UserError(
                "domain_encoder learns one subject of each image: leave --second_subject_rate out."
            )

    def forward(self, batch: dict) -> dict[str, Tensor]:
        features = features_of(self.image_encoder, batch["references"][:, 0, 0])
        predicted = self.adapter(features)
        self.adapter.cores = predicted.cores  # also for the backward pass, which may run layers again
        return super().forward(batch | {"predicted": predicted})

    def reference_pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self.image_encoder.pixels(images)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        vectors = self.adapter.vectors(batch["predicted"])
        dropped = torch.rand(len(t), device=t.device) < self.config.dropout_text * self.training
        # the pipeline itself puts all tokens of a word of several vectors into the text
        prompts = [
            "" if drop else prompt for prompt, drop in zip(batch["prompt"], dropped.tolist(), strict=True)
        ]
        text = self.without_text(self._text(prompts, vectors), dropped)
        if self.config.hard_path:
            ordinary = self.without_text(self._text(prompts, self._ordinary(vectors)), dropped)
            hard = ordinary["encoder_hidden_states"]
            text |= {"encoder_hidden_states": torch.cat([text["encoder_hidden_states"], hard], 1)}
        return Condition(text)

    def _text(self, prompts: list[str], vectors: list[Tensor]) -> dict[str, Tensor]:
        backbone = self.backbone
        with replaced_words(backbone.tokenizers, backbone.text_encoders, self.words, vectors):
            return backbone.encode_prompt(prompts)

    def _ordinary(self, vectors: list[Tensor]) -> list[Tensor]:
        """The embeddings of the ordinary words that are nearest to the predicted ones."""
        tables = [embedding_table(encoder) for encoder in self.backbone.text_encoders]
        pairs = zip(vectors, tables, strict=True)
        return [
            table.weight[nearest_words(own.flatten(0, 1), table)].view_as(own).detach()
            for own, table in pairs
        ]

    def losses(self, step: Step) -> dict[str, Tensor]:
        terms, config, predicted = super().losses(step), self.config, step.batch["predicted"]
        if config.nearest_word_weight:
            terms["nearest_word"] = config.nearest_word_weight * self.contrast(
                predicted, step.batch["identity"]
            )
        if config.offset_weight:
            squares = torch.stack([words.square().mean() for words in predicted.words])
            terms["offset"] = config.offset_weight * (squares.mean() + predicted.cores.square().mean())
        return terms

    def contrast(self, predicted: Predicted, identity: Tensor) -> Tensor:
        """The nearest-word contrast, mean over text encoders and vectors."""
        tables = [embedding_table(encoder).weight for encoder in self.backbone.text_encoders]
        pairs = zip(self.adapter.vectors(predicted), tables, strict=True)
        return torch.stack([nearest_word_contrast(own, identity, table) for own, table in pairs]).mean()


def image_encoder_of(backbone: Backbone, name: str, fit: ReferenceFit) -> ImageEncoder:
    """The image encoder that references are read with; UserError where none is named."""
    if not name and not embedded.is_embedded(backbone.name):
        raise UserError("--image_encoder: name the CLIP vision model that reads the references.")
    found = load_image_encoder(name or embedded.NAME, backbone.denoiser.dtype)
    found.fit = fit
    return found


def features_of(image_encoder: ImageEncoder, pixels: Tensor) -> Tensor:
    """The image encoder's last layer but one, (images, tokens, width)."""
    return image_encoder(pixels).hidden_states[-2].float()

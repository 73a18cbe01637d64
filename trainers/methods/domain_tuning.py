"""Domain-agnostic tuning: a dozen steps from the word and LoRA that a trained encoder predicts (Arar et al.,
2023, arXiv 2307.06925).

`--domain_encoder` is a run of `domain_encoder`. It reads the subject's images once; the word and the LoRA
that it predicts are then trained on them, and saved as ordinary files. With `--hard_path`, pipelines of
this toolkit also take the path of the nearest ordinary word; others draw with the files alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from PIL import Image

from customize.adapters.domain import FILE, DomainConfig, load_domain_encoder
from customize.adapters.dual_path import DualPath, check_paths, nearest_words
from customize.adapters.lora import Lora, LoraFields
from customize.adapters.words import LearnedWords
from customize.backbones.base import Backbone
from customize.backbones.text import embedding_table
from customize.config import option
from customize.data.concepts import Concept
from customize.data.images import ImageFile, read_image_file
from customize.errors import UserError
from customize.runs.checkpoint import open_run
from customize.runs.output import sha256
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.methods.domain_encoder import DomainEncoderConfig, features_of, image_encoder_of


@dataclass
class DomainTuningConfig(MethodConfig):
    domain_encoder: str = option("", "run of domain_encoder, whose prediction is tuned", essential=True)
    placeholder_token: str = option("<s>", "the word for the subject", essential=True)
    image_encoder: str = option(
        "",
        "where the CLIP vision model lies that the domain encoder was trained with; empty: as its run says",
    )
    hard_path: float = option(
        0.0,
        "share of the hard path in cross-attention, with the nearest ordinary word and the original "
        "weights; 0 is off, so that other programs draw the same",
        least=0,
        below=1,
    )
    token_learning_rate: float = option(0.0, "learning rate of the word; 0 means --learning_rate", least=0)


class DomainTuning(Method):
    Config = DomainTuningConfig
    needs_captions = True
    defaults = {"learning_rate": 1e-4, "max_train_steps": 12, "train_batch_size": 4}
    embedded_defaults = {"learning_rate": 1e-3, "token_learning_rate": 1e-2}

    def __init__(self, backbone: Backbone, config: DomainTuningConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        if config.hard_path:
            check_paths(backbone.denoiser)
        then = run_of_encoder(config.domain_encoder)
        name = config.image_encoder or then["image_encoder"]
        self.image_encoder = image_encoder_of(backbone, name, then["reference_fit"])
        self.encoder = load_domain_encoder(config.domain_encoder, self._fits)
        sizes, word = self.encoder.config, config.placeholder_token
        if "+" in word or not word.strip():
            raise UserError("domain_tuning learns one word; name one in --placeholder_token.")
        self.tokens = LearnedWords(backbone, {word: sizes.starting_word}, sizes.num_vectors)
        layers = ",".join(sizes.layers)
        self.adapters += [Lora(backbone, LoraFields(rank=sizes.rank, lora_layers=layers)), self.tokens]
        if config.hard_path:
            self.paths = DualPath(backbone.pipe, {word: sizes.num_vectors}, config.hard_path)
            self.adapters.append(self.paths)

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        word = given.get("placeholder_token", DomainTuningConfig.placeholder_token)
        return cls.defaults | super().defaults_for(base, given) | {"instance_prompt": f"a photo of {word}"}

    def _fits(self, config: DomainConfig) -> bool:
        widths = [embedding_table(encoder).embedding_dim for encoder in self.backbone.text_encoders]
        linear = dict(self.backbone.denoiser.named_modules())
        same = all(
            name in linear and list(linear[name].weight.shape) == [wide, narrow]
            for name, (narrow, wide) in config.layers.items()
        )
        return same and config.text_dims == widths and config.image_dim == self.image_encoder.width

    @torch.no_grad()
    def use_images(self, images: Sequence[ImageFile]) -> None:
        shown = [_shown(image) for image in images]
        predicted = self.encoder(features_of(self.image_encoder, self.image_encoder.pixels(shown)))
        vectors = [own.mean(0) for own in self.encoder.vectors(predicted)]
        for parameter, own in zip(self.tokens.vectors, vectors, strict=True):
            parameter.copy_(own)
        for name, (down, up) in self.encoder.lora(predicted.cores.mean(0)).items():
            layer: Any = self.backbone.denoiser.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)
        if self.config.hard_path:
            tables = [embedding_table(encoder) for encoder in self.backbone.text_encoders]
            pairs = zip(vectors, tables, strict=True)
            self.paths.install([nearest_words(own, table).tolist() for own, table in pairs])

    def described(self) -> dict[str, Any]:
        return {"domain_encoder": sha256(Path(self.config.domain_encoder) / FILE)}

    def parameter_groups(self, lr: float) -> list[dict]:
        words = list(self.tokens.parameters())
        known = {id(p) for p in words}
        rest = [p for p in self.trainable().values() if id(p) not in known]
        return [
            {"params": rest, "lr": lr},
            {"params": words, "lr": self.config.token_learning_rate or lr, "weight_decay": 0.0},
        ]


def run_of_encoder(folder: str) -> dict[str, Any]:
    """The settings of a run of domain_encoder; UserError if it is none, or damaged."""
    if not (Path(folder) / FILE).is_file():
        raise UserError(f"--domain_encoder: '{folder}' is no run of domain_encoder.")
    settings = open_run(Path(folder))["config"]
    return asdict(DomainEncoderConfig()) | settings


def _shown(file: ImageFile) -> Image.Image:
    """The image, with its subject on white where a mask is known."""
    image, mask = read_image_file(file)
    if mask is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), mask.convert("L"))

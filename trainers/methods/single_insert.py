"""SingleInsert: a subject from one image, without its background (Wu et al., 2023, arXiv 2310.08094).

An encoder reads the subject and predicts the vectors of its word. The losses compare clean latents. Inside
the mask, L_fg asks for the image itself. Outside of it, L_bg asks for what the base model predicts for the
class's prompt, so that the word never learns the background. In the second stage LoRA is trained too, and
L_sem keeps what the class's prompt draws.

The paper trains both stages one after the other; so does one run here. Afterwards the encoder is not needed:
the vectors that it predicts for the images are saved as an ordinary learned word.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.adapters.lora import Lora, LoraFields
from customize.adapters.words import LearnedWords
from customize.backbones.base import Backbone, Condition, Step
from customize.config import option
from customize.data.concepts import Concept
from customize.data.crops import fit
from customize.data.images import ImageFile, read_image_file
from customize.errors import UserError
from customize.imaging import to_tensor
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.methods.textual_inversion import WordFields, new_words

SIDE, PATCH = 224, 32  # of the images that the encoder reads, and of its patches, in pixels


@dataclass
class SingleInsertConfig(WordFields, LoraFields, MethodConfig):
    background_weight: float = option(
        1.0, "weight of L_bg: outside the mask, the base model's prediction for the class's prompt", least=0
    )
    semantic_weight: float = option(
        1.0, "weight of L_sem, in the second stage: what the class's prompt draws stays as it was", least=0
    )
    first_stage: float = option(
        0.5, "share of the steps in which only the word is learned; then LoRA too", least=0, most=1
    )
    train_text_encoder: bool = option(True, "in the second stage, LoRA of the CLIP text encoders too")
    lora_learning_rate: float = option(
        0.0, "learning rate of LoRA in the second stage; 0 means half of --learning_rate", least=0
    )
    encoder_dim: int = option(768, "width of the encoder that predicts the word, a multiple of 64", least=64)
    encoder_depth: int = option(12, "layers of the encoder that predicts the word", least=1)


class PredictedWord(LearnedWords):
    """A learned word whose vectors an encoder predicts from images of the subject: the vector of the class's
    word, and an offset that is zero at the start. Of several images, the mean counts."""

    def __init__(self, backbone: Backbone, words: dict[str, str], num_vectors: int, dim: int, depth: int):
        super().__init__(backbone, words, num_vectors)
        self.vectors.requires_grad_(False)
        self.sizes = [vectors.numel() for vectors in self.vectors]
        sizes = {"hidden_size": dim, "intermediate_size": 4 * dim, "num_attention_heads": dim // 64}
        self.encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                **sizes,
                num_hidden_layers=depth,
                image_size=SIDE,
                patch_size=PATCH,
                projection_dim=sum(self.sizes),
            )
        )
        nn.init.zeros_(self.encoder.visual_projection.weight)
        self.pixels: Tensor | None = None  # (images, 3, SIDE, SIDE), of the subject
        self.predicted: list[Tensor] | None = None

    def current(self) -> list[Tensor]:
        if self.predicted is not None:
            return self.predicted
        if self.pixels is None:
            return list(self.vectors)
        pixels = self.pixels.to(self.vectors[0].device)
        offsets = self.encoder(pixels).image_embeds.mean(0).split(self.sizes)
        pairs = zip(self.vectors, offsets, strict=True)
        return [vectors + offset.view_as(vectors) for vectors, offset in pairs]

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Context in which the encoder runs once, however often the word is read."""
        self.predicted = self.current()
        try:
            yield
        finally:
            self.predicted = None


class SingleInsert(Method):
    Config = SingleInsertConfig
    needs_captions = True
    defaults = {
        "learning_rate": 1e-4,
        "max_train_steps": 100,
        "train_batch_size": 4,
        "rank": 4,
        "unmasked_weight": 0.0,
    }
    embedded_defaults = {
        "learning_rate": 1e-3,
        "max_train_steps": 400,
        "num_vectors": 4,
        "rank": 16,
        "encoder_dim": 128,
        "encoder_depth": 2,
    }

    def __init__(self, backbone: Backbone, config: SingleInsertConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        if "+" in config.placeholder_token:
            raise UserError("single_insert learns one word; name one in --placeholder_token.")
        for name in ("snr_gamma", "contrastive_flow_weight"):
            if getattr(config, name):
                raise UserError(
                    f"single_insert compares clean latents, which --{name} does not weight; leave it out."
                )
        if config.encoder_dim % 64:
            raise UserError(f"--encoder_dim must be a multiple of 64, not {config.encoder_dim}.")
        self.lora = Lora(backbone, config, backbone.clip_encoders if config.train_text_encoder else [])
        self.tokens = new_words(
            backbone, config, PredictedWord, dim=config.encoder_dim, depth=config.encoder_depth
        )
        self.adapters += [self.lora, self.tokens]
        self.is_second_stage = False

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        word, start = (str(given.get(name, "")) for name in ("placeholder_token", "initializer_token"))
        prompt = {"instance_prompt": f"a photo of a {word} {start}"} if word and start else {}
        return cls.defaults | super().defaults_for(base, given) | prompt

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        if not source.config.masked_loss or source.config.unmasked_weight:
            raise UserError(
                "single_insert learns inside of the masks and holds what is outside: leave --masked_loss "
                "on and --unmasked_weight 0."
            )

    def use_images(self, images: Sequence[ImageFile]) -> None:
        self.tokens.pixels = torch.stack([cut_out(image) for image in images])

    def on_step(self, step: int, steps: int) -> None:
        self.is_second_stage = step >= self.config.first_stage * steps
        for parameter in self._lora_parameters():
            parameter.requires_grad_(self.is_second_stage)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        with self.tokens.predicting():
            return super().forward(batch)

    def losses(self, step: Step) -> dict[str, Tensor]:
        if not self.training:
            return super().losses(step)
        inside = F.interpolate(step.batch["mask"], step.latents.shape[-2:], mode="area")
        clean = self.backbone.clean(step.noisy, step.t, step.prediction).float()
        with torch.no_grad(), self.backbone.without_adapters():
            kept = self._class_latents(step)
        terms = {"denoise": ((clean - step.latents).square() * inside).mean()}
        terms["background"] = self.config.background_weight * ((clean - kept).square() * (1 - inside)).mean()
        if self.is_second_stage:
            terms["semantic"] = self.config.semantic_weight * F.mse_loss(self._class_latents(step), kept)
        return terms

    def _class_latents(self, step: Step) -> Tensor:
        """The clean latents that the model predicts for the prompts with the class's word."""
        prompts = [self.class_prompt(prompt) for prompt in step.batch["prompt"]]
        condition = Condition(self.backbone.encode_prompt(prompts), sizes=step.condition.sizes)
        prediction = self.backbone.denoise(step.noisy, step.t, condition)
        return self.backbone.clean(step.noisy, step.t, prediction).float()

    def class_prompt(self, prompt: str) -> str:
        """The prompt with the class's word alone: "a <s> dog" becomes "a dog", and so does "a <s>"."""
        [word], start = self.tokens.words, self.config.initializer_token
        return prompt.replace(word, start).replace(f"{start} {start}", start)

    def _lora_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if "lora_" in name]

    def parameter_groups(self, lr: float) -> list[dict]:
        rate = self.config.lora_learning_rate or lr / 2
        encoder = [p for p in self.tokens.parameters() if p.requires_grad]
        return [{"params": encoder, "lr": lr}, {"params": self._lora_parameters(), "lr": rate}]


def cut_out(file: ImageFile) -> Tensor:
    """The subject of an image on white, (3, SIDE, SIDE) in [-1, 1]; UserError for an image without a mask."""
    image, mask = read_image_file(file)
    if mask is None:
        raise UserError(
            f"single_insert must know where the subject is: put a mask, white on the subject, as "
            f"'{file.path.stem}.mask.png' beside '{file.path}', or make its background transparent."
        )
    alone = Image.composite(image, Image.new("RGB", image.size, "white"), mask.convert("L"))
    return to_tensor(fit(alone, SIDE, SIDE)) * 2 - 1

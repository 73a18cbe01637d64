"""What methods that train an encoder of images share: image encoder, adapter, and dropout for guidance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from customize import embedded
from customize.adapters.attention import text_layers
from customize.adapters.encoders.image_encoder import ReferenceFit, load_image_encoder
from customize.adapters.subject import SubjectAdapter
from customize.adapters.subject_files import adapter_file, load_adapter, read_file
from customize.config import option
from customize.data.sources import ReferenceSource
from customize.errors import UserError
from customize.pipelines.load import with_subjects
from customize.prompts import WORDS, check_words, without_words
from customize.randomness import fixed_randomness
from customize.trainers.methods.base import Method, MethodConfig


@dataclass
class EncoderConfig(MethodConfig):
    """Fields of every method that trains an encoder of images."""

    reference_fit: ReferenceFit = option(
        "stretch",
        "how reference images that are not square become square: stretch, pad with white, or crop the centre",
    )
    pretrained_adapter: str = option(
        "", "encoder to go on from: a run, a file, stickers, or a released IP-Adapter (for ip_adapter)"
    )
    validation_images: list[str] = option([], "images of the subject that --validation_prompt calls <s>")
    dropout_text: float = option(
        0.05, "share of samples trained without their prompt, for classifier-free guidance", least=0, most=1
    )
    dropout_image: float = option(
        0.05, "share of samples trained without references, for classifier-free guidance", least=0, most=1
    )
    dropout_both: float = option(
        0.05,
        "share of samples trained without prompt and references, for classifier-free guidance",
        least=0,
        most=1,
    )
    multi_reference_rate: float = option(
        0.25, "share of batches in which the encoder reads both references of a subject", least=0, most=1
    )


@dataclass
class SubjectConfig(EncoderConfig):
    """Fields of every method whose encoder reads references with a CLIP vision model."""

    image_encoder: str = option(
        "",
        "CLIP vision model that reads the references: folder, hub id or OWNER/NAME/FOLDER; empty: that of "
        "stickers",
        essential=True,
    )


class EncoderMethod(Method):
    """Subclasses make `adapter` in `make_adapter`, or of an earlier run in `start_from`, and say in
    `reference_pixels` what the encoder reads of an image."""

    Config: type[EncoderConfig] = EncoderConfig
    Source = ReferenceSource
    defaults = {"train_batch_size": 16, "max_train_steps": 100_000, "lr_warmup_steps": 1000}
    embedded_defaults = {
        "learning_rate": 7e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "max_train_steps": 1200,
        "timestep_sampling": "cubic",
        "unmasked_weight": 0.3,
    }
    adapter: Any

    def __init__(self, backbone, config: EncoderConfig, concepts=()):
        super().__init__(backbone, config, list(concepts))
        try:
            text_layers(backbone.denoiser)
        except TypeError:
            raise UserError(
                f"{type(self).__name__} needs a UNet (Stable Diffusion 1.x, 2.x, XL) as base model."
            ) from None
        self.load_readers()
        self.adapter = (
            self.start_from(config.pretrained_adapter) if config.pretrained_adapter else self.make_adapter()
        )
        self.adapters.append(self.adapter)

    def load_readers(self) -> None:
        """Loads frozen models that the encoder reads with, if it has some."""

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        if train_config.validation_prompt and not method_config.validation_images:
            raise UserError(
                "--validation_prompt: name images of the subject to draw with --validation_images."
            )
        if train_config.validation_metric == "score":
            raise UserError(
                "--validation_metric score rates runs of one subject; an encoder's best step goes by "
                "--holdout's loss."
            )
        if model_config.cache_dir or train_config.export_kohya:
            flag = "--cache_dir" if model_config.cache_dir else "--export_kohya"
            raise UserError(
                f"{flag} is for LoRA and learned words; an encoder sees new images at every step and is "
                "one file."
            )

    def make_adapter(self) -> Any:
        raise NotImplementedError

    def start_from(self, name: str) -> Any:
        """The adapter of an earlier run, to go on from; UserError where it does not fit."""
        raise NotImplementedError

    def reference_pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """References as the encoder reads them, (n, channels, side, side)."""
        raise NotImplementedError

    def diagnose(self, batches: list[dict], folder: Path, step: int) -> dict[str, float]:
        """`gain`: by how much the loss rises when each sample is given another subject's references, at the
        same noise."""
        found = []
        with torch.no_grad():
            for batch in batches:
                other = batch | {"references": batch["references"].clone()}
                other["references"][:, 0] = batch["references"][:, 0].roll(1, 0)
                losses = []
                for shown in (batch, other):
                    with fixed_randomness(0):
                        losses.append(float(torch.stack([self(shown)["denoise"] for _ in range(4)]).mean()))
                found.append(losses[1] - losses[0])
        return {"gain": sum(found) / len(found)}

    @property
    def pipe(self) -> Any:
        """A pipeline of the modules that are being trained."""
        pipe = with_subjects(self.backbone.pipe)
        pipe.set_progress_bar_config(disable=True)
        pipe.adapter, pipe.reference_fit = self.adapter, self.config.reference_fit
        return pipe

    def check_drawing(self, prompts: list[str]) -> None:
        """UserError if the validation prompts or images cannot be drawn with."""
        if not prompts:
            return
        subjects = {WORDS[0]: self.pipe.encode_references(self.config.validation_images)}
        for prompt in prompts:
            check_words(prompt, subjects, self.adapter.has_words)

    def draw(self, prompt: str, **options) -> Image.Image:
        """With the images of `--validation_images`."""
        return self.pipe(prompt, subject_images=self.config.validation_images, **options).images[0]

    def dropped(self, count: int) -> tuple[Tensor, Tensor]:
        """Which of `count` samples lose their prompt, and which their visual tokens; none in evaluation
        mode."""
        device, config = self.backbone.device, self.config
        text, image, both = config.dropout_text, config.dropout_image, config.dropout_both
        if not self.training:
            return torch.zeros(count, dtype=torch.bool, device=device), torch.zeros(
                count, dtype=torch.bool, device=device
            )
        u = torch.rand(count, device=device)
        no_text = (u < text) | ((u >= text + image) & (u < text + image + both))
        return no_text, (u >= text) & (u < text + image + both)

    def encode(self, features: Tensor, t: Tensor, shows_target: Tensor | None = None) -> Any:
        """Features (batch, references, tokens, features); where `shows_target` (batch,) only the first
        reference counts, as the second is the image to be drawn."""
        used = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if shows_target is not None:
            used[:, 1:] &= ~shows_target[:, None]
        return self.adapter.encoder(features, used, t)

    def regions_of(self, batch: dict) -> Tensor | None:
        """Where each subject may be, (batch, subjects, height, width) at latent size; None if the batch
        does not say."""
        if "regions" not in batch:
            return None
        height, width = (side // self.backbone.pipe.vae_scale_factor for side in batch["regions"].shape[-2:])
        return F.interpolate(batch["regions"], (height, width), mode="area")

    def prompts_of(self, batch: dict, no_text: Tensor) -> list[str]:
        prompts = (
            batch["prompt"]
            if self.adapter.has_words
            else [without_words(prompt) for prompt in batch["prompt"]]
        )
        return ["" if drop else prompt for prompt, drop in zip(prompts, no_text.tolist(), strict=True)]

    def uses_both(self) -> bool:
        """Whether this batch gets both references; only the first one in evaluation mode."""
        return self.training and torch.rand(()).item() < self.config.multi_reference_rate


class SubjectMethod(EncoderMethod):
    """Encoders that read references with a frozen CLIP vision model."""

    Config = SubjectConfig
    embedded_defaults = EncoderMethod.embedded_defaults | {"dim": 192, "depth": 2}
    adapter: SubjectAdapter
    config: SubjectConfig
    recomputes_text = False  # in the backward pass, to save memory

    def load_readers(self) -> None:
        name, backbone = self.config.image_encoder, self.backbone
        if not name and not embedded.is_embedded(backbone.name):
            raise UserError("--image_encoder: name the CLIP vision model that reads the references.")
        self.image_encoder = load_image_encoder(name or embedded.NAME, backbone.denoiser.dtype)
        self.image_encoder.fit = self.config.reference_fit

    def start_from(self, name: str) -> SubjectAdapter:
        """A released adapter as it is, or a new one of ours with the weights of an earlier run; parts
        that the run did not have start anew. UserError where sizes differ."""
        path = adapter_file(name)
        state, about = read_file(path)
        if about is None:
            return load_adapter(path, self.backbone.pipe, self.image_encoder).train().requires_grad_(True)
        adapter = self.make_adapter()
        own = {key: value.shape for key, value in adapter.state_dict().items()}
        differing = [key for key, value in state.items() if own.get(key) != value.shape]
        sizes = asdict(adapter.encoder.config)
        # what shapes do not tell
        differing += [name for name in ("heads", "image_layers") if about["config"][name] != sizes[name]]
        if differing:
            raise UserError(
                f"--pretrained_adapter: '{path}' has other sizes or parts ({differing[0]}); give the flags "
                "of its run."
            )
        adapter.load_state_dict(state, strict=False)
        return adapter

    def reference_pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """References as the image encoder reads them, (n, 3, side, side)."""
        return self.image_encoder.pixels(images)

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        self.recomputes_text = True

    @property
    def pipe(self) -> Any:
        pipe = super().pipe
        pipe.register_modules(
            image_encoder=self.image_encoder.vision, feature_extractor=self.image_encoder.processor
        )
        return pipe


def of_subjects(values: Tensor, present: Tensor) -> Tensor:
    """Values of each image (samples,), repeated for its subjects; `present` (samples, subjects) says
    which exist."""
    return values[:, None].expand_as(present)[present]

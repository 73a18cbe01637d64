"""The contract of a method: what it trains, what it conditions on, and its losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from customize import embedded
from customize.adapters.base import Adapter
from customize.adapters.words import LearnedWords
from customize.backbones.base import Backbone, Condition, Step
from customize.backbones.families import as_called
from customize.config import option
from customize.data.concepts import Concept
from customize.data.images import ImageFile
from customize.data.subject_images import SubjectImages
from customize.data.training_data import Source
from customize.errors import UserError
from customize.losses import denoising


@dataclass
class MethodConfig:
    """Fields of every method."""

    snr_gamma: float = option(
        0.0, "min-SNR weighting of the diffusion loss (DDPM models), 5 is usual; 0 is off", least=0
    )
    noise_offset: float = option(
        0.0,
        "strength of noise that is equal over the whole image, 0.05 is usual; 0 is off",
        least=0,
        most=1,
    )
    contrastive_flow_weight: float = option(
        0.0,
        "weight of contrastive flow matching, which keeps samples of a batch apart; 0.05 is usual, 0 is off",
        least=0,
        below=1,
    )

    @property
    def starting_word(self) -> str:
        """The word that a learned word starts from: the subject's class, if it is known."""
        return ""


class Method(nn.Module):
    """Subclasses add adapters in `__init__`, and override `condition` and `losses` where they differ."""

    Config: type[MethodConfig] = MethodConfig
    Source: type[Source] = SubjectImages  # reads the training data
    needs_captions: ClassVar[bool] = False  # of every showing, so that --caption_dropout is refused
    denoises: ClassVar[bool] = True  # has the diffusion loss; else settings of that loss are refused
    shows_references = False  # whether the model is shown images of the subject beside the prompt
    defaults: ClassVar[dict[str, Any]] = {}  # settings that suit the method, where the user sets nothing
    embedded_defaults: ClassVar[dict[str, Any]] = {}  # and on the embedded base model

    def __init__(self, backbone: Backbone, config: MethodConfig, concepts: list[Concept]):
        super().__init__()
        self.backbone, self.config, self.concepts = backbone, config, concepts
        # what it trains and saves; modules among them are attributes too
        self.adapters: list[Adapter] = []

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults of settings on a base model, by its name; `given` are the settings of the user."""
        return cls.defaults | (cls.embedded_defaults if embedded.is_embedded(base) else {})

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        """UserError for settings that this method cannot be run with; called before a model is loaded."""
        given = (name for name in ("snr_gamma", "contrastive_flow_weight") if getattr(method_config, name))
        if not cls.denoises and (name := next(given, "")):
            raise UserError(f"--{name}: this method has no diffusion loss; leave it out.")

    @classmethod
    def check_base(cls, backbone: Backbone) -> None:
        """UserError for a base model that this method cannot train."""
        if backbone.needs_references and not cls.shows_references:
            raise UserError(
                f"'{backbone.name}' edits images and draws nothing without one: train it with in_context, or "
                "use another base model."
            )

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        """Adds to the training data with the unchanged base model: no adapter has been added yet."""

    def check_caption(self, caption: str) -> None:
        """UserError for a caption that this method cannot learn from."""

    def use_images(self, images: Sequence[ImageFile]) -> None:
        """Called once before training with the subjects' images that are trained on; UserError for images
        that this method cannot learn from."""

    def check_drawing(self, prompts: list[str]) -> None:
        """UserError for validation prompts that cannot be drawn."""

    def draw_times(self, n: int) -> Tensor:
        """Random times (n,) in [0, 1]: 0 is data, 1 is noise."""
        return self.backbone.draw_times(n)

    def draw_noise(self, latents: Tensor) -> Tensor:
        """Noise of the latents' shape; with `noise_offset` also noise that is one number for each channel
        of a sample, so that very dark and very bright images can be learned."""
        noise = torch.randn_like(latents)
        if not self.config.noise_offset:
            return noise
        return noise + self.config.noise_offset * torch.randn_like(latents[:, :, :1, :1])

    def condition(self, batch: dict, t: Tensor) -> Condition:
        """What the denoiser is conditioned on; times `t` (batch,) run from 0, data, to 1, noise. The prompt
        of a sample whose caption was dropped is empty."""
        return Condition(self.backbone.encode_captions(batch["prompt"]))

    def without_text(self, text: dict[str, Tensor], dropped: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """The text arguments as the pipeline's unconditional half gets them, where the prompt of a sample is
        `dropped` (batch,): zeros on SDXL. Samples lie along `dim`."""
        if not self.backbone.zeroes_empty_prompt:
            return text

        def kept(value: Tensor) -> Tensor:
            return value * (~dropped).view([-1 if i == dim else 1 for i in range(value.ndim)])

        return {name: kept(value) for name, value in text.items()}

    def masked_errors(self, step: Step) -> Tensor:
        """The denoising error of each sample, shape (batch,), under its mask."""
        return denoising(step.prediction, step.target, step.batch.get("mask"))

    def errors(self, step: Step) -> Tensor:
        """The denoising error of each sample, also weighted by min-SNR if that was asked for."""
        error = self.masked_errors(step)
        if not self.config.snr_gamma:
            return error
        return error * self.backbone.snr_weights(step.t, self.config.snr_gamma)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Named, weighted terms. Their sum is minimised, and each is logged as it is summed."""
        return {"denoise": self.errors(step).mean()}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`batch` holds `prompt` and either `pixels` (batch, 3, height, width) or their latents' moments
        `mean` and `std`."""
        if "mean" in batch:
            latents = self.backbone.sample_latents(batch["mean"], batch["std"])
        else:
            latents = self.backbone.encode_image(batch["pixels"])
        t = self.backbone.nearest_times(self.draw_times(len(latents)))
        noise = self.draw_noise(latents)
        noisy, target = self.backbone.add_noise(latents, noise, t)
        condition = self.condition(batch, t)
        condition.sizes = batch.get("sizes")
        prediction = self.backbone.denoise(noisy, t, condition)
        step = Step(latents, noise, noisy, t, target, condition, prediction, batch)
        terms = self.losses(step)
        if self.config.contrastive_flow_weight and self.training:
            terms["contrastive_flow"] = self._contrastive_flow(step)
        return terms

    def _contrastive_flow(self, step: Step) -> Tensor:
        """Minus the error to the target of the next sample of the batch, at this sample's time: Contrastive
        Flow Matching (Stoica et al., 2025, arXiv 2506.05350). It is weighted as the denoising error is, below
        which it must stay: else it could fall without end."""
        if len(step.noise) == 1:
            raise UserError(
                "--contrastive_flow_weight needs other samples to keep apart: raise --train_batch_size."
            )
        _, other = self.backbone.add_noise(step.latents.roll(1, 0), step.noise.roll(1, 0), step.t)
        errors = self.errors(replace(step, target=other))
        if "is_prior" in step.batch:  # class images have a weight of their own
            errors = errors[~step.batch["is_prior"]]
        return -self.config.contrastive_flow_weight * errors.mean()

    def described(self) -> dict[str, Any]:
        """Entries of `run.json` that a resumed run must agree with, beside those of its data."""
        return {}

    def on_step(self, step: int, steps: int) -> None:
        """Called before each step, for schedules such as a weight that warms up."""

    def after_step(self) -> None:
        """Called after each step, before anything is saved, for constraints on what is trained."""

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self, lr: float) -> list[dict]:
        return [{"params": list(self.trainable().values()), "lr": lr}]

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them."""
        self.backbone.enable_gradient_checkpointing()

    def draw(self, prompt: str, **options) -> Image.Image:
        """One image, drawn by the modules that are being trained; `options` are those of the pipeline's
        call."""
        pipe = self.backbone.pipe
        return pipe(**as_called(pipe, self.backbone.prompt_arguments(prompt) | options)).images[0]

    def diagnose(self, batches: list[dict], folder: Path, step: int) -> dict[str, float]:
        """Numbers to log beside the validation loss, from held-out batches; images may go into
        `folder`."""
        return {}

    def prompts(self) -> list[str]:
        """Prompts that training needs beyond the captions."""
        return []

    @property
    def trains_text(self) -> bool:
        """Whether training changes the output of the text encoders, so that it cannot be cached."""
        return any(adapter.changes_text for adapter in self.adapters)

    @property
    def learned_words(self) -> list[str]:
        """The placeholder words whose vectors are learned: every caption must hold one of them."""
        return [
            word for adapter in self.adapters if isinstance(adapter, LearnedWords) for word in adapter.words
        ]


def refuse_caches_and_exports(model_config: Any, train_config: Any) -> None:
    """UserError for settings of LoRA and learned words that mean nothing to an encoder."""
    if model_config.cache_dir or train_config.export_kohya:
        flag = "--cache_dir" if model_config.cache_dir else "--export_kohya"
        raise UserError(f"{flag} is for LoRA and learned words; an encoder sees new images at every step.")

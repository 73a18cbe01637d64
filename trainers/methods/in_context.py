"""In-context references: LoRA for models that are shown images, which learns to draw the subject of one or
several of them (Flux.1 Kontext, arXiv 2506.15742; UNO, arXiv 2504.02160; Qwen-Image, arXiv 2508.02324).

The references' latents follow the noisy latents in the denoiser's sequence; only the noisy ones are predicted
and have a loss. Two references of a subject may also be held together, and apart from those of other
subjects, by InfoNCE between their tokens' means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from customize.adapters.lora import Lora, LoraFields
from customize.backbones.base import Condition, Step
from customize.backbones.families import as_called
from customize.config import option
from customize.data.crops import check_resolution
from customize.data.sources import ReferenceSource
from customize.errors import UserError
from customize.losses.contrastive import cross_modal_contrast, gathered
from customize.pipelines.in_context import reference_pixels, with_references
from customize.prompts import without_words
from customize.trainers.methods.base import Method, MethodConfig


@dataclass
class InContextConfig(LoraFields, MethodConfig):
    reference_resolution: int = option(
        512, "side in pixels that reference images are padded and resized to", least=64, essential=True
    )
    validation_images: list[str] = option([], "images of the subject that --validation_prompt is drawn with")
    dropout_text: float = option(
        0.05, "share of samples trained without their prompt, for classifier-free guidance", least=0, most=1
    )
    dropout_image: float | None = option(
        None,
        "share of batches trained without references; none means 0.05, or 0 for a model that draws nothing "
        "without them",
        least=0,
        most=1,
    )
    multi_reference_rate: float = option(
        0.25, "share of batches that show two references of a subject", least=0, most=1
    )
    reference_contrast_weight: float = option(
        0.0,
        "weight of the contrast between two references of a subject and those of other subjects; 0 is off; "
        "every batch then shows two references",
        least=0,
    )


class InContext(Method):
    Config = InContextConfig
    Source = ReferenceSource
    shows_references = True
    defaults = {"learning_rate": 1e-4, "max_train_steps": 5000, "rank": 16}

    def __init__(self, backbone, config: InContextConfig, concepts=()):
        super().__init__(backbone, config, list(concepts))
        if not backbone.takes_references:
            raise UserError(
                "in_context needs a base model that is shown images (Flux.2, Flux.1 Kontext, "
                "Qwen-Image-Edit-Plus); custom_contrast and ip_adapter teach other models to read them."
            )
        if config.dropout_image and backbone.needs_references:
            raise UserError(
                "--dropout_image: this base model draws nothing without references; leave it out."
            )
        if config.reference_contrast_weight and backbone.takes_references < 2:
            raise UserError(
                "--reference_contrast_weight needs a base model that is shown two images; leave it out here."
            )
        check_resolution(config.reference_resolution, backbone.reference_factor, "reference_resolution")
        usual = 0.0 if backbone.needs_references else 0.05
        self.dropout_image = usual if config.dropout_image is None else config.dropout_image
        self.adapters.append(Lora(backbone, config))
        self.tokens: Tensor | None = None  # (batch, tokens, dim), as the denoiser's last norm reads them

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        if train_config.validation_prompt and not method_config.validation_images:
            raise UserError(
                "--validation_prompt: name images of the subject to draw with --validation_images."
            )
        if train_config.validation_metric == "score":
            raise UserError("--validation_metric score rates runs of one subject; leave it out here.")
        if model_config.cache_dir:
            raise UserError("--cache_dir: in_context sees new images at every step; leave it out.")

    def reference_pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return reference_pixels(images, self.config.reference_resolution)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        views = batch["references"][:, 0, : self._references_shown(batch)]
        references = None
        if views.shape[1]:
            latents = self.backbone.encode_references(views.flatten(0, 1))
            references = latents.unflatten(0, views.shape[:2])
        dropped = torch.rand(len(t)) < self.config.dropout_text * self.training
        pairs = zip(batch["prompt"], dropped.tolist(), strict=True)
        empty = self.backbone.empty_prompt
        prompts = [empty if drop else without_words(prompt) for prompt, drop in pairs]
        text = self.backbone.encode_prompt_with_references(prompts, views)
        return Condition(self.without_text(text, dropped.to(t.device)), references=references)

    def _references_shown(self, batch: dict) -> int:
        """How many references this batch shows; one in evaluation mode."""
        config = self.config
        if not self.training:
            return 1
        if config.reference_contrast_weight:
            return 2
        if torch.rand(()).item() < self.dropout_image:
            return 0
        # a second reference may be the image to be drawn itself, as for subjects with two images
        several = self.backbone.takes_references > 1 and not batch["shows_target"].any()
        return 2 if several and torch.rand(()).item() < config.multi_reference_rate else 1

    def forward(self, batch: dict) -> dict[str, Tensor]:
        with self._reading_tokens():
            return super().forward(batch)

    @contextmanager
    def _reading_tokens(self) -> Iterator[None]:
        """Context in which the denoiser leaves the tokens that its last norm reads in `tokens`."""
        if not self.config.reference_contrast_weight:
            yield
            return
        handle = self.backbone.denoiser.norm_out.register_forward_pre_hook(
            lambda module, args: setattr(self, "tokens", args[0])
        )
        try:
            yield
        finally:
            handle.remove()

    def losses(self, step: Step) -> dict[str, Tensor]:
        terms, weight = super().losses(step), self.config.reference_contrast_weight
        if weight and self.training:
            if len(step.noisy) == 1:
                raise UserError("--reference_contrast_weight needs other subjects: raise --train_batch_size.")
            terms["reference_contrast"] = weight * self._contrast(step)
        return terms

    def _contrast(self, step: Step) -> Tensor:
        """InfoNCE between the first and the second reference of each subject, at temperature 0.1."""
        references, hidden = cast(Tensor, step.condition.references), cast(Tensor, self.tokens)
        cells = references[0, :, 0].numel(), step.noisy[0, 0].numel()  # of the references, of the image
        own = hidden.shape[1] * cells[0] // sum(cells)
        means = hidden[:, -own:].unflatten(1, (references.shape[1], -1)).mean(2)
        first, second = gathered(means[:, 0]), gathered(means[:, 1])
        identity = gathered(step.batch["identity"])
        return cross_modal_contrast(first, second, identity[:, None] == identity, 10.0)

    def described(self) -> dict[str, Any]:
        return {"in_context": {"reference_resolution": self.config.reference_resolution}}

    def draw(self, prompt: str, **options: Any) -> Image.Image:
        """With the images of `--validation_images`."""
        pipe = with_references(self.backbone.pipe, self.config.reference_resolution)
        pipe.set_progress_bar_config(disable=True)
        arguments = {"prompt": prompt, "subject_images": self.config.validation_images, **options}
        return pipe(**as_called(pipe, arguments)).images[0]

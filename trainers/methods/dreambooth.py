"""DreamBooth: a rare word comes to mean the subject, while its class is kept (Ruiz et al., 2023, arXiv
2208.12242)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customize.adapters.components import Components
from customize.adapters.lora import Lora, LoraFields
from customize.backbones.base import Condition, Step
from customize.config import option
from customize.errors import UserError
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.prepare import class_images

NO_CLASS_PROMPT = '--with_prior_preservation needs --class_prompt, such as "a photo of a dog".'


@dataclass
class DreamBoothConfig(LoraFields, MethodConfig):
    full_finetune: bool = option(False, "train the whole denoiser instead of LoRA")
    train_text_encoder: bool = option(False, "train the CLIP text encoders too")
    text_encoder_lr: float = option(0.0, "their learning rate; 0 means --learning_rate", least=0)
    with_prior_preservation: bool = option(False, "keep what the class prompt draws")
    prior_loss_weight: float = option(1.0, "weight of the prior loss", least=0)
    prior_source: Literal["images", "teacher"] = option(
        "images",
        "images: images of the class, made by the base model; teacher: the base model's own prediction",
    )
    sample_batch_size: int = option(4, "class images drawn at once", least=1)
    num_class_images: int = option(100, "images of each class to have in --class_data_dir", least=1)


class DreamBooth(Method):
    Config = DreamBoothConfig

    def __init__(self, backbone, config: DreamBoothConfig, concepts):
        super().__init__(backbone, config, concepts)
        self._check()
        clip = [encoder for encoder in backbone.text_encoders if "CLIP" in type(encoder).__name__]
        encoders = clip if config.train_text_encoder else []
        full = config.full_finetune
        self.adapters.append(Components(backbone, encoders) if full else Lora(backbone, config, encoders))

    @classmethod
    def prepare_data(cls, source, backbone, settings, config, accelerator):
        """Class images for the prior loss; the first process draws those that are missing."""
        if not config.with_prior_preservation or config.prior_source != "images":
            return
        with accelerator.main_process_first(), accelerator.autocast():
            for i, concept in enumerate(source.concepts):
                if not concept.class_prompt:
                    raise UserError(NO_CLASS_PROMPT)
                folder = Path(concept.class_data_dir or f"{settings.output_dir}/class_images/{i}")
                count, at_once = config.num_class_images, config.sample_batch_size
                source.images += class_images(
                    backbone, concept, i, folder, count, source.config, settings.seed, at_once
                )

    def _check(self) -> None:
        if not self.config.with_prior_preservation:
            return
        if any(not concept.class_prompt for concept in self.concepts):
            raise UserError(NO_CLASS_PROMPT)
        if self.uses_teacher_prior and self.config.full_finetune:
            raise UserError(
                "--prior_source teacher needs LoRA, which can be switched off; with --full_finetune use "
                "images."
            )

    @property
    def uses_teacher_prior(self) -> bool:
        return self.config.with_prior_preservation and self.config.prior_source == "teacher"

    def losses(self, step: Step) -> dict[str, Tensor]:
        error, is_prior = self.errors(step), step.batch["is_prior"]
        terms = {"denoise": error[~is_prior].mean()}
        if is_prior.any():
            terms["prior"] = self.config.prior_loss_weight * error[is_prior].mean()
        elif self.uses_teacher_prior:
            terms["prior"] = self.config.prior_loss_weight * self._teacher_error(step)
        return terms

    def _teacher_error(self, step: Step) -> Tensor:
        """How far the prediction for the class prompt has moved from the base model's, at the same noisy
        latents."""
        prompts = [self.concepts[concept].class_prompt for concept in step.batch["concept"].tolist()]
        with torch.no_grad(), self.backbone.without_adapters():
            kept = self.backbone.denoise(step.noisy, step.t, Condition(self.backbone.encode_prompt(prompts)))
        moved = self.backbone.denoise(step.noisy, step.t, Condition(self.backbone.encode_prompt(prompts)))
        return F.mse_loss(moved.float(), kept.float())

    def prompts(self):
        return (
            [concept.class_prompt for concept in self.concepts] if self.config.with_prior_preservation else []
        )

    def parameter_groups(self, lr):
        text = {n: p for n, p in self.trainable().items() if n.startswith("backbone.text_encoders.")}
        rest = [p for n, p in self.trainable().items() if n not in text]
        groups = [
            {"params": rest, "lr": lr},
            {"params": list(text.values()), "lr": self.config.text_encoder_lr or lr},
        ]
        return [group for group in groups if group["params"]]

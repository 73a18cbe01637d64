"""DreamBooth: a rare word comes to mean the subject, while its class is preserved (Ruiz et al., 2023,
arXiv 2208.12242)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customize import embedded
from customize.adapters.components import WHOLE, Components
from customize.adapters.lora import Lora, LoraFields
from customize.backbones.base import Backbone, Condition, Step
from customize.config import option
from customize.data.concepts import Concept
from customize.errors import UserError, shortened
from customize.losses import denoising, subject_fidelity
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.prepare import class_images

NO_CLASS_PROMPT = '--with_prior_preservation needs --class_prompt, such as "a photo of a dog".'


@dataclass
class DreamBoothConfig(LoraFields, MethodConfig):
    full_finetune: bool = option(False, "train the whole denoiser instead of LoRA")
    train_text_encoder: bool = option(False, "train the CLIP text encoders too")
    text_encoder_lr: float = option(
        0.0, "learning rate of the text encoders; 0 means --learning_rate", least=0
    )
    with_prior_preservation: bool = option(
        False, "prior preservation: a second loss keeps what --class_prompt draws", essential=True
    )
    prior_loss_weight: float = option(1.0, "weight of the prior preservation loss", least=0)
    prior_source: Literal["images", "teacher"] = option(
        "images",
        "what the prior loss compares with. images: images of the class, drawn by the base model; teacher: "
        "the base model's prediction for --class_prompt, without images",
    )
    fidelity_weight: float = option(
        0.0,
        "weight of negative-guided subject fidelity (SFO), which prefers the subject to the class images of "
        "--prior_source images, compared with the base model; 0 is off",
        least=0,
    )
    fidelity_beta: float = option(1000.0, "sharpness of the preference of --fidelity_weight", above=0)
    sample_batch_size: int = option(4, "class images drawn at once, for prior preservation", least=1)
    num_class_images: int = option(
        100, "class images to have in --class_data_dir, for prior preservation", least=1
    )


def class_folders(concepts: list[Concept], output_dir: str) -> list[Path]:
    """The folder of class images of each concept. UserError for a concept without a class prompt, and for
    one folder with two class prompts."""
    folders = [Path(own.class_data_dir or f"{output_dir}/class_images/{i}") for i, own in enumerate(concepts)]
    prompts: dict[Path, str] = {}
    for concept, folder in zip(concepts, folders, strict=True):
        if not concept.class_prompt:
            raise UserError(NO_CLASS_PROMPT)
        if prompts.setdefault(folder, concept.class_prompt) != concept.class_prompt:
            raise UserError(
                f"class_data_dir: '{folder}' is to hold images of '{shortened(prompts[folder])}' and of "
                f"'{shortened(concept.class_prompt)}'; give each class prompt a folder of its own."
            )
    return folders


class DreamBooth(Method):
    Config = DreamBoothConfig
    defaults = {"learning_rate": 1e-4, "max_train_steps": 500}
    embedded_defaults = {
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "train_batch_size": 4,
        "rank": 16,
        "lora_layers": "all",
    }

    def __init__(self, backbone, config: DreamBoothConfig, concepts):
        super().__init__(backbone, config, concepts)
        self._check()
        encoders = backbone.clip_encoders if config.train_text_encoder else []
        if config.train_text_encoder and not encoders:
            raise UserError(
                "--train_text_encoder is for models whose pipeline loads LoRA of CLIP; leave it out here."
            )
        full = config.full_finetune
        self.adapters.append(Components(backbone, encoders) if full else Lora(backbone, config, encoders))

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        whole = given.get("full_finetune") and not embedded.is_embedded(base)
        return super().defaults_for(base, given) | ({"learning_rate": 5e-6} if whole else {})

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        kinds = [model_config.quantize]
        kinds += [model_config.quantize_text_encoder] * method_config.train_text_encoder
        if method_config.full_finetune and any(kind != "none" for kind in kinds):
            raise UserError(WHOLE)

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        """Class images for the prior loss; the first process draws those that are missing."""
        if not method_config.with_prior_preservation or method_config.prior_source != "images":
            return
        folders = class_folders(source.concepts, train_config.output_dir)
        with accelerator.main_process_first(), accelerator.autocast():
            for i, (concept, folder) in enumerate(zip(source.concepts, folders, strict=True)):
                count, at_once = method_config.num_class_images, method_config.sample_batch_size
                source.images += class_images(
                    backbone, concept, i, folder, count, source.config, train_config.seed, at_once
                )

    def _check(self) -> None:
        if self.config.full_finetune and self.config.pretrained_lora:
            raise UserError("--pretrained_lora: --full_finetune trains no LoRA; leave one of the two out.")
        if self.config.fidelity_weight:
            if self.config.full_finetune:
                raise UserError("--fidelity_weight needs LoRA, which can be switched off; leave it out here.")
            if not self.config.with_prior_preservation or self.uses_teacher_prior:
                raise UserError(
                    "--fidelity_weight compares with images of the class: add --with_prior_preservation "
                    "--prior_source images."
                )
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
        is_prior = step.batch["is_prior"]
        terms = {"denoise": self.errors(step)[~is_prior].mean()}
        if is_prior.any():  # min-SNR weights the instance loss alone, as in diffusers' script
            terms["prior"] = self.config.prior_loss_weight * self.masked_errors(step)[is_prior].mean()
            if self.config.fidelity_weight and self.training:
                terms["fidelity"] = self.config.fidelity_weight * self._fidelity(step)
        elif self.uses_teacher_prior:
            terms["prior"] = self.config.prior_loss_weight * self._teacher_error(step)
        return terms

    def _fidelity(self, step: Step) -> Tensor:
        """Each image of a subject against a class image of the batch, at its noise, time and prompt."""
        prior = step.batch["is_prior"]
        own, others = (~prior).nonzero().flatten(), prior.nonzero().flatten()
        others = others[torch.arange(len(own), device=others.device) % len(others)]
        t, prompts = step.t[own], [step.batch["prompt"][i] for i in own.tolist()]
        text = self.backbone.encode_captions(prompts)
        sizes = None if step.condition.sizes is None else step.condition.sizes[own]

        def errors(images: Tensor) -> Tensor:
            noisy, target = self.backbone.add_noise(step.latents[images], step.noise[own], t)
            prediction = self.backbone.denoise(noisy, t, Condition(text, sizes=sizes))
            return denoising(prediction, target)

        with torch.no_grad(), self.backbone.without_adapters():
            reference = errors(own), errors(others)
        return subject_fidelity(errors(own), errors(others), *reference, self.config.fidelity_beta)

    def _teacher_error(self, step: Step) -> Tensor:
        """Mean squared difference between the prediction for the class prompt and that of the base model,
        at the same noisy latents."""
        prompts = [self.concepts[concept].class_prompt for concept in step.batch["concept"].tolist()]
        with torch.no_grad(), self.backbone.without_adapters():
            kept = self.backbone.denoise(step.noisy, step.t, self._class_condition(prompts, step))
        moved = self.backbone.denoise(step.noisy, step.t, self._class_condition(prompts, step))
        return F.mse_loss(moved.float(), kept.float())

    def _class_condition(self, prompts: list[str], step: Step) -> Condition:
        return Condition(self.backbone.encode_prompt(prompts), sizes=step.condition.sizes)

    def prompts(self) -> list[str]:
        return (
            [concept.class_prompt for concept in self.concepts] if self.config.with_prior_preservation else []
        )

    def parameter_groups(self, lr: float) -> list[dict]:
        text = {n: p for n, p in self.trainable().items() if n.startswith("backbone.text_encoders.")}
        rest = [p for n, p in self.trainable().items() if n not in text]
        groups = [
            {"params": rest, "lr": lr},
            {"params": list(text.values()), "lr": self.config.text_encoder_lr or lr},
        ]
        return [group for group in groups if group["params"]]

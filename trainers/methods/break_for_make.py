"""Break-for-Make: content and style learned apart in one LoRA, and joined (Xu et al., 2024, arXiv
2403.19456).

Three runs. `--stage content` learns one half of a split LoRA from images of the content, `--stage style`
the other half from images of the style ("break"). In each, auxiliary sets of the other kind train the
other half, at a lower rate and with the same noise and times, so that no half is tied to one partner
(multi-correspondence projection). `--stage joint --content_run A --style_run B` takes one half of each
run and trains both on both sets ("make"). The result is an ordinary LoRA.

The paper averages over three auxiliary sets in every step; here a step takes one of them at random.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from customize import embedded
from customize.adapters.lora import LoraFields
from customize.adapters.split_lora import SplitLora
from customize.backbones.base import Backbone, Condition, Step
from customize.config import check_ranges, option
from customize.data.concepts import Concept, DataConfig, read_concept_images, read_concepts
from customize.data.crops import fit
from customize.data.images import ImageFile, read_image_file
from customize.errors import UserError
from customize.imaging import to_tensor
from customize.losses import denoising
from customize.runs.checkpoint import open_run
from customize.trainers.methods.base import Method, MethodConfig


@dataclass
class BreakForMakeConfig(MethodConfig):
    stage: Literal["content", "style", "joint"] = option(
        "content", "content or style: learn one half of the LoRA; joint: both, from two runs", essential=True
    )
    content_run: str = option("", "for --stage joint: run of the stage content", essential=True)
    style_run: str = option("", "for --stage joint: run of the stage style", essential=True)
    auxiliary_list: str = option(
        "",
        "JSON file of auxiliary sets, of styles for --stage content and of contents for --stage style: a "
        "list of {instance_prompt, instance_data_dir}; empty: none",
        essential=True,
    )
    auxiliary_rate: float = option(
        0.1, "learning rate of the half that auxiliary sets train, as a share of --learning_rate", least=0
    )
    rank: int = option(64, "rank of the LoRA matrices, an even number", least=2, essential=True)
    split: float = option(0.5, "share of each layer's inputs and outputs that is frozen", above=0, below=1)
    orthogonal: bool = option(True, "frozen halves are orthonormal; else random")
    precondition: bool = option(
        False, "precondition each half's gradient by the other matrix (Riemannian preconditioning)"
    )
    projection_seed: int = option(0, "seed of the frozen halves: the same in all stages", least=0)
    lora_layers: str = option(
        "attention", "attention, attention+ff, all (convolutions too), or comma-separated module names"
    )


class BreakForMake(Method):
    Config = BreakForMakeConfig
    defaults = {"learning_rate": 1e-4, "max_train_steps": 1000}
    embedded_defaults = {
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "max_train_steps": 300,
        "train_batch_size": 4,
        "rank": 16,
        "lora_layers": "all",
    }

    def __init__(self, backbone: Backbone, config: BreakForMakeConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        check_ranges(config)
        fields = LoraFields(rank=config.rank, lora_layers=config.lora_layers)
        self.lora = SplitLora(backbone, fields, config.split, config.projection_seed, config.orthogonal)
        self.adapters.append(self.lora)
        if config.precondition:
            self.lora.precondition()
        if config.stage != "joint" and not config.auxiliary_list:  # nothing trains the other half
            for parameter in self.lora.parameters_of(content=config.stage == "style"):
                parameter.requires_grad_(False)
        if config.stage == "joint":
            runs = (config.content_run, True), (config.style_run, False)
            for name, content in runs:
                _check_run(name, content, backbone)
            for name, content in runs:
                self.lora.take(Path(name), content)
            sources = {"content_run": Path(config.content_run).name, "style_run": Path(config.style_run).name}
            self.lora.made_from = json.dumps({"how": "break_for_make", **sources})
        # auxiliary: latents and captions
        self.sets: list[list[tuple[dict[str, Tensor], tuple[str, ...]]]] = []

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        joint = method_config.stage == "joint"
        if joint != bool(method_config.content_run and method_config.style_run):
            raise UserError(
                "--stage joint, --content_run and --style_run belong together: train the stages content and "
                "style first."
            )
        if joint and method_config.auxiliary_list:
            raise UserError("--auxiliary_list is for --stage content and style; leave it out.")
        for name in (method_config.content_run, method_config.style_run):
            if joint:
                open_run(Path(name))

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        if method_config.auxiliary_list and source.config.smaller_resolutions:
            raise UserError("--auxiliary_list needs one size of crops: leave --smaller_resolutions out.")

    def use_images(self, images: Sequence[ImageFile]) -> None:
        if not self.config.auxiliary_list:
            return
        data = DataConfig(concepts_list=self.config.auxiliary_list)
        sets = read_concepts(data)
        if len({concept.weight for concept in sets}) > 1:
            raise UserError("--auxiliary_list: its sets are taken equally often; leave their weights out.")
        found = read_concept_images(sets, data)
        for file, caption in ((own, caption) for own in found for caption in own.captions):
            self.backbone.check_length(f"caption of '{file.path}'", caption)
        encoded = [(self._moments(file), file.captions) for file in found]
        pairs = list(zip(found, encoded, strict=True))
        self.sets = [[entry for file, entry in pairs if file.concept == i] for i in range(len(sets))]

    def _moments(self, file: ImageFile) -> dict[str, Tensor]:
        side = self.backbone.resolution
        pixels = to_tensor(fit(read_image_file(file)[0], side, side))[None] * 2 - 1
        return self.backbone.moments(pixels.to(self.backbone.device))

    def prompts(self) -> list[str]:
        return [caption for some in self.sets for _, captions in some for caption in captions]

    def forward(self, batch: dict) -> dict[str, Tensor]:
        stage = self.config.stage
        self.lora.train_halves(content=stage != "style", style=stage != "content")
        return super().forward(batch)

    def enable_gradient_checkpointing(self) -> None:
        self.backbone.enable_gradient_checkpointing(self._checkpointed)

    def _checkpointed(self, module: Any, *args: Any) -> Any:
        """A layer that is run again in the backward pass, with the halves trained that are trained now."""
        again = partial(self.lora.training, *self.lora.trained)
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    def draw_noise(self, latents: Tensor) -> Tensor:
        self.noise = super().draw_noise(latents)
        return self.noise

    def losses(self, step: Step) -> dict[str, Tensor]:
        terms = super().losses(step)
        if self.sets and self.training:
            terms["auxiliary"] = self.auxiliary(step)
        return terms

    def auxiliary(self, step: Step) -> Tensor:
        """The denoising loss on images of a random auxiliary set, with the noise and the times of the
        step; it trains the other half."""
        some = self.sets[int(torch.randint(len(self.sets), ()))]
        chosen = [some[i] for i in torch.randint(len(some), (len(step.t),)).tolist()]
        moments = {name: torch.cat([own[name] for own, _ in chosen]) for name in ("mean", "std")}
        latents = self.backbone.sample_latents(**moments)
        if latents.shape != step.latents.shape:
            raise UserError("--auxiliary_list needs square crops: leave --use_aspect_ratio_buckets out.")
        noisy, target = self.backbone.add_noise(latents, self.noise, step.t)
        condition = Condition(self.backbone.encode_prompt([_drawn(captions) for _, captions in chosen]))
        self.lora.train_halves(content=self.config.stage == "style", style=self.config.stage == "content")
        return denoising(self.backbone.denoise(noisy, step.t, condition), target).mean()

    def parameter_groups(self, lr: float) -> list[dict]:
        config, groups = self.config, []
        for content in (True, False):
            own = config.stage == "joint" or content == (config.stage == "content")
            trained = [p for p in self.lora.parameters_of(content) if p.requires_grad]
            groups.append({"params": trained, "lr": lr if own else lr * config.auxiliary_rate})
        return [group for group in groups if group["params"]]


def _drawn(captions: Sequence[str]) -> str:
    """A caption at random; where there is only one, no random number is drawn."""
    return captions[0 if len(captions) == 1 else int(torch.randint(len(captions), ()))]


def _check_run(name: str, content: bool, backbone: Backbone) -> None:
    """UserError unless a run is of the right stage and of this base model."""
    info, flag = open_run(Path(name)), "--content_run" if content else "--style_run"
    stage = "content" if content else "style"
    if info.get("method") != "break_for_make" or info["config"].get("stage") != stage:
        raise UserError(f"{flag}: '{name}' is no run of break_for_make --stage {stage}.")
    if info["base_model"] not in ("", embedded.lasting_name(backbone.name)):
        raise UserError(f"{flag}: '{name}' was trained on '{info['base_model']}'; give the same base model.")

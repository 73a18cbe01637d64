"""ZipLoRA: two or more trained LoRAs become one, which draws the subject of each (Shah et al., 2023, arXiv
2311.13600).

For each layer, the updates are added with a trained coefficient for each column. On the images of the
i-th concept, the merged model must predict what the i-th LoRA alone predicts (eq. 5, first term), and the
LoRAs must not use the same columns (second term). The result is an ordinary LoRA.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from customize import embedded
from customize.adapters.lora_reading import read_lora
from customize.adapters.merging import words_of
from customize.adapters.zipped_lora import ZippedLora
from customize.backbones.base import Backbone, Condition, Step
from customize.config import option
from customize.data.concepts import Concept
from customize.errors import UserError
from customize.runs.checkpoint import open_run
from customize.runs.folder import INFO
from customize.trainers.methods.base import Method, MethodConfig


@dataclass
class ZipLoRAConfig(MethodConfig):
    loras: list[str] = option(
        [], "the LoRAs to join, runs or files, one for each concept of --concepts_list", essential=True
    )
    overlap_weight: float = option(
        0.01, "weight of the loss that keeps the LoRAs to different columns", least=0
    )


class ZipLoRA(Method):
    Config = ZipLoRAConfig
    defaults = {"learning_rate": 1e-2, "max_train_steps": 100}
    embedded_defaults = {"train_batch_size": 4}

    def __init__(self, backbone: Backbone, config: ZipLoRAConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        if len(config.loras) < 2 or len(config.loras) != len(concepts):
            raise UserError(
                f"--loras names {len(config.loras)} LoRAs, and there are {len(concepts)} concepts; give two "
                "or more LoRAs, and for each of them, in their order, a concept of --concepts_list."
            )
        paths = [Path(name) for name in config.loras]
        for path in paths:
            _check_run(path, backbone)
        self.lora = ZippedLora(backbone, [read_lora(path, backbone.pipe) for path in paths])
        self.lora.made_from = json.dumps({"how": "ziplora", "merged": [path.name for path in paths]})
        self.adapters.append(self.lora)

    def losses(self, step: Step) -> dict[str, Tensor]:
        target = self.predictions_alone(step)
        terms = {"denoise": self.errors(replace(step, target=target)).mean()}
        if self.config.overlap_weight:
            terms["overlap"] = self.config.overlap_weight * self.lora.overlap()
        return terms

    @torch.no_grad()
    def predictions_alone(self, step: Step) -> Tensor:
        """What the LoRA of each sample's concept alone predicts, shape of the latents."""
        found, concepts = torch.empty_like(step.prediction), step.batch["concept"]
        for index in concepts.unique().tolist():
            own, sizes = concepts == index, step.condition.sizes
            prompts = [prompt for prompt, is_own in zip(step.batch["prompt"], own, strict=True) if is_own]
            condition = Condition(self.backbone.encode_captions(prompts))
            condition.sizes = None if sizes is None else sizes[own]
            with self.lora.only(index):
                found[own] = self.backbone.denoise(step.noisy[own], step.t[own], condition)
        return found


def _check_run(path: Path, backbone: Backbone) -> None:
    """UserError for what is missing, and for a run of another base model or with learned words."""
    if not path.exists():
        raise UserError(f"--loras: there is no '{path}'; give runs or LoRA files.")
    if not (path / INFO).exists():
        return
    info = open_run(path)
    if info["base_model"] not in ("", embedded.lasting_name(backbone.name)):
        raise UserError(
            f"--loras: '{path}' was trained on '{info['base_model']}'; give LoRAs of this base model."
        )
    if words_of([(path, info)]):
        raise UserError(
            f"--loras: '{path}' has learned words, which ziplora does not join; use `customize merge`."
        )

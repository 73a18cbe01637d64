"""Pivotal tuning: a new word is learned together with LoRA (after Roich et al., 2021, arXiv 2106.05744)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from customize.config import option
from customize.trainers.methods.dreambooth import DreamBooth, DreamBoothConfig
from customize.trainers.methods.textual_inversion import WordFields, new_words, word_defaults


@dataclass
class PivotalTuningConfig(WordFields, DreamBoothConfig):
    token_learning_rate: float = option(
        0.0, "learning rate of the new words; 0 means --learning_rate", least=0
    )
    train_text_encoder_ti_frac: float = option(
        1.0, "part of the steps in which the new words are trained", least=0, most=1
    )


class PivotalTuning(DreamBooth):
    Config = PivotalTuningConfig
    defaults = DreamBooth.defaults | {"max_train_steps": 1000, "token_learning_rate": 2e-3}
    embedded_defaults = DreamBooth.embedded_defaults | {
        "max_train_steps": 500,
        "token_learning_rate": 1e-2,
        "num_vectors": 2,
    }

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return super().defaults_for(base, given) | word_defaults(given)

    def __init__(self, backbone, config: PivotalTuningConfig, concepts):
        super().__init__(backbone, config, concepts)
        self.tokens = new_words(backbone, config)
        self.adapters.append(self.tokens)

    def on_step(self, step: int, steps: int) -> None:
        self.tokens.requires_grad_(step < self.config.train_text_encoder_ti_frac * steps)

    def parameter_groups(self, lr: float) -> list[dict]:
        words = list(self.tokens.parameters())
        known = {id(p) for p in words}
        groups = [
            group | {"params": [p for p in group["params"] if id(p) not in known]}
            for group in super().parameter_groups(lr)
        ]
        return [*groups, {"params": words, "lr": self.config.token_learning_rate or lr, "weight_decay": 0.0}]

"""CoRe: a word is learned so that the rest of any prompt keeps its meaning (Wu et al., 2024, arXiv
2408.15914).

L = L_diff + lambda_emb L_emb + lambda_attn L_attn. Each step takes a random prompt, once with the learned
word and once with the word of its class. L_emb compares what the text encoder makes of the rest of the
prompt, L_attn how much the image attends to it. No images belong to these prompts. In the middle of the
training the norm of the word's vectors is held.

The paper's second stage tunes the denoiser with the word held fixed: a second run, `pivotal_tuning` with
`--pretrained_words` and `--train_text_encoder_ti_frac 0`. Its tuning at test time is
`customize generate --context_steps`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize import embedded
from customize.attention_maps import recorded_layers
from customize.backbones.base import Backbone, Step
from customize.config import option
from customize.context import ContextPair
from customize.data.concepts import Concept
from customize.errors import UserError
from customize.losses.context import with_norms_of
from customize.trainers.methods.context_prompts import prompt_set
from customize.trainers.methods.textual_inversion import TextualInversion, TextualInversionConfig


@dataclass
class CoReConfig(TextualInversionConfig):
    context_prompts: str = option(
        "object",
        "prompts that the learned word must fit into: living, object, style, stickers, or a text file with "
        "one on each line, {} for the word",
        essential=True,
    )
    context_embedding_weight: float = option(
        1.5e-4,
        "weight of L_emb: the text encoder's output for the rest of a prompt stays as with the class's word; "
        "0 is off",
        least=0,
    )
    context_attention_weight: float = option(
        0.05,
        "weight of L_attn: the image's attention to the rest of a prompt stays as with the class's word; 0 "
        "is off",
        least=0,
    )
    norm_hold_start: float = option(
        0.4, "share of the steps after which the norm of the word's vectors is held", least=0, most=1
    )
    norm_hold_end: float = option(
        0.6,
        "share of the steps after which their norm is free again; as --norm_hold_start: never held",
        least=0,
        most=1,
    )


class CoRe(TextualInversion):
    Config = CoReConfig
    defaults = {"learning_rate": 5e-3, "max_train_steps": 300, "train_batch_size": 6}
    embedded_defaults = TextualInversion.embedded_defaults | {"context_prompts": embedded.NAME}

    def __init__(self, backbone: Backbone, config: CoReConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        recorded_layers(backbone.denoiser)  # says so where its attention cannot be read
        if config.optimize == "output":
            raise UserError(
                "core regularizes what the text encoder makes of a word; --optimize output learns a word "
                "behind it: leave it out, or use textual_inversion."
            )
        starts = config.initializer_token.split("+")
        self.class_words = dict(zip(self.tokens.words, starts, strict=True))
        self.templates = prompt_set(config.context_prompts)
        for template in self.templates:
            for word in self.tokens.words:
                backbone.check_length("prompt of --context_prompts", template.format(word))
        self.norms: list[Tensor] = []  # of the vectors, while they are held

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        super().check_settings(model_config, train_config, method_config)
        if method_config.norm_hold_end < method_config.norm_hold_start:
            raise UserError("--norm_hold_end must not be less than --norm_hold_start; raise it.")

    def on_step(self, step: int, steps: int) -> None:
        held = self.config.norm_hold_start * steps <= step < self.config.norm_hold_end * steps
        self.norms = [v.detach().norm(dim=-1, keepdim=True) for v in self.tokens.vectors] if held else []

    @torch.no_grad()
    def after_step(self) -> None:
        for vectors, norms in zip(self.tokens.vectors, self.norms, strict=False):
            vectors.copy_(with_norms_of(vectors, norms))

    def losses(self, step: Step) -> dict[str, Tensor]:
        terms, config = super().losses(step), self.config
        if not self.training or not (config.context_embedding_weight or config.context_attention_weight):
            return terms
        template = self.templates[int(torch.randint(len(self.templates), ()))]
        word = self.tokens.words[int(torch.randint(len(self.tokens.words), ()))]
        pair = ContextPair(template, word, self.class_words[word])
        embedding, attention = pair.losses(self.backbone, step.noisy[:1], step.t[:1])
        if config.context_embedding_weight:
            terms["context_embedding"] = config.context_embedding_weight * embedding
        if config.context_attention_weight:
            terms["context_attention"] = config.context_attention_weight * attention
        return terms

"""A prompt with a learned word beside the same prompt with the word of its class, and how much the rest
of the prompt differs between them (CoRe, Wu et al., 2024, arXiv 2408.15914)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from customize.attention_maps import AttentionRecorder, context_pairs
from customize.backbones.base import Backbone, Condition
from customize.backbones.layers import without_checkpointing
from customize.losses.context import context_attention, context_embedding


@dataclass
class ContextPair:
    """`template` holds {} where `word` or the class's word stands. Where the class's word follows {}, as in
    "a {} dog", it is part of the word."""

    template: str
    word: str
    class_word: str

    def __post_init__(self) -> None:
        if (doubled := f"{{}} {self.class_word}") in self.template:
            self.template = self.template.replace(doubled, "{}")
            self.word = f"{self.word} {self.class_word}"

    def losses(self, backbone: Backbone, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The context embedding and the context attention loss at noisy latents (1, channels, height, width)
        and their time (1,). Gradients flow into the learned word's prompt alone."""
        words = self.word, self.class_word
        own, other = (self.template.replace("{}", word) for word in words)
        embeds, shares = self._read(backbone, own, noisy, t)
        with torch.no_grad():
            class_embeds, class_shares = self._read(backbone, other, noisy, t)
        places, class_places = context_pairs(backbone.pipe, (own, other), words, len(embeds))
        return (
            context_embedding(embeds[places], class_embeds[class_places]),
            context_attention(shares[places], class_shares[class_places]),
        )

    def _read(self, backbone: Backbone, prompt: str, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The text encoder's outputs (tokens, dim), and how much each token is attended to (tokens,)."""
        text = backbone.encode_prompt([prompt])
        [outputs] = text["encoder_hidden_states"]
        with without_checkpointing(backbone.denoiser), AttentionRecorder(backbone.denoiser) as recorder:
            backbone.denoise(noisy, t, Condition(text))
        return outputs, recorder.shares(-1)

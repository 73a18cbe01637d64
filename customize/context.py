"""A prompt with a learned word beside the same prompt with the word of its class, and how much the rest
of the prompt differs between them (CoRe, Wu et al., 2024, arXiv 2408.15914)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from customize.attention_maps import AttentionRecorder, context_positions
from customize.backbones.base import Backbone, Condition
from customize.losses.context import context_attention, context_embedding


@dataclass
class ContextPair:
    """`template` holds {} where `word` or the class's word stands."""

    template: str
    word: str
    class_word: str

    def losses(self, backbone: Backbone, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The context embedding and the context attention loss at noisy latents (1, channels, height, width)
        and their time (1,). Gradients flow into the learned word's prompt alone."""
        embeds, shares, places = self._read(backbone, self.word, noisy, t)
        with torch.no_grad():
            class_embeds, class_shares, class_places = self._read(backbone, self.class_word, noisy, t)
        # by part, as words of several vectors move what follows; the padding's end has no partner then
        pairs = [p for parts in zip(places, class_places, strict=True) for p in zip(*parts, strict=False)]
        own, other = (list(positions) for positions in zip(*pairs, strict=True))
        return (
            context_embedding(embeds[own], class_embeds[other]),
            context_attention(shares[own], class_shares[other]),
        )

    def _read(
        self, backbone: Backbone, word: str, noisy: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """The text encoder's outputs (tokens, dim), how much each token is attended to (tokens,), and where
        the context stands."""
        prompt = self.template.replace("{}", word)
        text = backbone.encode_prompt([prompt])
        [outputs] = text["encoder_hidden_states"]
        with AttentionRecorder(backbone.denoiser) as recorder:
            backbone.denoise(noisy, t, Condition(text))
        places = context_positions(backbone.pipe, prompt, word, len(outputs))
        return outputs, recorder.shares(-1), places

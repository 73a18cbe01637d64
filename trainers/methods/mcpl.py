"""MCPL: several words learned at once from images that hold several things (Jin et al., 2024, arXiv
2310.12274).

Every thing of a sentence gets a word of its own ("a photo of a <fox> next to a <bus>"); no masks are
given. Three regularizers hold the words apart. AttnMask: the diffusion loss counts where the learned
words look, by their attention maps. PromptCL: the words' outputs of the text encoder attract those of the
same word in other prompts and repel those of other words. Bind adjective: an adjective counts as its
noun's word in PromptCL ("a brown <fox>").

The released code finds positives by a shift that is right for two words only; here the contrast goes by
labels. The maps are averaged over the steps that an image was shown in; this mean starts anew when a run
is resumed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from customize.attention_maps import AttentionRecorder, recorded_layers, word_positions
from customize.backbones.base import Backbone, Step
from customize.config import option
from customize.data.concepts import Concept
from customize.errors import UserError, shortened
from customize.losses.contrastive import supervised_contrast
from customize.losses.denoising import denoising
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.methods.textual_inversion import WordFields, new_words

SIDE = 16  # of the attention maps that are read


@dataclass
class MCPLConfig(WordFields, MethodConfig):
    attention_mask: Literal["hard", "soft", "none"] = option(
        "hard",
        "AttnMask: the loss counts where the learned words look. hard: where a map is above "
        "--attention_threshold of its maximum; soft: by the maps themselves; none: everywhere",
    )
    attention_threshold: float = option(
        0.5, "share of a map's maximum above which AttnMask counts a pixel", above=0, below=1
    )
    attention_memory: float = option(
        0.9, "share of an image's earlier attention maps that AttnMask keeps in each step", least=0, below=1
    )
    prompt_contrast_weight: float = option(
        0.001, "weight of PromptCL, the contrast between the learned words; 0 is off", least=0
    )
    prompt_contrast_temperature: float = option(0.2, "temperature of PromptCL", above=0)
    bind_adjectives: str = option(
        "", "adjectives of the learned words in their order, joined by +, such as brown+red: part of PromptCL"
    )


class MCPL(Method):
    Config = MCPLConfig
    needs_captions = True
    defaults = {"learning_rate": 5e-3, "max_train_steps": 3000, "train_batch_size": 4}
    embedded_defaults = {
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "max_train_steps": 500,
        "train_batch_size": 4,
        "num_vectors": 4,
    }

    def __init__(self, backbone: Backbone, config: MCPLConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        self.tokens = new_words(backbone, config)
        self.adapters.append(self.tokens)
        recorded_layers(backbone.denoiser)  # says so where its attention cannot be read
        self.adjectives = config.bind_adjectives.split("+") if config.bind_adjectives else []
        if self.adjectives and len(self.adjectives) != len(self.tokens.words):
            raise UserError(
                f"--bind_adjectives names {len(self.adjectives)} adjectives for {len(self.tokens.words)} "
                "words; give one for each word, joined by +."
            )
        if len(self.tokens.words) < 2:
            raise UserError(
                "mcpl learns several words: join them by + in --placeholder_token, or use textual_inversion."
            )
        self.recorder: AttentionRecorder | None = None
        # by image, and whether it was mirrored: the map (height, width) of each word
        self.means: dict[tuple[int, bool], dict[str, Tensor]] = {}

    def check_caption(self, caption: str) -> None:
        """UserError for a caption that says a word without the adjective that is bound to it."""
        pairs = zip(self.tokens.words, self.adjectives, strict=False)
        for word, adjective in pairs:
            if word in caption and adjective not in caption.split():
                text = f"the caption '{shortened(caption)}' says {word}, but not '{adjective}'"
                raise UserError(f"--bind_adjectives: {text}.")

    def forward(self, batch: dict) -> dict[str, Tensor]:
        if self.config.attention_mask == "none" or not self.training:
            return super().forward(batch)
        with AttentionRecorder(self.backbone.denoiser, side=SIDE, gradients=False) as self.recorder:
            return super().forward(batch)

    def losses(self, step: Step) -> dict[str, Tensor]:
        terms = super().losses(step)
        if self.config.prompt_contrast_weight:
            terms["prompt_contrast"] = self.config.prompt_contrast_weight * self.prompt_contrast(step)
        return terms

    def masked_errors(self, step: Step) -> Tensor:
        if self.config.attention_mask == "none" or not self.training:
            return super().masked_errors(step)
        if "focus" not in step.batch:  # once in a step: it goes into the means
            step.batch["focus"] = self.focus(step)
        return denoising(step.prediction, step.target, step.batch["focus"])

    def focus(self, step: Step) -> Tensor:
        """AttnMask inside the user's masks, (batch, 1, height, width)."""
        focus, mask = self.attention_mask(step.batch, tuple(step.latents.shape[-2:])), step.batch.get("mask")
        return focus if mask is None else focus * F.interpolate(mask, focus.shape[-2:], mode="area")

    def attention_mask(self, batch: dict, size: tuple[int, ...]) -> Tensor:
        """AttnMask of each sample (batch, 1, height, width) in [0, 1]: the union of the learned words'
        maps."""
        masks = []
        prompts, count = batch["prompt"], len(batch["prompt"])
        images = zip(batch["index"].tolist(), batch["is_flipped"].tolist(), strict=True)
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            maps = self.mean_maps(i - count, prompt, image)
            shares = maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-12)
            if self.config.attention_mask == "hard":
                shares = (shares > self.config.attention_threshold).float()
            masks.append(F.interpolate(shares.amax(0)[None, None], size, mode="nearest")[0])
        return torch.stack(masks)

    def mean_maps(self, sample: int, prompt: str, image: tuple[int, bool]) -> Tensor:
        """The maps (words, height, width) of an image's learned words, averaged over the steps that
        showed it."""
        assert self.recorder is not None
        means, memory = self.means.setdefault(image, {}), self.config.attention_memory
        words = [word for word in self.tokens.words if word in prompt]
        for word in words:
            positions = word_positions(self.backbone.pipe, prompt, word)
            found = self.recorder.of_tokens(positions, sample, (SIDE, SIDE)).sum(0)
            means[word] = memory * means[word] + (1 - memory) * found if word in means else found
        return torch.stack([means[word] for word in words])

    def prompt_contrast(self, step: Step) -> Tensor:
        """PromptCL over the words of all prompts of the batch (of this process)."""
        features, labels = [], []
        text = step.condition.text["encoder_hidden_states"]
        for i, prompt in enumerate(step.batch["prompt"]):
            for label, word in enumerate(self.tokens.words):
                if word not in prompt:
                    continue
                for own in (word, *self.adjectives[label : label + 1]):
                    features.append(text[i, word_positions(self.backbone.pipe, prompt, own)].mean(0))
                    labels.append(label)
        stacked = torch.stack(features).float()
        own_labels = torch.tensor(labels, device=stacked.device)
        return supervised_contrast(stacked, own_labels, self.config.prompt_contrast_temperature)

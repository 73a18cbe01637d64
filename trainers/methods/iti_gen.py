"""ITI-GEN: words for the categories of attributes, such as age, learned from reference images: drawn equally
often, they make images inclusive (Zhang et al., 2023, arXiv 2309.05569).

Each category is a concept of `--concepts_list`: a folder of reference images and a prompt with the category's
word, such as "a photo of a person <young>". In CLIP's space, prompts of two categories must differ as their
images do (directional alignment), over all combinations of the attributes' words, and stay near the prompt
without words (semantic consistency). No denoiser takes part, so the words serve every base model of the same
text encoder. Prompts of all combinations are drawn equally often: `inclusive_prompts`.

The word that all words start from, one mean over all references instead of batches, and `--alignment
difference` are choices of this project.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from customize import embedded
from customize.adapters.encoders.joint_space import load_joint_space
from customize.adapters.words import LearnedWords
from customize.attributes import inclusive_prompts, read_attributes, split_prompts
from customize.backbones.base import Backbone
from customize.config import option
from customize.data.concepts import Concept
from customize.data.images import ImageFile, read_image_file
from customize.errors import UserError
from customize.losses.inclusion import attribute_differences, attribute_directions, semantic_consistency
from customize.trainers.methods.base import Method, MethodConfig


@dataclass
class ITIGenConfig(MethodConfig):
    attributes: str = option(
        "",
        "the words of each attribute's categories, joined by +, with a comma between attributes, such as "
        "<young>+<old>,<dark>+<light>",
        essential=True,
    )
    clip_models: list[str] = option(
        [],
        "CLIP models (folders or hub ids) whose text halves are the base model's text encoders, in their "
        "order; empty: that of stickers",
        essential=True,
    )
    initializer_token: str = option("photo", "the word that the words of all categories start from")
    num_vectors: int = option(3, "vectors of each category's word", least=1)
    alignment: Literal["cosine", "difference"] = option(
        "cosine",
        "how prompts of two categories differ as their images do. cosine: in direction, as in the paper; "
        "difference: in length too, where words would else be too weak to be seen",
    )
    consistency_weight: float = option(
        1.0,
        "weight of semantic consistency: prompts with the words stay near the prompt without; 0 is off",
        least=0,
    )
    consistency_floor: float = option(
        0.8,
        "cosine to the prompt without the words up to which semantic consistency draws prompts",
        least=-1,
        most=1,
    )

    @property
    def starting_word(self) -> str:
        return self.initializer_token


class ITIGen(Method):
    Config = ITIGenConfig
    denoises = False
    defaults = {"learning_rate": 0.01, "max_train_steps": 150, "cache_latents": False}
    embedded_defaults = {"learning_rate": 3e-3, "max_train_steps": 100, "alignment": "difference"}

    def __init__(self, backbone: Backbone, config: ITIGenConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        self.attributes = read_attributes(config.attributes)
        words = [word for own in self.attributes for word in own]
        prompts = [concept.instance_prompt for concept in concepts]
        self.categories, self.template = split_prompts(prompts, words)  # the category of each concept
        starts = dict.fromkeys(words, config.initializer_token)
        self.tokens = LearnedWords(backbone, starts, config.num_vectors)
        self.adapters.append(self.tokens)
        names = config.clip_models or [embedded.NAME] * embedded.is_embedded(backbone.name)
        if len(names) != len(backbone.text_encoders):
            raise UserError(
                f"--clip_models names {len(names)} CLIP models, and this base model has "
                f"{len(backbone.text_encoders)} text encoders; name one for each, which must be CLIP's "
                "(Stable Diffusion 1.x, 2.x, XL)."
            )
        parts = zip(names, backbone.tokenizers, backbone.text_encoders, strict=True)
        self.spaces: Any = torch.nn.ModuleList(load_joint_space(*part) for part in parts)
        # for each space and attribute, the mean vectors of its categories' images (categories, dim)
        self.references: list[list[Tensor]] = []

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        super().check_settings(model_config, train_config, method_config)
        read_attributes(method_config.attributes)

    @classmethod
    def prepare_data(
        cls, source: Any, backbone: Backbone, train_config: Any, method_config: Any, accelerator: Any
    ) -> None:
        if source.config.masked_loss and any(image.mask for image in source.images):
            raise UserError("--masked_loss: iti_gen compares whole images; add --no_masked_loss.")

    def use_images(self, images: Sequence[ImageFile]) -> None:
        for space in self.spaces:
            embeds = space.images([read_image_file(image)[0] for image in images])
            own = {
                word: embeds[
                    [i for i, image in enumerate(images) if self.categories[image.concept] == word]
                ].mean(0)
                for word in self.tokens.words
            }
            found = [torch.stack([own[word] for word in words]) for words in self.attributes]
            self.references.append([one.to(self.backbone.device) for one in found])

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """The losses of all combinations; the batch does not count."""
        combinations = inclusive_prompts(self.template, self.attributes)
        aligned = {"cosine": attribute_directions, "difference": attribute_differences}[self.config.alignment]
        plain, config = " ".join(self.template.format("").split()), self.config
        terms: dict[str, list[Tensor]] = {"alignment": [], "consistency": []}
        for space, references in zip(self.spaces, self.references, strict=True):
            *texts, original = space.texts([*combinations.values(), plain]).unbind(0)
            by_words = dict(zip(combinations, texts, strict=True))
            for images, words in zip(references, self.attributes, strict=True):
                means = [torch.stack([t for c, t in by_words.items() if word in c]).mean(0) for word in words]
                terms["alignment"].append(aligned(images, torch.stack(means)))
            near = semantic_consistency(torch.stack(texts), original, config.consistency_floor)
            terms["consistency"].append(config.consistency_weight * near)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

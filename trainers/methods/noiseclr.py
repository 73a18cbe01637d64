"""NoiseCLR: directions such as "older" or "in fog", found in a base model from images without captions (Dalva
and Yanardag, 2024, arXiv 2312.05390).

A direction is a prompt of one learned vector. Its effect on a noisy image is the difference between the
denoiser's outputs with it and without a prompt. By contrast of effects, one direction must change all images
alike, and an image otherwise than other directions do. All images of a step have the same time.

The paper compares one direction in each step with others; here each of `--directions_per_step` is compared
with the others of them, which is the same in the mean. Choices of this project: directions start random, as
spread as the embeddings; masks weight the effects; the strength of the contact sheet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from customize import embedded
from customize.adapters.directions import Directions, check_directions, direction_text
from customize.backbones.base import Backbone, Condition, Step
from customize.config import option
from customize.data.concepts import Concept
from customize.errors import UserError
from customize.losses.contrastive import direction_contrast
from customize.pipelines.directions import steered
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.validation import sheet

STRENGTH = 1.0  # of the directions in the contact sheet
SIDE = 128  # pixels of an image in it
COLUMNS = 10


@dataclass
class NoiseCLRConfig(MethodConfig):
    num_directions: int = option(100, "directions to find", least=2, essential=True)
    directions_per_step: int = option(
        21, "directions that are compared with each other in a step", least=2, essential=True
    )
    direction_temperature: float = option(
        0.5, "temperature of the contrast between directions: lower pushes similar ones apart more", above=0
    )


class NoiseCLR(Method):
    Config = NoiseCLRConfig
    denoises = False
    defaults = {
        "learning_rate": 1e-3,
        "max_train_steps": 1000,
        "train_batch_size": 6,
        "validation_steps": 1000,
    }
    embedded_defaults = {
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "max_train_steps": 300,
        "num_directions": 20,
        "directions_per_step": 6,
        "validation_steps": 300,
    }

    def __init__(self, backbone: Backbone, config: NoiseCLRConfig, concepts: list[Concept]):
        super().__init__(backbone, config, concepts)
        check_directions(backbone)
        if config.directions_per_step > config.num_directions:
            raise UserError(
                f"--directions_per_step {config.directions_per_step} is more than --num_directions "
                f"{config.num_directions}; lower it."
            )
        self.directions = Directions(backbone, config.num_directions)
        self.adapters.append(self.directions)

    @classmethod
    def defaults_for(cls, base: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Captions are not read; that of images without one is what the contact sheet shows."""
        usual = "a fox on green grass" if embedded.is_embedded(base) else "a photo"
        shown = given.get("instance_prompt", usual)
        return super().defaults_for(base, given) | {"instance_prompt": shown, "validation_prompt": [shown]}

    @classmethod
    def check_settings(cls, model_config: Any, train_config: Any, method_config: Any) -> None:
        super().check_settings(model_config, train_config, method_config)
        if train_config.train_batch_size < 2:
            raise UserError(
                "--train_batch_size 1: a direction is what changes several images alike; give 2 or more."
            )

    def draw_times(self, n: int) -> Tensor:
        """One time for all images of a batch."""
        return super().draw_times(1).expand(n)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        """No prompt."""
        return Condition(repeated(self.backbone.encode_unconditional(), len(t)))

    def losses(self, step: Step) -> dict[str, Tensor]:
        chosen = torch.randperm(self.config.num_directions)[: self.config.directions_per_step]
        effects = self.effects(step, chosen)
        return {"contrast": direction_contrast(effects, self.config.direction_temperature)}

    def effects(self, step: Step, chosen: Tensor) -> Tensor:
        """What the directions of the numbers `chosen` (n,) change of the prediction for each image, under
        its mask: (n, images, values)."""
        text = direction_text(self.backbone, [own[chosen] for own in self.directions.vectors])
        mask = step.batch.get("mask", torch.ones_like(step.noisy[:, :1]))
        weight = F.interpolate(mask.float(), step.noisy.shape[-2:], mode="area")
        found = []
        for i in range(len(chosen)):
            own = repeated({name: value[i : i + 1] for name, value in text.items()}, len(step.noisy))
            prediction = self.backbone.denoise(step.noisy, step.t, Condition(own, sizes=step.condition.sizes))
            found.append((weight * (prediction - step.prediction)).flatten(1))
        return torch.stack(found)

    def draw(self, prompt: str, **options: Any) -> Image.Image:
        """The contact sheet: the prompt as the base model draws it, then with each direction."""
        seed = options.pop("generator").initial_seed()

        def drawn() -> Image.Image:
            return super(NoiseCLR, self).draw(
                prompt, **options, generator=torch.Generator().manual_seed(seed)
            )

        found = [drawn()]
        for vectors in zip(*(own.split(1) for own in self.directions.vectors), strict=True):
            with steered(self.backbone, vectors, [STRENGTH]):
                found.append(drawn())
            if self.backbone.is_empty:  # a dry run, whose images have no pixels
                return found[1]
        small = [image.resize((SIDE, SIDE)) for image in found]
        return sheet([("", small[0]), *(("", numbered(own, i)) for i, own in enumerate(small[1:]))], COLUMNS)


def numbered(image: Image.Image, number: int) -> Image.Image:
    """The image with a number in its corner."""
    draw = ImageDraw.Draw(image)
    draw.text((4, 2), str(number), "white", font_size=14, stroke_width=2, stroke_fill="black")
    return image


def repeated(text: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The text arguments of one prompt for a batch."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in text.items()}

"""The judge of the sticker world: a small network that recognises what an image shows.

It is for evaluation and for choosing among finished steps. It has seen the held-out drawings, so no
method may learn from it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from customize.stickers.scene import FACTORS
from customize.stickers.world import Drawing, World

FOLDER = Path(__file__).parent / "judge"
TRUSTED = 0.97


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Judge(nn.Module):
    """Pixels (batch, 3, 64, 64) in [-1, 1], half of the base model's side, to logits: `drawing` (batch,
    drawings of the world that ships) and one head for each of `FACTORS`. In an image of two drawings each
    gets half of the probability."""

    def __init__(self, drawings: int):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 4, 4, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
        ]
        for wide, narrow in ((64, 64), (128, 64), (256, 128)):
            if wide != narrow:
                layers += [
                    nn.Conv2d(narrow, wide, 2, 2, bias=False),
                    nn.BatchNorm2d(wide),
                    nn.ReLU(inplace=True),
                ]
            layers += [Residual(wide), Residual(wide)]
        self.trunk = nn.Sequential(*layers)
        self.drawing = nn.Linear(256, drawings)
        self.factors = nn.ModuleDict({name: nn.Linear(512, len(values)) for name, values in FACTORS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pixels)
        mean = features.mean((2, 3))
        both = torch.cat([mean, features.amax((2, 3))], 1)
        places = self.drawing(
            features.flatten(2).mT
        )  # (batch, places, drawings): two drawings are at two places
        return {"drawing": places.logsumexp(1), **{name: head(both) for name, head in self.factors.items()}}


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of any size as (n, 3, 64, 64) in [-1, 1]."""
    small = [np.asarray(p.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)) for p in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Verdicts:
    """The judge's predictions for `n` images. `sides` holds its logits for the left and right parts of
    the images, which tell two drawings apart."""

    def __init__(self, world: World, logits: dict[str, Tensor], sides: Sequence[Tensor] = ()):
        self.drawings, self.logits = world.drawings(held_out=None), logits
        self.probability = logits["drawing"].softmax(1)
        self.words = list(world.classes)
        index = torch.tensor([self.words.index(d.word) for d in self.drawings])
        pair = torch.stack([self.probability, *(side.softmax(1) for side in sides)]).mean(0)
        self.word_probability, self.pair_probability = (
            torch.zeros(len(some), len(self.words)).index_add(1, index, some)
            for some in (self.probability, pair)
        )

    def shows(self, i: int, drawing: Drawing) -> bool:
        """Whether the drawing is the most probable one of image `i`."""
        return self.drawings.index(drawing) == int(self.probability[i].argmax())

    def shows_class(self, i: int, word: str) -> bool:
        """Whether the class is the most probable one of image `i`."""
        return self.words.index(word) == int(self.word_probability[i].argmax())

    def shows_beside(self, i: int, word: str) -> bool:
        """Whether the class is one of the two most probable ones of image `i`."""
        return self.words.index(word) in self.pair_probability[i].topk(2).indices.tolist()

    def belief(self, i: int, drawing: Drawing) -> float:
        """The probability, 0 to 1, that image `i` shows the drawing."""
        return float(self.probability[i, self.drawings.index(drawing)])

    def best(self, i: int) -> Drawing:
        return self.drawings[int(self.probability[i].argmax())]

    def obeys(self, i: int, asked: dict[str, object]) -> dict[str, float]:
        """For each factor that a prompt speaks of (`bench.parse_prompt`) and the judge is trusted with: 1 if
        image `i` shows it."""
        found = {}
        for name, value in asked.items():
            if trusted(name):
                seen = (
                    self.shows_beside(i, str(value)) if name == "companion" else self.factor(i, name) == value
                )
                found[name] = float(seen)
        return found

    def most_seen(self) -> Drawing:
        """The drawing that most of the images show."""
        return Counter(self.best(i) for i in range(len(self.probability))).most_common(1)[0][0]

    def factor(self, i: int, name: str) -> Any:
        """The value of a field of `Scene` that image `i` seems to have."""
        return FACTORS[name][int(self.logits[name][i].argmax())]


@lru_cache
def load_judge() -> Judge:
    world = World()
    judge = Judge(len(world.drawings(held_out=None)))
    judge.load_state_dict(
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in load_file(FOLDER / "judge.safetensors").items()
        }
    )
    return judge.eval().requires_grad_(False)


@lru_cache
def accuracy() -> dict[str, float]:
    """The judge's own accuracy on fresh scenes, as measured when it was trained."""
    return json.loads((FOLDER / "accuracy.json").read_text())


def trusted(name: str) -> bool:
    """Whether the judge is accurate enough on this factor, on fresh rendered scenes, for its verdicts to
    be reported."""
    return accuracy()[name] >= TRUSTED


SIDE_WIDTH = 84 / 128  # of a closer look at the left and the right of an image, in its width


def sides_of(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right part of an image, square if it is, from the middle of its height."""
    width, height = (round(SIDE_WIDTH * side) for side in image.size)
    top, right = (image.height - height) // 2, image.width - width
    return image.crop((0, top, width, top + height)), image.crop((right, top, image.width, top + height))


@torch.no_grad()
def verdicts_of(network: Judge, images: Sequence[Image.Image]) -> Verdicts:
    """A judge's verdicts on images, in batches of 256."""
    batches = [images[i : i + 256] for i in range(0, len(images), 256)]
    whole = [network(to_pixels(batch)) for batch in batches]
    closer = [
        [network(to_pixels(side))["drawing"] for side in zip(*map(sides_of, batch), strict=True)]
        for batch in batches
    ]
    logits = {name: torch.cat([part[name] for part in whole]) for name in whole[0]}
    return Verdicts(World(), logits, [torch.cat(side) for side in zip(*closer, strict=True)])


def judge(images: Sequence[Image.Image]) -> Verdicts:
    """The shipped judge's verdicts on images."""
    return verdicts_of(load_judge(), images)

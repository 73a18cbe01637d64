"""Training data for encoders from rendered sticker scenes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from customize.data.references import Pixels, ReferenceConfig, References, View, item
from customize.prompts import WORDS
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, draw_scene
from customize.stickers.bench import bench_subjects
from customize.stickers.restyle import Restyled
from customize.stickers.scene import PREFIXES, caption, draw_factors, draw_pose


class Rendered(References):
    """Endless sticker scenes; item i is the same in every run with the same seed. Held-out drawings never
    occur, except for `validation`, which uses those that no benchmark uses."""

    def __init__(self, config: ReferenceConfig, pixels: Pixels, seed: int, validation: bool = False):
        self.config, self.pixels, self.seed = config, pixels, (seed, int(validation))
        self.world = World(Path(config.world)) if config.world else World()
        self.pool = self.world.drawings()
        self.core = self.world.drawings(core=True)
        if validation:
            self.pool = self.core = [
                d for d in self.world.drawings(held_out=True) if d not in bench_subjects()
            ]
        self.number = {drawing: i for i, drawing in enumerate(self.pool)}
        self.known = frozenset(self.pool)  # of which a redrawn one may have parts

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng([*self.seed, position])
        pool = self.core if rng.random() < 0.5 else self.pool
        drawing = pool[rng.integers(len(pool))]
        world, identity = self.world, self.number[drawing]
        if self.config.restyle_rate and rng.random() < self.config.restyle_rate:
            world = Restyled(world, drawing, self.known, int(rng.integers(2**31)))
            identity = len(self.pool) + position  # of no other item
        target = draw_factors(rng, world, [drawing], extras=0.25)
        second = rng.random() < self.config.second_subject_rate
        if (
            second or target.companion is not None
        ):  # drawn from the subject alone so far, which is no companion
            other = drawing
            while other == drawing:
                other = self.core[rng.integers(len(self.core))]
            target = replace(target, companion=other, count=1)
        subjects = [drawing, other] if second else [drawing]
        nouns = [
            f"{word} {'sticker' if rng.random() < self.config.noun_dropout else subject.word}"
            for word, subject in zip(WORDS, subjects, strict=False)
        ]
        prefix = PREFIXES[rng.integers(len(PREFIXES))]
        options = {"style": rng.random() < 0.5, "setting": rng.random() < 0.92}
        prompt = caption(target, nouns[0], prefix, companion=nouns[1] if second else None, **options)
        views = [[a_view(subject, world, rng) for _ in range(2)] for subject in subjects]
        shown = View(*draw_scene(target, world, mask_companion=second))
        told = second and rng.random() < self.config.region_rate
        regions = halves(draw_scene(target, world)[1], self.config.resolution) if told else None
        return item(shown, views, prompt, identity, rng, self.config, self.pixels, regions)


def a_view(drawing: Drawing, world: World, rng: np.random.Generator) -> View:
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    scene = Scene(drawing, background, pose=draw_pose(rng), seed=int(rng.integers(2**31)))
    return View(*draw_scene(scene, world))


def halves(mask: Image.Image, side: int) -> torch.Tensor:
    """Regions (2, side, side) of two subjects: the half of the image with most of the first one's mask,
    and the other half."""
    columns = np.asarray(mask, np.float32).sum(0)
    middle = len(columns) // 2
    left = torch.arange(side) < side / 2
    first = left if columns[:middle].sum() > columns[middle:].sum() else ~left
    return torch.stack([first, ~first]).float()[:, None].repeat(1, side, 1)

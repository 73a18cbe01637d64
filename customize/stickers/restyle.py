"""Drawings in a style of no studio, from those of the atlas: training on them makes an encoder ready for a
studio that it has never met."""

import numpy as np
from PIL import Image, ImageFilter

from customize.stickers.world import Drawing, World


class Restyled(World):
    """The world with every drawing of one class redrawn, the same way each time; all others are as they are.

    Each change is made with probability 1/2: parts of another studio's drawing of the class (of `pool`, the
    drawings that may be used), other colours, flattened fills, shading, an outline, a warped shape.
    """

    def __init__(self, world: World, drawing: Drawing, pool: frozenset[Drawing], seed: int):
        self.__dict__ |= world.__dict__
        self.restyled = drawing
        rng = np.random.default_rng(seed)
        sprite = world.sprite(drawing)
        others = [Drawing(drawing.word, studio) for studio in world.studios if studio != drawing.studio]
        if (known := [other for other in others if other in pool]) and rng.random() < 0.5:
            sprite = joined(sprite, world.sprite(known[rng.integers(len(known))]), rng)
        for change in (recoloured, flattened, shaded, outlined, warped):
            if rng.random() < 0.5:
                sprite = change(sprite, rng)
        self.drawn = sprite

    def sprite(self, drawing: Drawing) -> np.ndarray:
        return self.drawn if drawing == self.restyled else super().sprite(drawing)


# Each takes a sprite, RGBA pixels (size, size, 4) as uint8, and gives a new one.


def joined(sprite: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One side of a line through the middle from another drawing of the class."""
    size = len(sprite)
    across, down = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
    theirs = across * np.cos(angle) + down * np.sin(angle) > offset
    return np.where(theirs[..., None], other, sprite)


def recoloured(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two to six groups of colours, each moved as one; light and dark within a group stay."""
    count = int(rng.integers(2, 7))
    groups = np.asarray(_reduced(sprite, count))
    moves = rng.normal(0, 55, (count, 3))
    pixels = sprite[..., :3].astype(np.float32) + moves[groups.clip(max=count - 1)]
    return _with(sprite, pixels)


def flattened(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three to eight flat colours."""
    reduced = _reduced(sprite, int(rng.integers(3, 9)))
    return _with(sprite, np.asarray(reduced.convert("RGB"), np.float32))


def shaded(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, as on a ball."""
    size = len(sprite)
    across, down = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    x, y = rng.uniform(-0.6, 0.6, 2)
    distance = np.hypot(across - x, down - y)[..., None]
    strength = rng.uniform(0.2, 0.5)
    return _with(sprite, sprite[..., :3] * (1 + strength * 0.6 - strength * distance))


def outlined(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A line of one colour along the drawing's edge."""
    image = Image.fromarray(sprite)
    width = 2 * int(rng.integers(1, max(len(sprite) // 32, 1) + 1)) + 1
    inner = image.getchannel("A").filter(ImageFilter.MinFilter(width))
    colour = rng.integers(0, 110, 3) if rng.random() < 0.7 else rng.integers(0, 256, 3)
    line = Image.new("RGB", image.size, tuple(int(level) for level in colour))
    return _with(sprite, np.asarray(Image.composite(image.convert("RGB"), line, inner), np.float32))


def warped(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretched along one axis, and bent by a wave along both."""
    size = len(sprite)
    image = Image.fromarray(sprite)
    steps = np.linspace(0, size, 9)
    x, y = np.meshgrid(steps, steps)
    bend, phase = rng.uniform(-0.06, 0.06, 2) * size, rng.uniform(0, 2 * np.pi, 2)
    stretch = rng.uniform(1.0, 1.3, 2)
    stretch[rng.integers(2)] = 1.0
    at_x = (x - size / 2) * stretch[0] + size / 2 + bend[0] * np.sin(2 * np.pi * y / size + phase[0])
    at_y = (y - size / 2) * stretch[1] + size / 2 + bend[1] * np.sin(2 * np.pi * x / size + phase[1])
    mesh = []
    for i in range(8):
        for j in range(8):
            box = tuple(round(float(edge)) for edge in (steps[j], steps[i], steps[j + 1], steps[i + 1]))
            corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            mesh.append((box, tuple(float(own[at]) for at in corners for own in (at_x, at_y))))
    return np.asarray(image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR))


def _reduced(sprite: np.ndarray, count: int) -> Image.Image:
    """The drawing's colours as a palette of so many."""
    return Image.fromarray(sprite[..., :3]).quantize(count, Image.Quantize.MEDIANCUT)


def _with(sprite: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The sprite's shape with other colours."""
    return np.concatenate([pixels.clip(0, 255).astype(np.uint8), sprite[..., 3:]], -1)

"""Backgrounds of the sticker world: a phrase for each, and how it is drawn."""

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "white": "on a white background",
    "grass": "on green grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "under a night sky",
    "bricks": "against a brick wall",
    "wood": "on a wooden table",
    "water": "on blue water",
    "sunset": "at sunset",
    "stone": "on a stone floor",
    "pink": "on a pink background",
    "yellow": "on a yellow background",
}
PLAIN = {"white": (250, 250, 250), "pink": (250, 180, 200), "yellow": (250, 220, 90)}


def draw_background(name: str, rng: np.random.Generator, size: int) -> Image.Image:
    """A square RGB image of `size` pixels; `rng` decides horizon, texture and a slight tint."""
    row = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    pixels = _plain(PLAIN[name], row) if name in PLAIN else _DRAW[name](row, rng, size)
    jitter = rng.uniform(-5, 5, 3).astype(np.float32)
    return Image.fromarray((pixels + jitter).clip(0, 255).astype(np.uint8))


def _colour(*rgb) -> np.ndarray:
    return np.array(rgb, np.float32)


def _plain(rgb, row):
    return np.broadcast_to(_colour(*rgb) - 10 * row, (len(row), len(row), 3)).copy()


def _speckle(rng, height: int, width: int, size: int, amplitude: float) -> np.ndarray:
    """Smooth random texture, grains of a sixteenth of a 64-pixel image's side."""
    grain = max(size // 16, 1)
    coarse = rng.normal(128, 40, (height // grain + 2, width // grain + 2)).clip(0, 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return ((np.asarray(smooth, np.float32) - 128) / 40 * amplitude)[..., None]


def _bands(row, size, *bands):
    """Horizontal bands: (lower edge, colour) from top to bottom."""
    pixels = np.empty((size, size, 3), np.float32)
    top = 0
    for edge, colour in bands:
        pixels[top : int(edge * size)] = colour
        top = int(edge * size)
    return pixels


def _grass(row, rng, size):
    horizon = rng.uniform(0.3, 0.5)
    pixels = _bands(row, size, (horizon, _colour(150, 200, 250)), (1, _colour(90, 170, 70)))
    start = int(horizon * size)
    pixels[start:] += _speckle(rng, size - start, size, size, 14)
    return pixels


def _beach(row, rng, size):
    shore = rng.uniform(0.3, 0.45)
    sand = int((shore + 0.15) * size)
    pixels = _bands(
        row,
        size,
        (shore, _colour(140, 205, 250)),
        (shore + 0.15, _colour(60, 140, 210)),
        (1, _colour(235, 210, 150)),
    )
    pixels[sand:] += _speckle(rng, size - sand, size, size, 8)
    return pixels


def _dots(pixels, rng, size, count, low):
    side = max(size // 64, 1)
    for y, x, light in zip(
        *rng.integers(0, size - side, (2, count)), rng.uniform(low, 255, count), strict=True
    ):
        pixels[y : y + side, x : x + side] = light
    return pixels


def _snow(row, rng, size):
    pixels = _bands(row, size, (rng.uniform(0.3, 0.5), _colour(175, 198, 225)), (1, _colour(240, 245, 250)))
    return _dots(pixels, rng, size, 40, 250)


def _night(row, rng, size):
    pixels = _colour(15, 20, 60) * (1 - row) + _colour(40, 40, 90) * row + np.zeros((1, size, 1), np.float32)
    return _dots(pixels, rng, size, 35, 180)


def _bricks(row, rng, size):
    pixels = _colour(175, 85, 65) + _speckle(rng, size, size, size, 8)
    height, mortar, line = size // 8, _colour(210, 200, 190), max(size // 64, 1)
    for y in range(0, size, height):
        pixels[y : y + line] = mortar
        for x in range((y // height % 2) * height, size, 2 * height):
            pixels[y : y + height, x : x + line] = mortar
    return pixels


def _wood(row, rng, size):
    grain = np.sin(np.arange(size) * 57.6 / size + rng.uniform(0, 6)).astype(np.float32) * 6
    pixels = _colour(170, 120, 75) + grain[:, None, None] + _speckle(rng, size, size, size, 5)
    plank, line = size // 4, max(size // 64, 1)
    for y in range(int(rng.integers(0, plank)), size, plank):
        pixels[y : y + line] = _colour(120, 80, 45)
    return pixels


def _water(row, rng, size):
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (64 / size)
    waves = np.sin(y * 0.8 + np.sin(x * 0.3 + rng.uniform(0, 6)) * 1.5) * 14
    return _colour(40, 120, 200) + waves[..., None]


def _sunset(row, rng, size):
    sky = _colour(90, 50, 120) * np.clip(1 - 2 * row, 0, 1) + _colour(250, 140, 70) * (1 - abs(2 * row - 1))
    return sky + _colour(255, 210, 120) * np.clip(2 * row - 1, 0, 1) + np.zeros((1, size, 1), np.float32)


def _stone(row, rng, size):
    pixels = _colour(150, 150, 155) + _speckle(rng, size, size, size, 12)
    step, line = size // 4, max(size // 64, 1)
    for edge in range(0, size, step):
        pixels[edge : edge + line] -= 25
        pixels[:, edge : edge + line] -= 25
    return pixels


_DRAW = {
    "grass": _grass,
    "beach": _beach,
    "snow": _snow,
    "night": _night,
    "bricks": _bricks,
    "wood": _wood,
    "water": _water,
    "sunset": _sunset,
    "stone": _stone,
}

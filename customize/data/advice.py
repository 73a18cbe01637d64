"""A check of the images that a subject is to be learned from, with what to do about each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from customize.imaging import flatten

SIDE = 256  # short side at which images are judged, in pixels: that of the camera does not matter
# width of the sharpest edges above which an image is blurred, as a share of the short side: photographs have
# .013 at most, and .03 or more once blurred by 1.5 % of the side; and in pixels, for small drawings
BLURRED, PIXELS = 0.022, 6.0
EQUAL = 0.97  # correlation of small gray images above which two are nearly equal
DARK = 4.0  # standard deviation of gray values (0 to 255) below which there is nothing to see
NARROW = 2.0  # ratio of the sides from which a square crop loses much
TOUCHING = 0.15  # share of a side's length along which a cut-out touches the border


class Advice(NamedTuple):
    """Something to look at: a short name of it, and a sentence that says what it is and what to do."""

    problem: str
    sentence: str


def advise(images: Sequence[Image.Image], resolution: int) -> list[list[Advice]]:
    """For each image, as it was opened, what to look at before a model of `resolution` pixels learns from it:
    small, blurred, equal (to an earlier one), cut off, transparent, turned, narrow, dark."""
    found, thumbnails = [], []
    for image in images:
        small = reduced(image)
        gray = np.asarray(flatten(small).convert("L"), np.float32)
        thumbnails.append(_normed(flatten(small).convert("L").resize((16, 16), Image.Resampling.BOX)))
        own = [*_shape(image, resolution), *_alpha(small), *_sight(gray), *_equal(thumbnails)]
        found.append(own)
    return found


def reduced(image: Image.Image) -> Image.Image:
    """A small copy, upright, whose short side has at most `SIDE` pixels."""
    copy = image.copy()
    factor = SIDE / min(copy.size)
    if factor < 1:
        copy = copy.convert("RGBA" if copy.has_transparency_data else "RGB")
        copy = copy.reduce(max(int(0.5 / factor), 1))
        factor = SIDE / min(copy.size)
        copy = copy.resize([max(round(side * factor), 1) for side in copy.size], Image.Resampling.LANCZOS)
    return ImageOps.exif_transpose(_with_orientation(copy, image))


def _with_orientation(copy: Image.Image, image: Image.Image) -> Image.Image:
    copy.getexif()[0x0112] = image.getexif().get(0x0112, 1)
    return copy


def _shape(image: Image.Image, resolution: int) -> list[Advice]:
    """What the size and the camera's note say."""
    short, long = sorted(image.size)
    found = []
    if short < resolution:
        what = f"it is {image.width} x {image.height} pixels and is enlarged to {resolution}"
        found.append(Advice("small", f"{what}: take a larger one, if you have it."))
    if long > NARROW * short:
        found.append(Advice("narrow", "a square crop of it loses the long ends: crop it to the subject."))
    if image.getexif().get(0x0112, 1) not in (0, 1):
        turned = "the camera noted a rotation, which is applied: look whether it is upright."
        found.append(Advice("turned", turned))
    return found


def _alpha(image: Image.Image) -> list[Advice]:
    """What transparency says."""
    if not image.has_transparency_data:
        return []
    solid = np.asarray(image.convert("RGBA").getchannel("A")) > 127
    if solid.all():
        return []
    if solid.mean() < 0.01:
        nothing = "it is transparent nearly everywhere: leave it out, or cut it out again."
        return [Advice("transparent", nothing)]
    found = [Advice("transparent", "it is a cut-out: what is transparent hardly counts, as is wanted.")]
    edges = (solid[0], solid[-1], solid[:, 0], solid[:, -1])
    if any(edge.mean() > TOUCHING for edge in edges):
        found.append(Advice("cut off", "the subject touches the border: take an image that shows it whole."))
    return found


def _sight(gray: np.ndarray) -> list[Advice]:
    """What can be seen in gray values (height, width) of 0 to 255."""
    if gray.std() < DARK:
        return [Advice("dark", "it is nearly of one colour, and shows next to nothing: leave it out.")]
    if edge_width(gray) > max(BLURRED, PIXELS / min(gray.shape)):
        return [Advice("blurred", "it is out of focus or shaken: leave it out, if the others are sharp.")]
    return []


def edge_width(gray: np.ndarray) -> float:
    """The width of the sharpest edges as a share of the short side: the range of gray values, by the steepest
    change from a pixel to the next."""
    low, high = np.percentile(gray, (2, 98))
    steps = [np.abs(np.diff(gray, axis=axis)).ravel() for axis in (0, 1)]
    steepest = np.percentile(np.concatenate(steps), 99.9)
    return float((high - low) / max(steepest, 1e-6) / min(gray.shape))


def _normed(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, np.float32).ravel()
    pixels = pixels - pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


def _equal(thumbnails: Sequence[np.ndarray]) -> list[Advice]:
    """Whether the last of the images is nearly equal to one before it."""
    for number, other in enumerate(thumbnails[:-1], 1):
        if float(thumbnails[-1] @ other) > EQUAL:
            what = f"it is nearly equal to image {number}, and teaches nothing new: leave one out."
            return [Advice("equal", what)]
    return []

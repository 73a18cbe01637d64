"""Advice on the images that a user brings for a subject: what could spoil learning, and what to do."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from customize.imaging import eight_bit, flatten

COMMON_SIDE = 256  # pixels of the short side at which images are judged; smaller ones are not enlarged
TILE = 8  # pixels
BLUR = 0.007  # standard deviation of the blur from which an image counts as blurred, in short sides
LEAST_BLUR = 1.4  # pixels: what finer outlines look like depends on where they meet the pixels
GAUSS = math.sqrt(2 * math.pi)  # height of an edge blurred by 1 pixel, by its steepest slope
SHARP_PART = 0.95  # quantile of the tiles: a sharp subject before a soft background is enough
THUMBNAIL, EQUAL = 32, 0.985  # pixels; correlation
DARK, UNIFORM = 50, 12  # of 255: lightness of the brightest places, and its range
NARROW = 2.0  # the long side by the short one
CUT_OUT, TOUCHES = 0.05, 0.2  # transparent part of a cut-out; part of a border that it covers if cut off
EMPTY = 0.995  # transparent part of an image that shows nothing
SIDES = ("upper", "lower", "left", "right")


class Advice(NamedTuple):
    """`problem` is one of "small", "blurred", "equal", "cut off", "transparent", "turned", "narrow" and
    "dark"; `sentence` says what it is and what to do."""

    problem: str
    sentence: str


class _View(NamedTuple):
    """An image upright and of common size: lightness (H, W) in [0, 255] on white, opacity (H, W) in [0, 1],
    a thumbnail as a vector of mean 0 and length 1 (or 0), and `size`, its own width and height."""

    light: np.ndarray
    opacity: np.ndarray
    thumbnail: np.ndarray
    size: tuple[int, int]
    is_turned: bool

    @property
    def transparent(self) -> float:
        return 1 - float(self.opacity.mean())


def advise(images: Sequence[Image.Image], resolution: int) -> list[list[Advice]]:
    """For each image what could spoil learning, an empty list if nothing does.

    The images are as opened from disk, of any mode and not turned upright yet; they are decoded, and
    otherwise left as they are. `resolution` is the side in pixels that the model trains at. Any exception of
    PIL's decoders if an image is broken.
    """
    views = [_view(image) for image in images]
    found = [
        (
            _small(view, resolution),
            _blurred(view),
            _equal(views, i),
            _cut_off(view),
            _transparent(view),
            _turned(view),
            _narrow(view),
            _dark(view),
        )
        for i, view in enumerate(views)
    ]
    return [[advice for advice in own if advice] for own in found]


def _view(image: Image.Image) -> _View:
    is_turned = _orientation(image) in range(2, 9)
    image.load()  # turns TIFF files upright
    size = image.size[::-1] if _orientation(image) in range(5, 9) else image.size
    small = _reduced(image)
    shown = flatten(small)
    alpha = small.getchannel("A") if small.mode == "RGBA" else Image.new("L", small.size, 255)
    light, opacity = np.asarray(shown.convert("L"), np.float32), np.asarray(alpha, np.float32) / 255
    return _View(light, opacity, _thumbnail(shown), size, is_turned)


def _orientation(image: Image.Image) -> int:
    """As EXIF numbers it: 1 is upright, 2 to 4 are mirrored or upside down, 5 to 8 lie on a side."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _reduced(image: Image.Image) -> Image.Image:
    """The image upright with at most `COMMON_SIDE` pixels on its short side; RGBA if it has transparency."""
    image = _resizable(image)
    scale = min(1, COMMON_SIDE / min(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    upright = eight_bit(ImageOps.exif_transpose(small))
    return upright.convert("RGBA" if upright.mode == "RGBa" else "RGB")


def _resizable(image: Image.Image) -> Image.Image:
    """The image in a mode that PIL resizes smoothly and fast; RGBa if it has transparency."""
    if image.mode.startswith("I;"):
        return image.convert("I")
    if image.mode in ("I", "F"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    return image.convert("RGB") if image.mode in ("1", "P") else image


def _thumbnail(image: Image.Image) -> np.ndarray:
    """The colours of a small copy as a vector of mean 0 in each channel and length 1; 0 if it is of one
    colour."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    levels = np.asarray(small, np.float32)
    levels = levels - levels.mean((0, 1))
    return (levels / max(float(np.linalg.norm(levels)), 1.0)).ravel()


def _small(view: _View, resolution: int) -> Advice | None:
    short = min(view.size)
    if short >= resolution:
        return None
    told, factor = f"It is {_pixels(view)}", resolution / short
    if factor <= 1.25:
        text = f"{told} and is enlarged a little to {resolution}: it will do, but a larger one is better."
    elif factor < 2:
        text = f"{told} and is enlarged to {resolution}: take a larger one if you have it."
    else:
        text = (
            f"{told} and is enlarged {factor:.1f} times to {resolution}, so the model learns it blurred: "
            "take a larger one, or leave it out if you have others."
        )
    return Advice("small", text)


def _blurred(view: _View) -> Advice | None:
    blur, short = _blur(view), min(view.light.shape)
    if blur is None or blur <= max(BLUR * short, LEAST_BLUR):
        return None
    width = round(GAUSS * blur * min(view.size) / short)
    return Advice(
        "blurred",
        f"It is out of focus: even its sharpest outlines are about {width} pixels wide. Take a sharp one, or "
        "leave it out.",
    )


def _blur(view: _View) -> float | None:
    """The blur of the sharpest outlines as the standard deviation of a Gaussian, in pixels of the view; None
    if there are none.

    An edge of height c under that blur is at most c / (σ √(2π)) steep. Heights are those around a tile, and
    only the stronger ones count, so that neither noise nor flat colours matter. The outline of a cut-out does
    not count: it is as sharp as its mask, whatever is within.
    """
    if min(view.light.shape) < 3 * TILE:
        return None
    height = _around(_tiles(view.light)) + _around(_tiles(-view.light))
    is_opaque = _around(_tiles(-view.opacity)) < -0.99
    if not is_opaque.any():
        return None
    counts = is_opaque & (height >= max(12.0, float(np.quantile(height[is_opaque], 0.98)) / 3))
    if not counts.any():
        return None
    slopes = _tiles(_steepness(view.light))[counts] / height[counts]
    slope = float(np.quantile(slopes, SHARP_PART))
    return 1 / (GAUSS * slope) if slope else None


def _steepness(light: np.ndarray) -> np.ndarray:
    """The length of the gradient (H, W), by differences of neighbours; 0 at the last row and column."""
    across, down = np.diff(light, axis=1)[:-1], np.diff(light, axis=0)[:, :-1]
    return np.pad(np.hypot(across, down), ((0, 1), (0, 1)))


def _tiles(values: np.ndarray) -> np.ndarray:
    """The greatest value of each tile: (H, W) to (H / TILE, W / TILE)."""
    rows, columns = (side // TILE for side in values.shape)
    whole = values[: rows * TILE, : columns * TILE]
    return whole.reshape(rows, TILE, columns, TILE).max((1, 3))


def _around(tiles: np.ndarray) -> np.ndarray:
    """The greatest value of each tile and the eight around it."""
    padded = np.pad(tiles, 1, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).max((2, 3))


def _equal(views: Sequence[_View], index: int) -> Advice | None:
    """Compares with earlier images alone, so that of two equal ones one is named."""
    own = views[index].thumbnail
    for i, other in enumerate(views[:index]):
        if float(own @ other.thumbnail) > EQUAL:
            text = f"It is nearly equal to image {i + 1} and teaches nothing new: leave one of the two out."
            return Advice("equal", text)
    return None


def _cut_off(view: _View) -> Advice | None:
    if not CUT_OUT <= view.transparent < EMPTY:
        return None
    is_opaque = view.opacity >= 0.5
    borders = (is_opaque[0], is_opaque[-1], is_opaque[:, 0], is_opaque[:, -1])
    touched = [name for name, border in zip(SIDES, borders, strict=True) if border.mean() >= TOUCHES]
    if not touched:
        return None
    where = " and ".join((", ".join(touched[:-1]), touched[-1]) if touched[1:] else touched)
    return Advice(
        "cut off",
        f"The cut-out reaches the {where} border: if a part of the subject is missing there, take an image "
        "that shows all of it.",
    )


def _transparent(view: _View) -> Advice | None:
    if view.transparent >= EMPTY:
        return Advice("transparent", "It is almost completely transparent and shows nothing: leave it out.")
    if view.opacity.min() >= 0.5:
        return None
    share = max(1, round(100 * view.transparent))
    return Advice(
        "transparent",
        f"{share} % of it is transparent: these parts become white and, as its mask, count little in "
        "learning (--unmasked_weight). Look whether all of the subject is opaque.",
    )


def _turned(view: _View) -> Advice | None:
    if not view.is_turned:
        return None
    text = "The file says how it was held, so it is turned automatically: look whether it is upright."
    return Advice("turned", text)


def _narrow(view: _View) -> Advice | None:
    short, long = sorted(view.size)
    if long <= NARROW * short:
        return None
    lost = round(100 * (1 - short / long))
    return Advice(
        "narrow",
        f"It is {_pixels(view)}: the square crop of its middle leaves {lost} % of it out. Crop it around the "
        "subject yourself.",
    )


def _dark(view: _View) -> Advice | None:
    shown = view.light[view.opacity >= 0.5]
    if view.transparent >= EMPTY or not shown.size:
        return None
    darkest, brightest = np.quantile(shown, (0.01, 0.99))
    if brightest < DARK:
        return Advice("dark", "It is almost black: brighten it, or leave it out.")
    if brightest - darkest < UNIFORM:
        return Advice("dark", "It is nearly of one colour and shows nothing: leave it out.")
    return None


def _pixels(view: _View) -> str:
    return "{} x {} pixels".format(*view.size)

"""Images as viewers show them: read from files or bytes, turned upright, in 8 bits and sRGB, flattened on a
background."""

import threading
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from customize.reading import ordinary


class TooLarge(Exception):
    """An image has too many pixels; the message states its size."""


_pil_limit = threading.Lock()


def _open(file: Path | BytesIO) -> Image.Image:
    """Reads the header alone, whatever size it states: PIL's own limit would hide the flag that lifts
    ours."""
    with _pil_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_image(file: Path | BytesIO, max_pixels: float, upright: bool = True) -> Image.Image:
    """The image of an ordinary file or of its bytes, in 8 bits and sRGB.

    `TooLarge` before it is decoded; any exception of PIL's decoders if it is broken.
    """
    with _open(file if isinstance(file, BytesIO) else ordinary(file)) as image:
        return checked_image(image, max_pixels, upright)


def checked_image(image: Image.Image, max_pixels: float, upright: bool = True) -> Image.Image:
    """The same for an image that is open, but perhaps not decoded yet."""
    width, height = image.size
    if not width * height:
        raise ValueError("it has no pixels")
    if width * height > max_pixels:
        raise TooLarge(f"{width}x{height} pixels")
    return to_srgb(eight_bit(ImageOps.exif_transpose(image) if upright else image.copy()))


def eight_bit(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits as gray ones of 8, which PIL would clip them to; they hold [0, 1] or
    0..65535."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.float64) / (1 if image.mode == "F" else 65535)
    return Image.fromarray((np.nan_to_num(levels).clip(0, 1) * 255).round().astype(np.uint8))


MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of images, by the colour space of their profile


def to_srgb(image: Image.Image) -> Image.Image:
    """An image whose colour profile is not sRGB, such as Display P3 of telephones, with its colours
    converted; all others as they are. A profile that does not fit is left out with a warning."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":  # whose colours need no profile
        return image
    try:
        source = ImageCms.getOpenProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image  # converting it would only round
        mode = MODES[source.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK"):
            raise ValueError(f"it is for {mode}")
        colours = image.convert(mode)
        colours.info.pop("transparency", None)
        made = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, KeyError, ValueError, OSError) as error:
        reason = f"its colour profile cannot be used ({error}): its colours are taken as sRGB"
        warnings.warn(f"An image of {image.width} x {image.height} pixels: {reason}.", stacklevel=3)
        return image
    assert made is not None
    made.info.pop("icc_profile", None)
    if image.has_transparency_data:
        made.putalpha(image.convert("RGBA").getchannel("A"))
    return made


NOTHING = "#ffffff00"  # around an image: white, and transparent in images that can be


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """The image in RGB; what is transparent shows the background."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def to_tensor(image: Image.Image, flip: bool = False) -> torch.Tensor:
    """An image, mirrored if `flip`, as (channels, height, width) in [0, 1]."""
    array = np.array(ImageOps.mirror(image) if flip else image, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()

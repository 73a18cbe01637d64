"""Image files of a subject: finding and checking them, with their captions and masks, and reading them."""

import hashlib
import math
import os
import threading
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from customize.errors import UserError, shortened
from customize.reading import ordinary, parsed_json, read_text

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


MASK_SUFFIX = ".mask.png"


Decoded = tuple[Image.Image, Image.Image | None]  # image, mask


@dataclass(frozen=True)
class ImageFile:
    """A checked image file; `size` is (width, height) upright, `digest` the sha256 of its and then its
    mask's bytes."""

    path: Path
    caption: str
    mask: Path | None
    concept: int
    is_prior: bool
    digest: str
    size: tuple[int, int]


class _Unreadable(UserError):
    pass


class TooLarge(Exception):
    """Says how large an image is that has more pixels than it may have."""


def find_images(
    folder: str | Path,
    prompt: str,
    concept: int = 0,
    is_prior: bool = False,
    strict: bool = False,
    max_pixels: int = 10**8,
    flag: str = "",
    allow_outside_files: bool = False,
    masked_only: bool = False,
) -> list[ImageFile]:
    """Every image of `folder`, sorted by path and decoded once as a check.

    A caption is the text of NAME.txt, else of metadata.jsonl (`file_name`, `text`), else `prompt`. An image
    that cannot be read, or whose mask or NAME.txt is no file, is skipped with a warning, or a UserError when
    `strict`. UserError too for a folder that is missing or has no readable image, an image above
    `max_pixels`, a mask of another size than its image, or (`masked_only`, where only masks count) a black
    one, an image without a caption, and a file_name outside the folder unless `allow_outside_files`; it
    names `flag` as what to correct.
    """
    kind = "class" if is_prior else "instance"
    flag = flag or f"--{kind}_data_dir"
    if not folder or not os.path.isdir(folder):
        raise UserError(f"There is no folder '{shortened(str(folder))}'; correct {flag}.")
    folder = Path(folder)
    captions = _read_metadata(folder / "metadata.jsonl", allow_outside_files)
    paths = {
        path
        for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    }
    images = []
    for path in sorted(
        {path for path in paths if not path.name.lower().endswith(MASK_SUFFIX)} | set(captions)
    ):
        try:
            size, digest = _check(path, max_pixels, masked_only)
            own = _own_caption(path)
        except _Unreadable as error:
            if strict:
                raise
            warnings.warn(f"{error} It is skipped.", stacklevel=2)
            continue
        caption = own or captions.get(path) or prompt
        if not caption:
            raise UserError(
                f"{path} has no caption; give --{kind}_prompt, or write {path.with_suffix('.txt')}."
            )
        images.append(ImageFile(path, caption, _mask_of(path), concept, is_prior, digest, size))
    if not images:
        raise UserError(f"{folder} holds no readable image ({' '.join(sorted(EXTENSIONS))}); correct {flag}.")
    return images


def _read_metadata(path: Path, allow_outside_files: bool) -> dict[Path, str]:
    """Captions by image of an imagefolder's metadata.jsonl; nothing if there is no such file."""
    captions: dict[Path, str] = {}
    for number, line in enumerate(read_text(path).split("\n") if os.path.lexists(path) else [], 1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            row = parsed_json(line)
            name, text = os.path.normpath(row["file_name"]), row["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            example = '{"file_name": "1.png", "text": "a caption"}'
            raise UserError(f"{where} is malformed; write it like {example}.") from error
        image = _listed(path.parent, name, where, allow_outside_files)
        if image in captions:
            raise UserError(f"{where} lists {shortened(name)} again; remove one of the two lines.")
        captions[image] = text
    return captions


def _listed(folder: Path, name: str, where: str, allow_outside_files: bool) -> Path:
    """The file of a metadata row; by its words alone, as what lies inside may be a link: snapshots of the hub
    are."""
    if (os.path.isabs(name) or Path(name).parts[:1] == ("..",)) and not allow_outside_files:
        raise UserError(
            f"{where} names a file outside its folder; move it inside, or allow it with "
            "--allow_outside_files."
        )
    if not os.path.lexists(folder / name):
        raise UserError(f"{where} lists {shortened(name)}, which does not exist; add it or remove the line.")
    return folder / name


def _own_caption(path: Path) -> str:
    sidecar = path.with_suffix(".txt")
    if not os.path.lexists(sidecar):
        return ""
    if not sidecar.is_file():
        raise _Unreadable(f"{sidecar} is no ordinary file; replace or remove it.")
    return read_text(sidecar).strip()


def _mask_of(path: Path) -> Path | None:
    mask = path.with_name(path.stem + MASK_SUFFIX)
    return mask if os.path.lexists(mask) else None


def _check(path: Path, max_pixels: int, masked_only: bool) -> tuple[tuple[int, int], str]:
    """Decode an image and its mask once; the upright size and the digest of the two files."""
    image, mask = _decode(path, max_pixels=max_pixels)
    digest = hashlib.sha256(path.read_bytes())
    if file := _mask_of(path):
        mask = _decode_mask(file, max_pixels)
        if mask.size != image.size:
            raise UserError(
                f"The mask {file} is {mask.size} but its image {image.size} pixels; make them equal or "
                "remove it."
            )
        digest.update(file.read_bytes())
    if masked_only and mask and not mask.getbbox():
        raise nothing_counts(path)
    return image.size, digest.hexdigest()


def nothing_counts(what: object) -> UserError:
    return UserError(
        f"the mask of {what} is black, so nothing of it counts; mend it, or raise --unmasked_weight above 0."
    )


_pil_limit = threading.Lock()


def _open(file: Path | BytesIO) -> Image.Image:
    """Read the header alone, whatever size it states: PIL's own limit would hide the flag that lifts ours."""
    with _pil_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_image(file: Path | BytesIO, max_pixels: float, upright: bool = True) -> Image.Image:
    """The image of an ordinary file or of its bytes, of 8 bits; `TooLarge` before it is decoded, anything
    else if broken."""
    with _open(file if isinstance(file, BytesIO) else ordinary(file)) as image:
        return checked_image(image, max_pixels, upright)


def checked_image(image: Image.Image, max_pixels: float, upright: bool = True) -> Image.Image:
    """The same for an image that is open, but perhaps not decoded yet."""
    width, height = image.size
    if not width * height:
        raise ValueError("it has no pixels")
    if width * height > max_pixels:
        raise TooLarge(f"{width}x{height} pixels")
    return eight_bit(ImageOps.exif_transpose(image) if upright else image.copy())


def _decode(
    path: Path, upright: bool = True, background: str = "white", max_pixels: float = math.inf
) -> Decoded:
    """RGB image composited on `background`, and its alpha channel (L) unless that is fully opaque."""
    try:
        return _to_rgb(read_image(path, max_pixels, upright), background)
    except TooLarge as error:
        raise UserError(
            f"{path} has {error}: shrink it, or raise --max_pixels (now {max_pixels})."
        ) from error
    except (
        Exception
    ) as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise _Unreadable(f"{path} cannot be read as an image ({error}); replace or remove it.") from error


def _decode_mask(path: Path, max_pixels: float = math.inf) -> Image.Image:
    """A mask (L) as it is, upright already."""
    return _decode(path, upright=False, background="black", max_pixels=max_pixels)[0].convert("L")


def eight_bit(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits as gray ones of 8, which PIL would clip them to; they hold [0, 1] or
    0..65535."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.float64) / (1 if image.mode == "F" else 65535)
    return Image.fromarray((np.nan_to_num(levels).clip(0, 1) * 255).round().astype(np.uint8))


def _to_rgb(image: Image.Image, background: str) -> Decoded:
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return flat, None if alpha.getextrema() == (255, 255) else alpha


def read_image_file(file: ImageFile) -> Decoded:
    """The upright RGB image and its mask (L, 255 is the subject) of the same size, or None.

    A mask file is taken as it is (upright already); without one, an alpha channel that is not fully opaque is
    the mask. Transparent parts are white. UserError if a file vanished or changed size since `find_images`.
    """
    image, mask = _decode(file.path)
    if file.mask:
        mask = _decode_mask(file.mask)
    if image.size != file.size or (mask and mask.size != file.size):
        raise UserError(f"{file.path} or its mask changed its size during the run; start again.")
    return image, mask

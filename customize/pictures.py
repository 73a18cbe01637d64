"""Picture files of a subject: finding and checking them, with their captions and masks, and reading them."""

import hashlib
import json
import math
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from customize.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MASK_SUFFIX = ".mask.png"

Decoded = tuple[Image.Image, Image.Image | None]  # picture, mask


@dataclass(frozen=True)
class Picture:
    """A checked picture file; `size` is (width, height) upright, `digest` the sha256 of its and then its mask's bytes."""

    path: Path
    caption: str
    mask: Path | None
    concept: int
    is_prior: bool
    digest: str
    size: tuple[int, int]


class _Unreadable(UserError):
    pass


def find_pictures(
    folder: str | Path,
    prompt: str,
    concept: int = 0,
    is_prior: bool = False,
    strict: bool = False,
    max_pixels: int = 10**8,
    flag: str = "",
) -> list[Picture]:
    """Every picture of `folder`, sorted by path and decoded once as a check.

    A caption is the text of NAME.txt, else of metadata.jsonl (`file_name`, `text`), else `prompt`. An unreadable file is
    skipped with a warning, or a UserError when `strict`. UserError too for a folder that is missing or has no readable
    picture, a picture above `max_pixels`, a mask of another size than its picture, and a picture without a caption; it names
    `flag` as what to correct.
    """
    kind = "class" if is_prior else "instance"
    flag = flag or f"--{kind}_data_dir"
    if not folder or not Path(folder).is_dir():
        raise UserError(f"There is no folder '{folder}'; correct {flag}.")
    folder = Path(folder)
    captions = _read_metadata(folder / "metadata.jsonl")
    paths = {path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")}
    pictures = []
    for path in sorted({path for path in paths if not path.name.lower().endswith(MASK_SUFFIX)} | set(captions)):
        try:
            size, digest = _check(path, max_pixels)
        except _Unreadable as error:
            if strict:
                raise
            warnings.warn(f"{error} It is skipped.", stacklevel=2)
            continue
        sidecar = path.with_suffix(".txt")
        caption = (read_text(sidecar).strip() if sidecar.is_file() else "") or captions.get(path) or prompt
        if not caption:
            raise UserError(f"{path} has no caption; give --{kind}_prompt, or write {sidecar}.")
        pictures.append(Picture(path, caption, _mask_of(path), concept, is_prior, digest, size))
    if not pictures:
        raise UserError(f"{folder} holds no readable picture ({' '.join(sorted(EXTENSIONS))}); correct {flag}.")
    return pictures


def _read_metadata(path: Path) -> dict[Path, str]:
    """Captions by picture of an imagefolder's metadata.jsonl; nothing if there is no such file."""
    captions = {}
    for number, line in enumerate(read_text(path).split("\n") if path.exists() else [], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            picture, text = path.parent / row["file_name"], row["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            example = '{"file_name": "1.png", "text": "a caption"}'
            raise UserError(f"Line {number} of {path} is malformed; write it like {example}.") from error
        if not picture.is_file():
            raise UserError(f"Line {number} of {path} lists {picture}, which does not exist; add it or remove the line.")
        captions[picture] = text
    return captions


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); correct its path or save it so.") from error


def _mask_of(path: Path) -> Path | None:
    mask = path.with_name(path.stem + MASK_SUFFIX)
    return mask if mask.is_file() else None


def _check(path: Path, max_pixels: int) -> tuple[tuple[int, int], str]:
    """Decode a picture and its mask once; the upright size and the digest of the two files."""
    mask = _mask_of(path)
    size = _decode(path, max_pixels=max_pixels)[0].size
    digest = hashlib.sha256(path.read_bytes())
    if mask:
        mask_size = _decode(mask, upright=False, max_pixels=max_pixels)[0].size
        if mask_size != size:
            raise UserError(f"The mask {mask} is {mask_size} but its picture {size} pixels; make them equal or remove it.")
        digest.update(mask.read_bytes())
    return size, digest.hexdigest()


_pil_limit = threading.Lock()


def _open(path: Path) -> Image.Image:
    """Read the header alone, whatever size it states: PIL's own limit would hide the flag that lifts ours."""
    with _pil_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode(path: Path, upright: bool = True, background: str = "white", max_pixels: float = math.inf) -> Decoded:
    """RGB picture composited on `background`, and its alpha channel (L) unless that is fully opaque."""
    try:
        with _open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{path} has {width}x{height} pixels: shrink it, or raise --max_pixels (now {max_pixels}).")
            return _to_rgb(ImageOps.exif_transpose(image) if upright else image, background)
    except UserError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise _Unreadable(f"{path} cannot be read as a picture ({error}); replace or remove it.") from error


def eight_bit(image: Image.Image) -> Image.Image:
    """Pictures of more than 8 bits as gray ones of 8, which PIL would clip them to; they hold [0, 1] or 0..65535."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.float64) / (1 if image.mode == "F" else 65535)
    return Image.fromarray((np.nan_to_num(levels).clip(0, 1) * 255).round().astype(np.uint8))


def _to_rgb(image: Image.Image, background: str) -> Decoded:
    image = eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return flat, None if alpha.getextrema() == (255, 255) else alpha


def read_picture(picture: Picture) -> Decoded:
    """The upright RGB picture and its mask (L, 255 is the subject) of the same size, or None.

    A mask file is taken as it is (upright already); without one, an alpha channel that is not fully opaque is the mask.
    Transparent parts are white. UserError if a file vanished or changed size since `find_pictures`.
    """
    image, mask = _decode(picture.path)
    if picture.mask:
        mask = _decode(picture.mask, upright=False, background="black")[0].convert("L")
    if image.size != picture.size or (mask and mask.size != picture.size):
        raise UserError(f"{picture.path} or its mask changed its size during the run; start again.")
    return image, mask


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG under its name only when it is complete."""
    partial = path.with_name(f".{path.stem}.partial")
    picture.save(partial, format="PNG")
    partial.rename(path)

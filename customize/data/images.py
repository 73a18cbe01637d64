"""Image files of a subject: finding them with their captions and masks, checking and reading them."""

import hashlib
import math
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from customize.data.captions import METADATA, NoCaptionFile, Sidecars, read_metadata
from customize.errors import UserError, shortened
from customize.imaging import TooLarge, flatten, read_image

_KNOWN = Image.registered_extensions()  # of the formats that this Pillow knows
EXTENSIONS = {
    ending
    for ending in (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif"),
        *(".tif", ".tiff", ".jp2", ".tga", ".ppm", ".pgm"),
    )
    if _KNOWN.get(ending) in Image.OPEN
}
FOREIGN = {".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
FOREIGN |= {".mp4", ".mov", ".avif", ".pdf"} - EXTENSIONS  # images, and films of them, that cannot be read
MASK_SUFFIX = ".mask.png"
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini"}
NAMED = 5  # so many files are named in a warning

Decoded = tuple[Image.Image, Image.Image | None]  # image, mask


@dataclass(frozen=True)
class ImageFile:
    """A checked image file; `size` is (width, height) upright, `digest` the sha256 of its and then its
    mask's bytes, `caption` the first of its captions."""

    path: Path
    caption: str
    mask: Path | None
    concept: int
    is_prior: bool
    digest: str
    size: tuple[int, int]
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions; one is drawn each time that the image is shown."""
        return self.caption, *self.more_captions

    @property
    def caption_text(self) -> str:
        """All captions in one text, which differs from any single caption; for digests."""
        return "\0\0".join(self.captions)


class _Unreadable(UserError):
    pass


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

    The captions are the lines of NAME.txt or NAME.caption, else that of metadata.csv or those of
    metadata.jsonl (`file_name`, and `text`, which may be a list), else `prompt`. An image that cannot be
    read, or whose mask or caption file is no file, is skipped with a warning, or a UserError when `strict`.
    A warning also names the files and subfolders that are not used. UserError for a folder that is missing
    or has no readable image, an image above `max_pixels`, a mask of another size than its image, or
    (`masked_only`, where only masks count) a black one, an image without a caption, and a file_name outside
    the folder unless `allow_outside_files`; it names `flag` as what to correct.
    """
    kind = "class" if is_prior else "instance"
    flag = flag or f"--{kind}_data_dir"
    folder, entries = _entries(folder, flag)
    captions, sidecars = read_metadata(folder, allow_outside_files), Sidecars()
    inside = {path for path in entries if is_image_name(path)}
    images, used = [], {folder / name for name in METADATA}
    for path in sorted(inside | set(captions)):
        mask = _mask_of(path)
        used |= {path, *([mask] if mask else []), *sidecars.of(path)}
        try:
            size, digest = _check(path, mask, max_pixels, masked_only)
            own = sidecars.captions(path)
        except (_Unreadable, NoCaptionFile) as error:
            if strict:
                raise
            warnings.warn(f"{error} It is skipped.", stacklevel=2)
            continue
        caption, *others = own or captions.get(path) or (prompt,)
        if not caption:
            raise UserError(
                f"{path} has no caption; give --{kind}_prompt, or write {path.with_suffix('.txt')}."
            )
        images.append(ImageFile(path, caption, mask, concept, is_prior, digest, size, tuple(others)))
    _tell_unused([path for path in entries if path not in used], used, strict)
    if not images:
        endings = " ".join(sorted(EXTENSIONS))
        raise UserError(f"{folder} holds no readable image ({endings}); correct {flag}.")
    return images


def is_image_name(path: Path) -> bool:
    """Whether a file name is that of a readable image and not of a mask."""
    return path.suffix.lower() in EXTENSIONS and not path.name.lower().endswith(MASK_SUFFIX)


def _entries(folder: str | Path, flag: str) -> tuple[Path, list[Path]]:
    """What a folder holds, sorted, without hidden files."""
    if not folder or not os.path.isdir(folder):
        raise UserError(f"There is no folder '{shortened(str(folder))}'; correct {flag}.")
    try:
        entries = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{flag}: the folder '{folder}' cannot be read ({error.strerror}); allow it, or choose another."
        ) from error
    return Path(folder), entries


def _tell_unused(paths: list[Path], used: Collection[Path], strict: bool) -> None:
    """Warns of files and subfolders that are not used; UserError for unreadable image formats if
    `strict`."""
    files = [path for path in paths if not path.is_dir() and path.name.lower() not in LEFT_BY_SYSTEMS]
    foreign = [path for path in files if path.suffix.lower() in FOREIGN]
    if foreign:
        text = f"{_names(foreign)}: this format cannot be read; convert to PNG or JPEG."
        if strict:
            raise UserError(text)
        warnings.warn(f"{text} Skipped.", stacklevel=3)
    if others := [path for path in files if path not in foreign]:
        warnings.warn(f"{_names(others)}: no image, nor the caption or mask of one; not used.", stacklevel=3)
    listed = {path.parent for path in used}
    folders = [path for path in paths if path.is_dir() and path not in listed and _holds_images(path)]
    if folders:
        text = f"{_names(folders)}: images in subfolders are not used; move them up, or name their folder."
        warnings.warn(text, stacklevel=3)


def _names(paths: list[Path]) -> str:
    """The folder of some files, and the first of their names."""
    names = ", ".join(shortened(path.name) for path in paths[:NAMED])
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"In '{paths[0].parent}', {names}{more}"


def _holds_images(folder: Path) -> bool:
    try:
        return any(map(is_image_name, folder.iterdir()))
    except OSError:
        return False


def _mask_of(path: Path) -> Path | None:
    mask = path.with_name(path.stem + MASK_SUFFIX)
    return mask if os.path.lexists(mask) else None


def _check(
    path: Path, mask_file: Path | None, max_pixels: int, masked_only: bool
) -> tuple[tuple[int, int], str]:
    """Decodes an image and its mask once; the upright size and the digest of the two files."""
    image, mask = _decode(path, max_pixels=max_pixels)
    digest = hashlib.sha256(path.read_bytes())
    if mask_file:
        mask = _decode_mask(mask_file, max_pixels)
        if mask.size != image.size:
            raise UserError(
                f"The mask {mask_file} is {mask.size} but its image {image.size} pixels; make them equal or "
                "remove it."
            )
        digest.update(mask_file.read_bytes())
    if masked_only and mask and not mask.getbbox():
        raise nothing_counts(path)
    return image.size, digest.hexdigest()


def nothing_counts(what: object) -> UserError:
    """For a mask that leaves nothing of an image to learn from."""
    return UserError(
        f"the mask of {what} is black, so nothing of it counts; mend it, or raise --unmasked_weight above 0."
    )


def _decode(
    path: Path, upright: bool = True, background: str = "white", max_pixels: float = math.inf
) -> Decoded:
    """RGB image composited on `background`, and its alpha channel (L) unless that is fully opaque."""
    try:
        image = read_image(path, max_pixels, upright)
        return flatten(image, background), _alpha(image)
    except TooLarge as error:
        raise UserError(
            f"{path} has {error}: shrink it, or raise --max_pixels (now {max_pixels})."
        ) from error
    except Exception as error:  # PIL's decoders raise all kinds for broken files
        raise _Unreadable(f"{path} cannot be read as an image ({error}); replace or remove it.") from error


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _decode_mask(path: Path, max_pixels: float = math.inf) -> Image.Image:
    """A mask (L) as it is, upright already."""
    return _decode(path, upright=False, background="black", max_pixels=max_pixels)[0].convert("L")


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

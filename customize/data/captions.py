"""Captions of a folder of images: text files beside the images, and metadata files that list them."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from customize.errors import UserError, shortened
from customize.reading import parsed_json, read_text

SIDECARS = {".txt", ".caption"}  # endings of caption files, in any case: NAME.txt and NAME.jpg.txt
METADATA = ("metadata.jsonl", "metadata.csv")
KEYS = ("text", "caption", "prompt")  # what a metadata row may call its caption
EXAMPLES = {
    "metadata.jsonl": '{"file_name": "1.png", "text": "a caption"}',
    "metadata.csv": "file_name,text in the first line and 1.png,a caption in each further one",
}


class NoCaptionFile(UserError):
    """A path with the name of a caption file that is not an ordinary file."""


class Sidecars:
    """The caption files beside images; every folder is listed once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[Path]]] = {}

    def of(self, image: Path) -> list[Path]:
        """The caption files of an image: NAME.txt, NAME.caption, NAME.png.txt, NAME.png.caption."""
        if image.parent not in self._folders:
            listed: dict[str, list[Path]] = self._folders.setdefault(image.parent, {})
            for path in sorted(image.parent.iterdir()):
                if path.suffix.lower() in SIDECARS:
                    listed.setdefault(path.stem, []).append(path)
        found = self._folders[image.parent]
        return [*found.get(image.stem, ()), *found.get(image.name, ())]

    def captions(self, image: Path) -> tuple[str, ...]:
        """The captions of an image, one for each line of its caption files that is not empty; none if there
        is no such file.

        UserError if two files differ, or one is not text; `NoCaptionFile` if one is no ordinary file.
        """
        captions: dict[tuple[str, ...], Path] = {}
        for path in self.of(image):
            if not path.is_file():
                raise NoCaptionFile(f"{path} is no ordinary file; replace or remove it.")
            captions[_filled(read_text(path).split("\n"))] = path
        if len(captions) > 1:
            first, second = [path.name for path in captions.values()][:2]
            raise UserError(f"{image} has two captions that differ, {first} and {second}; keep one.")
        return next(iter(captions), ())


def one_of(captions: Sequence[str], rng: np.random.Generator) -> str:
    """A caption at random; where there is only one, nothing is drawn from `rng`."""
    return captions[0 if len(captions) == 1 else int(rng.integers(len(captions)))]


def read_metadata(folder: Path, allow_outside_files: bool) -> dict[Path, tuple[str, ...]]:
    """Captions by image, from the folder's metadata.jsonl or metadata.csv; nothing if there is neither. In
    metadata.jsonl, an image may have a list of them.

    UserError for a row that is malformed, that names a file twice, outside the folder (unless
    `allow_outside_files`) or one that does not exist, and if both files are there.
    """
    present = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(present) > 1:
        raise UserError(f"{folder} holds metadata.jsonl and metadata.csv; remove one of the two.")
    captions: dict[Path, tuple[str, ...]] = {}
    for number, row in (pair for path in present for pair in _rows(path)):
        where = f"Line {number} of {present[0]}"
        try:
            name = os.path.normpath(row["file_name"])
            texts = next(row[key] for key in KEYS if key in row)
            own = _filled(texts if isinstance(texts, list) else [texts])
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise _malformed(where, present[0]) from error
        image = _listed(folder, name, where, allow_outside_files)
        if image in captions:
            raise UserError(f"{where} lists {shortened(name)} again; remove one of the two lines.")
        captions[image] = own
    return captions


def _filled(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts without the space around them, and without empty ones."""
    return tuple(text.strip() for text in texts if text.strip())


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a metadata file, each with the number of its line."""
    text = read_text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        try:
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if value is not None}
        except csv.Error as error:
            raise _malformed(f"Line {reader.line_num} of {path}", path) from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parsed_json(line)
            except ValueError as error:
                raise _malformed(f"Line {number} of {path}", path) from error


def _malformed(where: str, path: Path) -> UserError:
    return UserError(f"{where} is malformed; write it like {EXAMPLES[path.name]}.")


def _listed(folder: Path, name: str, where: str, allow_outside_files: bool) -> Path:
    """The file of a metadata row. Only the path as written is checked, as snapshots of the hub consist of
    links."""
    if (os.path.isabs(name) or Path(name).parts[:1] == ("..",)) and not allow_outside_files:
        raise UserError(
            f"{where} names a file outside its folder; move it inside, or allow it with "
            "--allow_outside_files."
        )
    if not os.path.lexists(folder / name):
        raise UserError(f"{where} lists {shortened(name)}, which does not exist; add it or remove the line.")
    return folder / name

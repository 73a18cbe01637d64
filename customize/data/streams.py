"""Training data for encoders from the rows of a Hugging Face dataset."""

import itertools
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from customize.data.captions import one_of
from customize.data.references import Pixels, ReferenceConfig, View, drawn, item, named
from customize.errors import UserError, first_line, shortened
from customize.imaging import TooLarge, read_image
from customize.reading import inside

Row = tuple[Any, Any, Any]  # image and mask, undecoded, and caption


FORMATS = {
    "imagefolder",
    "parquet",
    "webdataset",
    "arrow",
    "json",
    "csv",
}  # whose --data_files lie on this machine


WILD = set("*?[{")


MISSED = 100  # subjects that cannot be read, one after another, end a run


class Streamed(IterableDataset):
    """Endless items from the rows of a Hugging Face dataset. Process `rank` of `world` takes every
    `world`-th subject; rows cannot be distributed, as the views of a subject must stay together. Images
    are decoded when they are used."""

    def __init__(
        self, config: ReferenceConfig, rows, pixels: Pixels, seed: int, rank: int = 0, world: int = 1
    ):
        self.config, self.rows, self.pixels, self.seed, self.rank, self.world = (
            config,
            rows,
            pixels,
            seed,
            rank,
            world,
        )
        self.skip = 0

    def after(self, items: int) -> "Streamed":
        """Starts after `items` subjects, whose rows are read and passed over."""
        self.skip = items
        return self

    def __iter__(self) -> Iterator[dict]:
        missed = 0  # one after another
        for name, views, rng in itertools.islice(self.subjects(), self.skip, None):
            try:
                yield self.item(name, views, rng)
                missed = 0
            except Unreadable as error:
                missed += 1
                if missed == MISSED:
                    raise
                self.pass_over(error)

    def item(self, name: str, views: Sequence[Row], rng: np.random.Generator) -> dict:
        target, *references = (self.view(name, *views[i], rng) for i in drawn(rng, len(views)))
        number, twice = zlib.crc32(name.encode()), len(views) < 3
        try:
            prompt = named(target.caption or self.config.instance_prompt.replace("{}", name))
            return item(
                target, [references], prompt, number, rng, self.config, self.pixels, shows_target=twice
            )
        except UserError as error:
            raise Unreadable(f"--dataset_name: of subject '{shortened(name)}', {error}") from error

    def view(self, name: str, image: Any, mask: Any, caption: Any, rng: np.random.Generator) -> View:
        """One image with one of its captions."""
        shown = decoded(image, name, self.config)
        cut = None if mask is None else decoded(mask, name, self.config).convert("L").resize(shown.size)
        captions = [text or "" for text in caption] if isinstance(caption, list) else [caption or ""]
        if not all(isinstance(text, str) for text in captions):
            raise Unreadable(
                f"--caption_column: subject '{shortened(name)}' has {shortened(repr(caption))}, which is "
                "no text."
            )
        return View(shown, cut, one_of([text for text in captions if text] or [""], rng))

    def subjects(self) -> Iterator[tuple[str, Sequence[Row], np.random.Generator]]:
        """This process's subjects in their order, epoch after epoch, each with a generator of its own."""
        for epoch in itertools.count():
            order, found = np.random.default_rng([self.seed, self.rank, epoch]), False
            own = itertools.islice(self.listed(), self.rank, None, self.world)
            for i, (name, views) in enumerate(shuffled(own, self.config.shuffle_buffer, order)):
                found = True
                yield name, views, np.random.default_rng([self.seed, self.rank, epoch, i])
            if not found:
                raise UserError(
                    "--dataset_name: no subject with two or more views was found in this dataset's rows."
                )

    def listed(self) -> Iterator[tuple[str, Sequence[Row]]]:
        """Each subject's name and views: a row's list of images, or the rows that follow each other
        with one name."""
        config = self.config
        if config.subject_column:
            called = called_by(self.rows, config.subject_column)
            for name, rows in itertools.groupby(self.read(), key=lambda row: row[config.subject_column]):
                yield called(name), [self.parts(row) for row in rows]
            return
        for i, row in enumerate(self.read()):
            images, masks, captions = self.parts(row)
            if not isinstance(images or [], list):
                self.pass_over(
                    Unreadable(
                        f"--image_column: subject '{i}' has {type(images).__name__}, no list of images."
                    )
                )
                continue
            images = images or []
            masks = (masks if isinstance(masks, list) else [masks]) if masks else [None] * len(images)
            captions = captions if isinstance(captions, list) else [captions] * len(images)
            if len(images) == len(masks) == len(captions):
                yield str(i), list(zip(images, masks, captions, strict=True))
                continue
            counted = f"{len(images)} images, {len(masks)} masks and {len(captions)} captions"
            self.pass_over(Unreadable(f"--dataset_name: subject '{i}' has {counted}."))

    def read(self) -> Iterator[dict]:
        """The rows; UserError where a file of the dataset turns out to be broken, or cannot be reached
        any more."""
        try:
            yield from self.rows
        except Exception as error:  # as in `read_rows`
            raise not_read(self.config, error) from error

    def pass_over(self, error: "Unreadable") -> None:
        if self.config.strict:
            raise error
        warnings.warn(f"{error} It is skipped.", stacklevel=2)

    def parts(self, row: dict) -> Row:
        """A row's image, mask and caption, or lists of them."""
        config = self.config
        return row[config.image_column], row.get(config.mask_column), row.get(config.caption_column)


class Unreadable(UserError):
    pass


def decoded(image: Any, name: str, config: ReferenceConfig) -> Image.Image:
    """The upright image of an undecoded row; `Unreadable` if it is none, too large, or a file outside the
    dataset. The datasets library is not used for this, as it would fetch any address that a row names."""
    which = f"--dataset_name: an image of subject '{shortened(name)}'"
    try:
        return read_image(source_of(image, config), config.max_pixels)
    except TooLarge as error:
        raise Unreadable(
            f"{which} has more pixels than --max_pixels {config.max_pixels} ({error})."
        ) from error
    except Exception as error:  # PIL's decoders raise all kinds
        raise Unreadable(f"{which} cannot be read ({error}).") from error


def source_of(image: Any, config: ReferenceConfig) -> BytesIO | Path:
    """An image's bytes, or the dataset's own file of it; ValueError if it has neither."""
    if not isinstance(image, dict):
        raise ValueError(f"it is {type(image).__name__}, not a dictionary with bytes or path")
    content, path = image.get("bytes"), image.get("path")
    if isinstance(content, bytes):
        return BytesIO(content)
    if not isinstance(path, str):
        raise ValueError("it has neither bytes nor a path")
    if "://" in path:
        where = f"the address '{shortened(path)}' is never fetched"
        raise ValueError(
            f"{where}: download the dataset and name its folder, or store the images in its rows"
        )
    if not config.allow_outside_files and not inside(os.path.abspath(path), own_folders(config)):
        outside = f"'{shortened(path)}' lies outside the dataset's folder"
        raise ValueError(f"{outside}: move it inside, or allow it with --allow_outside_files")
    return Path(path)


def own_folders(config: ReferenceConfig) -> list[str]:
    """The folders of a dataset on this machine, as named and with links resolved; none for a dataset of
    the hub."""
    found = [config.dataset_name] if os.path.isdir(config.dataset_name) else []
    if config.dataset_name in FORMATS and config.data_files and "://" not in config.data_files:
        above = Path(config.data_files).parts[:-1]
        found.append(os.path.join(".", *itertools.takewhile(lambda part: not WILD & set(part), above)))
    return [place(folder) for folder in found for place in (os.path.abspath, os.path.realpath)]


def called_by(rows: Any, subject: str) -> Callable[[Any], str]:
    """A function from values of the subject column to names; the labels of an imagefolder are the names
    of its folders."""
    label = (getattr(rows, "features", None) or {}).get(subject)
    names = getattr(label, "names", None) or []
    return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)


def shuffled(subjects: Iterable, size: int, rng: np.random.Generator) -> Iterator:
    """The subjects with two or more views, shuffled in a buffer of `size`."""
    buffer: list = []
    for subject in subjects:
        if len(subject[1]) < 2:
            continue
        buffer.append(subject)
        if len(buffer) > size:
            yield buffer.pop(int(rng.integers(len(buffer))))
    for i in rng.permutation(len(buffer)) if size else range(len(buffer)):
        yield buffer[i]


def read_rows(config: ReferenceConfig) -> Any:
    """The rows of `dataset_name`; UserError where the library, the dataset or a column is missing."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise UserError(
            "--dataset_name needs the datasets library: pip install 'customize[datasets]'."
        ) from None
    options = {"data_files": config.data_files} if config.data_files else {}
    try:
        rows = load_dataset(
            config.dataset_name,
            config.dataset_config_name or None,
            split="train",
            streaming=config.streaming,
            **options,
        )
        rows = (rows if config.streaming else rows.to_iterable_dataset()).decode(False)
        first_row = next(iter(rows), None)
    # the library raises errors of its own, of the hub's and of the file formats
    except Exception as error:
        raise not_read(config, error) from error
    if first_row is None:
        raise UserError(f"--dataset_name '{config.dataset_name}' has no rows.")
    columns = rows.column_names or list(first_row)
    for flag in ("image_column", "mask_column", "caption_column", "subject_column"):
        name = getattr(config, flag)
        if (
            name
            and name not in columns
            and (flag, name) != ("caption_column", ReferenceConfig.caption_column)
        ):
            raise UserError(f"--{flag}: the dataset has no column '{name}', only {', '.join(columns)}.")
    if not config.subject_column and not isinstance(first_row[config.image_column], list):
        raise UserError(
            "--subject_column: name the column that says which subject a row shows, or give lists of images."
        )
    return rows


def not_read(config: ReferenceConfig, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(
        f"--dataset_name '{config.dataset_name}' could not be read ({reason}); correct it or mend its files."
    )


def split_rows(rows: Any, subject: str, count: int) -> tuple[list[dict], Any]:
    """The rows of the first `count` subjects, and the others."""
    taken: list[dict] = []
    names: list = []
    called = called_by(rows, subject)
    for i, row in enumerate(rows) if count else ():
        name = row[subject] if subject else i
        if name not in names[-1:]:
            if len(names) == count:
                break
            names.append(name)
        taken.append(row | {subject: called(name)} if subject else row)
    return taken, rows.skip(len(taken)) if taken else rows


def first_epoch(items: Iterable[dict]) -> list[dict]:
    """The items before the first subject comes again."""
    found: dict[int, dict] = {}
    for entry in items:
        if entry["identity"] in found:
            break
        found[entry["identity"]] = entry
    return list(found.values())

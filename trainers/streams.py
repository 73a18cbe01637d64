"""The rows of a Hugging Face dataset as a source that encoders learn from."""

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from customize.errors import UserError
from customize.pictures import eight_bit
from customize.trainers.references import Pixels, ReferenceConfig, View, drawn, item, named

Row = tuple[Any, Any, Any]  # picture and mask, undecoded, and caption
MISSED = 100  # subjects that cannot be read, one after another, end a run


class Streamed(IterableDataset):
    """Rows of a Hugging Face dataset, endless. Process `rank` of `world` takes each `world`-th subject: rows or files could not
    be shared out, as the views of a subject must stay together. Pictures are decoded when they are shown, not before."""

    def __init__(self, config: ReferenceConfig, rows, pixels: Pixels, seed: int, rank: int = 0, world: int = 1):
        self.config, self.rows, self.pixels, self.seed, self.rank, self.world = config, rows, pixels, seed, rank, world
        self.skip = 0

    def after(self, items: int) -> "Streamed":
        """Begins after so many subjects, whose rows are read and passed over: one item each, if none of them was skipped."""
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
        target, *references = (self.view(name, *views[i]) for i in drawn(rng, len(views)))
        try:
            prompt = named(target.caption or self.config.instance_prompt.replace("{}", name))
        except UserError as error:
            raise Unreadable(f"--dataset_name: of subject '{name}', {error}") from error
        number, twice = zlib.crc32(name.encode()), len(views) < 3
        return item(target, [references], prompt, number, rng, self.config, self.pixels, shows_target=twice)

    def view(self, name: str, picture: Any, mask: Any, caption: str | None) -> View:
        shown = decoded(picture, name, self.config.max_pixels)
        cut = None if mask is None else decoded(mask, name, self.config.max_pixels).convert("L").resize(shown.size)
        if not isinstance(caption or "", str):
            raise Unreadable(f"--caption_column: subject '{name}' has {caption!r}, which is no text.")
        return View(shown, cut, caption or "")

    def subjects(self) -> Iterator[tuple[str, Sequence[Row], np.random.Generator]]:
        """This process's subjects in their order, epoch after epoch, each with a generator of its own."""
        for epoch in itertools.count():
            order, found = np.random.default_rng([self.seed, self.rank, epoch]), False
            own = itertools.islice(self.listed(), self.rank, None, self.world)
            for i, (name, views) in enumerate(shuffled(own, self.config.shuffle_buffer, order)):
                found = True
                yield name, views, np.random.default_rng([self.seed, self.rank, epoch, i])
            if not found:
                raise UserError("--dataset_name: no subject with two or more views was found in this dataset's rows.")

    def listed(self) -> Iterator[tuple[str, Sequence[Row]]]:
        """Each subject's name and views: a row's list of pictures, or the rows that follow each other with one name."""
        config = self.config
        if config.subject_column:
            called = called_by(self.rows, config.subject_column)
            for name, rows in itertools.groupby(self.rows, key=lambda row: row[config.subject_column]):
                yield called(name), [self.parts(row) for row in rows]
            return
        for i, row in enumerate(self.rows):
            pictures, masks, captions = self.parts(row)
            pictures = pictures or []
            masks = masks or [None] * len(pictures)
            captions = captions if isinstance(captions, list) else [captions] * len(pictures)
            if len(pictures) == len(masks) == len(captions):
                yield str(i), list(zip(pictures, masks, captions, strict=True))
                continue
            counted = f"{len(pictures)} pictures, {len(masks)} masks and {len(captions)} captions"
            self.pass_over(Unreadable(f"--dataset_name: subject '{i}' has {counted}."))

    def pass_over(self, error: "Unreadable") -> None:
        if self.config.strict:
            raise error
        warnings.warn(f"{error} It is skipped.", stacklevel=2)

    def parts(self, row: dict) -> Row:
        """A row's picture, mask and caption, or lists of them."""
        config = self.config
        return row[config.image_column], row.get(config.mask_column), row.get(config.caption_column)


class Unreadable(UserError):
    pass


def decoded(picture: Any, name: str, max_pixels: int) -> Image.Image:
    """The upright picture of a row's undecoded one; `Unreadable` if it is none, or too large."""
    from datasets import Image as ImageFeature

    try:
        found = ImageFeature().decode_example(picture)
        width, height = found.size
    except Exception as error:  # PIL's decoders raise all kinds, and so do the library's readers of remote files
        raise Unreadable(f"--dataset_name: a picture of subject '{name}' cannot be read ({error}).") from error
    if width * height > max_pixels:
        raise Unreadable(f"--dataset_name: a picture of subject '{name}' has more pixels than --max_pixels {max_pixels}.")
    return eight_bit(found)


def called_by(rows, subject: str) -> Callable[[Any], str]:
    """What the values of the subject column stand for: an imagefolder's labels are the names of its folders."""
    label = (getattr(rows, "features", None) or {}).get(subject)
    return getattr(label, "int2str", str)


def shuffled(subjects: Iterable, size: int, rng: np.random.Generator) -> Iterator:
    """Those with two or more views, shuffled in a buffer of `size`."""
    buffer: list = []
    for subject in subjects:
        if len(subject[1]) < 2:
            continue
        buffer.append(subject)
        if len(buffer) > size:
            yield buffer.pop(int(rng.integers(len(buffer))))
    for i in rng.permutation(len(buffer)) if size else range(len(buffer)):
        yield buffer[i]


def read_rows(config: ReferenceConfig):
    """The rows of `dataset_name`; UserError where the library, the dataset or a column is missing."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise UserError("--dataset_name needs the datasets library: pip install 'customize[datasets]'.") from None
    options = {"data_files": config.data_files} if config.data_files else {}
    try:
        rows = load_dataset(
            config.dataset_name, config.dataset_config_name or None, split="train", streaming=config.streaming, **options
        )
    except Exception as error:  # the library raises errors of its own, of the hub's and of the file formats
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--dataset_name '{config.dataset_name}' could not be read ({reason}).") from error
    rows = (rows if config.streaming else rows.to_iterable_dataset()).decode(False)
    first_row = next(iter(rows), None)
    if first_row is None:
        raise UserError(f"--dataset_name '{config.dataset_name}' has no rows.")
    columns = rows.column_names or list(first_row)
    for flag in ("image_column", "mask_column", "caption_column", "subject_column"):
        name = getattr(config, flag)
        if name and name not in columns and (flag, name) != ("caption_column", ReferenceConfig.caption_column):
            raise UserError(f"--{flag}: the dataset has no column '{name}', only {', '.join(columns)}.")
    if not config.subject_column and not isinstance(first_row[config.image_column], list):
        raise UserError("--subject_column: name the column that says which subject a row shows, or give lists of pictures.")
    return rows


def split_rows(rows, subject: str, count: int) -> tuple[list[dict], Any]:
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

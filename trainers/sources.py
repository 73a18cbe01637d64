"""The three sources that encoders learn from: rendered sticker scenes, a folder of folders, a Hugging Face dataset."""

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from customize.errors import UserError
from customize.pictures import Picture, find_pictures, read_picture
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, draw_scene
from customize.stickers.bench import bench_subjects
from customize.stickers.scene import PREFIXES, caption, draw_factors, draw_pose
from customize.subject import WORDS
from customize.trainers.references import (
    Pixels,
    ReferenceConfig,
    References,
    View,
    drawn,
    held_out_batches,
    item,
    named,
)

Row = tuple[Any, Any, Any]  # picture and mask, undecoded, and caption
MISSED = 100  # subjects that cannot be read, one after another, end a run


class Rendered(References):
    """Sticker scenes, endless: item i is the same at every run with one seed. Held-out drawings are never among them, except
    for `validation`, which draws on those that no benchmark uses."""

    def __init__(self, config: ReferenceConfig, pixels: Pixels, seed: int, validation: bool = False):
        self.config, self.pixels, self.seed = config, pixels, (seed, int(validation))
        self.world = World(Path(config.world)) if config.world else World()
        self.pool = self.world.drawings()
        self.core = self.world.drawings(core=True)
        if validation:
            self.pool = self.core = [d for d in self.world.drawings(held_out=True) if d not in bench_subjects()]
        self.number = {drawing: i for i, drawing in enumerate(self.pool)}

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng([*self.seed, position])
        pool = self.core if rng.random() < 0.5 else self.pool
        drawing = pool[rng.integers(len(pool))]
        target = draw_factors(rng, self.world, [drawing], extras=0.25)
        second = rng.random() < self.config.second_subject_rate
        if second or target.companion is not None:  # drawn from the subject alone so far, which is no companion
            other = drawing
            while other == drawing:
                other = self.core[rng.integers(len(self.core))]
            target = replace(target, companion=other, count=1)
        subjects = [drawing, other] if second else [drawing]
        nouns = [
            f"{word} {'sticker' if rng.random() < self.config.noun_dropout else subject.word}"
            for word, subject in zip(WORDS, subjects, strict=False)
        ]
        prefix = PREFIXES[rng.integers(len(PREFIXES))]
        options = {"style": rng.random() < 0.5, "setting": rng.random() < 0.92}
        prompt = caption(target, nouns[0], prefix, companion=nouns[1] if second else None, **options)
        views = [[self.view(subject, rng) for _ in range(2)] for subject in subjects]
        shown = View(*draw_scene(target, self.world, mask_companion=second))
        told = second and rng.random() < self.config.region_rate
        regions = halves(draw_scene(target, self.world)[1], self.config.resolution) if told else None
        return item(shown, views, prompt, self.number[drawing], rng, self.config, self.pixels, regions)

    def view(self, drawing: Drawing, rng: np.random.Generator) -> View:
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        scene = Scene(drawing, background, pose=draw_pose(rng), seed=int(rng.integers(2**31)))
        return View(*draw_scene(scene, self.world))


def halves(mask: Image.Image, side: int) -> torch.Tensor:
    """Regions (2, side, side) of two subjects: the half in which most of the first one's mask lies, and the other."""
    columns = np.asarray(mask, np.float32).sum(0)
    middle = len(columns) // 2
    left = torch.arange(side) < side / 2
    first = left if columns[:middle].sum() > columns[middle:].sum() else ~left
    return torch.stack([first, ~first]).float()[:, None].repeat(1, side, 1)


class Folders(References):
    """A folder of pictures for each subject; an epoch shows every subject once, in an order that the seed decides."""

    def __init__(self, config: ReferenceConfig, subjects: Sequence[tuple[str, Sequence[Picture]]], pixels: Pixels, seed: int):
        self.config, self.subjects, self.pixels, self.seed = config, subjects, pixels, seed

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.subjects))
        index = int(np.random.default_rng([self.seed, epoch]).permutation(len(self.subjects))[place])
        rng = np.random.default_rng([self.seed, epoch, place])
        _, pictures = self.subjects[index]
        target, *references = (pictures[i] for i in drawn(rng, len(pictures)))
        views = [View(*read_picture(picture)) for picture in references]
        prompt = named(target.caption)
        target_view, twice = View(*read_picture(target)), len(pictures) < 3
        return item(target_view, [views], prompt, index, rng, self.config, self.pixels, shows_target=twice)


def read_folders(config: ReferenceConfig) -> list[tuple[str, list[Picture]]]:
    """Subjects by name with their pictures; UserError for a folder without subjects, or a subject with one picture only."""
    root = Path(config.train_data_dir)
    if not root.is_dir():
        raise UserError(f"There is no folder '{root}'; correct --train_data_dir.")
    subjects: list[tuple[str, list[Picture]]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        prompt = config.instance_prompt.replace("{}", folder.name)
        pictures = find_pictures(folder, prompt, len(subjects), False, config.strict, config.max_pixels)
        if len(pictures) < 2:
            raise UserError(f"'{folder}' holds one picture: an encoder learns from two or more views of every subject.")
        for picture in pictures:
            named(picture.caption)
        subjects.append((folder.name, pictures))
    if not subjects:
        raise UserError(f"--train_data_dir '{root}' must hold a folder of pictures for each subject.")
    return subjects


class Streamed(IterableDataset):
    """Rows of a Hugging Face dataset, endless. Process `rank` of `world` takes each `world`-th subject: rows or files could not
    be shared out, as the views of a subject must stay together. Pictures are decoded when they are shown, not before."""

    def __init__(self, config: ReferenceConfig, rows, pixels: Pixels, seed: int, rank: int = 0, world: int = 1):
        self.config, self.rows, self.pixels, self.seed, self.rank, self.world = config, rows, pixels, seed, rank, world
        self.skip = 0

    def after(self, items: int) -> "Streamed":
        """Begins after so many items, whose rows are read and passed over."""
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
                if self.config.strict or missed == MISSED:
                    raise
                warnings.warn(f"{error} It is skipped.", stacklevel=2)

    def item(self, name: str, views: Sequence[Row], rng: np.random.Generator) -> dict:
        target, *references = (self.view(name, *views[i]) for i in drawn(rng, len(views)))
        prompt = named(target.caption or self.config.instance_prompt.replace("{}", name))
        number, twice = zlib.crc32(name.encode()), len(views) < 3
        return item(target, [references], prompt, number, rng, self.config, self.pixels, shows_target=twice)

    def view(self, name: str, picture: Any, mask: Any, caption: str | None) -> View:
        shown = decoded(picture, name, self.config.max_pixels)
        cut = None if mask is None else decoded(mask, name, self.config.max_pixels).convert("L").resize(shown.size)
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
            masks = masks or [None] * len(pictures)
            captions = captions if isinstance(captions, list) else [captions] * len(pictures)
            yield str(i), list(zip(pictures, masks, captions, strict=True))

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
    return found


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
    for flag in ("image_column", "mask_column", "subject_column"):
        if (name := getattr(config, flag)) and name not in columns:
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


def read_references(model, config: ReferenceConfig, settings, pixels: Pixels, accelerator) -> tuple[Dataset, list[dict]]:
    """The training set, and batches of `holdout` subjects that it does not show, if any are held out.

    UserError if no source is named on a base model other than stickers, or two are, or one subject alone is held out.
    """
    if config.train_data_dir and config.dataset_name:
        raise UserError("Name the subjects with --train_data_dir or with --dataset_name, not with both.")
    seed, count = settings.seed, config.holdout
    if count == 1:
        raise UserError("--holdout 1 leaves nothing to compare the subject with: hold out 2 or more, or 0.")
    held_out = partial(held_out_batches, size=settings.train_batch_size, device=accelerator.device)
    if config.train_data_dir:
        subjects = read_folders(config)
        if not 0 <= count < len(subjects):
            raise UserError(f"--holdout {count} leaves no subject for training; there are {len(subjects)}.")
        kept = np.random.default_rng(seed).permutation(len(subjects)).tolist()
        held, train = (Folders(config, [subjects[i] for i in part], pixels, seed) for part in (kept[:count], kept[count:]))
        return train, held_out(held, count)
    if config.dataset_name:
        held_rows, rows = split_rows(read_rows(config), config.subject_column, count)
        kept_rows = list(itertools.islice(Streamed(config, held_rows, pixels, seed), count)) if count else []
        streamed = Streamed(config, rows, pixels, seed, accelerator.process_index, accelerator.num_processes)
        return streamed, held_out(kept_rows, len(kept_rows))
    if model.pretrained_model_name_or_path != "stickers":
        raise UserError("Name the subjects to learn from: --train_data_dir (a folder for each) or --dataset_name.")
    return Rendered(config, pixels, seed), held_out(Rendered(config, pixels, seed, validation=True), count)

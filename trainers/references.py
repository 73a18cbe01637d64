"""What encoders learn from: many subjects, of each two reference views and one target picture with its caption.

Three sources: rendered sticker scenes (embedded), a folder of folders, and any Hugging Face `datasets` source. Items hold
`pixels` (3, H, W) in [-1, 1], the target; `references` (subjects, 2, 3, h, w), normalised for the image tower, the second of
each subject always cut out on white where a mask is known; `prompt`, with each subject's word before its noun; and
`identity`, the first subject's number. Only rendered scenes have a second subject (`second_subject_rate`).
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, Sampler

from customize.config import option
from customize.data import fit, mask_weight, to_device, to_tensor
from customize.encoders.tower import opaque
from customize.errors import UserError
from customize.pictures import Picture, find_pictures, read_picture
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, draw_scene
from customize.stickers.bench import bench_subjects
from customize.stickers.scene import PREFIXES, caption, draw_factors, draw_pose
from customize.subject import WORDS

Pixels = Callable[[Sequence[Image.Image]], torch.Tensor]
WORD = WORDS[0]


@dataclass
class ReferenceConfig:
    """Which subjects are learned from."""

    train_data_dir: str = option(
        "", "folder with one folder of pictures for each subject (NAME.txt: caption with <s>, NAME.mask.png: mask)"
    )
    dataset_name: str = option("", "a Hugging Face dataset: hub id, or imagefolder, parquet or webdataset with --data_files")
    dataset_config_name: str = option("", "configuration of that dataset")
    data_files: str = option("", "files of that dataset, a path or pattern")
    image_column: str = option("image", "column of pictures: a list of views in each row, or one view with --subject_column")
    caption_column: str = option("text", "column of captions")
    subject_column: str = option("", "column that names the subject; rows of one subject must follow each other")
    streaming: bool = option(True, "read the dataset while training, without downloading it whole")
    shuffle_buffer: int = option(1000, "subjects among which a stream is shuffled; 0: in their order")
    instance_prompt: str = option("a photo of <s>", "caption of pictures that have none; {} is the subject's name")
    resolution: int = option(0, "side of the target pictures in pixels; 0: what the model was trained at")
    holdout: int = option(0, "subjects kept from training for the validation loss and the diagnostics")
    segment_rate: float = option(0.5, "share of first references that are cut out on white, as far as masks are known")
    unmasked_weight: float = option(0.5, "loss weight of what lies outside the target's mask, 0 to 1, where one is known")
    augment: bool = option(False, "turn, shift, scale and mirror references on white (rendered scenes vary by themselves)")
    noun_dropout: float = option(0.5, "stickers: share of captions that do not name the class, so that pictures must tell")
    second_subject_rate: float = option(0.0, "stickers: share of scenes with a second subject, <s2>, and references of it")
    world: str = option("", "stickers: an atlas folder of the whole world; empty: the drawings that ship")
    max_pixels: int = option(100_000_000, "pictures with more pixels are refused")
    strict: bool = option(False, "stop at an unreadable picture instead of skipping it with a warning")
    dataloader_num_workers: int = option(0, "processes that load pictures (a stream: 1 at most); 0 loads in the main process")


@dataclass(frozen=True)
class View:
    """One picture of a subject."""

    picture: Image.Image
    mask: Image.Image | None = None
    caption: str = ""

    @property
    def cut_out(self) -> Image.Image:
        """The subject alone on white, if its mask is known."""
        picture = opaque(self.picture)
        if self.mask is None:
            return picture
        return Image.composite(picture, Image.new("RGB", picture.size, "white"), self.mask)


def item(
    target: View, subjects: Sequence[Sequence[View]], prompt: str, identity: int, rng, config: ReferenceConfig, pixels: Pixels
) -> dict:
    """`subjects` holds two views of each."""
    shown = []
    for first, second in subjects:
        shown += [first.cut_out if rng.random() < config.segment_rate else opaque(first.picture), second.cut_out]
    if config.augment:
        shown = [moved(picture, rng) for picture in shown]
    side = config.resolution, config.resolution
    picture = to_tensor(fit(opaque(target.picture), *side)) * 2 - 1
    weight = torch.ones(1, *side) if target.mask is None else mask_weight(target.mask, *side, config.unmasked_weight)
    references = pixels(shown).unflatten(0, (-1, 2))
    return {"pixels": picture, "mask": weight, "references": references, "prompt": prompt, "identity": identity}


def moved(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by up to 15 degrees, scaled, shifted and perhaps mirrored, on white."""
    side = max(picture.size)
    square = ImageOps.pad(picture, (side, side), color="white")
    square = ImageOps.mirror(square) if rng.random() < 0.5 else square
    scale, (x, y) = rng.uniform(0.7, 1.1), rng.uniform(-0.1, 0.1, 2) * side
    angle = np.deg2rad(rng.uniform(-15, 15))
    a, b = np.cos(angle) / scale, np.sin(angle) / scale
    half = side / 2
    matrix = (a, b, half - a * (half + x) - b * (half + y), -b, a, half + b * (half + x) - a * (half + y))
    return square.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white")


def named(prompt: str) -> str:
    """The caption with the subject's word; UserError if it stands nowhere."""
    if WORD not in prompt:
        raise UserError(
            f"the caption '{prompt}' does not say {WORD}: write it before the subject's noun, as in 'a {WORD} dog'."
        )
    return prompt


class References(Dataset):
    """Endless items by position: the same item at the same position whenever the seed is the same."""

    config: ReferenceConfig


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
        picture, mask = draw_scene(target, self.world)
        # the mask is the first subject's: with a second one the whole picture counts
        shown = View(picture, None if second else mask)
        return item(shown, views, prompt, self.number[drawing], rng, self.config, self.pixels)

    def view(self, drawing: Drawing, rng: np.random.Generator) -> View:
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        scene = Scene(drawing, background, pose=draw_pose(rng), seed=int(rng.integers(2**31)))
        return View(*draw_scene(scene, self.world))


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
        return item(View(*read_picture(target)), [views], prompt, index, rng, self.config, self.pixels)


def drawn(rng: np.random.Generator, count: int) -> list[int]:
    """Three pictures of `count`: a target and two references, different ones as far as there are any."""
    order = rng.permutation(count).tolist()
    return (order * 3)[:3] if count < 3 else order[:3]


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
    be shared out, as the views of a subject must stay together."""

    def __init__(self, config: ReferenceConfig, rows, pixels: Pixels, seed: int, rank: int = 0, world: int = 1):
        self.config, self.rows, self.pixels, self.seed, self.rank, self.world = config, rows, pixels, seed, rank, world
        self.skip = 0

    def after(self, items: int) -> "Streamed":
        """Begins after so many items, which are read and passed over."""
        self.skip = items
        return self

    def __iter__(self) -> Iterator[dict]:
        yield from itertools.islice(self.items(), self.skip, None)

    def items(self) -> Iterator[dict]:
        for epoch in itertools.count():
            rng, found = np.random.default_rng([self.seed, self.rank, epoch]), False
            own = itertools.islice(self.subjects(), self.rank, None, self.world)
            for name, views in shuffled(own, self.config.shuffle_buffer, rng):
                found = True
                target, *references = (views[i] for i in drawn(rng, len(views)))
                prompt = named(target.caption or self.config.instance_prompt.replace("{}", name))
                number = zlib.crc32(name.encode())
                yield item(target, [references], prompt, number, rng, self.config, self.pixels)
            if not found:
                raise UserError("--dataset_name: no subject with two or more views was found in this dataset's rows.")

    def subjects(self) -> Iterator[tuple[str, list[View]]]:
        """Each subject's name and views: a row's list of pictures, or the rows that follow each other with one name."""
        image, text, subject = self.config.image_column, self.config.caption_column, self.config.subject_column
        if subject:
            called = called_by(self.rows, subject)
            for name, rows in itertools.groupby(self.rows, key=lambda row: row[subject]):
                yield called(name), [View(row[image], None, row.get(text) or "") for row in rows]
            return
        for i, row in enumerate(self.rows):
            captions = row.get(text) or ""
            captions = captions if isinstance(captions, list) else [captions] * len(row[image])
            yield str(i), [View(picture, None, said) for picture, said in zip(row[image], captions, strict=True)]


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
    first_row = next(iter(rows), None)
    if first_row is None:
        raise UserError(f"--dataset_name '{config.dataset_name}' has no rows.")
    columns = rows.column_names or list(first_row)
    for flag in ("image_column", "subject_column"):
        if (name := getattr(config, flag)) and name not in columns:
            raise UserError(f"--{flag}: the dataset has no column '{name}', only {', '.join(columns)}.")
    if not config.subject_column and not isinstance(first_row[config.image_column], list):
        raise UserError("--subject_column: name the column that says which subject a row shows, or give lists of pictures.")
    return rows


class Positions(Sampler[list[int]]):
    """Endless batches of positions, beginning with batch `start`; process `rank` of `world` takes each `world`-th batch."""

    def __init__(self, batch_size: int, start: int = 0, rank: int = 0, world: int = 1):
        self.batch_size, self.start, self.rank, self.world = batch_size, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for i in itertools.count(self.start):
            begin = (i * self.world + self.rank) * self.batch_size
            yield list(range(begin, begin + self.batch_size))


def collate_references(items: Sequence[dict]) -> dict:
    """A batch: `pixels` (B, 3, H, W), `mask` (B, 1, H, W), `references` (B, subjects, 2, 3, h, w), `present` (B, subjects),
    False where a picture has fewer subjects than others, `identity` (B,), `prompt` a list."""
    batch: dict = {name: torch.stack([entry[name] for entry in items]) for name in ("pixels", "mask")}
    batch["references"] = pad_sequence([entry["references"] for entry in items], batch_first=True)
    batch["present"] = pad_sequence(
        [torch.ones(len(entry["references"]), dtype=torch.bool) for entry in items], batch_first=True
    )
    batch["identity"] = torch.tensor([entry["identity"] for entry in items], dtype=torch.long)
    return batch | {"prompt": [entry["prompt"] for entry in items]}


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


def held_out_batch(items, count: int, device: torch.device) -> list[dict]:
    """The first `count` items as one batch on the device, which contrasts need together."""
    if not count:
        return []
    return [to_device(collate_references([items[i] for i in range(count)]), device)]


def read_references(model, config: ReferenceConfig, settings, pixels: Pixels, accelerator) -> tuple[Dataset, list[dict]]:
    """The training set, and one batch of `holdout` subjects that it does not show, if any are held out.

    UserError if no source is named on a base model other than stickers, or two are.
    """
    if config.train_data_dir and config.dataset_name:
        raise UserError("Name the subjects with --train_data_dir or with --dataset_name, not with both.")
    seed, count, device = settings.seed, config.holdout, accelerator.device
    if config.train_data_dir:
        subjects = read_folders(config)
        if not 0 <= count < len(subjects):
            raise UserError(f"--holdout {count} leaves no subject for training; there are {len(subjects)}.")
        kept = np.random.default_rng(seed).permutation(len(subjects)).tolist()
        held, train = (Folders(config, [subjects[i] for i in part], pixels, seed) for part in (kept[:count], kept[count:]))
        return train, held_out_batch(held, count, device)
    if config.dataset_name:
        held_rows, rows = split_rows(read_rows(config), config.subject_column, count)
        kept_rows = list(itertools.islice(Streamed(config, held_rows, pixels, seed), count)) if count else []
        streamed = Streamed(config, rows, pixels, seed, accelerator.process_index, accelerator.num_processes)
        return streamed, held_out_batch(kept_rows, len(kept_rows), device)
    if model.pretrained_model_name_or_path != "stickers":
        raise UserError("Name the subjects to learn from: --train_data_dir (a folder for each) or --dataset_name.")
    return Rendered(config, pixels, seed), held_out_batch(Rendered(config, pixels, seed, validation=True), count, device)

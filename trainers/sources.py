"""The three sources that encoders learn from: rendered sticker scenes, a folder of folders, and a dataset (streams.py)."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from customize.errors import UserError, shortened
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
from customize.trainers.streams import Streamed, read_rows, split_rows


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
    if not os.path.isdir(root):
        raise UserError(f"There is no folder '{shortened(str(root))}'; correct --train_data_dir.")
    rules: dict[str, Any] = {name: getattr(config, name) for name in ("strict", "max_pixels", "allow_outside_files")}
    rules |= {"flag": "--train_data_dir", "masked_only": config.unmasked_weight == 0}
    subjects: list[tuple[str, list[Picture]]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        prompt = config.instance_prompt.replace("{}", folder.name)
        pictures = find_pictures(folder, prompt, len(subjects), **rules)
        if len(pictures) < 2:
            raise UserError(f"'{folder}' holds one picture: an encoder learns from two or more views of every subject.")
        for picture in pictures:
            named(picture.caption)
        subjects.append((folder.name, pictures))
    if not subjects:
        raise UserError(f"--train_data_dir '{root}' must hold a folder of pictures for each subject.")
    return subjects


def first_epoch(items: Iterable[dict]) -> list[dict]:
    """Of endless items those before the first subject comes again."""
    found: dict[int, dict] = {}
    for entry in items:
        if entry["identity"] in found:
            break
        found[entry["identity"]] = entry
    return list(found.values())


def read_references(model, config: ReferenceConfig, settings, pixels: Pixels, accelerator) -> tuple[Dataset, list[dict]]:
    """The training set, and batches of `holdout` subjects that it does not show, if any are held out.

    UserError if no source is named on a base model other than stickers, or two are, or one subject alone is held out.
    """
    if config.train_data_dir and config.dataset_name:
        raise UserError("Name the subjects with --train_data_dir or with --dataset_name, not with both.")
    seed, count = settings.seed, config.holdout
    if count == 1:
        raise UserError(f"--holdout {count} leaves nothing to compare a subject with: hold out 2 or more, or 0.")
    held_out = partial(held_out_batches, size=settings.train_batch_size, device=accelerator.device)
    if config.train_data_dir:
        subjects = read_folders(config)
        if count >= len(subjects):
            raise UserError(f"--holdout {count} leaves no subject for training; there are {len(subjects)}.")
        kept = np.random.default_rng(seed).permutation(len(subjects)).tolist()
        held, train = (Folders(config, [subjects[i] for i in part], pixels, seed) for part in (kept[:count], kept[count:]))
        return train, held_out(held, count)
    if config.dataset_name:
        held_rows, rows = split_rows(read_rows(config), config.subject_column, count)
        kept_rows = first_epoch(Streamed(config, held_rows, pixels, seed)) if count else []
        if count and len(kept_rows) < 2:
            raise UserError(f"--holdout {count}: fewer than two of the first {count} subjects can be used; hold out more.")
        streamed = Streamed(config, rows, pixels, seed, accelerator.process_index, accelerator.num_processes)
        return streamed, held_out(kept_rows, len(kept_rows))
    if model.pretrained_model_name_or_path != "stickers":
        raise UserError("Name the subjects to learn from: --train_data_dir (a folder for each) or --dataset_name.")
    return Rendered(config, pixels, seed), held_out(Rendered(config, pixels, seed, validation=True), count)

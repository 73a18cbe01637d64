"""Training data for encoders from a folder of images for each subject."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from customize.data.captions import one_of
from customize.data.images import ImageFile, find_images, read_image_file
from customize.data.references import Pixels, ReferenceConfig, References, View, drawn, item, named
from customize.errors import UserError, shortened


class Folders(References):
    """A folder of images for each subject; an epoch shows every subject once, in an order that the seed
    decides."""

    def __init__(
        self,
        config: ReferenceConfig,
        subjects: Sequence[tuple[str, Sequence[ImageFile]]],
        pixels: Pixels,
        seed: int,
    ):
        self.config, self.subjects, self.pixels, self.seed = config, subjects, pixels, seed

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.subjects))
        index = int(np.random.default_rng([self.seed, epoch]).permutation(len(self.subjects))[place])
        rng = np.random.default_rng([self.seed, epoch, place])
        _, images = self.subjects[index]
        target, *references = (images[i] for i in drawn(rng, len(images)))
        views = [View(*read_image_file(image)) for image in references]
        prompt = named(one_of(target.captions, rng))
        target_view, twice = View(*read_image_file(target)), len(images) < 3
        return item(target_view, [views], prompt, index, rng, self.config, self.pixels, shows_target=twice)


def read_folders(config: ReferenceConfig) -> list[tuple[str, list[ImageFile]]]:
    """Subjects by name with their images; UserError for a folder without subjects, or a subject with one
    image only."""
    root = Path(config.train_data_dir)
    if not os.path.isdir(root):
        raise UserError(f"There is no folder '{shortened(str(root))}'; correct --train_data_dir.")
    rules: dict[str, Any] = {
        name: getattr(config, name) for name in ("strict", "max_pixels", "allow_outside_files")
    }
    rules |= {"flag": "--train_data_dir", "masked_only": config.unmasked_weight == 0}
    subjects: list[tuple[str, list[ImageFile]]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        prompt = config.instance_prompt.replace("{}", folder.name)
        images = find_images(folder, prompt, len(subjects), **rules)
        if len(images) < 2:
            raise UserError(
                f"'{folder}' holds one image: an encoder learns from two or more views of every subject."
            )
        for caption in (caption for image in images for caption in image.captions):
            named(caption)
        subjects.append((folder.name, images))
    if not subjects:
        raise UserError(f"--train_data_dir '{root}' must hold a folder of images for each subject.")
    return subjects

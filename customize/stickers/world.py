"""The drawings of the sticker world, and which of them pretraining may see."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"
MODEL = Path(__file__).parent / "model"
ENCODER = Path(__file__).parent / "encoder" / "subject.safetensors"
ATLAS_COLUMNS = 8


@dataclass(frozen=True)
class Drawing:
    """One studio's drawing of one class: a subject of this world."""

    word: str
    studio: str

    def __str__(self):
        return f"{self.studio} {self.word}"


@lru_cache
def _atlas(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "atlas.webp").convert("RGBA"))


class World:
    """Drawings read from an atlas folder: `world.json` (classes, studios, held-out lists) and `atlas.webp`
    (sprites).

    The folder that ships with the package holds the core vocabulary and the held-out drawings.
    """

    def __init__(self, folder: Path = DATA):
        listed = json.loads((folder / "world.json").read_text())
        self.folder, self.size, self.studios = folder, listed["size"], tuple(listed["studios"])
        self.classes = {entry["word"]: entry | {"index": i} for i, entry in enumerate(listed["classes"])}

    @property
    def atlas(self) -> np.ndarray:
        return _atlas(self.folder)

    def sprite(self, drawing: Drawing) -> np.ndarray:
        """RGBA pixels, uint8, shape (size, size, 4)."""
        index, column = self.classes[drawing.word]["index"], self.studios.index(drawing.studio)
        x = ((index % ATLAS_COLUMNS) * len(self.studios) + column) * self.size
        y = (index // ATLAS_COLUMNS) * self.size
        return self.atlas[y : y + self.size, x : x + self.size]

    def drawings(self, core: bool | None = None, held_out: bool | None = False) -> list[Drawing]:
        """All drawings; `core` and `held_out` keep those of the core vocabulary and those not pretrained on
        (None: either)."""
        return [
            Drawing(word, studio)
            for word, entry in self.classes.items()
            for studio in self.studios
            if core in (None, entry["core"]) and held_out in (None, studio in entry["held_out"])
        ]

    def is_unknown(self, word: str) -> bool:
        """Whether no studio's drawing of this class was seen in pretraining."""
        return len(self.classes[word]["held_out"]) == len(self.studios)

"""One finished run, measured like a benchmark of one subject beside its base model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from customize.app.bench.bench import Subject
from customize.app.bench.drawing import save_picture
from customize.app.bench.dreambench import LIVE, DreamBench
from customize.app.bench.stickers import StickerBench
from customize.checkpoint import read_info
from customize.errors import UserError
from customize.pictures import find_pictures, read_picture
from customize.prompts import class_word, subject_words
from customize.stickers import Drawing, World
from customize.stickers.bench import bench_prompts
from customize.stickers.judge import judge

METHODS = ("base", "run", "real")
DREAMBENCH_PROMPTS = tuple(
    f"a {{}} {place}"
    for place in (
        "in the jungle",
        "in the snow",
        "on the beach",
        "on a cobblestone street",
        "on top of a wooden floor",
        "with a city in the background",
        "with a mountain in the background",
        "on top of green grass with sunflowers around it",
    )
)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What the two kinds have in common; comes before a benchmark in the order of base classes."""

    run_path: Path
    methods: Sequence[str] = METHODS

    @cached_property
    def settings(self) -> dict:
        return read_info(self.run_path)["config"]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The pictures that the run learned from."""
        folder = self.settings["instance_data_dir"]
        if not Path(folder).is_dir():
            raise UserError(f"the pictures that '{self.run_path}' learned from are no longer in '{folder}'; put them back.")
        return [read_picture(picture)[0] for picture in find_pictures(folder, "any")]

    @property
    def word(self) -> str:
        names = ("instance_prompt", "class_prompt", "initializer_token")
        return class_word(*(self.settings.get(name, "") for name in names))

    def words(self, name: str, subject: Subject) -> str:
        return subject_words(self.settings["instance_prompt"]) if name == "run" else subject.word

    def label(self, name: str) -> str:
        return {"base": "Base model", "real": "Real pictures"}.get(name, self.run_path.name)

    def run_folder(self, name: str, subject: Subject) -> Path:
        return self.run_path

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(self.pictures):
            save_picture(picture, folder / f"{i:02d}.png")
        return self.pictures


@dataclass(frozen=True, kw_only=True)
class StickerRun(FinishedRun, StickerBench):
    """A run on the embedded model. `drawing`: what it learned ("flat fox"); empty: what the judge sees in its pictures."""

    drawing: str = ""
    methods: Sequence[str] = METHODS

    def __post_init__(self):
        self.subjects  # noqa: B018  a wrong name is told before anything is drawn

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        known = {str(drawing): drawing for drawing in World().drawings(held_out=None)}
        if self.drawing and self.drawing not in known:
            raise UserError(f"--subject: there is no drawing '{self.drawing}'; write it as 'STUDIO CLASS', such as 'flat fox'.")
        drawing = known[self.drawing] if self.drawing else most_seen(self.pictures)
        name = str(drawing).replace(" ", "-")
        return [Subject(name, drawing.word, "", tuple(bench_prompts(self.quick)), drawing)]

    def protocol(self):
        return super().protocol() | {"subjects": f"{self.subjects[0].name}, the pictures of '{self.run_path}'", "training": ""}


def most_seen(pictures: list[Image.Image]) -> Drawing:
    """The drawing that the judge sees in most of the pictures."""
    verdicts = judge(pictures)
    return Counter(verdicts.best(i) for i in range(len(pictures))).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True)
class PhotographRun(FinishedRun, DreamBench):
    """A run on any other base model, with eight of DreamBench's prompts."""

    data: Path = Path()
    methods: Sequence[str] = METHODS

    def __post_init__(self):
        self.pictures  # noqa: B018  missing ones are told before anything is drawn

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        group = "live" if self.word in LIVE else "object"
        return [Subject(self.run_path.name, self.word, group, DREAMBENCH_PROMPTS, None)]

    def protocol(self):
        return super().protocol() | {"bench": f"eight prompts of DreamBench for '{self.run_path}'", "training": ""}

    def results(self, protocol, methods):
        found = super().results(protocol, methods) | {"title": self.run_path.name}
        found.pop("published")  # of thirty other subjects
        return found

"""One finished run, measured like a benchmark of one subject beside its base model."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from customize.app.bench.bench import Subject, Taken
from customize.app.bench.drawing import weights_of, write_images
from customize.app.bench.dreambench import LIVE, DreamBench
from customize.app.bench.stickers import StickerBench
from customize.data.images import ImageFile, find_images, read_image_file
from customize.errors import UserError
from customize.prompts import class_word, subject_words
from customize.runs.folder import read_info
from customize.stickers import Drawing, World
from customize.stickers.bench import bench_prompts
from customize.stickers.judge import judge
from customize.stickers.scene import SIDE

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
    def found(self) -> list[ImageFile]:
        """The images that the run learned from; UserError if they are gone or were of several subjects."""
        folder = self.settings["instance_data_dir"]
        if not folder:
            raise UserError(f"'{self.run_path}' learned several concepts; evaluate knows runs of one.")
        if not Path(folder).is_dir():
            raise UserError(
                f"the images that '{self.run_path}' learned from are no longer in '{folder}'; put them back."
            )
        return find_images(folder, "any")

    @cached_property
    def images(self) -> list[Image.Image]:
        return [read_image_file(image)[0] for image in self.found]

    @property
    def name(self) -> str:
        return self.run_path.resolve().name

    @cached_property
    def calls(self) -> str:
        """What stands for the subject in prompts."""
        words = subject_words(self.settings["instance_prompt"])
        if not words:
            raise UserError(
                f"'{self.run_path}' has no --instance_prompt, so it is not known what prompts call the "
                "subject."
            )
        return words

    def stamp(self) -> dict[str, str]:
        """Exactly this run, learned from exactly these images: another one's images are not mixed in."""
        digest = hashlib.sha256((self.run_path / "run.json").read_bytes())
        for path in weights_of(self.run_path):
            digest.update(path.read_bytes())
        learned = hashlib.sha256("".join(image.digest for image in self.found).encode())
        return {
            "run": f"{self.name}, sha256 {digest.hexdigest()[:12]}",
            "learned from": f"{len(self.found)} images, sha256 {learned.hexdigest()[:12]}",
        }

    def teaching(self, name: str) -> str:
        return self.label(name)

    @property
    def word(self) -> str:
        names = ("instance_prompt", "class_prompt", "initializer_token")
        return class_word(*(self.settings.get(name, "") for name in names))

    def words(self, name: str, subject: Subject) -> str:
        return self.calls if name == "run" else subject.word

    def label(self, name: str) -> str:
        return {"base": "Base model", "real": "Real images"}.get(name, self.name)

    def run_folder(self, name: str, subject: Subject) -> Path:
        return self.run_path

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        return write_images(self.images, folder)


@dataclass(frozen=True, kw_only=True)
class StickerRun(FinishedRun, StickerBench):
    """A run on the embedded model. `drawing_name`: what it learned ("flat fox"); empty: what the judge sees
    in its images."""

    drawing_name: str = ""
    methods: Sequence[str] = METHODS

    def __post_init__(self):
        self.subjects, self.calls  # noqa: B018  mistakes are told before anything is drawn

    @cached_property
    def images(self) -> list[Image.Image]:
        """As training saw them: squares of the embedded model's size."""
        return [
            ImageOps.fit(read_image_file(image)[0], (SIDE, SIDE), Image.Resampling.LANCZOS)
            for image in self.found
        ]

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        known = {str(drawing): drawing for drawing in World().drawings(held_out=None)}
        if self.drawing_name and self.drawing_name not in known:
            raise UserError(
                f"--subject: there is no drawing '{self.drawing_name}'; write 'STUDIO CLASS', such as "
                "'flat fox'."
            )
        drawing = known[self.drawing_name] if self.drawing_name else most_seen(self.images)
        name = str(drawing).replace(" ", "-")
        return [Subject(name, drawing.word, "", tuple(bench_prompts(self.quick)), drawing)]

    def taken(self, *parts) -> Taken:
        return replace(super().taken(*parts), masks=None)  # a user's images are not the benchmark's

    def drawing(self):
        return super().drawing() | {"subjects": self.subjects[0].name} | self.stamp()


def most_seen(images: list[Image.Image]) -> Drawing:
    """The drawing that the judge sees in most of the images, with a warning if it is not sure."""
    verdicts = judge(images)
    drawing = verdicts.most_seen()
    if sum(verdicts.belief(i, drawing) for i in range(len(images))) < len(images) / 2:
        warnings.warn(
            f"it is not sure that the images show the {drawing}; name the drawing with --subject.",
            stacklevel=2,
        )
    return drawing


@dataclass(frozen=True, kw_only=True)
class PhotographRun(FinishedRun, DreamBench):
    """A run on any other base model, with eight of DreamBench's prompts."""

    data: Path = Path()
    methods: Sequence[str] = METHODS

    def __post_init__(self):
        self.found, self.calls, self.word  # noqa: B018  mistakes are told before anything is drawn

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        group = "live" if self.word in LIVE else "object"
        return [Subject(self.name, self.word, group, DREAMBENCH_PROMPTS, None)]

    def drawing(self):
        return super().drawing() | {"bench": "eight prompts of DreamBench"} | self.stamp()

    def results(self, protocol, methods):
        found = super().results(protocol, methods) | {"title": self.name}
        found.pop("published")  # of thirty other subjects
        return found

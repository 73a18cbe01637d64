"""One finished run, measured like a benchmark of one subject beside its base model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageOps

from customize.app.bench.bench import Bench, ImagesToScore, Subject
from customize.app.bench.drawing import weights_of, write_images
from customize.app.bench.dreambench import LIVE, DreamBench
from customize.app.bench.sticker_scores import score_unknown
from customize.app.bench.stickers import StickerBench
from customize.data.images import ImageFile, find_images, read_image_file
from customize.errors import UserError
from customize.prompts import class_word, subject_words
from customize.runs.folder import read_info
from customize.stickers import Drawing, World
from customize.stickers.bench import bench_prompts
from customize.stickers.judge import judge
from customize.stickers.measure import masked_correlation
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
    """What both kinds of runs share; it stands before the benchmark among the base classes."""

    run_path: Path
    methods: Sequence[str] = METHODS
    title = "Evaluation"

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
        """The words for the subject in prompts."""
        words = subject_words(self.settings["instance_prompt"])
        if not words:
            raise UserError(
                f"'{self.run_path}' has no --instance_prompt, so it is not known what prompts call the "
                "subject."
            )
        return words

    def stamp(self) -> dict[str, str]:
        """Identifies the run and the images it learned from, so that images of another run are not mixed
        in."""
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

    def trains(self, name: str) -> bool:
        return False

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        return write_images(self.images, folder)


@dataclass(frozen=True, kw_only=True)
class StickerRun(FinishedRun, StickerBench):
    """A run on the embedded model. `drawing_name` is the drawing that it learned ("flat fox"); empty: the
    one that fits its images, if any does."""

    drawing_name: str = ""
    methods: Sequence[str] = METHODS

    def __post_init__(self):
        self.subjects, self.calls  # noqa: B018  mistakes are told before anything is drawn

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images as training saw them: squares of the embedded model's size."""
        return [
            ImageOps.fit(read_image_file(image)[0], (SIDE, SIDE), Image.Resampling.LANCZOS)
            for image in self.found
        ]

    @cached_property
    def shown(self) -> Drawing | None:
        """The drawing of the sticker world that the run learned; None if its images show none of them."""
        known = {str(drawing): drawing for drawing in World().drawings(held_out=None)}
        if self.drawing_name and self.drawing_name not in known:
            raise UserError(
                f"--subject: there is no drawing '{self.drawing_name}'; write 'STUDIO CLASS', such as "
                "'flat fox'."
            )
        return known[self.drawing_name] if self.drawing_name else fitting(self.images)

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        word = self.shown.word if self.shown else self.word
        name = str(self.shown).replace(" ", "-") if self.shown else self.name
        return [Subject(name, word, "", tuple(bench_prompts(self.quick)), self.shown)]

    def images_to_score(self, *parts) -> ImagesToScore:
        return Bench.images_to_score(self, *parts)  # no masks of a user's images are known

    def drawing(self) -> dict[str, str]:
        what = (
            str(self.shown) if self.shown else "no drawing of the sticker world: its own images are the truth"
        )
        return super().drawing() | {"subjects": what} | self.stamp()

    def real(self, subject: Subject, folder: Path) -> list[Image.Image]:
        return super().real(subject, folder) if self.shown else []

    def score(self, taken: ImagesToScore) -> tuple[dict, dict, list[dict]]:
        return super().score(taken) if self.shown else score_unknown(taken, self.clip)

    def results(self, protocol: dict[str, str], methods: list[dict]) -> dict:
        found = super().results(protocol, methods) | {"title": self.name}
        return found if self.shown else found | {"axes": ["prompt_fidelity", "clip_i"]}


FITS = 0.65  # mean correlation of a drawing with images of it: .83 of real scenes, .49 of look-alikes


def fitting(images: list[Image.Image]) -> Drawing | None:
    """The drawing that the judge sees in most of the images, if it fits them. The judge always names one
    of the drawings it knows, and is confident about unknown ones too."""
    drawing = judge(images).most_seen()
    sprite = World().sprite(drawing)
    correlation = fmean(masked_correlation(image, sprite) for image in images)
    return drawing if correlation >= FITS else None


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

    def drawing(self) -> dict[str, str]:
        return super().drawing() | {"bench": "eight prompts of DreamBench"} | self.stamp()

    def results(self, protocol: dict[str, str], methods: list[dict]) -> dict:
        found = super().results(protocol, methods) | {"title": self.name}
        found.pop("published")  # of thirty other subjects
        return found

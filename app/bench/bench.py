"""What all benchmarks share: train each method on each subject, draw the prompts, score the images. Every
image is kept, so that an interrupted evaluation goes on where it stopped."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from customize.app.bench.drawing import ImageRequest, Sampling, cost_of, draw_missing, same_protocol, trained
from customize.backbones.families import as_called
from customize.backbones.load import load_base
from customize.data.images import MASK_SUFFIX
from customize.pipelines import load_pipeline
from customize.runs.folder import base_options
from customize.trainers.launch import run

NOT_TRAINED = ("base", "real")  # rows that are no methods: the untouched base model, and real images
PRIOR_PROMPTS = 4  # of these many prompts the class word alone is drawn, before and after


def folder_of(name: str) -> str:
    """The folder name of a method's images; some methods are named by a path."""
    return name.strip("./").replace("/", "-")


@dataclass(frozen=True)
class Subject:
    """One subject of a benchmark: `prompts` have `{}` in its place, `source` is its drawing or its folder of
    photographs."""

    name: str
    word: str
    group: str
    prompts: tuple[str, ...]
    source: Any


@dataclass(frozen=True)
class ImagesToScore:
    """The images of one subject and method that are to be scored: `images` for `prompts`, the subject's
    `references`, and images of the class word alone by the method (`prior`) and by the base model
    (`before`). All but the references may be empty."""

    subject: Subject
    images: list[Image.Image]
    references: list[Image.Image]
    prior: list[Image.Image]
    before: list[Image.Image]
    repeats: int
    masks: list[Image.Image] | None = None  # of the references, if they are known

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image, with the class word in the subject's place."""
        return [
            prompt.format(self.subject.word) for prompt in self.subject.prompts for _ in range(self.repeats)
        ]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Subclasses define the subjects, how a method is trained, and the scores."""

    folder: Path
    methods: Sequence[str]
    sampling: Sampling
    base: str = "stickers"
    base_settings: dict = field(default_factory=dict)  # flags of training that it is loaded with
    repeats: int = 4
    seed: int = 0

    title = "Benchmark"

    @property
    def subjects(self) -> Sequence[Subject]:
        raise NotImplementedError

    def drawing(self) -> dict[str, str]:
        """Everything that decides the images apart from the methods' own settings. Images made under
        another description are never mixed in."""
        raise NotImplementedError

    def teaching(self, name: str) -> str:
        """Everything that decides what method `name` learns, beyond `drawing`."""
        raise NotImplementedError

    def scoring(self) -> dict[str, str]:
        """How the images are measured: encoders, preprocessing, pairing, averages."""
        raise NotImplementedError

    def label(self, name: str) -> str:
        raise NotImplementedError

    def words(self, name: str, subject: Subject) -> str:
        """The words for the subject in the prompts of method `name`; the class word for the base model."""
        raise NotImplementedError

    def training(self, name: str, subject: Subject) -> list[str]:
        """Method and flags of `customize train`, except data, output and seed."""
        raise NotImplementedError

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        """Writes the images that teach the subject into `folder`, and returns them."""
        raise NotImplementedError

    def real(self, subject: Subject, folder: Path) -> list[Image.Image]:
        """Real images for the prompts, written to `folder` as the shots are named; none where there are
        none."""
        return []

    def score(self, taken: ImagesToScore) -> tuple[dict, dict, list[dict]]:
        """Scores by metric, prompt fidelity by factor, and each image's scores."""
        raise NotImplementedError

    def results(self, protocol: dict[str, str], methods: list[dict]) -> dict:
        """The argument of `write_report`."""
        raise NotImplementedError

    def plan(self) -> str:
        """What is still to be trained and drawn, in one line, and about how long drawing takes."""
        images, trainings = 0, 0
        for name in (name for name in self.methods if name != "real"):
            for subject in self.subjects:
                folder = self.folder / folder_of(name) / subject.name
                shots = self.shots(subject, subject.word)
                images += sum(not (folder / f"{shot.name}.png").exists() for shot in shots)
                trainings += name != "base" and self.trains(name) and not (folder / "training.json").exists()
        if not images:
            return f"{self.title}: all images are there already"
        prompt = self.subjects[0].prompts[0].format(self.subjects[0].word)
        begin = time.perf_counter()
        pipe = self.pipeline("base", self.subjects[0])
        generator = torch.Generator().manual_seed(0)
        pipe(**as_called(pipe, {"prompt": prompt, "generator": generator, **self.sampling.options}))
        minutes = images * (time.perf_counter() - begin) / 60
        taught = f"{trainings} trainings and " if trainings else ""
        about = f"about {max(round(minutes), 1)} min to draw"
        return f"{self.title}: {taught}{images} images, {about}"

    def trains(self, name: str) -> bool:
        """Whether a method is trained for each subject."""
        return True

    def run(self) -> dict:
        """Trains, draws and scores what is missing; returns the results for the report."""
        drawing = self.drawing()
        same_protocol(self.folder, drawing)
        # whose class images methods are compared with, even where it is no row
        base = [] if set(self.methods) <= set(NOT_TRAINED) else ["base"]
        for name in dict.fromkeys([*self.methods, *base]):
            same_protocol(self.folder / folder_of(name), {"method": self.teaching(name)})
        rows: dict[str, list[dict]] = {name: [] for name in self.methods}
        with tqdm(
            [(name, subject) for name in self.methods for subject in self.subjects], desc=self.title
        ) as bar:
            for name, subject in bar:
                bar.set_postfix_str(f"{name}, {subject.name}")
                rows[name].append(self.row(name, subject))
        methods = [
            {
                "name": name,
                "label": self.label(name),
                "kind": name if name in NOT_TRAINED else "method",
                "subjects": some,
            }
            for name, some in rows.items()
        ]
        taught = {f"method {name}": self.teaching(name) for name in self.methods if name not in NOT_TRAINED}
        return self.results(drawing | taught | self.scoring(), methods)

    def row(self, name: str, subject: Subject) -> dict:
        """One method's scores, images and costs for one subject."""
        place = Path(folder_of(name), subject.name)
        folder = self.folder / place
        references = self.write_references(name, subject, folder / "images")
        shots = self.shots(subject, self.words(name, subject))
        if name == "real":
            images, prior = self.real(subject, folder), []
        else:
            load = cache(lambda: self.pipeline(name, subject))
            images = draw_missing(load, shots, folder, self.sampling)
            prior = self.prior(name, subject, load)
        before = (
            [] if name in NOT_TRAINED else self.prior("base", subject, lambda: self.pipeline("base", subject))
        )
        scores, factors, each = self.score(self.images_to_score(subject, images, references, prior, before))
        return {
            "name": subject.name,
            "label": subject.name.replace("-", " ").replace("_", " "),
            "group": subject.group,
            "scores": scores,
            "factors": factors,
            "cost": cost_of(folder),
            "references": [
                str(place / "images" / path.name)
                for path in sorted((folder / "images").glob("*.png"))
                if not path.name.endswith(MASK_SUFFIX)
            ],
            "images": [
                {"file": str(place / f"{shot.name}.png"), "prompt": shot.prompt, "scores": found}
                for shot, found in zip(shots if each else [], each, strict=True)
            ],
        }

    def shots(self, subject: Subject, words: str) -> list[ImageRequest]:
        return [
            ImageRequest(f"{i:02d}-{k}", prompt.format(words), self.seed + 100 * i + k)
            for i, prompt in enumerate(subject.prompts)
            for k in range(self.repeats)
        ]

    def run_folder(self, name: str, subject: Subject) -> Path:
        """The finished run of a method for a subject, trained if it is missing."""
        folder = self.folder / folder_of(name) / subject.name
        flags = [
            "--instance_data_dir",
            str(folder / "images"),
            "--instance_prompt",
            f"a {self.words(name, subject)}",
        ]
        flags += ["--class_prompt", f"a {subject.word}", "--pretrained_model_name_or_path", self.base]
        flags += ["--seed", str(self.seed), "--overwrite_output_dir"]
        flags += [word for name, value in self.base_settings.items() for word in (f"--{name}", value)]
        return trained(
            folder, lambda place: run([*self.training(name, subject), *flags, "--output_dir", str(place)])
        )

    @cached_property
    def base_pipeline(self) -> DiffusionPipeline:
        return load_base(self.base, **base_options(self.base_settings))

    def pipeline(self, name: str, subject: Subject) -> Any:
        pipe = self.base_pipeline if name == "base" else load_pipeline(self.run_folder(name, subject))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.sampling.device)

    def prior(self, name: str, subject: Subject, load: Callable) -> list[Image.Image]:
        """Images of the class word alone, drawn from the same noise for every method."""
        shots = self.shots(subject, subject.word)[: PRIOR_PROMPTS * self.repeats : self.repeats]
        return draw_missing(
            load, shots, self.folder / folder_of(name) / subject.name / "class", self.sampling
        )

    def images_to_score(
        self,
        subject: Subject,
        images: list[Image.Image],
        references: list[Image.Image],
        prior: list[Image.Image],
        before: list[Image.Image],
    ) -> ImagesToScore:
        return ImagesToScore(subject, images, references, prior, before, self.repeats)

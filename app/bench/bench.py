"""What every benchmark does: for each method and subject teach, draw, score; resumable at every picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from customize.app.bench.drawing import Sampling, Shot, cost_of, draw_missing, same_protocol, trained
from customize.loading import load_base
from customize.pipelines import load_pipeline
from customize.trainers.__main__ import run

NOT_TRAINED = ("base", "real")  # rows that are no methods: the untouched base model, and real pictures
PRIOR_PROMPTS = 4  # of these many prompts the class word alone is drawn, before and after


@dataclass(frozen=True)
class Subject:
    """One subject of a benchmark: `prompts` have `{}` in its place, `source` is its drawing or its folder of photographs."""

    name: str
    word: str
    group: str
    prompts: tuple[str, ...]
    source: Any


@dataclass(frozen=True)
class Taken:
    """A subject's pictures to be scored: as many of each of `prompts`, the references, and those of the class word alone by the
    method (`prior`) and by the base model (`before`); all but the references may be empty."""

    subject: Subject
    pictures: list[Image.Image]
    references: list[Image.Image]
    prior: list[Image.Image]
    before: list[Image.Image]
    repeats: int

    @property
    def prompts(self) -> list[str]:
        """The prompt of each picture, with the class word in the subject's place."""
        return [prompt.format(self.subject.word) for prompt in self.subject.prompts for _ in range(self.repeats)]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Subclasses say what the subjects are, how a method is taught, and what the scores are."""

    folder: Path
    methods: Sequence[str]
    sampling: Sampling
    base: str = "stickers"
    repeats: int = 4
    seed: int = 0

    title = "Benchmark"

    @property
    def subjects(self) -> Sequence[Subject]:
        raise NotImplementedError

    def protocol(self) -> dict[str, str]:
        """What every number must be read with."""
        raise NotImplementedError

    def label(self, name: str) -> str:
        raise NotImplementedError

    def words(self, name: str, subject: Subject) -> str:
        """What stands for the subject in the prompts of method `name`; the class word for the base model."""
        raise NotImplementedError

    def training(self, name: str, subject: Subject) -> list[str]:
        """Method and flags of `customize train`, but for data, output and seed."""
        raise NotImplementedError

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        """Writes the pictures that teach the subject into `folder`, and returns them."""
        raise NotImplementedError

    def real(self, subject: Subject, folder: Path) -> list[Image.Image]:
        """Real pictures for the prompts, written to `folder` as the shots are named; none where there are none."""
        return []

    def score(self, taken: Taken) -> tuple[dict, dict, list[dict]]:
        """Scores by metric, text control by factor, and each picture's scores."""
        raise NotImplementedError

    def results(self, protocol: dict[str, str], methods: list[dict]) -> dict:
        """What `write_report` takes."""
        raise NotImplementedError

    def run(self) -> dict:
        """Teaches, draws and scores what is missing, and returns the results for the report."""
        protocol = self.protocol()
        same_protocol(self.folder, protocol)
        rows: dict[str, list[dict]] = {name: [] for name in self.methods}
        with tqdm([(name, subject) for name in self.methods for subject in self.subjects], desc=self.title) as bar:
            for name, subject in bar:
                bar.set_postfix_str(f"{name}, {subject.name}")
                rows[name].append(self.row(name, subject))
        methods = [
            {"name": name, "label": self.label(name), "kind": name if name in NOT_TRAINED else "method", "subjects": some}
            for name, some in rows.items()
        ]
        return self.results(protocol, methods)

    def row(self, name: str, subject: Subject) -> dict:
        """One method's scores, pictures and costs for one subject."""
        place = Path(name, subject.name)
        folder = self.folder / place
        references = self.write_references(name, subject, folder / "pictures")
        shots = self.shots(subject, self.words(name, subject))
        pictures = self.real(subject, folder) if name == "real" else self.drawn(name, subject, shots, folder)
        prior = [] if name == "real" else self.prior(name, subject)
        before = [] if name in NOT_TRAINED else self.prior("base", subject)
        scores, factors, each = self.score(Taken(subject, pictures, references, prior, before, self.repeats))
        return {
            "name": subject.name,
            "label": subject.name.replace("-", " ").replace("_", " "),
            "group": subject.group,
            "scores": scores,
            "factors": factors,
            "cost": cost_of(folder),
            "references": [str(place / "pictures" / path.name) for path in sorted((folder / "pictures").glob("*.png"))],
            "pictures": [
                {"file": str(place / f"{shot.name}.png"), "prompt": shot.prompt, "scores": found}
                for shot, found in zip(shots if each else [], each, strict=True)
            ],
        }

    def shots(self, subject: Subject, words: str) -> list[Shot]:
        return [
            Shot(f"{i:02d}-{k}", prompt.format(words), self.seed + 100 * i + k)
            for i, prompt in enumerate(subject.prompts)
            for k in range(self.repeats)
        ]

    def run_folder(self, name: str, subject: Subject) -> Path:
        """The finished run of a method for a subject, trained if it is missing."""
        folder = self.folder / name / subject.name
        flags = ["--instance_data_dir", str(folder / "pictures"), "--instance_prompt", f"a {self.words(name, subject)}"]
        flags += ["--class_prompt", f"a {subject.word}", "--pretrained_model_name_or_path", self.base]
        flags += ["--seed", str(self.seed), "--overwrite_output_dir"]
        return trained(folder, lambda place: run([*self.training(name, subject), *flags, "--output_dir", str(place)]))

    def pipeline(self, name: str, subject: Subject):
        pipe = load_base(self.base) if name == "base" else load_pipeline(self.run_folder(name, subject))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.sampling.device)

    def drawn(self, name: str, subject: Subject, shots: Sequence[Shot], folder: Path) -> list[Image.Image]:
        if name != "base":
            self.run_folder(name, subject)
        return draw_missing(lambda: self.pipeline(name, subject), shots, folder, self.sampling)

    def prior(self, name: str, subject: Subject) -> list[Image.Image]:
        """What the class word alone draws, from the same noises for every method."""
        shots = self.shots(subject, subject.word)[: PRIOR_PROMPTS * self.repeats : self.repeats]
        return self.drawn(name, subject, shots, self.folder / name / subject.name / "class")

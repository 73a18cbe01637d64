"""DreamBench: likeness and obedience on photographs, by the field's measures (Ruiz et al., 2023, arXiv 2208.12242)."""

import ast
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image

from customize.app.bench.bench import NOT_TRAINED, Bench, Subject, Taken
from customize.app.bench.drawing import save_picture
from customize.app.bench.published import PUBLISHED
from customize.config import parse
from customize.errors import UserError
from customize.metrics import (
    ClipEncoder,
    ImageEncoder,
    ceiling_score,
    diversity,
    drift,
    nearest_score,
    prompt_score,
    subject_score,
)
from customize.pictures import find_pictures, read_picture
from customize.trainers.__main__ import configs
from customize.trainers.registry import METHODS, find_method

FILE = "prompts_and_classes.txt"
LIVE = {"cat", "dog"}  # classes that take the second list of prompts
TOKEN, WORD = "sks", "<subject>"  # what stands before the class word: a rare word, or a learned one


def read_dreambench(folder: Path) -> list[Subject]:
    """The subjects of a dataset folder: a folder of pictures each, and `prompts_and_classes.txt`.

    Subjects that the file lists and the folder lacks are left out with a warning. UserError for a missing or malformed file,
    lists of prompts that differ in length, a folder that the file does not list, and one without readable pictures.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"--data_dir: '{folder}' has no {FILE}; give the folder of the DreamBooth dataset.")
    text = path.read_text(encoding="utf-8-sig")
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text.split("Prompts")[0], re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [_prompts(block) for block in re.findall(r"prompt_list\s*=\s*\[(.*?)\n\s*\]", text, re.DOTALL)]
    if not classes or len(lists) != 2:
        raise UserError(f"'{path}' is malformed: it must list classes ('name,class') and two prompt lists; download it again.")
    if len(lists[0]) != len(lists[1]):
        raise UserError(f"'{path}' has {len(lists[0])} prompts for objects but {len(lists[1])} for live subjects; mend it.")
    found = {place.name: place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")}
    if strangers := found.keys() - classes.keys():
        raise UserError(f"'{path}' names no class for the folder '{min(strangers)}'; add the line '{min(strangers)},CLASS'.")
    if absent := classes.keys() - found.keys():
        warnings.warn(f"{len(absent)} subjects of {path} have no folder: {', '.join(sorted(absent))}.", stacklevel=2)
    subjects = [
        Subject(name, word := classes[name], "live" if word in LIVE else "object", lists[word in LIVE], place)
        for name, place in found.items()
    ]
    for subject in subjects:
        find_pictures(subject.source, "any")  # says so if there is none
    if not subjects:
        raise UserError(f"--data_dir: '{folder}' holds no folder of pictures; give the folder of the DreamBooth dataset.")
    return subjects


def _prompts(block: str) -> tuple[str, ...]:
    """Lines such as `'a {0} {1} in the snow'.format(unique_token, class_token),`."""
    texts = [ast.literal_eval(quoted) for quoted in re.findall(r"('[^'\n]*'|\"[^\"\n]*\")\s*\.format", block)]
    return tuple(text.replace("{0} {1}", "{}") for text in texts)


@dataclass(frozen=True, kw_only=True)
class DreamBench(Bench):
    """The protocol on the dataset in `data`. `train` are flags of `customize train` (perhaps a YAML file before them) for every
    method; `encoders` by name: clip (pictures and prompts), and perhaps dino and dinov2. `references`: teach with and compare
    with all pictures of a subject, or its first one. `limits`: at most so many subjects and prompts."""

    data: Path
    encoders: dict[str, ImageEncoder]
    train: Sequence[str] = ()
    references: Literal["all", "one"] = "all"
    limits: tuple[int | None, int | None] = (None, None)

    title = "DreamBench"

    def __post_init__(self):
        for name in self.methods:
            if name not in NOT_TRAINED:
                parse(configs(find_method(name)), self.train)
        self.subjects  # noqa: B018  the dataset's mistakes are told before anything is trained

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        subjects, prompts = self.limits
        return [replace(s, prompts=s.prompts[:prompts]) for s in read_dreambench(self.data)[:subjects]]

    @property
    def clip(self) -> ClipEncoder:
        encoder = self.encoders["clip"]
        assert isinstance(encoder, ClipEncoder)
        return encoder

    @property
    def judge(self) -> str:
        """The encoder of `nearest` and `diversity`."""
        return "dino" if "dino" in self.encoders else "clip"

    def protocol(self):
        digest = hashlib.sha256("\n".join(p for subject in self.subjects for p in subject.prompts).encode()).hexdigest()
        every = "every real one of the subject" if self.references == "all" else "the one reference (the first file)"
        return {
            "bench": f"DreamBench, {len(self.subjects)} of its 30 subjects",
            "base model": self.base,
            "prompts": f"{len(self.subjects[0].prompts)} a subject, sha256 {digest[:12]}",
            "pictures": f"{self.repeats} for each prompt, seeds from {self.seed}, PNG",
            "sampling": ", ".join(f"{name} {value}" for name, value in self.sampling.options.items()),
            "training": " ".join(self.train) or "the methods' defaults",
            "references": "all pictures of the subject" if self.references == "all" else "its first picture alone",
            **{name: encoder.stamp for name, encoder in self.encoders.items()},
            "pairing": f"every picture with {every}; CLIP-T: every picture with its own prompt, class word for subject",
            "scale": "cosines from -1 to 1, not multiplied",
            "averages": "over pictures within a subject, then over subjects; intervals are 95 % bootstrap over subjects",
            "note": "the pictures that teach are also compared with, as in the paper: read 'nearest' beside the real row",
        }

    def label(self, name):
        return {"base": "Base model", "real": "Real pictures"}.get(
            name, METHODS[name].summary.split(" (")[0] if name in METHODS else name
        )

    def words(self, name, subject):
        if name in NOT_TRAINED:
            return subject.word
        return f"{WORD if self.learns_words(name) else TOKEN} {subject.word}"

    def learns_words(self, name: str) -> bool:
        return hasattr(find_method(name).Config, "placeholder_token")

    def training(self, name, subject):
        words = ["--placeholder_token", WORD, "--initializer_token", subject.word.split()[-1]]
        return [name, *self.train, *(words if self.learns_words(name) else [])]

    def write_references(self, name, subject, folder):
        real = [read_picture(picture)[0] for picture in find_pictures(subject.source, "any")]
        chosen = real if self.references == "all" or name == "real" else real[:1]
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(chosen):
            save_picture(picture, folder / f"{i:02d}.png")
        return chosen

    def score(self, taken: Taken):
        if not taken.pictures:
            return self.ceiling(taken.references), {}, []
        scores: dict[str, float | None] = {}
        each: list[dict] = [{} for _ in taken.pictures]
        for name, encoder in self.encoders.items():
            drawn, real = encoder(taken.pictures), encoder(taken.references)
            scores[LIKENESS[name]] = subject_score(drawn, real)
            for entry, feature in zip(each, drawn, strict=True):
                entry[LIKENESS[name]] = subject_score(feature[None], real)
            if name == self.judge:
                scores["nearest"] = nearest_score(drawn, real)
                scores["diversity"] = diversity(drawn.unflatten(0, (-1, self.repeats))) if self.repeats > 1 else None
        drawn, texts = self.clip(taken.pictures), self.clip.texts(taken.prompts)
        scores["clip_t"] = prompt_score(drawn, texts)
        for entry, feature, text in zip(each, drawn, texts, strict=True):
            entry["clip_t"] = prompt_score(feature[None], text[None])
        scores["drift"] = drift(self.clip(taken.before), self.clip(taken.prior)) if taken.before else None
        return scores, {}, each

    def ceiling(self, real: list[Image.Image]) -> dict[str, float | None]:
        """What real pictures score: each against each other one."""
        features = {name: encoder(real) for name, encoder in self.encoders.items()}
        scores: dict[str, float | None] = {LIKENESS[name]: ceiling_score(some) for name, some in features.items()}
        return scores | {"nearest": nearest_score(features[self.judge])}

    def results(self, protocol, methods):
        measured = {name for method in methods for subject in method["subjects"] for name in subject["scores"]}
        metrics = {name: METRICS[name] for name in METRICS if name in measured}
        axes = ["clip_t", LIKENESS[self.judge]]
        common = {"title": self.title, "protocol": protocol, "axes": axes, "metrics": metrics, "methods": methods}
        return common | {"published": PUBLISHED}


LIKENESS = {"clip": "clip_i", "dino": "dino", "dinov2": "dinov2"}


def metric(title: str, better: str, about: str) -> dict[str, str]:
    return {"title": title, "better": better, "style": "number", "about": about}


METRICS = {
    "dino": metric("DINO", "higher", "mean cosine of every picture with every reference, class token of DINO"),
    "clip_i": metric("CLIP-I", "higher", "the same by CLIP's picture tower"),
    "dinov2": metric("DINOv2", "higher", "the same by DINOv2"),
    "clip_t": metric("CLIP-T", "higher", "mean cosine of every picture with its own prompt, by CLIP"),
    "drift": metric("Drift", "lower", "(1 - cosine) / 2 between what the class word alone draws before and after, by CLIP"),
    "diversity": metric("Diversity", "higher", "mean distance (1 - cosine) between two pictures of one prompt"),
    "nearest": metric(
        "Nearest", "", "mean cosine with the nearest reference (real row: the nearest other picture): more is copying"
    ),
}

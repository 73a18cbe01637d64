"""DreamBench: subject and prompt fidelity on photographs, by the field's measures (Ruiz et al., 2023, arXiv
2208.12242)."""

import ast
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from customize.app.bench.bench import NOT_TRAINED, Bench, ImagesToScore, Subject
from customize.app.bench.drawing import write_images
from customize.app.bench.published import PUBLISHED
from customize.config import default, read_given
from customize.data.images import find_images, read_image_file
from customize.errors import UserError
from customize.metrics import (
    ClipEncoder,
    MetricEncoder,
    ceiling_score,
    diversity,
    drift,
    nearest_score,
    prompt_score,
    subject_score,
)
from customize.trainers.launch import complete, configs
from customize.trainers.registry import find_method

FILE = "prompts_and_classes.txt"
# training settings that are the benchmark's, not the file's
DECIDED = {
    "instance_data_dir",
    "instance_prompt",
    "concepts_list",
    "class_prompt",
    "class_data_dir",
    "holdout",
    "output_dir",
}
DECIDED |= {"seed", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "validation_prompt"}
DECIDED |= {"placeholder_token", "initializer_token", "pretrained_model_name_or_path", "revision", "variant"}
LIVE = {"cat", "dog"}  # classes that take the second list of prompts
TOKEN, WORD = "sks", "<subject>"  # what stands before the class word: a rare word, or a learned one


def read_dreambench(folder: Path) -> list[Subject]:
    """The subjects of a dataset folder: a folder of images each, and `prompts_and_classes.txt`.

    Subjects that the file lists and the folder lacks are left out with a warning. UserError for a missing or
    malformed file, lists of prompts that differ in length, a folder that the file does not list, and one
    without readable images.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"--data_dir: '{folder}' has no {FILE}; give the folder of the DreamBooth dataset.")
    text = path.read_text(encoding="utf-8-sig")
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text.split("Prompts")[0], re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [_prompts(block) for block in re.findall(r"prompt_list\s*=\s*\[(.*?)\n\s*\]", text, re.DOTALL)]
    if not classes or len(lists) != 2:
        raise UserError(
            f"'{path}' is malformed: it must list classes ('name,class') and two prompt lists; download it "
            "again."
        )
    if len(lists[0]) != len(lists[1]):
        raise UserError(
            f"'{path}' has {len(lists[0])} prompts for objects but {len(lists[1])} for live subjects; mend "
            "it."
        )
    found = {
        place.name: place
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    }
    if strangers := found.keys() - classes.keys():
        raise UserError(
            f"'{path}' names no class for the folder '{min(strangers)}'; add the line "
            f"'{min(strangers)},CLASS'."
        )
    if absent := classes.keys() - found.keys():
        warnings.warn(
            f"{len(absent)} subjects of {path} have no folder: {', '.join(sorted(absent))}.", stacklevel=2
        )
    subjects = [
        Subject(name, word := classes[name], "live" if word in LIVE else "object", lists[word in LIVE], place)
        for name, place in found.items()
    ]
    for subject in subjects:
        find_images(subject.source, "any")  # says so if there is none
    if not subjects:
        raise UserError(
            f"--data_dir: '{folder}' holds no folder of images; give the folder of the DreamBooth dataset."
        )
    return subjects


def _prompts(block: str) -> tuple[str, ...]:
    """Lines such as `'a {0} {1} in the snow'.format(unique_token, class_token),`."""
    texts = [ast.literal_eval(quoted) for quoted in re.findall(r"('[^'\n]*'|\"[^\"\n]*\")\s*\.format", block)]
    return tuple(text.replace("{0} {1}", "{}") for text in texts)


@dataclass(frozen=True, kw_only=True)
class DreamBench(Bench):
    """The protocol on the dataset in `data`. `train` is a YAML file of training settings for every method, or
    a folder with one METHOD.yaml for each (none: the methods' defaults); `encoders` by name: clip (images
    and prompts), and perhaps dino and dinov2. `references`: teach with and compare with all images of a
    subject, or its first one. `limits`: at most so many subjects and prompts."""

    data: Path
    encoders: dict[str, MetricEncoder]
    train: Path | None = None
    references: Literal["all", "one"] = "all"
    limits: tuple[int | None, int | None] = (None, None)

    title = "DreamBench"

    def __post_init__(self):
        """Reports mistakes in the settings and the dataset before anything is trained."""
        self.subjects  # noqa: B018
        for name in self.methods:
            if name not in NOT_TRAINED:
                self.settings(name)

    def flags(self, name: str) -> list[str]:
        """The words before the benchmark's own flags on the command line of `customize train`."""
        if self.train is None:
            return []
        return [str(self.train / f"{name}.yaml" if self.train.is_dir() else self.train)]

    def settings(self, name: str) -> dict[str, Any]:
        """Training settings that differ from the defaults of the configurations; UserError for those that
        the benchmark decides."""
        given = read_given(configs(find_method(name)), self.flags(name))
        if decided := given.keys() & DECIDED:
            raise UserError(
                f"--train_file: the benchmark decides '{min(decided)}' itself; remove it from '{self.train}'."
            )
        made, _ = complete(name, given | {"pretrained_model_name_or_path": self.base})
        changed = {
            f.name: v for part in made for f in fields(part) if (v := getattr(part, f.name)) != default(f)
        }
        return {setting: value for setting, value in changed.items() if setting not in DECIDED}

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
    def main(self) -> str:
        """The encoder of subject fidelity in the plot, of `nearest` and of `diversity`."""
        return "dino" if "dino" in self.encoders else "clip"

    def drawing(self) -> dict[str, str]:
        digest = hashlib.sha256(
            "\n".join(p for subject in self.subjects for p in subject.prompts).encode()
        ).hexdigest()
        return {
            "bench": f"DreamBench, {len(self.subjects)} subjects",
            "base model": " ".join([self.base, *self.base_settings.values()]),
            "prompts": f"{len(self.subjects[0].prompts)} a subject, sha256 {digest[:12]}",
            "images": f"{self.repeats} for each prompt, seeds from {self.seed}, PNG",
            "sampling": str(self.sampling),
            "references": "all images of the subject"
            if self.references == "all"
            else "its first image alone",
        }

    def teaching(self, name: str) -> str:
        if name in NOT_TRAINED:
            return self.label(name)
        changed = ", ".join(f"{key} {value}" for key, value in sorted(self.settings(name).items()))
        return f"{changed or 'default settings'}; {self.dataset}"

    @cached_property
    def dataset(self) -> str:
        """Number and digest of all images; computed once, as it reads every file."""
        found = [image.digest for subject in self.subjects for image in find_images(subject.source, "any")]
        return f"{len(found)} images, sha256 {hashlib.sha256(''.join(found).encode()).hexdigest()[:12]}"

    def scoring(self) -> dict[str, str]:
        every = "every real one of the subject" if self.references == "all" else "the one reference"
        return {
            **{name: encoder.stamp for name, encoder in self.encoders.items()},
            "pairing": (
                f"every image with {every}; CLIP-T: every image with its own prompt, class word for subject"
            ),
            "nearest, diversity": f"by {self.main}",
            "real row": "every real image of a subject with every other one",
            "scale": "cosines from -1 to 1, not multiplied",
            "averages": (
                "over images within a subject, then over subjects; intervals are 95 % bootstrap over subjects"
            ),
            "note": (
                "the images that teach are also compared with, as in the paper: read 'nearest' "
                "beside the real row"
            ),
        }

    def label(self, name: str) -> str:
        return {"base": "Base model", "real": "Real images"}.get(name, name.replace("_", " "))

    def words(self, name: str, subject: Subject) -> str:
        if name in NOT_TRAINED:
            return subject.word
        return f"{WORD if self.learns_words(name) else TOKEN} {subject.word}"

    def learns_words(self, name: str) -> bool:
        return hasattr(find_method(name).Config, "placeholder_token")

    def training(self, name: str, subject: Subject) -> list[str]:
        words = ["--placeholder_token", WORD, "--initializer_token", subject.word.split()[-1]]
        return [name, *self.flags(name), *(words if self.learns_words(name) else [])]

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        real = [read_image_file(image)[0] for image in find_images(subject.source, "any")]
        chosen = real if self.references == "all" or name == "real" else real[:1]
        return write_images(chosen, folder)

    def score(self, taken: ImagesToScore) -> tuple[dict, dict, list[dict]]:
        if not taken.images:
            return self.ceiling(taken.references), {}, []
        scores: dict[str, float | None] = {}
        each: list[dict] = [{} for _ in taken.images]
        drawn = {name: encoder(taken.images) for name, encoder in self.encoders.items()}
        real = {name: encoder(taken.references) for name, encoder in self.encoders.items()}
        for name in self.encoders:
            scores[FIDELITY[name]] = subject_score(drawn[name], real[name])
            for entry, feature in zip(each, drawn[name], strict=True):
                entry[FIDELITY[name]] = subject_score(feature[None], real[name])
        texts = self.clip.texts(taken.prompts)
        scores["clip_t"] = prompt_score(drawn["clip"], texts)
        for entry, feature, text in zip(each, drawn["clip"], texts, strict=True):
            entry["clip_t"] = prompt_score(feature[None], text[None])
        scores["nearest"] = nearest_score(drawn[self.main], real[self.main])
        several = drawn[self.main].unflatten(0, (-1, self.repeats))
        scores["diversity"] = diversity(several) if self.repeats > 1 else None
        scores["drift"] = drift(self.clip(taken.before), self.clip(taken.prior)) if taken.before else None
        return scores, {}, each

    def ceiling(self, real: list[Image.Image]) -> dict[str, float | None]:
        """The scores of real images: each one against every other one."""
        if len(real) < 2:
            return {}
        features = {name: encoder(real) for name, encoder in self.encoders.items()}
        scores: dict[str, float | None] = {
            FIDELITY[name]: ceiling_score(some) for name, some in features.items()
        }
        return scores | {"nearest": nearest_score(features[self.main])}

    def results(self, protocol: dict[str, str], methods: list[dict]) -> dict:
        rows = [subject["scores"] for method in methods for subject in method["subjects"]]
        axes = ["clip_t", FIDELITY[self.main]]
        metrics = {n: METRICS[n] for n in METRICS if n in axes or any(row.get(n) is not None for row in rows)}
        common = {
            "title": self.title,
            "protocol": protocol,
            "axes": axes,
            "metrics": metrics,
            "methods": methods,
        }
        return common | {"published": PUBLISHED}


FIDELITY = {"clip": "clip_i", "dino": "dino", "dinov2": "dinov2"}


def metric(title: str, better: str, about: str) -> dict[str, str]:
    return {"title": title, "better": better, "style": "number", "about": about}


METRICS = {
    "dino": metric("DINO", "higher", "mean cosine of every image with every reference, class token of DINO"),
    "clip_i": metric(
        "CLIP-I", "higher", "mean cosine of every image with every reference, CLIP's image encoder"
    ),
    "dinov2": metric(
        "DINOv2", "higher", "mean cosine of every image with every reference, class token of DINOv2"
    ),
    "clip_t": metric("CLIP-T", "higher", "mean cosine of every image with its own prompt, by CLIP"),
    "drift": metric(
        "Drift", "lower", "(1 - cosine) / 2 between what the class word alone draws before and after, by CLIP"
    ),
    "diversity": metric("Diversity", "higher", "mean distance (1 - cosine) between two images of one prompt"),
    "nearest": metric(
        "Nearest",
        "",
        "mean cosine with the nearest reference (real row: the nearest other image): more is copying",
    ),
}

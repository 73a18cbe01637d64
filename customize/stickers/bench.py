"""StickerBench's subjects, prompts and reference images: DreamBench with ground truth."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from customize.files import write_text
from customize.runs.output import save_image
from customize.stickers.backgrounds import BACKGROUNDS
from customize.stickers.scene import COUNTS, FACTORS, Scene, draw_pose, draw_scene
from customize.stickers.world import DATA, Drawing, World

SEEN = ("white", "grass", "stone", "yellow")  # backgrounds of the reference images
PHRASES: dict[str, dict[str, object]] = {  # fields of a scene, and what a prompt says for each value
    "background": {phrase: name for name, phrase in BACKGROUNDS.items()},
    **{
        name: {word: word for word in words if word}
        for name, words in FACTORS.items()
        if name not in ("background", "count")
    },
    "count": {phrase.strip(): number for number, phrase in COUNTS.items() if phrase},
}


@lru_cache
def _bench() -> dict:
    return json.loads((DATA / "bench.json").read_text())


def bench_subjects(quick: bool = False) -> list[Drawing]:
    """Held-out drawings: twenty of known classes, ten of classes that pretraining never saw; `quick`: six
    known ones."""
    subjects = [Drawing(word, studio) for word, studio in _bench()["subjects"]]
    return subjects[: _bench()["quick"]["subjects"]] if quick else subjects


def bench_prompts(quick: bool = False) -> list[str]:
    """Prompts with `{}` in the subject's place."""
    return _bench()["prompts"][: _bench()["quick"]["prompts"] if quick else None]


def parse_prompt(prompt: str) -> dict[str, object]:
    """The fields of `Scene` that a prompt speaks of, and the values asked for; `companion` is the class
    beside the subject."""
    found: dict[str, object] = {}
    beside = re.search(r" next to a (\w+)", prompt)
    if beside:
        found["companion"] = beside[1]
        prompt = prompt.replace(beside[0], "")
    for field, phrases in PHRASES.items():
        for phrase, value in phrases.items():
            if re.search(rf"\b{re.escape(phrase)}\b", prompt):
                found[field] = value
                prompt = prompt.replace(phrase, "")  # "blue water" says nothing of the subject's colour
    return found


PREPOSITIONS = {
    "on",
    "in",
    "at",
    "under",
    "against",
    "with",
    "near",
    "behind",
    "inside",
    "over",
    "by",
    "wearing",
}
GRAMMAR = {"a", "an", "the", "of", "and", "photo", "picture", "image", "sticker", "copies"}


TOKEN = r"<\w+>|\w+"  # a word of a prompt, or a placeholder
FIXED = sorted((phrase for named in PHRASES.values() for phrase in named), key=len, reverse=True)
FIXED_PHRASE = re.compile(rf"\b(?:{'|'.join(map(re.escape, FIXED))})\b")


@lru_cache
def vocabulary() -> set[str]:
    """The things and studios that the base model was trained on, and words that hold a prompt together."""
    things = {drawing.word for drawing in World().drawings()}
    return GRAMMAR | things | {studio.lower() for studio in World().studios}


def not_understood(prompt: str, own: str = "") -> list[str]:
    """The words of a prompt that no scene of the base model's training shows, in order; phrases from their
    preposition on. `own` holds the words that a run has learned."""
    text = re.sub(r" next to (?=an? )", " and ", f" {prompt.lower()} ")
    known = vocabulary() | set(re.findall(TOKEN, own.lower()))
    found: list[str] = []
    after_preposition = False
    for word in re.findall(rf"{FIXED_PHRASE.pattern}|{TOKEN}", text):
        if FIXED_PHRASE.fullmatch(word):
            if word.split()[0] in PREPOSITIONS:
                after_preposition = False
            elif after_preposition:  # "with a red hat"
                found[-1] += f" {word}"
        elif word in PREPOSITIONS:
            found, after_preposition = [*found, word], True
        elif after_preposition:
            found[-1] += f" {word}"
        elif word not in known:
            found.append(word)
    return found


def reference_scenes(subject: Drawing, seed: int = 0) -> list[Scene]:
    """Four scenes of the subject in different poses: the images that a user would bring."""
    rng = np.random.default_rng(seed)
    return [
        Scene(subject, background, pose=draw_pose(rng), seed=seed + i) for i, background in enumerate(SEEN)
    ]


def write_references(
    folder: Path, subject: Drawing, words: str, seed: int = 0, masks: bool = False
) -> list[Image.Image]:
    """Writes the reference images as a user's folder of images, each with a caption that calls the
    subject `words`; with `masks` also where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for i, scene in enumerate(reference_scenes(subject, seed)):
        image, mask = draw_scene(scene, World())
        save_image(image, folder / f"{i}.png")
        if masks:
            save_image(mask, folder / f"{i}.mask.png")
        images.append(image)
    for i, text in enumerate(reference_captions(subject, words)):
        write_text(folder / f"{i}.txt", text)
    return images


def reference_captions(subject: Drawing, words: str) -> list[str]:
    """The captions of the reference images, which call the subject `words`."""
    return [f"a {words} {BACKGROUNDS[scene.background]}" for scene in reference_scenes(subject)]


def true_scene(subject: Drawing, prompt: str, seed: int) -> Image.Image:
    """A rendered image of the subject as the prompt asks: what a perfect method could draw."""
    rng = np.random.default_rng(seed)
    fields = dict(parse_prompt(prompt))
    if "companion" in fields:
        fields["companion"] = Drawing(str(fields["companion"]), subject.studio)
    scene = replace(Scene(subject, pose=draw_pose(rng), seed=seed), **fields)  # type: ignore[arg-type]
    return draw_scene(scene, World())[0]

"""The embedded base model, `stickers`: the only place in the core that knows its name and its files."""

import os
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from customize.errors import nearest, shortened
from customize.stickers import ENCODER, MODEL

NAME = "stickers"
MODEL_FILES = {".safetensors", ".sft", ".ckpt", ".pt", ".gguf"}  # endings of whole models in one file
RARE = ("sks", "ohwx")  # words without a meaning that its text encoder reads as one token
GUIDANCE = 4.0  # that suits it best; pipelines draw with 7.5 otherwise
SUBJECT_ENCODER = ENCODER
IMAGE_ENCODER = MODEL / "image_encoder"


def is_embedded(name: str | Path) -> bool:
    """Whether a name of a base model, encoder or image encoder means the embedded one."""
    return str(name) == NAME


def folder_of(name: str | Path) -> str:
    """Where a base model lies: the embedded one's folder, or the name itself (a folder or a hub id)."""
    return str(MODEL) if is_embedded(name) else str(name)


def is_single_file(name: str | Path) -> bool:
    """Whether a base model's name means one file of weights, as model sites offer them."""
    return Path(name).suffix.lower() in MODEL_FILES and not os.path.isdir(name)


def lasting_name(name: str | Path) -> str:
    """A base model's name that is valid in every working folder: the absolute path of a local folder or
    file."""
    is_place = name and not is_embedded(name) and os.path.exists(name)  # also of names that no file can have
    return str(Path(name).resolve()) if is_place else str(name)


SURE = 0.7  # median below which images are no scenes of the world: its own have .73 or more, photographs .61


def warn_of_photographs(images: Sequence[Image.Image]) -> None:
    """Warns if images are unlike the scenes of the sticker world, such as photographs: the judge is not sure
    of any two things in them."""
    from customize.stickers.judge import judge

    squares = [ImageOps.fit(image.convert("RGB"), (128, 128)) for image in images]
    if judge(squares).pair_probability.topk(2, 1).values.sum(1).median() < SURE:
        warnings.warn(
            f"the images are unlike the drawn scenes that {NAME}, the embedded base model, was trained on: "
            "it draws photographs as blots; name a real model with --pretrained_model_name_or_path.",
            stacklevel=2,
        )


def not_understood(prompt: str, own: str = "") -> str:
    """A sentence that names the words of a prompt which the embedded base model does not know; empty if
    it knows all. `own` holds the words that a run has learned."""
    from customize.stickers.bench import not_understood

    return _does_not_know(not_understood(prompt, own))


def _does_not_know(unknown: Sequence[str]) -> str:
    from customize.stickers.bench import vocabulary

    if not unknown:
        return ""
    words = ", ".join(f"'{shortened(phrase)}'" for phrase in unknown[:5])
    return (
        f"{NAME}, the embedded base model, does not know {words}: it knows things such as a fox, a bus or an "
        "apple, places such as 'on the beach' or 'under a night sky', colours, sizes and counts."
        f"{nearest(unknown[0], vocabulary())}"
    )


def warn_of_words(
    captions: Collection[str],
    learned: Collection[str] = (),
    class_prompts: Collection[str] = (),
    starting_words: Collection[str] = (),
    prompts: Collection[str] = (),
) -> None:
    """Warns of the words of a training that the embedded base model does not know. `learned` are its new
    words; if there are none, the first unknown word of each caption is the subject's own. `prompts` may also
    say what the captions say."""
    from customize.stickers.bench import not_understood

    strange: dict[str, list[str]] = {"the captions": []}
    rare: set[str] = set()
    for caption in captions:
        found = not_understood(caption, " ".join(learned))
        own, others = ([], found) if learned else (found[:1], found[1:])
        rare.update(word for word in own if " " not in word and word not in RARE)
        strange["the captions"] += others
    for word in sorted(rare):
        warnings.warn(
            f"the captions: {NAME}, the embedded base model, reads '{shortened(word)}' in several pieces, "
            f"and loses the rest of the prompt beside it; call the subject {' or '.join(RARE)}.",
            stacklevel=2,
        )
    own_words = " ".join(captions)
    for flag, texts, known in (
        ("--class_prompt", class_prompts, ""),
        ("--initializer_token", starting_words, ""),
        ("--validation_prompt", prompts, own_words),
    ):
        strange[flag] = [phrase for text in texts for phrase in not_understood(text, known)]
    for where, phrases in strange.items():
        if phrases:
            warnings.warn(f"{where}: {_does_not_know(list(dict.fromkeys(phrases)))}", stacklevel=2)


def context_prompts() -> list[str]:
    """Prompts of the sticker world with {} for a subject: every background, and every other thing that
    captions speak of, on several backgrounds."""
    from customize.stickers import Drawing, Scene, caption
    from customize.stickers.scene import FACTORS

    subject, backgrounds = Drawing("fox", "flat"), FACTORS["background"]
    scenes = [Scene(subject, background) for background in backgrounds]
    for name, values in FACTORS.items():
        if name != "background":
            choices = [value for value in values if value != getattr(scenes[0], name)]
            scenes += [
                Scene(subject, backgrounds[(5 * i + j) % len(backgrounds)], **{name: value})
                for i, value in enumerate(choices)
                for j in range(0, len(backgrounds), 3)
            ]
    found = [caption(scene, "{}") for scene in scenes]
    for i, word in enumerate(("bus", "apple", "house", "cat", "car", "tree")):
        scene = Scene(subject, backgrounds[i], companion=Drawing(word, "flat"))
        found.append(caption(scene, "{}", companion=word))
    return found


def subject_score(
    references: Sequence[Image.Image],
) -> Callable[[list[tuple[str, Image.Image]]], dict[str, float]]:
    """Scores drawn (prompt, image) pairs by the sticker world's judge, both 0 to 1: `subject_fidelity`, the
    probability of the drawing that the references show; `prompt_fidelity`, the share of what the prompts ask
    for that the images show.

    For choosing among checkpoints only: the judge has seen held-out drawings, so nothing may learn from it.
    """
    from customize.stickers.bench import parse_prompt
    from customize.stickers.judge import judge

    drawing = judge(references).most_seen()

    def score(drawn: list[tuple[str, Image.Image]]) -> dict[str, float]:
        verdicts = judge([image for _, image in drawn])
        obeyed = [verdicts.obeys(i, parse_prompt(prompt)) for i, (prompt, _) in enumerate(drawn)]
        found = [hit for hits in obeyed for hit in hits.values()]
        fidelity = float(np.mean([verdicts.belief(i, drawing) for i in range(len(drawn))]))
        return {"subject_fidelity": fidelity, "prompt_fidelity": float(np.mean(found)) if found else 1.0}

    return score

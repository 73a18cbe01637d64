"""Choosing among a run's steps by what matters: likeness x obedience of validation pictures, rather than a loss."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from customize.data import Concept
from customize.errors import UserError
from customize.pictures import Picture, read_picture
from customize.prompts import class_word, subject_words

Scorer = Callable[[list[tuple[str, Image.Image]]], dict[str, float]]  # drawn (prompt, picture) to identity and control


def sticker_scorer(references: Sequence[Image.Image]) -> Scorer:
    """Of the embedded world, by its judge: how probable it finds the drawing that the references show, and what it finds of all
    that the prompts ask for, both 0 to 1. It only chooses among checkpoints; nothing learns from it."""
    from customize.stickers.bench import said
    from customize.stickers.judge import judge

    drawing = judge(references).most_seen()

    def score(drawn: list[tuple[str, Image.Image]]) -> dict[str, float]:
        verdicts = judge([picture for _, picture in drawn])
        obeyed = [verdicts.obeys(i, said(prompt)) for i, (prompt, _) in enumerate(drawn)]
        found = [hit for hits in obeyed for hit in hits.values()]
        identity = float(np.mean([verdicts.belief(i, drawing) for i in range(len(drawn))]))
        return {"identity": identity, "control": float(np.mean(found)) if found else 1.0}

    return score


def encoder_scorer(references: Sequence[Image.Image], concept: Concept, initializer: str, clip, dino) -> Scorer:
    """Of any other model: DINO's mean cosine with the references, and CLIP's with the prompts, class word in the subject's
    place (see `customize.metrics`)."""
    from customize.metrics import prompt_score, subject_score

    real, words = dino(references), subject_words(concept.instance_prompt)
    word = class_word(concept.instance_prompt, concept.class_prompt, initializer)

    def score(drawn: list[tuple[str, Image.Image]]) -> dict[str, float]:
        pictures = [picture for _, picture in drawn]
        texts = clip.texts([prompt.replace(words, word) for prompt, _ in drawn])
        return {"identity": subject_score(dino(pictures), real), "control": prompt_score(clip(pictures), texts)}

    return score


def make_scorer(settings, base: str, concepts: list[Concept], pictures: Sequence[Picture], initializer: str = "") -> Scorer:
    """The scorer of a run: the sticker world's judge on the embedded base model, CLIP and DINO on others.

    UserError for several concepts, which would need a score each, and where the metrics' libraries are missing.
    """
    if len(concepts) != 1:
        raise UserError("--validation_metric score is for one concept; use loss with several.")
    words = subject_words(concepts[0].instance_prompt)
    if not words or any(words not in prompt for prompt in settings.validation_prompt):
        raise UserError(f"--validation_prompt: the score needs '{words or 'an --instance_prompt'}' in every validation prompt.")
    references = [read_picture(picture)[0] for picture in pictures]
    if base == "stickers":
        return sticker_scorer(references)
    try:
        from customize.metrics import load_clip, load_dino
    except ModuleNotFoundError as error:
        raise UserError(f"--validation_metric score needs {error.name}: pip install 'customize[evaluate]'.") from error
    clip, dino = load_clip(settings.validation_clip, "validation_clip"), load_dino(settings.validation_dino, "validation_dino")
    return encoder_scorer(references, concepts[0], initializer, clip, dino)

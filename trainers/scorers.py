"""Choosing among a run's steps by subject fidelity times prompt fidelity of validation images, rather than
by a loss."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from customize import embedded
from customize.data.concepts import Concept
from customize.data.images import ImageFile, read_image_file
from customize.errors import UserError
from customize.prompts import class_word, subject_words

Scorer = Callable[
    [list[tuple[str, Image.Image]]], dict[str, float]
]  # drawn (prompt, image) pairs to subject_fidelity and prompt_fidelity


def encoder_scorer(
    references: Sequence[Image.Image], concept: Concept, initializer: str, clip: Any, dino: Any
) -> Scorer:
    """The scorer for real models: the mean cosine with the references by DINO, and with the prompts by
    CLIP, with the class word in the subject's place (see `customize.metrics`)."""
    from customize.metrics import prompt_score, subject_score

    real, words = dino(references), subject_words(concept.instance_prompt)
    word = class_word(concept.instance_prompt, concept.class_prompt, initializer)

    def score(drawn: list[tuple[str, Image.Image]]) -> dict[str, float]:
        images = [image for _, image in drawn]
        texts = clip.texts([prompt.replace(words, word) for prompt, _ in drawn])
        return {
            "subject_fidelity": subject_score(dino(images), real),
            "prompt_fidelity": prompt_score(clip(images), texts),
        }

    return score


def check_scored(settings: Any, concepts: list[Concept]) -> None:
    """UserError for several concepts, and for a validation prompt without the subject's words."""
    if len(concepts) != 1:
        raise UserError("--validation_metric score is for one concept; use loss with several.")
    words = subject_words(concepts[0].instance_prompt)
    if not words or any(words not in prompt for prompt in settings.validation_prompt):
        raise UserError(
            f"--validation_prompt: the score needs '{words or 'an --instance_prompt'}' in every validation "
            "prompt."
        )


def make_scorer(
    settings: Any, base: str, concepts: list[Concept], images: Sequence[ImageFile], initializer: str = ""
) -> Scorer:
    """The scorer of a run: the judge on the embedded base model, CLIP and DINO on others.

    UserError for several concepts, and where the metrics' libraries are missing.
    """
    check_scored(settings, concepts)
    references = [read_image_file(image)[0] for image in images]
    if embedded.is_embedded(base):
        return embedded.subject_score(references)
    try:
        from customize.metrics import load_clip, load_dino
    except ModuleNotFoundError as error:
        raise UserError(
            f"--validation_metric score needs {error.name}: pip install 'customize[evaluate]'."
        ) from error
    clip, dino = (
        load_clip(settings.validation_clip, "validation_clip"),
        load_dino(settings.validation_dino, "validation_dino"),
    )
    return encoder_scorer(references, concepts[0], initializer, clip, dino)

"""The base model that is embedded in the toolkit, `stickers`: the one place of the core that knows its name
and its files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from customize.stickers import ENCODER, MODEL

NAME = "stickers"
GUIDANCE = 4.0  # that suits it best; pipelines draw with 7.5 otherwise
SUBJECT_ENCODER = ENCODER
IMAGE_ENCODER = MODEL / "image_encoder"


def is_embedded(name: str | Path) -> bool:
    """Whether a base model, an encoder or an image encoder of this name is the embedded one."""
    return str(name) == NAME


def folder_of(name: str | Path) -> str:
    """Where a base model lies: the embedded one's folder, or the name itself (a folder or a hub id)."""
    return str(MODEL) if is_embedded(name) else str(name)


def lasting_name(name: str | Path) -> str:
    """A base model's name by which it is found from every working folder: of a local folder, its absolute
    path."""
    return str(Path(name).resolve()) if not is_embedded(name) and Path(name).is_dir() else str(name)


def subject_score(
    references: Sequence[Image.Image],
) -> Callable[[list[tuple[str, Image.Image]]], dict[str, float]]:
    """Scores drawn (prompt, image) pairs by the sticker world's judge, both 0 to 1: `identity`, how probable
    it finds the drawing that the references show; `control`, the share of what the prompts ask for that it
    finds.

    For choosing among checkpoints only: the judge has seen held-out drawings, so nothing may learn from it.
    """
    from customize.stickers.bench import parse_prompt
    from customize.stickers.judge import judge

    drawing = judge(references).most_seen()

    def score(drawn: list[tuple[str, Image.Image]]) -> dict[str, float]:
        verdicts = judge([image for _, image in drawn])
        obeyed = [verdicts.obeys(i, parse_prompt(prompt)) for i, (prompt, _) in enumerate(drawn)]
        found = [hit for hits in obeyed for hit in hits.values()]
        identity = float(np.mean([verdicts.belief(i, drawing) for i in range(len(drawn))]))
        return {"identity": identity, "control": float(np.mean(found)) if found else 1.0}

    return score

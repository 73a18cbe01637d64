"""StickerBench's measures: ground truth of the sticker world, its judge and its CLIP, for one subject's
images by one method."""

from collections.abc import Sequence

import numpy as np

from customize.app.bench.bench import ImagesToScore
from customize.metrics import (
    ClipEncoder,
    ceiling_score,
    copy_rate,
    diversity,
    drift,
    prompt_score,
    subject_only,
    subject_score,
)
from customize.stickers import World
from customize.stickers.bench import SEEN, parse_prompt, true_scene
from customize.stickers.judge import Verdicts, judge, trusted
from customize.stickers.measure import SCALES, Fit, best_fit

# what makes a drawing hard to recognise, for judge and correlation: prompts with it count for prompt
# fidelity alone
RESHAPED = {"tint", "size", "orientation", "count", "companion"}


def metric(title: str, better: str, style: str, about: str) -> dict[str, str]:
    return {"title": title, "better": better, "style": style, "about": about}


METRICS = {
    "subject_fidelity": metric(
        "Subject fidelity",
        "higher",
        "percent",
        "images in which the judge sees this very drawing, of 537; others of its class do not count",
    ),
    "correlation": metric(
        "Correlation",
        "higher",
        "number",
        "subject fidelity without a judge: best masked correlation of the true drawing with the image",
    ),
    "class": metric(
        "Class kept",
        "higher",
        "percent",
        "images in which the judge sees the subject's class, by any studio",
    ),
    "prompt_fidelity": metric(
        "Prompt fidelity", "higher", "percent", "share of what the prompts ask for that the judge finds"
    ),
    "clip_i": metric(
        "CLIP-I", "higher", "number", "mean cosine with the four reference images, by the world's own CLIP"
    ),
    "clip_i_masked": metric("CLIP-I masked", "higher", "number", "the same for the subject alone, on white"),
    "clip_t": metric(
        "CLIP-T", "higher", "number", "mean cosine with the prompt, class word in the subject's place"
    ),
    "drift": metric(
        "Drift",
        "lower",
        "number",
        "(1 - cosine) / 2 between what the class word alone draws before and after",
    ),
    "taken": metric(
        "Class leakage",
        "lower",
        "percent",
        "images of the class word alone in which the judge sees the subject",
    ),
    "diversity": metric(
        "Diversity", "higher", "number", "mean distance (1 - cosine) between two images of one prompt"
    ),
    "copy": metric(
        "Copying",
        "lower",
        "number",
        "cosine with the nearest reference, less that with a true view of the scene asked for",
    ),
    "background_leak": metric(
        "Background leak", "lower", "percent", "where a new background is asked for: a reference's background"
    ),
    "pose_leak": metric(
        "Pose leak",
        "lower",
        "percent",
        "size, tilt and mirroring like a reference's; real scenes show chance",
    ),
}


def score(taken: ImagesToScore, clip: ClipEncoder, seed: int = 0) -> tuple[dict, dict, list[dict]]:
    """Scores by metric, prompt fidelity by factor, and each image's scores; None where a measure has
    nothing to go on."""
    drawing, verdicts, every = (
        taken.subject.source,
        judge(taken.images),
        [parse_prompt(prompt) for prompt in taken.prompts],
    )
    obeyed = [verdicts.obeys(i, asked) for i, asked in enumerate(every)]
    plain = [not RESHAPED & asked.keys() for asked in every]
    shown = [
        float(verdicts.shows(i, drawing)) if known and trusted("drawing") else None
        for i, known in enumerate(plain)
    ]
    sprite = World().sprite(drawing)
    fits = [
        best_fit(image, sprite) if known else None for image, known in zip(taken.images, plain, strict=True)
    ]
    each = [
        {
            "subject_fidelity": seen,
            "correlation": fit and fit.correlation,
            "prompt_fidelity": mean(list(found.values())),
        }
        for seen, fit, found in zip(shown, fits, obeyed, strict=True)
    ]
    scores = {
        name: mean([entry[name] for entry in each])
        for name in ("subject_fidelity", "correlation", "prompt_fidelity")
    }
    kept = [verdicts.shows_class(i, drawing.word) for i, known in enumerate(plain) if known]
    scores["class"] = mean(kept) if trusted("class") else None
    scores |= (
        by_clip(taken, clip, fits, seed) | prior_scores(taken, clip) | leaks(taken, every, verdicts, fits)
    )
    return {name: scores.get(name) for name in METRICS}, by_factor(obeyed), each


def score_unknown(taken: ImagesToScore, clip: ClipEncoder) -> tuple[dict, dict, list[dict]]:
    """The same for a subject that is no drawing of the sticker world: without what needs the true drawing.

    Without images (the row of the subject's real ones), the references are compared with each other.
    """
    real = clip(taken.references)
    if not taken.images:
        return {"clip_i": ceiling_score(real) if len(real) > 1 else None}, {}, []
    verdicts, images = judge(taken.images), clip(taken.images)
    asked = [parse_prompt(prompt) for prompt in taken.prompts]
    obeyed = [verdicts.obeys(i, factors) for i, factors in enumerate(asked)]
    each = [
        {"clip_i": subject_score(image[None], real), "prompt_fidelity": mean(list(found.values()))}
        for image, found in zip(images, obeyed, strict=True)
    ]
    scores: dict[str, float | None] = {
        "prompt_fidelity": mean([entry["prompt_fidelity"] for entry in each]),
        "clip_i": subject_score(images, real),
        "clip_t": prompt_score(images, clip.texts(taken.prompts)),
        "diversity": diversity(images.unflatten(0, (-1, taken.repeats))) if taken.repeats > 1 else None,
        "drift": drift(clip(taken.before), clip(taken.prior)) if taken.before and taken.prior else None,
    }
    return scores, by_factor(obeyed), each


def by_factor(obeyed: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Prompt fidelity by factor of the scene."""
    names = dict.fromkeys(name for found in obeyed for name in found)
    return {name: mean([found[name] for found in obeyed if name in found]) for name in names}


def mean(values: Sequence[float | bool | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def by_clip(
    taken: ImagesToScore, clip: ClipEncoder, fits: list[Fit | None], seed: int
) -> dict[str, float | None]:
    """The field's own measures, by the world's CLIP."""
    images, references = clip(taken.images), clip(taken.references)
    views = [
        true_scene(taken.subject.source, prompt, 20_000 + seed + i) for i, prompt in enumerate(taken.prompts)
    ]
    return {
        "clip_i": subject_score(images, references),
        "clip_i_masked": masked_score(taken, clip, fits),
        "clip_t": prompt_score(images, clip.texts(taken.prompts)),
        "diversity": diversity(images.unflatten(0, (-1, taken.repeats))) if taken.repeats > 1 else None,
        "copy": copy_rate(images, references, clip(views)),
    }


def masked_score(taken: ImagesToScore, clip: ClipEncoder, fits: list[Fit | None]) -> float | None:
    """CLIP-I of the subject alone: where the drawing fits best in an image, and its masks in the
    references."""
    sprite, side = World().sprite(taken.subject.source), taken.images[0].width
    crops = [
        subject_only(p, fit.mask(sprite, side)) for p, fit in zip(taken.images, fits, strict=True) if fit
    ]
    masks = taken.masks or [best_fit(image, sprite).mask(sprite, image.width) for image in taken.references]
    real = [subject_only(p, mask) for p, mask in zip(taken.references, masks, strict=True)]
    return subject_score(clip(crops), clip(real)) if crops else None


def prior_scores(taken: ImagesToScore, clip: ClipEncoder) -> dict[str, float | None]:
    """Drift and class leakage: what happened to the class word."""
    if not taken.prior:
        return {}
    verdicts = judge(taken.prior)
    seen = (
        [verdicts.shows(i, taken.subject.source) for i in range(len(taken.prior))]
        if trusted("drawing")
        else []
    )
    moved = drift(clip(taken.before), clip(taken.prior)) if taken.before else None
    return {"drift": moved, "taken": mean(seen)}


def leaks(
    taken: ImagesToScore, every: list[dict], verdicts: Verdicts, fits: list[Fit | None]
) -> dict[str, float | None]:
    """Whether background or pose of the reference images come back in images that should not have them."""
    new = [
        i for i, asked in enumerate(every) if asked.get("background") not in SEEN and trusted("background")
    ]
    poses = [best_fit(image, World().sprite(taken.subject.source)) for image in taken.references]
    return {
        "background_leak": mean([verdicts.factor(i, "background") in SEEN for i in new]),
        "pose_leak": mean([any(alike(fit, pose) for pose in poses) for fit in fits if fit is not None]),
    }


def alike(a: Fit, b: Fit) -> bool:
    """The same tilt and mirroring, and the same size within one step."""
    near = abs(SCALES.index(a.scale) - SCALES.index(b.scale)) <= 1
    return near and a.angle == b.angle and a.mirrored == b.mirrored

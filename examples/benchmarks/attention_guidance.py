"""Two things of one sentence: CONFORM and Attend-and-Excite beside plain drawing.

Sentences of two things ("a fox next to a bus on the beach") are drawn from the same noise without guidance
and with each kind. `--things class`: classes that the embedded base model knows; `learned`: held-out
drawings by two learned words (the runs of multi_concept.py's MCPL); `injected`: held-out drawings by the
encoder that ships. The judge says whether both are in the image. Prints a Markdown table with 95 %
bootstrap intervals over sentences, and the seconds an image takes.

    python examples/benchmarks/attention_guidance.py --things class --sentences 32
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from customize.metrics import confidence_interval
from customize.pipelines import load_pipeline, load_subject_pipeline
from customize.pipelines.guidance import AttentionGuidance
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import BACKGROUNDS, Drawing, World, draw_scene
from customize.stickers.bench import bench_subjects, reference_scenes
from customize.stickers.judge import judge, sides_of

KINDS: dict[str, dict[str, Any] | None] = {
    "no guidance": None,
    "CONFORM, 0.01": {"kind": "conform", "strength": 0.01},
    "CONFORM, 0.02": {"kind": "conform", "strength": 0.02},
    "Attend-and-Excite, 0.01": {"kind": "attend_and_excite", "strength": 0.01},
    "Attend-and-Excite, 0.02": {"kind": "attend_and_excite", "strength": 0.02},
}
RUNS = Path("runs/multi_concept")


class Sentence(NamedTuple):
    """A prompt, its two phrases, what else the pipeline is given, and what they mean: classes or drawings."""

    prompt: str
    phrases: list[str]
    options: dict[str, Any]
    things: list[Any]
    pipe: Any


def of_classes(count: int) -> list[Sentence]:
    rng, world, pipe = np.random.default_rng(0), World(), load_pipeline("stickers")
    words = sorted({drawing.word for drawing in world.drawings(core=True)})
    places = list(BACKGROUNDS.values())
    found = []
    for _ in range(count):
        pair = [words[i] for i in rng.choice(len(words), 2, replace=False)]
        prompt = f"a {pair[0]} next to a {pair[1]} {places[rng.integers(len(places))]}"
        found.append(Sentence(prompt, pair, {}, pair, pipe))
    return found


def pairs_of(count: int) -> list[tuple[Drawing, Drawing]]:
    subjects = [drawing for drawing in bench_subjects() if not World().is_unknown(drawing.word)]
    return [(subjects[2 * i], subjects[2 * i + 1]) for i in range(count)]


def of_learned(count: int) -> list[Sentence]:
    found = []
    for pair in pairs_of(10):
        folder = RUNS / "-".join(str(drawing).replace(" ", "-") for drawing in pair) / "mcpl"
        if folder.is_dir():
            pipe = load_pipeline(folder)
            for place in BACKGROUNDS.values():
                prompt = f"a <one> next to a <two> {place}"
                found.append(Sentence(prompt, ["<one>", "<two>"], {}, list(pair), pipe))
    return found[:: max(len(found) // count, 1)][:count]


def of_injected(count: int) -> list[Sentence]:
    pipe, places, found = load_subject_pipeline("stickers"), list(BACKGROUNDS.values()), []
    for i in range(count):
        pair = pairs_of(10)[i % 10]
        phrases = [f"<s> {pair[0].word}", f"<s2> {pair[1].word}"]
        shown = [[draw_scene(s, World())[0] for s in reference_scenes(drawing)] for drawing in pair]
        prompt = f"a {phrases[0]} next to a {phrases[1]} {places[(5 * i) % len(places)]}"
        images = dict(zip(("<s>", "<s2>"), shown, strict=True))
        found.append(Sentence(prompt, phrases, {"subject_images": images}, list(pair), pipe))
    return found


THINGS: dict[str, Callable[[int], list[Sentence]]] = {
    "class": of_classes,
    "learned": of_learned,
    "injected": of_injected,
}


def counts_of(asked: list[Sentence], images: list[Image.Image]) -> list[int]:
    """How many of the two things each image shows: classes among the two most probable ones, very drawings
    where one is the most probable of the left or the right part."""
    verdicts, sides = judge(images), judge([side for image in images for side in sides_of(image)])
    counts = []
    for i, sentence in enumerate(asked):
        parts = {sides.best(2 * i), sides.best(2 * i + 1)}
        seen = [
            thing in parts if isinstance(thing, Drawing) else verdicts.shows_beside(i, thing)
            for thing in sentence.things
        ]
        counts.append(sum(seen))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--things", choices=THINGS, default="class")
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/attention_guidance"))
    options = parser.parse_args()
    quiet_libraries()
    options.output.mkdir(parents=True, exist_ok=True)
    asked, sheets = THINGS[options.things](options.sentences), []
    print(f"\n{len(asked)} sentences, {options.things}\n\n| | both | one | neither | s an image |")
    print("|---|---|---|---|---|")
    for name, settings in KINDS.items():
        begin, images = time.perf_counter(), []
        for i, (prompt, phrases, given, _, pipe) in enumerate(asked):
            pipe.set_progress_bar_config(disable=True)
            call = {"num_inference_steps": 25, "guidance_scale": 4.0, **given}
            if settings is not None:
                call |= AttentionGuidance(pipe, prompt, phrases, **settings).arguments
            images += pipe(prompt, generator=torch.Generator().manual_seed(i), **call).images
        seconds = (time.perf_counter() - begin) / len(asked)
        shown = counts_of(asked, images)
        low, high = confidence_interval([float(count == 2) for count in shown])
        shares = [np.mean([count == wanted for count in shown]) for wanted in (2, 1, 0)]
        print(
            f"| {name} | {shares[0]:.0%} ({low:.0%} to {high:.0%}) | {shares[1]:.0%} | {shares[2]:.0%} | "
            f"{seconds:.2f} |",
            flush=True,
        )
        sheets.append(images[:8])
    side = sheets[0][0].width
    page = Image.new("RGB", (side * 8, side * len(sheets)))
    for y, row in enumerate(sheets):
        for x, image in enumerate(row):
            page.paste(image, (x * side, y * side))
    save_image(page, options.output / f"{options.things}.png")


if __name__ == "__main__":
    main()

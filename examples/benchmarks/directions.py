"""NoiseCLR on the sticker world: do directions, found without captions, match what scenes differ in?

    python examples/benchmarks/directions.py --steps 300

96 rendered scenes teach. Then eight prompts are drawn from the same noise plainly and with each direction,
and the judge says what an image shows. Of the judged values that a direction adds, such as a background or a
tint, one is the most frequent: match is the share of the images that get it. Purity is the share of this one
factor among all changes of factors; kept are the images that still show their thing. Directions that are not
trained are the baseline. Prints a Markdown table and a line for each direction; the run with its contact
sheet is in --output.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import customize
from customize.pipelines.directions import Direction, directed
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import World, draw_scene
from customize.stickers.judge import Verdicts, judge, trusted
from customize.stickers.scene import FACTORS, draw_factors

THINGS = ("fox", "bus", "apple", "cat", "house", "tree", "car", "dog")
MATCHED = 0.5  # share of images that must get one value, for a direction to have found it


class Found(NamedTuple):
    """What a direction does: the value it adds most often, in which share of images, and how purely."""

    factor: str
    value: Any
    match: float
    purity: float
    kept: float


def write_scenes(folder: Path, count: int = 96) -> Path:
    """Random scenes, in which tints, light, weather and the like are frequent."""
    world, rng = World(), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = draw_factors(rng, world, world.drawings(core=True), extras=0.7)
        save_image(draw_scene(scene, world)[0], folder / f"{i:03d}.png")
    return folder


def draw(pipe: Any) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(i) for i in range(len(THINGS))]
    prompts = [f"a {thing}" for thing in THINGS]
    return pipe(prompts, generator=generators, num_inference_steps=15, guidance_scale=4.0).images


def effect(plain: Verdicts, steered: Verdicts) -> Found:
    """What changed between two drawings of the same prompts and noise."""
    added: Counter = Counter()
    changed = dict.fromkeys((name for name in FACTORS if trusted(name)), 0)
    for name in changed:
        for i in range(len(THINGS)):
            value = steered.factor(i, name)
            if value != plain.factor(i, name):
                changed[name] += 1
                added[name, value] += 1
    kept = mean(steered.shows_class(i, thing) for i, thing in enumerate(THINGS))
    if not added:
        return Found("", "", 0.0, 0.0, kept)
    [((factor, value), count)] = added.most_common(1)
    return Found(factor, value, count / len(THINGS), changed[factor] / sum(changed.values()), kept)


def effects(run: Path, count: int, strength: float) -> list[Found]:
    pipe = customize.load_pipeline("stickers")
    pipe.set_progress_bar_config(disable=True)
    plain, found = judge(draw(pipe)), []
    for number in range(count):
        with directed(pipe, [Direction(run, number, strength)]):
            found.append(effect(plain, judge(draw(pipe))))
    return found


def row(name: str, found: Sequence[Found]) -> str:
    matched = [own for own in found if own.match >= MATCHED]
    values = {(own.factor, own.value) for own in matched}
    cells = f"{len(matched)} of {len(found)}", len(values), len({factor for factor, _ in values})
    purity = f"{mean(own.purity for own in matched):.2f}" if matched else ""
    numbers = f"{mean(own.match for own in found):.2f} | {purity} | {mean(own.kept for own in found):.0%}"
    return f"| {name} | {' | '.join(map(str, cells))} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--directions", type=int, default=20)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/directions"))
    options = parser.parse_args()
    quiet_libraries()
    images, rows, lines = write_scenes(options.output / "scenes"), [], []
    for name, steps, rate in (("random", 1, 1e-12), ("trained", options.steps, 1e-2)):
        run = options.output / name
        if not (run / "run.json").exists():
            customize.train(
                "noiseclr",
                instance_data_dir=images,
                output_dir=run,
                num_directions=options.directions,
                max_train_steps=steps,
                learning_rate=rate,
            )
        found = effects(run, options.directions, options.strength)
        rows.append(row(name, found))
        lines += [f"{name} {i}: {own}" for i, own in enumerate(found)]
    print("| | found a value | values | factors | match | purity | kept |\n|---|---|---|---|---|---|---|")
    print("\n".join([*rows, "", *lines]))


if __name__ == "__main__":
    main()

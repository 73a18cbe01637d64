"""ITI-GEN on the sticker world: are images balanced over an attribute once its words are learned from images?

    python examples/benchmarks/inclusion.py background
    python examples/benchmarks/inclusion.py background light --thing bus

For each category of the named factors, forty rendered scenes of any thing are the references. Before, the
thing is drawn from its plain prompt; then as often from the prompts of all combinations. The judge says what
each image shows. Shown: images with the category whose word the prompt says (before: as many as chance would
give); divergence: Kullback-Leibler, in nats, of the shown categories from equal shares (0 is balanced; images
without any of the categories count as one more, of share 0.001); kept: images of the thing. Prints a Markdown
table; a sheet and the run are in --output.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import customize
from customize.attributes import inclusive_prompts
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import World, draw_scene
from customize.stickers.judge import Verdicts, judge
from customize.stickers.scene import FACTORS, draw_factors
from customize.trainers.validation import sheet

REFERENCES = 40


def categories(factor: str) -> dict[str, Any]:
    """The words of a factor's values; of tints and borders only those that are there."""
    values = [value for value in FACTORS[factor] if value or factor in ("light", "weather", "size")]
    return {f"<{factor}-{i}>": value for i, value in enumerate(values)}


def write_references(folder: Path, factors: Sequence[str], thing: str) -> Path:
    """Reference scenes of every category, and the list of concepts."""
    world, rng, rows = World(), np.random.default_rng(1), []
    subjects = world.drawings(core=True)
    for factor in factors:
        for word, value in categories(factor).items():
            place = folder / "references" / word.strip("<>")
            place.mkdir(parents=True, exist_ok=True)
            for i in range(REFERENCES):
                scene = replace(draw_factors(rng, world, subjects, extras=0), **{factor: value})
                save_image(draw_scene(scene, world)[0], place / f"{i}.png")
            rows.append({"instance_data_dir": str(place), "instance_prompt": f"a {thing} {word}"})
    (folder / "concepts.json").write_text(json.dumps(rows))
    return folder / "concepts.json"


def draw(pipe: Any, prompts: Sequence[str]) -> list[Image.Image]:
    """An image for each prompt; image i is drawn with the seed i."""
    images = []
    for start in range(0, len(prompts), 16):
        part = list(prompts[start : start + 16])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        options = {"num_inference_steps": 25, "guidance_scale": 4.0}
        images += pipe(part, generator=generators, **options).images
    return images


def divergence(shown: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Kullback-Leibler divergence of the shown values from equal shares of `wanted`, in nats."""
    counts, target = Counter(shown), (1 - 0.001) / len(wanted)
    shares = {value: count / len(shown) for value, count in counts.items()}
    others = sum(share for value, share in shares.items() if value not in wanted)
    parts = [(share, target) for value, share in shares.items() if value in wanted]
    return sum(share * math.log(share / aim) for share, aim in [*parts, (others, 0.001)] if share)


def rows_of(name: str, verdicts: Verdicts, asked: Sequence[dict[str, Any]], thing: str) -> list[str]:
    """Table rows, one for each factor."""
    found, count = [], len(asked)
    kept = sum(verdicts.shows_class(i, thing) for i in range(count)) / count
    for factor in asked[0]:
        shown = [verdicts.factor(i, factor) for i in range(count)]
        hits = sum(value == own[factor] for value, own in zip(shown, asked, strict=True)) / count
        apart = divergence(shown, list(categories(factor).values()))
        found.append(f"| {name} | {factor} | {hits:.0%} | {apart:.2f} | {kept:.0%} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("factors", nargs="+", choices=FACTORS)
    parser.add_argument("--thing", default="fox")
    parser.add_argument("--images", type=int, default=72, help="images before and after")
    parser.add_argument("--output", type=Path, default=Path("runs/inclusion"))
    options = parser.parse_args()
    quiet_libraries()
    folder = options.output / "-".join(options.factors)
    words = {word: value for factor in options.factors for word, value in categories(factor).items()}
    attributes = [list(categories(factor)) for factor in options.factors]
    run = customize.train(
        "iti_gen",
        concepts_list=write_references(folder, options.factors, options.thing),
        attributes=",".join("+".join(own) for own in attributes),
        output_dir=folder / "run",
        overwrite_output_dir=True,
    )
    prompts = inclusive_prompts(f"a {options.thing} {{}}", attributes)
    order = [list(prompts)[i % len(prompts)] for i in range(options.images)]
    asked = [dict(zip(options.factors, (words[word] for word in own), strict=True)) for own in order]
    before = draw(customize.load_pipeline("stickers"), [f"a {options.thing}"] * options.images)
    after = draw(customize.load_pipeline(run), [prompts[own] for own in order])
    save_image(sheet([("", image) for image in after[:36]], 12), folder / "after.png")
    print("| | attribute | shown | divergence | kept |\n|---|---|---|---|---|")
    for name, images in (("plain prompt", before), ("inclusive words", after)):
        print("\n".join(rows_of(name, judge(images), asked, options.thing)))


if __name__ == "__main__":
    main()

"""Two subjects in one prompt: are both there, each with its own looks? `python
examples/benchmarks/two_subjects.py [RUN]`

Fifty pairs of held-out drawings of different classes, "a <s> A next to a <s2> B", once freely and once with
each subject's region given (left and right half). The judge names the drawings in the left and in the right
half of an image:

* both: either order, each half shows one of the two subjects;
* one: only one of them is found;
* swapped looks: a half shows another studio's drawing of one of the two classes, by the studio of the other
  subject.

Two rows stand beside: real scenes of the same pairs, what the judge finds where both are there; and the base
model with the class words alone, of which only the classes count ("swapped looks" cannot be): what text alone
can place.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from customize.app.bench.stickers import drawings_of
from customize.pipelines import load_subject_pipeline
from customize.prompts import without_words
from customize.runs.output import save_image
from customize.stickers import Drawing, Scene, World, draw_scene
from customize.stickers.bench import reference_scenes
from customize.stickers.judge import judge
from customize.stickers.scene import Pose

PAIRS = 50


def pairs() -> list[tuple[Drawing, Drawing]]:
    """Of known classes and different studios, so that swapped looks can be told; the same at every run."""
    found = [(a, b) for a, b in itertools.permutations(drawings_of("known"), 2) if a.studio != b.studio]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:PAIRS]]


def references(drawing: Drawing) -> list[Image.Image]:
    return [draw_scene(scene, World())[0] for scene in reference_scenes(drawing)]


def halves(image: Image.Image) -> list[Image.Image]:
    """The middle squares of the left and of the right half."""
    side = image.width
    return [image.crop((x, side // 4, x + side // 2, side // 4 + side // 2)) for x in (0, side // 2)]


def region(left: bool, side: int = 64) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side) if left else (side // 2, 0, side, side))
    return mask


def verdict(image: Image.Image, a: Drawing, b: Drawing) -> str:
    seen = judge(halves(image))
    found = [seen.best(i) for i in range(2)]
    if set(found) == {a, b}:
        return "both"
    if Drawing(a.word, b.studio) in found or Drawing(b.word, a.studio) in found:
        return "swapped looks"
    return "one" if a in found or b in found else "neither"


def classes(image: Image.Image, a: Drawing, b: Drawing) -> str:
    """The verdict for images that were told the class words only."""
    seen = judge(halves(image))
    found = {seen.best(i).word for i in range(2)}
    return "both" if found == {a.word, b.word} else "one" if found & {a.word, b.word} else "neither"


def real(a: Drawing, b: Drawing, seed: int) -> Image.Image:
    """Both drawings side by side on grass."""
    return draw_scene(Scene(a, "grass", companion=b, pose=Pose(scale=0.6), seed=seed), World())[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default="stickers")
    parser.add_argument("--output", type=Path, default=Path("runs/two_subjects"))
    options = parser.parse_args()
    pipe = load_subject_pipeline(options.run)
    pipe.set_progress_bar_config(disable=True)
    masks = {"<s>": region(True), "<s2>": region(False)}
    counts: dict[str, list[str]] = {"real scenes": [], "base model": [], "free": [], "with regions": []}
    options.output.mkdir(parents=True, exist_ok=True)
    for i in range(0, PAIRS, 5):
        some = pairs()[i : i + 5]
        named = [f"a <s> {a.word} next to a <s2> {b.word} on green grass" for a, b in some]
        images = [{"<s>": references(a), "<s2>": references(b)} for a, b in some]
        counts["real scenes"] += [verdict(real(a, b, i + k), a, b) for k, (a, b) in enumerate(some)]
        for name, prompts, subjects in (
            ("base model", [without_words(prompt) for prompt in named], {}),
            ("free", named, {"subject_images": images}),
            ("with regions", named, {"subject_images": images, "subject_masks": masks}),
        ):
            generators = [torch.Generator().manual_seed(i + k) for k in range(len(some))]
            drawn = pipe(
                prompts, **subjects, guidance_scale=4.0, num_inference_steps=25, generator=generators
            ).images
            say = verdict if subjects else classes
            counts[name] += [say(image, a, b) for image, (a, b) in zip(drawn, some, strict=True)]
            for k, image in enumerate(drawn):
                save_image(image, options.output / f"{i + k:02d}-{name.split()[0]}.png")
    for name, found in counts.items():
        shares = {
            verdict: f"{found.count(verdict) / len(found):.0%}"
            for verdict in ("both", "one", "swapped looks", "neither")
        }
        print(f"{name:14s}", shares)


if __name__ == "__main__":
    main()

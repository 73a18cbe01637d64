"""Break-for-Make from the first image to the last: a thing in a style, from a few images of each.

    python examples/break_for_make.py --pair 0 --steps 300

It uses the sticker world: the content is a drawing of one studio, the style are drawings of other classes
by another studio, and the truth, the same class by the other studio, is never shown. The three runs and a
sheet are written to --output: the content's images, those of the style, what is drawn, and (in the
sticker world) the truth.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import customize
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, draw_scene
from customize.stickers.bench import bench_subjects
from customize.stickers.scene import draw_pose

CONTENT, STYLE = "sks", "ohwx"  # rare words, each one token of the embedded model
SHOWN = ("white", "grass", "stone", "yellow")  # backgrounds of the images that teach
NEW = ("beach", "snow", "night", "bricks", "wood", "water", "sunset", "pink")
AUXILIARY = 3  # sets for each of the first two stages


def pairs() -> list[tuple[Drawing, Drawing]]:
    """Drawings of a class by one studio, and by another that the base model has not seen it by."""
    world = World()
    known = {(own.word, own.studio) for own in world.drawings(core=True)}
    targets = [own for own in bench_subjects() if not world.is_unknown(own.word)]
    studios = sorted({studio for _, studio in known})
    found = []
    for target in targets:
        sources = [s for s in studios if s != target.studio and (target.word, s) in known]
        if sources:
            found.append((Drawing(target.word, sources[0]), target))
    return found


def write_images(folder: Path, drawings: Sequence[Drawing], words: Sequence[str], seed: int = 0) -> str:
    """Captioned scenes, one for each of the drawings; returns the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, (drawing, word) in enumerate(zip(drawings, words, strict=True)):
        background = SHOWN[i % len(SHOWN)]
        scene = Scene(drawing, background, pose=draw_pose(rng), seed=seed + i)
        save_image(draw_scene(scene, World())[0], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {word} {BACKGROUNDS[background]}", encoding="utf-8")
    return str(folder)


def others(studio: str, word: str, count: int, seed: int) -> list[Drawing]:
    """Drawings of other classes by a studio, as the base model knows them."""
    own = [d for d in World().drawings(core=True) if d.studio == studio and d.word != word]
    return [own[i] for i in np.random.default_rng(seed).choice(len(own), count, replace=False)]


def write_sticker_sets(folder: Path, content: Drawing, target: Drawing) -> dict[str, Any]:
    """The images of a pair, and three auxiliary sets of each kind; returns their places."""
    style = others(target.studio, target.word, 6, 0)
    places = {
        "content": write_images(folder / "content", [content] * 4, [f"{CONTENT} {content.word}"] * 4),
        "style": write_images(folder / "style", style, [f"{STYLE} {own.word}" for own in style]),
    }
    studios = sorted({own.studio for own in World().drawings(core=True)} - {target.studio})
    styles, contents = [], []
    for i in range(AUXILIARY):
        studio = studios[i % len(studios)]
        some = others(studio, target.word, 4, 10 + i)
        place = write_images(folder / f"styles{i}", some, [f"{studio} {own.word}" for own in some], i)
        styles.append({"instance_data_dir": place, "instance_prompt": f"{studio} style"})
        [thing] = others(studio, target.word, 1, 20 + i)
        place = write_images(folder / f"contents{i}", [thing] * 4, [str(thing)] * 4, i)
        contents.append({"instance_data_dir": place, "instance_prompt": f"a {thing}"})
    both = [
        {"instance_data_dir": places["content"], "instance_prompt": f"a {CONTENT} {content.word}"},
        {"instance_data_dir": places["style"], "instance_prompt": f"a {STYLE} thing"},
    ]
    for name, sets in (("styles", styles), ("contents", contents), ("both", both)):
        places[name] = str(folder / f"{name}.json")
        Path(places[name]).write_text(json.dumps(sets), encoding="utf-8")
    return places


def three_stages(folder: Path, places: dict[str, Any], **settings: Any) -> Path:
    """The run of the last stage. `settings` go to every stage; without `styles` and `contents` among the
    places, there are no auxiliary sets."""
    runs = {}
    for stage, sets in (("content", "styles"), ("style", "contents")):
        runs[stage] = customize.train(
            "break_for_make",
            stage=stage,
            instance_data_dir=places[stage],
            instance_prompt="an image",
            auxiliary_list=places.get(sets, ""),
            output_dir=folder / stage,
            overwrite_output_dir=True,
            **settings,
        )
    return customize.train(
        "break_for_make",
        stage="joint",
        content_run=runs["content"],
        style_run=runs["style"],
        concepts_list=places["both"],
        output_dir=folder / "joint",
        overwrite_output_dir=True,
        **settings,
    )


def draw(run: str | Path, words: str) -> list[Image.Image]:
    """The words on eight backgrounds."""
    pipe = customize.load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a {words} {BACKGROUNDS[name]}" for name in NEW]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images


def sheet(rows: Sequence[Sequence[Image.Image]], size: int = 128) -> Image.Image:
    page = Image.new("RGB", (size * max(map(len, rows)), size * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image.convert("RGB").resize((size, size)), (x * size, y * size))
    return page


def truth(target: Drawing) -> list[Image.Image]:
    return [draw_scene(Scene(target, name, seed=i), World())[0] for i, name in enumerate(NEW)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=int, default=0, help="which pair of the sticker world")
    parser.add_argument("--steps", type=int, default=300, help="of each stage")
    parser.add_argument("--output", type=Path, default=Path("runs/break_for_make"))
    options = parser.parse_args()
    quiet_libraries()
    content, target = pairs()[options.pair]
    places = write_sticker_sets(options.output / "images", content, target)
    run = three_stages(options.output, places, max_train_steps=options.steps)
    given = [
        [Image.open(path) for path in sorted(Path(places[name]).glob("*.png"))]
        for name in ("content", "style")
    ]
    words = f"{STYLE} {CONTENT} {target.word}"
    save_image(sheet([*given, draw(run, words), truth(target)]), options.output / "sheet.png")
    print(f"'a {words} on the beach': {options.output / 'sheet.png'}")


if __name__ == "__main__":
    main()

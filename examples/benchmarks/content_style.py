"""Content in a style: Break-for-Make beside one LoRA on both sets, merges of two LoRAs, and its own
parts, on pairs of the sticker world whose truth exists and is never shown.

    python examples/benchmarks/content_style.py --pairs 12 --steps 150

Content: four scenes of a drawing by one studio. Style: six drawings of other classes by another. Asked
for: the first class by the second studio, on eight new backgrounds. The judge says whether the class is
kept, which studio drew it, and how much of the prompt is followed; the correlation is with the true
drawing. Prints a Markdown table with 95 % bootstrap intervals over pairs; sheets of all pairs are in
--output. Rows that are there are not made again, so that two processes (`--part 0 2`, `--part 1 2`) can share
the pairs, and a last one without `--part` prints the table.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import customize
from customize.app.merge import MergeConfig, merge_loras
from customize.metrics import confidence_interval
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import Drawing, World
from customize.stickers.judge import judge
from customize.stickers.measure import masked_correlation

sys.path.insert(0, str(Path(__file__).parents[1]))
from break_for_make import CONTENT, NEW, STYLE, draw, pairs, sheet, three_stages, truth, write_sticker_sets

LORA = {
    "rank": 16,
    "lora_layers": "all",
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "train_batch_size": 4,
}
MERGES = ("cat", "svd", "linear", "ties", "dare", "orthogonal", "k_lora")
SCORES = ("class kept", "studio", "correlation", "background")


def plain(folder: Path, name: str, **data) -> Path:
    """A DreamBooth LoRA, trained unless it is there."""
    if not (folder / name / "run.json").exists():
        customize.train("dreambooth", output_dir=folder / name, **data, **LORA)
    return folder / name


def merged(folder: Path, how: str, runs: list[Path]) -> Path:
    output = folder / f"merge-{how}"
    config = MergeConfig(
        output_dir=str(output), how=how, rank=0 if how == "cat" else 32, overwrite_output_dir=True
    )
    return merge_loras([str(run) for run in runs], config)


def rows_of(folder: Path, content: Drawing, target: Drawing, steps: int) -> dict[str, Callable]:
    """What each row draws with: a run, and the words of the prompt."""
    places = write_sticker_sets(folder / "images", content, target)
    few, word = {"max_train_steps": steps}, target.word
    alone = {name: value for name, value in places.items() if name not in ("styles", "contents")}
    both, of_studio = f"{STYLE} {CONTENT} {word}", f"{target.studio} {CONTENT} {word}"

    def one(name: str) -> Path:
        return plain(folder, name, instance_data_dir=places[name], instance_prompt=name, **few)

    def halves() -> Path:
        runs = {f"{stage}_run": folder / "whole" / stage for stage in ("content", "style")}
        data = {
            "concepts_list": places["both"],
            "output_dir": folder / "halves",
            "overwrite_output_dir": True,
        }
        still = {"max_train_steps": 1, "learning_rate": 1e-12}
        return customize.train("break_for_make", stage="joint", **runs, **data, **still)

    def stages(name: str, places: dict = places, **settings) -> Path:
        if not (folder / name / "joint" / "run.json").exists():
            three_stages(folder / name, places, **few, **settings)
        return folder / name / "joint"

    def zipped() -> Path:
        return customize.train(
            "ziplora",
            loras=[str(one(name)) for name in ("content", "style")],
            concepts_list=places["both"],
            output_dir=folder / "ziplora",
            overwrite_output_dir=True,
        )

    found: dict[str, Callable] = {
        "base model, the studio's name": lambda: ("stickers", str(target)),
        "Break-for-Make": lambda: (stages("whole"), both),
        "one LoRA on both sets": lambda: (
            plain(folder, "together", concepts_list=places["both"], max_train_steps=2 * steps),
            both,
        ),
        "content LoRA, the studio's name": lambda: (one("content"), of_studio),
        "two LoRAs, ziplora": lambda: (zipped(), both),
    }
    for how in MERGES:
        found[f"two LoRAs, {how}"] = lambda how=how: (
            merged(folder, how, [one("content"), one("style")]),
            both,
        )
    return found | {
        "Break-for-Make without the last stage": lambda: (halves(), both),
        "Break-for-Make without orthogonal halves": lambda: (stages("random", orthogonal=False), both),
        "Break-for-Make without auxiliary sets": lambda: (stages("alone", alone), both),
        "Break-for-Make, preconditioned": lambda: (stages("pre", precondition=True), both),
    }


def images_of(folder: Path, make: Callable) -> list[Image.Image]:
    """The images of a row, drawn unless they are there."""
    if len(list(folder.glob("*.png"))) < len(NEW):
        images = draw(*make())
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            save_image(image, folder / f"{i}.png")
        print(folder, flush=True)
    return read(folder)


def read(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


def scores(images: list, target: Drawing) -> dict[str, float]:
    """Means over the images."""
    verdicts, sprite = judge(images), World().sprite(target)
    count = range(len(images))
    return {
        "class kept": float(np.mean([verdicts.shows_class(i, target.word) for i in count])),
        "studio": float(np.mean([verdicts.best(i).studio == target.studio for i in count])),
        "correlation": float(np.mean([masked_correlation(image, sprite) for image in images])),
        "background": float(np.mean([verdicts.factor(i, "background") == NEW[i] for i in count])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=150, help="of each stage and LoRA")
    parser.add_argument("--rows", default="", help="only rows whose names begin so")
    parser.add_argument("--output", type=Path, default=Path("runs/content_style"))
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), help="this part of the pairs, of so many"
    )
    options = parser.parse_args()
    quiet_libraries()
    part, of = options.part
    chosen = pairs()[: options.pairs][part::of]
    folders = {target: options.output / str(target).replace(" ", "-") for _, target in chosen}
    rows = {target: rows_of(folders[target], content, target, options.steps) for content, target in chosen}
    table: dict[str, list[dict[str, float]]] = {}
    for name in next(iter(rows.values())):
        if not name.startswith(options.rows):
            continue
        for target, own in rows.items():
            images = images_of(folders[target] / "drawn" / name, own[name])
            table.setdefault(name, []).append(scores(images, target))
    for target, folder in folders.items():
        drawn = [read(folder / "drawn" / name) for name in table if (folder / "drawn" / name).exists()]
        save_image(sheet([*drawn, truth(target)]), folder / "sheet.png")
    print(f"\n{options.steps} steps\n\n| | pairs | {' | '.join(SCORES)} |\n" + "|---" * 6 + "|")
    for name, some in table.items():
        cells = [str(len(some))]
        for key in SCORES:
            values = [own[key] for own in some]
            low, high = confidence_interval(values)
            cells.append(f"{sum(values) / len(values):.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

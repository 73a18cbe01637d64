"""Builds the sticker world's sprite atlas from the three npm packages of drawings.

    npm pack emoji-datasource@16.0.0 emoji-datasource-google@16.0.0
    npm pack emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python examples/stickers/prepare.py FOLDER_WITH_THE_TGZ_FILES [--full atlas_folder] [--size 64]

It rewrites `customize/stickers/data/` (the core vocabulary and the held-out drawings, which the package
ships) and, with `--full`, an atlas of all 1,015 classes for pretraining. The choice of held-out drawings
depends on a fixed seed alone.
"""

import argparse
import io
import json
import random
import tarfile
from pathlib import Path

from PIL import Image

import customize.stickers as stickers

CATEGORIES = (
    "Objects",
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Smileys & Emotion",
)
PACKAGES = {
    "flat": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/{}.png"),
    "cartoon": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/{}.png"),
    "3d": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/{}.webp"),
}
HELD_OUT_DRAWINGS, HELD_OUT_CLASSES, SEED = 60, 30, 2409


def read_drawings(folder: Path, size: int) -> dict[str, dict[str, Image.Image]]:
    """Every studio's drawings by code point, as RGBA squares of `size` pixels."""
    drawings: dict[str, dict[str, Image.Image]] = {}
    for studio, (package, pattern) in PACKAGES.items():
        prefix, suffix = pattern.split("{}")
        drawings[studio] = {}
        with tarfile.open(folder / package) as archive:
            for member in archive:
                if member.name.startswith(prefix) and member.name.endswith(suffix):
                    image = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
                    drawings[studio][member.name[len(prefix) : -len(suffix)]] = image.resize(
                        (size, size), Image.LANCZOS
                    )
    return drawings


def read_classes(folder: Path, drawings: dict) -> list[dict]:
    """Every class drawn by all three studios, with its word: the chosen one, or the emoji's short name."""
    core = json.loads((Path(stickers.__file__).parent / "vocabulary.json").read_text())["core"]
    with tarfile.open(folder / "emoji-datasource-16.0.0.tgz") as archive:
        emoji = json.loads(archive.extractfile("package/emoji.json").read())
    classes = []
    for entry in sorted(emoji, key=lambda e: e["sort_order"]):
        code, short = Path(entry["image"]).stem, entry["short_name"]
        if entry["category"] in CATEGORIES and all(code in drawn for drawn in drawings.values()):
            word = core.get(short) or short.replace("_", " ").replace("-", " ")
            if short not in core and word in core.values():
                word += " " + entry["category"].split()[0].lower()
            classes.append(
                {
                    "word": word,
                    "code": code,
                    "category": entry["category"],
                    "core": short in core,
                    "held_out": [],
                }
            )
    return classes


def hold_out(classes: list[dict]) -> None:
    """Marks the drawings and the classes that no pretraining may see."""
    choose = random.Random(SEED)
    core = [c for c in classes if c["core"]]
    for i, entry in enumerate(choose.sample(core, HELD_OUT_DRAWINGS)):
        entry["held_out"] = [list(PACKAGES)[i % 3]]
    nameable = [
        c
        for c in classes
        if not c["core"] and c["word"].isalpha() and not c["category"].startswith("Smileys")
    ]
    for entry in choose.sample(nameable, HELD_OUT_CLASSES):
        entry["held_out"] = list(PACKAGES)


def write_atlas(folder: Path, classes: list[dict], drawings: dict, size: int) -> None:
    """One lossless image, a row for each class and a column for each studio, wrapped into 8 columns of
    classes."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, studios = stickers.ATLAS_COLUMNS, list(PACKAGES)
    rows = -(-len(classes) // columns)
    sheet = Image.new("RGBA", (columns * len(studios) * size, rows * size))
    for i, entry in enumerate(classes):
        for j, studio in enumerate(studios):
            sheet.paste(
                drawings[studio][entry["code"]],
                (((i % columns) * len(studios) + j) * size, (i // columns) * size),
            )
    sheet.save(folder / "atlas.webp", lossless=True, method=6)
    listed = ",\n".join(" " + json.dumps(entry) for entry in classes)
    (folder / "world.json").write_text(
        f'{{"size": {size}, "studios": {json.dumps(studios)}, "classes": [\n{listed}\n]}}\n'
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    parser.add_argument("--full", type=Path, help="also write the atlas of every class here")
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    drawings = read_drawings(options.packages, options.size)
    classes = read_classes(options.packages, drawings)
    hold_out(classes)
    if options.full:
        write_atlas(options.full, classes, drawings, options.size)
    write_atlas(stickers.DATA, [c for c in classes if c["core"] or c["held_out"]], drawings, options.size)


if __name__ == "__main__":
    main()

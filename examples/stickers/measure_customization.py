"""How well a method teaches held-out drawings. `python examples/stickers/measure_customization.py`

For each of six held-out drawings (four pictures each) and method: likeness (masked correlation of the drawing with pictures of
six unseen scenes), obedience (the background is the one asked for), before and after; and the prior, what the class word
alone draws before and after. Writes a Markdown table, JSON, and one sheet of pictures for each method.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from customize.app.cli import quiet_libraries
from customize.app.demo import UNSEEN, draw
from customize.data import DataConfig
from customize.loading import load_base
from customize.pipelines import load_pipeline
from customize.stickers import BACKGROUNDS, Drawing, World
from customize.stickers.measure import background_of, masked_correlation
from customize.trainers.__main__ import ModelConfig, launch
from customize.trainers.dreambooth import DreamBoothConfig
from customize.trainers.settings import TrainConfig
from customize.trainers.textual_inversion import TextualInversionConfig

SUBJECTS = [
    Drawing("fox", "flat"),
    Drawing("turtle", "cartoon"),
    Drawing("mushroom", "3d"),
    Drawing("bus", "flat"),
    Drawing("apple", "cartoon"),
    Drawing("snowman", "3d"),
]


def settings(method: str, subject: Drawing, folder: Path, steps: int):
    """Data, training and method settings, and the words that mean the subject."""
    common = {"output_dir": str(folder), "train_batch_size": 4, "lr_scheduler": "cosine", "overwrite_output_dir": True}
    if method == "textual_inversion":
        words = "<subject>"
        options = TextualInversionConfig(placeholder_token=words, initializer_token=subject.word, num_vectors=4)
        train = TrainConfig(max_train_steps=steps, learning_rate=1e-2, **common)
    else:
        words = f"sks {subject.word}"
        prior = {"with_prior_preservation": True, "prior_source": "teacher", "prior_loss_weight": 0.5}
        options = DreamBoothConfig(rank=16, lora_layers="all", **(prior if method == "dreambooth-prior" else {}))
        train = TrainConfig(max_train_steps=steps, learning_rate=1e-3, **common)
    data = DataConfig(instance_data_dir=str(folder / "pictures"), instance_prompt=f"a {words}", resolution=64)
    data.class_prompt = f"a {subject.word}"
    return data, train, options, words


def score(pictures: list[Image.Image], sprite: np.ndarray, backgrounds=UNSEEN) -> dict[str, float]:
    likeness = float(np.mean([masked_correlation(picture, sprite) for picture in pictures]))
    return {
        "likeness": likeness,
        "obedience": float(np.mean([background_of(p) == b for p, b in zip(pictures, backgrounds, strict=True)])),
    }


def measure(method: str, subject: Drawing, folder: Path, steps: int) -> tuple[dict, list[Image.Image]]:
    world, base = World(), load_base("stickers")
    data, train, options, words = settings(method, subject, folder, steps)
    sprite, taught = world.sprite(subject), write_pictures(folder / "pictures", subject, words)
    subject_prompts = [f"a {words} {BACKGROUNDS[b]}" for b in UNSEEN]
    class_prompts = [f"a {subject.word} {BACKGROUNDS[b]}" for b in UNSEEN]
    before_class = draw(base, class_prompts)
    begin = time.time()
    launch(method.split("-")[0], ModelConfig(), data, train, options)
    seconds, pipe = time.time() - begin, load_pipeline(folder)
    after, after_class = draw(pipe, subject_prompts), draw(pipe, class_prompts)
    drift = float(
        np.mean(
            [
                np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 255
                for a, b in zip(before_class, after_class, strict=True)
            ]
        )
    )
    row = {"method": method, "subject": str(subject), "seconds": round(seconds), "prior drift": drift}
    for name, pictures in {"own pictures": taught, "before": before_class, "after": after, "class after": after_class}.items():
        likeness = score(pictures, sprite, UNSEEN[: len(pictures)])
        row |= {f"likeness {name}": likeness["likeness"]}
        if name != "own pictures":
            row |= {f"obedience {name}": likeness["obedience"]}
    return row, [*taught[:2], *before_class[:3], *after, *after_class[:3]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/measured"))
    parser.add_argument("--methods", nargs="+", default=["dreambooth", "textual_inversion"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS))
    options = parser.parse_args()
    quiet_libraries()
    rows = []
    for method in options.methods:
        strips = []
        for subject in SUBJECTS[: options.subjects]:
            row, pictures = measure(
                method, subject, options.output / f"{method}-{subject.studio}-{subject.word}", options.steps
            )
            rows.append(row)
            strips.append(pictures)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            (options.output / "results.json").write_text(json.dumps(rows, indent=1))
        sheet(strips).save(options.output / f"{method}.png")
    (options.output / "results.md").write_text(table(rows))
    print(table(rows))


def sheet(strips: list[list[Image.Image]], side: int = 96) -> Image.Image:
    """A row a subject: two of its pictures; three of the class before; six of the subject after; three of the class after."""
    page = Image.new("RGB", (len(strips[0]) * side + 36, len(strips) * side), "white")
    for y, strip in enumerate(strips):
        for x, picture in enumerate(strip):
            gap = 12 * sum(x >= start for start in (2, 5, 11))
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x * side + gap, y * side))
    return page


def table(rows: list[dict]) -> str:
    """Means over subjects, a line a method."""
    names = [name for name in rows[0] if isinstance(rows[0][name], float | int)]
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        lines.append(f"| {method} | " + " | ".join(f"{np.mean([row[name] for row in chosen]):.2f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Several words from images that hold several things: MCPL with and without each of its regularizers.

For pairs of held-out drawings of known classes, four scenes of the two side by side teach two words at
once. Each word is then drawn alone on eight backgrounds. By the correlation with the true drawings,
without a judge: the share of images that show the word's drawing rather than the other one of the pair,
and the word's correlation; by the judge, the share in which it recognises the word's drawing. Prints a
Markdown table.

    python examples/benchmarks/multi_concept.py --pairs 3 --steps 300
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from customize.pipelines import load_pipeline
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, draw_scene
from customize.stickers.bench import bench_subjects
from customize.stickers.judge import judge
from customize.stickers.measure import masked_correlation
from customize.stickers.scene import draw_pose
from customize.trainers.launch import run

LEARNED = ("<one>", "<two>")
SHOWN = ("white", "grass", "stone", "yellow")  # backgrounds of the scenes that teach
NEW = ("beach", "snow", "night", "bricks", "wood", "water", "sunset", "pink")
VARIANTS = {
    "textual_inversion": ["textual_inversion"],
    "MCPL": ["mcpl"],
    "MCPL without AttnMask": ["mcpl", "--attention_mask", "none"],
    "MCPL without PromptCL": ["mcpl", "--prompt_contrast_weight", "0"],
    "MCPL, soft AttnMask": ["mcpl", "--attention_mask", "soft"],
}


def write_scenes(folder: Path, pair: tuple[Drawing, Drawing]) -> None:
    """Four captioned scenes of both."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, background in enumerate(SHOWN):
        scene = Scene(pair[0], background, companion=pair[1], pose=draw_pose(rng), seed=i)
        caption = f"a {LEARNED[0]} next to a {LEARNED[1]} {BACKGROUNDS[background]}"
        save_image(draw_scene(scene, World())[0], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")


def train(folder: Path, variant: list[str], pair: tuple[Drawing, Drawing], steps: int) -> Path:
    """The run of a variant."""
    starts = "+".join(drawing.word for drawing in pair)
    words = [
        *variant,
        "--instance_data_dir",
        str(folder / "images"),
        "--placeholder_token",
        "+".join(LEARNED),
    ]
    words += ["--initializer_token", starts, "--max_train_steps", str(steps), "--num_vectors", "4"]
    words += [
        "--instance_prompt",
        f"a {LEARNED[0]} next to a {LEARNED[1]}",
        "--checkpointing_steps",
        "100000",
    ]
    return run([*words, "--overwrite_output_dir", "--output_dir", str(folder / variant_name(variant))])


def variant_name(variant: list[str]) -> str:
    return "-".join(word.strip("-") for word in variant)


def scores(pipe, pair: tuple[Drawing, Drawing], page: Path) -> list[dict[str, float]]:
    """Scores of each image of each word alone."""
    sprites, rows, images = [World().sprite(drawing) for drawing in pair], [], []
    for i, word in enumerate(LEARNED):
        prompts = [f"a {word} {BACKGROUNDS[name]}" for name in NEW]
        generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
        drawn = pipe(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
        images.append(drawn)
        verdicts = judge(drawn)
        for k, image in enumerate(drawn):
            own, other = (masked_correlation(image, sprites[j]) for j in (i, 1 - i))
            seen = float(verdicts.shows(k, pair[i]))
            rows.append({"right": float(own > other), "correlation": own, "recognised": seen})
    side = images[0][0].width
    sheet = Image.new("RGB", (side * len(NEW), side * 2))
    for i, drawn in enumerate(images):
        for k, image in enumerate(drawn):
            sheet.paste(image, (k * side, i * side))
    save_image(sheet, page)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/multi_concept"))
    options = parser.parse_args()
    quiet_libraries()
    subjects = [drawing for drawing in bench_subjects() if not World().is_unknown(drawing.word)]
    pairs = [(subjects[2 * i], subjects[2 * i + 1]) for i in range(options.pairs)]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for pair in pairs:
        folder = options.output / "-".join(str(drawing).replace(" ", "-") for drawing in pair)
        write_scenes(folder / "images", pair)
        for name, variant in VARIANTS.items():
            pipe = load_pipeline(train(folder, variant, pair, options.steps))
            pipe.set_progress_bar_config(disable=True)
            found = scores(pipe, pair, folder / f"{variant_name(variant)}.png")
            rows[name] += found
            print(folder.name, name, {k: round(float(np.mean([r[k] for r in found])), 3) for k in found[0]})
    print(f"\n{len(pairs)} pairs, {options.steps} steps\n")
    print("| | right word | correlation | recognised |\n|---|---|---|---|")
    for name, some in rows.items():
        cells = [float(np.mean([row[key] for row in some])) for key in ("right", "correlation", "recognised")]
        print(f"| {name} | {cells[0]:.0%} | {cells[1]:.3f} | {cells[2]:.0%} |")


if __name__ == "__main__":
    main()

"""Several words from images that hold several things: MCPL with and without each of its regularizers.

For groups of two or three held-out drawings of known classes, scenes of two of them side by side teach a
word for each at once; of three, every scene says which two it shows. Each word is then drawn alone on
eight backgrounds. By the correlation with the true drawings, without a judge: the share of images that show
the word's drawing rather than another one of the group (else they are swapped), and the word's
correlation; by the judge, the share in which it recognises the word's drawing. Intersection over union: of
where the model sees a word in the scenes, noised half-way (above half of the maximum of its attention map,
16 x 16), with where its drawing is. Prints a Markdown table.

    python examples/benchmarks/multi_concept.py --groups 2 --words 2 --steps 200
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from customize.attention_maps import AttentionRecorder, word_positions
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.imaging import to_tensor
from customize.pipelines import load_pipeline
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, draw_scene
from customize.stickers.bench import bench_subjects
from customize.stickers.judge import judge
from customize.stickers.measure import masked_correlation
from customize.stickers.scene import draw_pose
from customize.trainers.launch import run

LEARNED = ("<one>", "<two>", "<three>")
SHOWN = ("white", "grass", "stone", "yellow")  # backgrounds of the scenes that teach
NEW = ("beach", "snow", "night", "bricks", "wood", "water", "sunset", "pink")
VARIANTS = {
    "textual_inversion": ["textual_inversion"],
    "MCPL": ["mcpl"],
    "MCPL without AttnMask": ["mcpl", "--attention_mask", "none"],
    "MCPL without PromptCL": ["mcpl", "--prompt_contrast_weight", "0"],
    "MCPL, soft AttnMask": ["mcpl", "--attention_mask", "soft"],
    "MCPL, PromptCL of weight .05": ["mcpl", "--prompt_contrast_weight", "0.05"],
}
SCORES = ("right", "correlation", "recognised", "overlap")


def scenes_of(group: Sequence[Drawing]) -> list[tuple[Scene, int, int]]:
    """Scenes of two drawings of the group, with their numbers: four of a pair, two of each pair of three."""
    pairs = list(itertools.combinations(range(len(group)), 2))
    rng, found = np.random.default_rng(0), []
    for i in range(4 if len(pairs) == 1 else 2 * len(pairs)):
        first, second = pairs[i % len(pairs)]
        background = SHOWN[i % len(SHOWN)]
        scene = Scene(group[first], background, companion=group[second], pose=draw_pose(rng), seed=i)
        found.append((scene, first, second))
    return found


def caption_of(scene: Scene, first: int, second: int) -> str:
    return f"a {LEARNED[first]} next to a {LEARNED[second]} {BACKGROUNDS[scene.background]}"


def write_scenes(folder: Path, group: Sequence[Drawing]) -> None:
    """The captioned scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, shown in enumerate(scenes_of(group)):
        save_image(draw_scene(shown[0], World())[0], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption_of(*shown), encoding="utf-8")


def train(folder: Path, variant: list[str], group: Sequence[Drawing], steps: int, start: str) -> Path:
    """The run of a variant; words start from `start`, or else from their classes."""
    names, starts = "+".join(LEARNED[: len(group)]), "+".join(start or own.word for own in group)
    flags = f"--placeholder_token {names} --initializer_token {starts} --num_vectors 4"
    flags += f" --max_train_steps {steps} --checkpointing_steps 100000 --overwrite_output_dir"
    flags += f" --instance_data_dir {folder / 'images'} --output_dir {folder / variant_name(variant)}"
    return run([*variant, *flags.split()])


def variant_name(variant: list[str]) -> str:
    return "-".join(word.strip("-") for word in variant)


def scores(pipe, group: Sequence[Drawing], page: Path) -> list[dict[str, float]]:
    """Scores of each image of each word alone."""
    sprites, rows, images = [World().sprite(drawing) for drawing in group], [], []
    for i, word in enumerate(LEARNED[: len(group)]):
        prompts = [f"a {word} {BACKGROUNDS[name]}" for name in NEW]
        generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
        drawn = pipe(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
        images.append(drawn)
        verdicts = judge(drawn)
        for k, image in enumerate(drawn):
            fits = [masked_correlation(image, sprite) for sprite in sprites]
            seen = float(verdicts.shows(k, group[i]))
            rows.append({"right": float(max(fits) == fits[i]), "correlation": fits[i], "recognised": seen})
    side = images[0][0].width
    sheet = Image.new("RGB", (side * len(NEW), side * len(images)))
    for i, drawn in enumerate(images):
        for k, image in enumerate(drawn):
            sheet.paste(image, (k * side, i * side))
    save_image(sheet, page)
    return rows


@torch.no_grad()
def overlaps(pipe, group: Sequence[Drawing]) -> list[dict[str, float]]:
    """Intersection over union of each word's attention with its drawing, in the scenes that taught it."""
    backbone, found = wrap(pipe), []
    for scene, first, second in scenes_of(group):
        image, own = draw_scene(scene, World())
        _, both = draw_scene(scene, World(), mask_companion=True)
        masks = [to_tensor(mask.convert("RGB"))[:1] for mask in (own, both)]
        masks[1] = (masks[1] - masks[0]).clamp(min=0)
        latents = backbone.encode_image(to_tensor(image)[None] * 2 - 1)
        t = backbone.nearest_times(torch.tensor([0.5]))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noisy, _ = backbone.add_noise(latents, noise, t)
        prompt = caption_of(scene, first, second)
        with AttentionRecorder(backbone.denoiser, side=16) as recorder:
            backbone.denoise(noisy, t, Condition(backbone.encode_prompt([prompt])))
        for number, mask in zip((first, second), masks, strict=True):
            places = word_positions(pipe, prompt, LEARNED[number])
            heat = recorder.of_tokens(places, -1, (16, 16)).sum(0)
            seen, true = heat > heat.max() / 2, F.adaptive_avg_pool2d(mask, 16)[0] > 0.5
            found.append({"overlap": float((seen & true).sum() / (seen | true).sum())})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--words", type=int, default=2, choices=[2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--start", default="", help="the word that all start from; empty: their classes")
    parser.add_argument("--output", type=Path, default=Path("runs/multi_concept"))
    options = parser.parse_args()
    quiet_libraries()
    subjects = [drawing for drawing in bench_subjects() if not World().is_unknown(drawing.word)]
    size = options.words
    groups = [subjects[size * i : size * (i + 1)] for i in range(options.groups)]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for group in groups:
        folder = options.output / "-".join(str(drawing).replace(" ", "-") for drawing in group)
        write_scenes(folder / "images", group)
        for name, variant in VARIANTS.items():
            pipe = load_pipeline(train(folder, variant, group, options.steps, options.start))
            pipe.set_progress_bar_config(disable=True)
            rows[name] += scores(pipe, group, folder / f"{variant_name(variant)}.png")
            rows[name] += overlaps(pipe, group)
    start = options.start or "their classes"
    print(f"\n{len(groups)} groups of {size} drawings, {options.steps} steps, words start from {start}\n")
    print(
        "| | right word | correlation | recognised | attention on the drawing (IoU) |\n|---|---|---|---|---|"
    )
    for name, some in rows.items():
        cells = [float(np.mean([row[key] for row in some if key in row])) for key in SCORES]
        print(f"| {name} | {cells[0]:.0%} | {cells[1]:.3f} | {cells[2]:.0%} | {cells[3]:.2f} |")


if __name__ == "__main__":
    main()

"""What each part of CustomContrast brings: encoders of one budget on StickerBench, known and unknown classes
apart.

    python examples/benchmarks/encoders.py train start ip_start    (in as many processes as there are cores)
    python examples/benchmarks/encoders.py train words cscl ...
    python examples/benchmarks/encoders.py table [words cscl dreambooth-no-prior ...] [--group known]
    [--quick]
    python examples/benchmarks/encoders.py sheet    (docs/encoder.png, of the encoder that ships)

Both kinds of encoder are fitted to the drawings' names first (examples/stickers/names.py). All variants of
CustomContrast then go on from one encoder that was trained without contrast and location (`start`),
IP-Adapter from one of its own kind (`ip_start`), with as many images each. A reference UNet has no names to
learn, and sees as many images in one training.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from customize.app.bench.stickers import StickerBench, drawings_of
from customize.metrics import confidence_interval
from customize.pipelines import load_subject_pipeline
from customize.stickers import Drawing, World, draw_scene
from customize.stickers.bench import bench_subjects, reference_scenes
from customize.trainers.launch import run

FOLDER = Path("runs/encoders")
CONTRAST = "--cscl_weight {cscl} --macl_weight {macl}"
NEXT = "--pretrained_adapter {folder}/start --learning_rate 5e-4"
VARIANTS = {  # method, and flags beyond those of its YAML file
    "ip_start": ("ip_adapter", "--pretrained_adapter .furnace/names-ip_adapter"),
    "start": (
        "custom_contrast",
        "--pretrained_adapter .furnace/names-custom_contrast --cscl_weight 0 --macl_weight 0 --no_location",
    ),
    "ip_adapter": ("ip_adapter", "--pretrained_adapter {folder}/ip_start --learning_rate 5e-4"),
    "words": ("custom_contrast", f"{NEXT} --cscl_weight 0 --macl_weight 0 --no_location"),
    "cscl": ("custom_contrast", f"{NEXT} --cscl_weight {{cscl}} --macl_weight 0 --no_location"),
    "macl": ("custom_contrast", f"{NEXT} --cscl_weight 0 --macl_weight {{macl}} --no_location"),
    "reference_unet": ("reference_unet", ""),
    "full": ("custom_contrast", f"{NEXT} {CONTRAST}"),
    "no_location": ("custom_contrast", f"{NEXT} {CONTRAST} --no_location"),
    "full_ratio": ("custom_contrast", f"{NEXT} {CONTRAST} --macl_form ratio"),
    "full_weight": ("custom_contrast", f"{NEXT} {CONTRAST} --macl_form weight"),
    "full_product": ("custom_contrast", f"{NEXT} {CONTRAST} --macl_form product"),
    "full_plain": ("custom_contrast", f"{NEXT} {CONTRAST} --macl_form plain"),
}
STARTS = ("start", "ip_start")
WHOLE = ("reference_unet",)  # trained in one piece, for as many steps as others with what they start from


def train(name: str, options) -> None:
    method, flags = VARIANTS[name]
    steps = options.start_steps if name in STARTS else options.steps
    steps += options.start_steps if name in WHOLE else 0
    flags = flags.format(folder=FOLDER, cscl=options.cscl_weight, macl=options.macl_weight)
    output = FOLDER / name
    if (output / "run.json").exists():
        return print(f"{output} is there already")
    file = f"examples/stickers/{method}.yaml"
    resumed = (
        "--resume_from_checkpoint latest" if list(output.glob("checkpoint-*")) else "--overwrite_output_dir"
    )
    run([method, file, *f"{flags} --max_train_steps {steps} --output_dir {output} {resumed}".split()])


SHOWN = (
    "subject_fidelity",
    "correlation",
    "class",
    "prompt_fidelity",
    "clip_i_masked",
    "background_leak",
    "pose_leak",
)


class MoreSubjects(StickerBench):
    """Twelve drawings of known classes, or six of unknown ones, under the quick subset's eight prompts."""

    @property
    def drawings(self) -> list[Drawing]:
        return drawings_of(self.group)[: 6 if self.group == "unknown" else 12]


def table(options) -> None:
    """Scores by group of subjects, differences to `words` subject by subject, and what the last validation
    said of Z."""
    found = [file.parent.name for file in sorted(FOLDER.glob("*/run.json"))]
    names = options.variants or [name for name in found if name not in STARTS]
    bench_of = StickerBench if options.quick else MoreSubjects
    for group in [options.group] if options.group else ["known", "unknown"]:
        methods = ["base", "real", *(str(FOLDER / name) if name in VARIANTS else name for name in names)]
        folder = FOLDER / f"bench-{group}{'-quick' if options.quick else ''}"
        bench = bench_of(folder=folder, methods=methods, repeats=1, quick=True, group=group, steps=150)
        rows = {Path(method["name"]).name: method["subjects"] for method in bench.run()["methods"]}
        print(
            f"\n{group} classes: mean (95 % bootstrap over subjects)\n\n| | {' | '.join(SHOWN)} | seconds "
            "an image |"
        )
        print("|---" * (len(SHOWN) + 2) + "|")
        for name, subjects in rows.items():
            cells = [interval([subject["scores"][metric] for subject in subjects]) for metric in SHOWN]
            seconds = [subject["cost"].get("seconds an image", 0.0) for subject in subjects]
            print(f"| {name} | {' | '.join(cells)} | {sum(seconds) / len(seconds):.2f} |")
        if "words" in rows:
            print(
                f"\n{group} classes: difference to words\n\n| | subject fidelity | correlation | prompt "
                "fidelity |\n|---|---|---|---|"
            )
            for name in names:
                cells = [
                    difference(rows[Path(name).name], rows["words"], metric)
                    for metric in ("subject_fidelity", "correlation", "prompt_fidelity")
                ]
                print(f"| {name} | {' | '.join(cells)} |")
    for name in names:
        if (log := FOLDER / Path(name).name / "validation.jsonl").exists():
            last = json.loads(log.read_text().splitlines()[-1])
            print(name, {key: round(value, 3) for key, value in last.items()})


def interval(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = confidence_interval(known)
    return f"{sum(known) / len(known):.3f} ({low:.3f} to {high:.3f})"


def difference(ours: list[dict], theirs: list[dict], metric: str) -> str:
    return interval([a["scores"][metric] - b["scores"][metric] for a, b in zip(ours, theirs, strict=True)])


def sheet(name: str, output: Path, size: int = 128) -> None:
    """Eight held-out drawings, two of them of unknown classes: two references, what the class word alone
    draws, and five scenes by the encoder."""
    pipe = load_subject_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    subjects = [*bench_subjects()[:6], *bench_subjects()[-2:]]
    prompts = ["on the beach", "on green grass", "in front of a brick wall", "at night", "in the snow"]
    page = Image.new("RGB", ((3 + len(prompts)) * size, len(subjects) * size), "white")
    for row, drawing in enumerate(subjects):
        references = [draw_scene(scene, World())[0] for scene in reference_scenes(drawing)]
        options = {"num_inference_steps": 25, "guidance_scale": 4.0}
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        base = pipe(
            f"a {drawing.word} on the beach", generator=torch.Generator().manual_seed(0), **options
        ).images
        scenes = [f"a <s> {drawing.word} {place}" for place in prompts]
        drawn = pipe(scenes, subject_images=references, generator=generators, **options).images
        for column, image in enumerate([*references[:2], *base, *drawn]):
            page.paste(image.resize((size, size), Image.Resampling.NEAREST), (column * size, row * size))
    page.save(output)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["train", "table", "sheet"])
    parser.add_argument(
        "variants", nargs="*", help=f"{', '.join(VARIANTS)}; for table also methods of StickerBench"
    )
    parser.add_argument("--group", choices=["known", "unknown"], help="table: only these subjects")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="table: the first six subjects of known classes instead of twelve",
    )
    parser.add_argument("--start_steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--cscl_weight", type=float, default=0.005)
    parser.add_argument("--macl_weight", type=float, default=0.005)
    options = parser.parse_args()
    if options.action == "table":
        return table(options)
    if options.action == "sheet":
        return sheet("stickers", Path("docs/encoder.png"))
    for name in options.variants:
        train(name, options)


if __name__ == "__main__":
    main()

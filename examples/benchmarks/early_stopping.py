"""Which step of a run to keep? `python examples/benchmarks/early_stopping.py [--output
runs/early_stopping]`

DreamBooth LoRA on StickerBench's six quick subjects, validated every 50 of 300 steps. Three choices among
the checkpoints of each run are compared on prompts and noises that no choice has seen: the last step, the
lowest fixed-seed validation loss on a held-out image (`--validation_metric loss`), and the best
subject fidelity times prompt fidelity on four validation prompts (`score`). Prints a Markdown table with
95 % bootstrap intervals over subjects. Resumable.
"""

import argparse
import json
from pathlib import Path

from customize.app.bench.bench import ImagesToScore, Subject
from customize.app.bench.drawing import ImageRequest, Sampling, draw_missing, trained
from customize.app.bench.sticker_scores import score
from customize.app.bench.stickers import COMMON, LORA
from customize.metrics import confidence_interval, load_sticker_clip
from customize.pipelines import load_pipeline
from customize.quiet import quiet_libraries
from customize.stickers import Drawing
from customize.stickers.bench import bench_prompts, bench_subjects, write_references
from customize.trainers.launch import run

STEPS, EVERY = 300, 50
VALIDATION = bench_prompts()[8:12]  # those that the quick subset leaves out
SAMPLING = Sampling(num_inference_steps=25, guidance_scale=4.0, batch_size=16)


def train(folder: Path, drawing: Drawing) -> Path:
    """A run whose every validated step is kept as a checkpoint; the choices are read from its
    `validation.jsonl`."""
    words = f"sks {drawing.word}"
    write_references(folder / "images", drawing, words)
    flags = f"dreambooth {COMMON} {LORA} --max_train_steps {STEPS}"
    flags += f" --validation_steps {EVERY} --checkpointing_steps {EVERY}"
    flags += " --checkpoints_total_limit 0 --holdout 1 --validation_metric score --overwrite_output_dir"
    prompts = [prompt.format(words) for prompt in VALIDATION]
    data = ["--instance_data_dir", str(folder / "images"), "--instance_prompt", f"a {words}"]
    return trained(
        folder,
        lambda out: run([*flags.split(), *data, "--validation_prompt", *prompts, "--output_dir", str(out)]),
    )


def choices(run_folder: Path) -> dict[str, int]:
    rows = [json.loads(line) for line in (run_folder / "validation.jsonl").read_text().splitlines()]
    return {
        "last": STEPS,
        "lowest validation loss": min(rows, key=lambda row: row["validation_loss"])["step"],
        "best score": max(rows, key=lambda row: row["score"])["step"],
    }


def measure(folder: Path, run_folder: Path, step: int, drawing: Drawing, clip) -> dict[str, float]:
    prompts, words = bench_prompts(quick=True), f"sks {drawing.word}"
    shots = [ImageRequest(f"{i:02d}", prompt.format(words), 500 + i) for i, prompt in enumerate(prompts)]

    def load():
        pipe = load_pipeline(run_folder / f"checkpoint-{step}")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    images = draw_missing(load, shots, folder / f"step-{step}", SAMPLING)
    references = write_references(folder / "images", drawing, words)
    scores, _, _ = score(
        ImagesToScore(Subject("", drawing.word, "", tuple(prompts), drawing), images, references, [], [], 1),
        clip,
    )
    kept = {name: scores[name] for name in ("subject_fidelity", "correlation", "prompt_fidelity")}
    fidelity = kept["correlation"] if kept["subject_fidelity"] is None else kept["subject_fidelity"]
    return kept | {
        "correlation x prompt fidelity": kept["correlation"] * kept["prompt_fidelity"],
        "subject x prompt fidelity": fidelity * kept["prompt_fidelity"],
    }


def row(name: str, values: list[dict]) -> str:
    cells = []
    for key in values[0]:
        numbers = [value[key] for value in values if value[key] is not None]
        low, high = confidence_interval(numbers) if numbers else (float("nan"),) * 2
        cells.append(f"{sum(numbers) / max(len(numbers), 1):.3f} ({low:.3f} to {high:.3f})")
    return f"| {name} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/early_stopping"))
    options = parser.parse_args()
    quiet_libraries()
    clip, found, steps = load_sticker_clip(), {}, {}
    for drawing in bench_subjects(quick=True):
        folder = options.output / str(drawing).replace(" ", "-")
        run_folder = train(folder, drawing)
        for name, step in choices(run_folder).items():
            steps.setdefault(name, []).append(step)
            found.setdefault(name, []).append(measure(folder, run_folder, step, drawing, clip))
    print(f"| kept | {' | '.join(found['last'][0])} |\n|{'---|' * (1 + len(found['last'][0]))}")
    for name, values in found.items():
        print(row(f"{name} (steps {', '.join(map(str, steps[name]))})", values))
    for name in ("last", "lowest validation loss"):
        pairs = zip(found["best score"], found[name], strict=True)
        print(
            row(
                f"best score minus {name}",
                [{k: b[k] - a[k] if a[k] is not None else None for k in a} for b, a in pairs],
            )
        )


if __name__ == "__main__":
    main()

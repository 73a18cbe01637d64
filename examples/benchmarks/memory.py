"""The memory that --dry_run estimates, beside what real runs of the embedded model took on a CPU.

    python examples/benchmarks/memory.py [CASE ...]

Each case is trained for three steps in a process of its own, once. "measured" is what torch's allocator gave
out at most since training began (its profiler's record of every allocation), "resident" how much the process
grew in that time. "estimate" is the same part of the dry run's training phase: gradients, optimizer,
activations and batch, as on a CPU. Weights are not in it: they are counted, not estimated.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from customize.stickers import Drawing, Scene, World, draw_scene
from customize.trainers import launch
from customize.trainers.memory import RunPlan, estimate, priced
from customize.trainers.registry import find_method
from customize.trainers.settings import make_accelerator

CHECKPOINTED, BF16 = {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}
WORD = {"placeholder_token": "<toy>", "initializer_token": "fox"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DreamBooth, batch 1": ("dreambooth", {"train_batch_size": 1}),
    "DreamBooth, batch 4": ("dreambooth", {"train_batch_size": 4}),
    "DreamBooth, batch 4, checkpointing": ("dreambooth", {"train_batch_size": 4} | CHECKPOINTED),
    "DreamBooth, batch 4, bf16": ("dreambooth", {"train_batch_size": 4} | BF16),
    "DreamBooth, batch 4, bf16, checkpointing": ("dreambooth", {"train_batch_size": 4} | BF16 | CHECKPOINTED),
    "DreamBooth, batch 4, nothing cached": ("dreambooth", {"train_batch_size": 4, "cache_latents": False}),
    "DreamBooth, whole denoiser, batch 4": ("dreambooth", {"train_batch_size": 4, "full_finetune": True}),
    "textual inversion, batch 1": ("textual_inversion", WORD | {"train_batch_size": 1}),
    "textual inversion, batch 4": ("textual_inversion", WORD | {"train_batch_size": 4}),
    "textual inversion, batch 4, checkpointing": (
        "textual_inversion",
        WORD | {"train_batch_size": 4} | CHECKPOINTED,
    ),
    "custom_contrast, batch 4": ("custom_contrast", {"train_batch_size": 4}),
    "custom_contrast, batch 4, checkpointing": ("custom_contrast", {"train_batch_size": 4} | CHECKPOINTED),
    "custom_contrast, batch 16": ("custom_contrast", {"train_batch_size": 16}),
}


def settings_of(case: str, images: Path, output: Path) -> tuple[str, dict[str, Any]]:
    method, own = CASES[case]
    data = {} if method == "custom_contrast" else {"instance_data_dir": str(images)}
    prompt = {"instance_prompt": "a photo of sks fox"} if method == "dreambooth" else {}
    # the largest batches of a run: no references are left out, and two are read
    largest = {"multi_reference_rate": 1.0, "dropout_text": 0.0, "dropout_image": 0.0, "dropout_both": 0.0}
    largest = largest if method == "custom_contrast" else {}
    return method, data | prompt | largest | own | {"max_train_steps": 3, "output_dir": str(output)}


def write_images(folder: Path) -> None:
    folder.mkdir()
    for i, place in enumerate(("beach", "night", "grass", "snow")):
        draw_scene(Scene(Drawing("fox", "flat"), place), World())[0].save(folder / f"{i}.png")


# the child: a real run


def measured(case: str, images: Path, output: Path) -> dict[str, int]:
    """Trains; bytes that torch allocated, and that the process grew by, since training began."""
    from torch.profiler import ProfilerActivity, profile

    method, settings = settings_of(case, images, output)
    stock, found = launch.train, {}

    def train(*args: Any) -> int:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            steps = stock(*args)
        found["resident"] = _resident("VmHWM") - before
        live = found["measured"] = 0
        for event in profiler.profiler.kineto_results.events():
            live += event.nbytes() if event.name() == "[memory]" else 0
            found["measured"] = max(found["measured"], live)
        return steps

    launch.train = train
    launch.train_method(method, **settings)
    return found


def _resident(name: str) -> int:
    [line] = [own for own in Path("/proc/self/status").read_text().splitlines() if own.startswith(name)]
    return 1024 * int(line.split()[1])


# the parent: the estimate


def estimated(case: str, images: Path, output: Path) -> int:
    """Bytes of the training phase beside the weights."""
    method, settings = settings_of(case, images, output)
    parts, _ = launch.complete(method, settings)
    kind = find_method(method)
    source = kind.Source.read(parts[1], "stickers", 0)
    plan = RunPlan(kind, *parts, source)
    [phase] = [
        own
        for own in priced(estimate(plan, make_accelerator(parts[2]), "cpu"), plan).phases
        if own.name == "training"
    ]
    return sum(phase.others.values())


def main(cases: list[str]) -> None:
    print("| run | estimate, MB | measured, MB | error | resident, MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images"
        write_images(images)
        for i, case in enumerate(cases or CASES):
            output = Path(place) / f"run-{i}"
            words = [sys.executable, __file__, "--child", case, str(images), str(output)]
            said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            real, guess = json.loads(said.splitlines()[-1]), estimated(case, images, output)
            error = guess / real["measured"] - 1
            sizes = [f"{own / 1e6:.1f}" for own in (guess, real["measured"], real["resident"])]
            print(f"| {case} | {sizes[0]} | {sizes[1]} | {error:+.1%} | {sizes[2]} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measured(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main(sys.argv[1:])

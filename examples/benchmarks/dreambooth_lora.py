"""Compares `customize train dreambooth` with diffusers' `train_dreambooth_lora.py`: steps per second,
wall time, peak memory.

    git clone https://github.com/huggingface/diffusers
    python examples/benchmarks/dreambooth_lora.py --diffusers_script
    diffusers/examples/dreambooth/train_dreambooth_lora.py

Take the checkout at the installed version. The trainers run one after the other, each in a process of its
own with the same model, images and flags, in turn (A B C A B C ...). A process is `python THIS_FILE
--child ...`, which only adds a hook that writes its peak memory at exit.

Both trainers redraw a tqdm bar after every step, so both are timed from outside in the same way: stderr
is read as it arrives, and a step's time is when its number first appears. Steps per second are those from
step `--warmup` to the last; imports, loading, encoding for the caches and saving are in the wall time
alone. Where torchvision is missing, diffusers' script gets a stand-in for the transforms that it uses
under these flags, and the report says so.
"""

import argparse
import atexit
import hashlib
import json
import os
import platform
import random
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from functools import reduce
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

BAR = re.compile(rb"\| *(\d+)/(\d+) \[")  # how tqdm writes "step/steps"
LIBRARIES = ("customize", "diffusers", "torch", "transformers", "accelerate", "peft")
Run = dict[str, Any]


def child(memory_file: str, target: str, *words: str) -> None:
    """Runs `target`, a script or a module, as if by `python target words`; writes the peak memory when
    the process ends."""
    atexit.register(write_memory, Path(memory_file))
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = [target, *words]
    if target.endswith(".py"):
        if find_spec("torchvision") is None:
            stand_in_for_torchvision()
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def write_memory(path: Path) -> None:
    """Bytes at the peak: resident (Linux only), and allocated by torch on the GPU (if there is one); and
    what it ran on."""
    import torch

    status = Path("/proc/self/status")
    # not getrusage's ru_maxrss, which begins with the parent's
    resident = (
        int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024 if status.exists() else None
    )
    cpu = None, f"CPU, {torch.get_num_threads()} threads"
    gpu, device = (
        (torch.cuda.max_memory_allocated(), torch.cuda.get_device_name())
        if torch.cuda.is_available()
        else cpu
    )
    path.write_text(json.dumps({"resident": resident, "gpu": gpu, "device": device}))


def stand_in_for_torchvision() -> None:
    """Puts `torchvision.transforms` into this process, as far as the script uses it; the results are
    torchvision's.

    Not as a folder on PYTHONPATH: transformers would find it there and import from torchvision what the
    stand-in lacks.
    """
    import numpy as np
    import torch
    from PIL import Image
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()  # transformers remembers this answer
    parts = {
        "InterpolationMode": Image.Resampling,
        "Resize": lambda n, interpolation: (
            lambda x: x.resize([side * n // min(x.size) for side in x.size], interpolation)
        ),
        "CenterCrop": lambda n: (
            lambda x: x.crop([(side + sign * n) // 2 for sign in (-1, 1) for side in x.size])
        ),
        "ToTensor": lambda: (
            lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1).contiguous().float().div(255)
        ),
        "Normalize": lambda mean, std: (
            lambda x: (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        ),
        "RandomHorizontalFlip": lambda p: lambda x: x.transpose(0) if random.random() < p else x,
        "Compose": lambda steps: lambda x: reduce(lambda x, step: step(x), steps, x),
    }
    functions = {
        "resize": lambda x, size, interpolation: x.resize(size[::-1], Image.Resampling.BILINEAR),
        "center_crop": lambda x, size: x.crop(
            [(side + sign * n) // 2 for sign in (-1, 1) for side, n in zip(x.size, size[::-1], strict=True)]
        ),
        "crop": lambda x, top, left, height, width: x.crop((left, top, left + width, top + height)),
        "hflip": lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "to_tensor": parts["ToTensor"](),
        "normalize": lambda x, mean, std: parts["Normalize"](mean, std)(x),
    }
    modules = {
        "torchvision": {},
        "torchvision.transforms": parts,
        "torchvision.transforms.functional": functions,
    }
    for name, content in modules.items():
        sys.modules[name] = module_from_spec(ModuleSpec(name, None))
        vars(sys.modules[name]).update(content)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, sys.modules[name])


def draw_images(folder: Path, world: Any) -> str:
    """Writes four images of a drawing that the embedded model has not seen; returns the prompt."""
    from customize.stickers import BACKGROUNDS, Scene, draw_scene

    subject = world.drawings(held_out=True)[0]
    folder.mkdir()
    for background in list(BACKGROUNDS)[:4]:
        draw_scene(Scene(subject, background), world)[0].save(folder / f"{background}.png")
    return f"a sks {subject.word}"


def random_model(folder: Path, world: Any) -> Path:
    """Writes a model of the embedded one's layout and size with random weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stickers"))
    import autoencoder
    import unet
    from diffusers import StableDiffusionPipeline

    import text_tower

    tokenizer = text_tower.train_tokenizer(world)
    parts = (autoencoder.build(), text_tower.build(tokenizer), tokenizer, unet.build(), unet.schedule())
    StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def measure(words: list[str], steps: int, warmup: int, work: Path) -> Run:
    """One training in a new process."""
    from safetensors.torch import load_file

    memory, output, begin = work / "memory.json", work / "output", time.perf_counter()
    command = [sys.executable, __file__, "--child", str(memory), *words, "--output_dir", str(output)]
    text, read, bars = b"", 0, [{0: begin, steps: begin}]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while chunk := os.read(process.stderr.fileno(), 1 << 16):  # type: ignore[union-attr]
            now, text = time.perf_counter(), text + chunk
            for match in BAR.finditer(text, read):
                read, step = match.end(), int(match[1])
                if int(match[2]) == steps:
                    bars += [{}] if step == 0 else []  # a new bar
                    bars[-1].setdefault(step, now)
    wall = time.perf_counter() - begin
    bar = max(
        bars, key=lambda bar: max(bar.values()) - min(bar.values())
    )  # others, as of loading weights, are short
    if process.returncode or not {warmup, steps} <= bar.keys():
        raise SystemExit(
            f"{' '.join(command)} ended with {process.returncode}:\n{text.decode(errors='replace')[-3000:]}"
        )
    trained = sum(value.numel() for value in load_file(output / "pytorch_lora_weights.safetensors").values())
    speed = (steps - warmup) / (bar[steps] - bar[warmup])
    return {"steps_per_s": speed, "wall_s": wall, "trained_values": trained, **json.loads(memory.read_text())}


def report(rows: dict[str, list[Run]], ratios: dict[str, float], about: dict[str, Any]) -> str:
    def spread(runs: list[Run], name: str, unit: int = 1, digits: int = 0) -> str:
        values = [run[name] / unit for run in runs if run[name] is not None]
        return " / ".join(f"{f(values):.{digits}f}" for f in (min, statistics.median, max)) if values else "-"

    head = [
        "trainer",
        "steps/s",
        "ratio",
        "wall time, s",
        "peak resident, MiB",
        "peak GPU, MiB",
        "trained values",
        "device",
    ]
    table = [head, ["---"] * len(head)]
    for name, runs in rows.items():
        numbers = [spread(runs, "steps_per_s", 1, 2), f"{ratios[name]:.2f}", spread(runs, "wall_s", 1, 1)]
        numbers += [
            spread(runs, "resident", 2**20),
            spread(runs, "gpu", 2**20),
            str(runs[0]["trained_values"]),
        ]
        table.append([name, *numbers, runs[0]["device"]])
    legend = "Least / median / greatest of the repeats; the ratio is that of median steps/s to diffusers'."
    return "\n".join(
        [
            *(f"| {' | '.join(r)} |" for r in table),
            "",
            legend,
            "",
            *(f"- {k}: {v}" for k, v in about.items()),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers_script", type=Path, required=True)
    parser.add_argument(
        "--model",
        type=Path,
        help="a diffusers folder; else the embedded model, or random weights of its size",
    )
    parser.add_argument("--lora_layers", default="attention", help="what the script trains, by our names")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10, help="first steps, which are not timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    if not 0 < options.warmup < options.steps:
        parser.error("--warmup must be 1 or more and less than --steps")
    from customize.stickers import MODEL, World
    from customize.stickers.scene import SIDE

    with tempfile.TemporaryDirectory() as folder:
        work, world, model = Path(folder), World(), options.model
        model = model or (
            MODEL if (MODEL / "model_index.json").exists() else random_model(work / "random weights", world)
        )
        flags = f"--resolution {SIDE} --train_batch_size {options.train_batch_size} --rank 8"
        flags += f" --max_train_steps {options.steps}"
        flags += " --learning_rate 1e-4 --seed 0 --lr_scheduler constant --lr_warmup_steps 0"
        flags += " --mixed_precision no --report_to tensorboard"
        words = [
            *flags.split(),
            "--checkpointing_steps",
            str(options.steps + 1),
            "--pretrained_model_name_or_path",
            str(model),
        ]
        words += [
            "--instance_prompt",
            draw_images(work / "data", world),
            "--instance_data_dir",
            str(work / "data"),
        ]
        ours = ["customize.app.cli", "train", "dreambooth", *words, "--lora_layers", options.lora_layers]
        trainers = {"diffusers": [str(options.diffusers_script), *words, "--center_crop"]}
        trainers |= {"customize --no_cache_latents": [*ours, "--no_cache_latents"], "customize": ours}
        about = {
            "machine": (
                f"{platform.platform()}, {os.cpu_count()} cores, load average at the start "
                f"{os.getloadavg()[0]:.1f}"
            ),
            "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
            "torchvision": "a stand-in for diffusers' script"
            if find_spec("torchvision") is None
            else version("torchvision"),
            "diffusers' script": (
                f"SHA-256 {hashlib.sha256(options.diffusers_script.read_bytes()).hexdigest()}"
            ),
            "timed": f"steps {options.warmup + 1} to {options.steps}, {options.repeats} repeats in turn",
            "flags": " ".join(words).replace(folder, "TEMPORARY"),
        }
        rows: dict[str, list[Run]] = {name: [] for name in trainers}
        for name, command in list(trainers.items()) * options.repeats:
            rows[name].append(
                measure(command, options.steps, options.warmup, Path(tempfile.mkdtemp(dir=work)))
            )
            print(name, rows[name][-1], file=sys.stderr)
    medians = {name: statistics.median(run["steps_per_s"] for run in runs) for name, runs in rows.items()}
    ratios = {name: median / medians["diffusers"] for name, median in medians.items()}
    print(text := report(rows, ratios, about))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "dreambooth_lora.md").write_text(text)
    results = {"about": about, "ratios": ratios, "rows": rows}
    (options.output_dir / "dreambooth_lora.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()

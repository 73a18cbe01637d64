"""Ends a training at many moments, resumes it, and compares what it learned with the run that nobody
interrupted.

    python examples/benchmarks/interruptions.py [--kills 50] [--stops 20]

SIGKILL comes while a step is computed, or at a file operation of a save; SIGTERM and SIGHUP come at both.
Each run is a process of its own on the embedded base model. A table says how many resumed runs are
identical to the last bit, and how many steps were lost (a kill may lose those since the last checkpoint;
a stop must lose none).
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from customize.adapters.lora_files import LORA
from customize.app.cli import main as customize
from customize.runs.folder import checkpoint_step, foreign, latest_checkpoint, read_info
from customize.stickers import Drawing
from customize.stickers.bench import write_references
from customize.trainers import loop, resume

STEPS = 12
FLAGS = f"--max_train_steps {STEPS} --checkpointing_steps 3 --validation_steps 4 --holdout 1 "
FLAGS += "--rank 2 --lora_dropout 0.2"


def in_process(work: Callable[[], int]) -> int:
    """Runs `work` in a copy of this process; returns its exit code, minus the signal that ended it."""
    if (child := os.fork()) == 0:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trap(owner, name: str, moment: int, number: int, only_saving: bool) -> None:
    """Sends this process the signal at call `moment` of a function; `only_saving` counts those within a
    save."""
    original, count = getattr(owner, name), [0]

    def counted(*arguments, **options):
        if not only_saving or saving():
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def saving() -> bool:
    """Whether a frame above writes a run or a checkpoint."""
    frame = sys._getframe(2)
    while frame:
        if frame.f_code.co_name in ("write_checkpoint", "write", "write_card"):
            return True
        frame = frame.f_back
    return False


def train(output: Path, images: Path, *more: str) -> int:
    words = [
        "train",
        "dreambooth",
        "--instance_data_dir",
        str(images),
        "--instance_prompt",
        "a sks fox",
        *FLAGS.split(),
    ]
    return customize([*words, "--learning_rate", "1e-3", "--output_dir", str(output), *more])


def interrupted(case: tuple, output: Path, images: Path) -> int:
    trap(*case)
    return train(output, images)


def cases(number: int, count: int, rng: np.random.Generator) -> list[tuple]:
    """Half of the moments in steps, half at a file operation of a save."""
    steps = [
        (loop, "accumulate_gradients", int(rng.integers(1, STEPS + 1)), number, False)
        for _ in range(count // 2)
    ]
    operations = [
        (os, "fsync", 60),
        (os, "replace", 30),
        (resume, "save_file", 4),
        (shutil, "rmtree", 30),
        (os, "chmod", 60),
    ]
    saves = []
    for i in range(count - count // 2):
        owner, name, most = operations[i % len(operations)]
        saves.append((owner, name, int(rng.integers(1, most + 1)), number, True))
    return steps + saves


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first / LORA), load_file(second / LORA)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=20, help="moments for each of SIGTERM and SIGHUP")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs under nohup would ignore it
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_references(folder / "images", Drawing("fox", "flat"), "sks fox")
        assert in_process(lambda: train(folder / "whole", folder / "images")) == 0
        moments = {"SIGKILL": options.kills, "SIGTERM": options.stops, "SIGHUP": options.stops}
        for name, count in ((name, count) for name, count in moments.items() if count):
            rows = [attempt(case, folder, name) for case in cases(getattr(signal, name), count, rng)]
            ended, identical, lost, clean = zip(*rows, strict=True)
            print(
                f"{name}: {count} moments, {sum(ended)} ended early; identical after resuming "
                f"{sum(identical)} of {count}; "
                f"steps lost at most {max(lost)}; nothing left behind {sum(clean)} of {count}",
                flush=True,
            )


def attempt(case: tuple, folder: Path, name: str) -> tuple[bool, bool, int, bool]:
    """Whether the run ended early, ended identical after resuming, steps lost, and whether its folder is
    clean."""
    output, number = folder / "run", getattr(signal, name)
    shutil.rmtree(output, ignore_errors=True)
    code = in_process(lambda: interrupted(case, output, folder / "images"))
    expected = {0, -number} if name == "SIGKILL" else {0, 2}
    kept = latest_checkpoint(output)
    reached = case[2] if case[1] == "accumulate_gradients" else None
    lost = reached - (checkpoint_step(kept) if kept else 0) if reached and code and name != "SIGKILL" else 0
    resumed = ["--resume_from_checkpoint", "latest"] if kept else ["--overwrite_output_dir"]
    again = in_process(lambda: train(output, folder / "images", *resumed))
    fine = (
        code in expected
        and again == 0
        and read_info(output)["step"] == STEPS
        and same(output, folder / "whole")
    )
    clean = not foreign(output) and not list(output.rglob(".customize-*"))
    if not (fine and clean):
        print(
            f"  not as it should be: {case[1]} {case[2]} {name}: exit {code}, then {again}, left "
            f"{os.listdir(output)}"
        )
    return code != 0, fine, lost, clean


if __name__ == "__main__":
    main()

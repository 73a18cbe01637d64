"""The runs of a folder, finished or not, with what they do now."""

import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from customize.errors import UserError
from customize.runs.folder import INFO, PROGRESS, latest_checkpoint, read_info, samples
from customize.runs.output import LOCK

DEPTH = 2  # folders below the one that is listed in which runs are looked for


class RunState(NamedTuple):
    """A run: its state is training, done, stopped (it can go on), failed or damaged; `thumbnail` is an image
    of it, if there is one."""

    name: str
    folder: Path
    method: str
    base_model: str
    state: str
    step: int
    steps: int
    thumbnail: Path | None = None


def progress_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's progress file; those that are damaged, or being written, are left out."""
    try:
        lines = (folder / PROGRESS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "state" in entry:
            found.append(entry)
    return found


def is_written(folder: Path) -> bool:
    """Whether a program of this machine is writing into the folder now."""
    return (pid := writer_of(folder)) is not None and psutil.pid_exists(pid)


def writer_of(folder: Path) -> int | None:
    """The number of the process that locked the folder, if it is one of this machine; it may have ended."""
    try:
        held = re.fullmatch(r"process (\d+) on (.*)", (folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(held[1]) if held and held[2] == platform.node() else None


def run_state(folder: Path, name: str = "") -> RunState | None:
    """What a folder's run does; None if it holds no run."""
    progress, checkpoint = progress_of(folder), latest_checkpoint(folder)
    if not (progress or checkpoint or (folder / INFO).exists()):
        return None
    try:
        info = read_info(folder if (folder / INFO).exists() else checkpoint or folder)
        base, method, step = info["base_model"], info.get("method", ""), info.get("step", 0)
        steps, state = info["config"].get("max_train_steps", step), "done"
    except UserError:
        base, method, step, steps, state = "", "", 0, 0, "damaged" if (folder / INFO).exists() else "failed"
    if progress:
        last = progress[-1]
        method, step, steps = last.get("method", method), last["step"], last.get("steps", steps)
    if is_written(folder):
        state = "training"
    elif not (folder / INFO).exists():
        state = "stopped" if checkpoint else "failed"
    return RunState(name or folder.name, folder, method, base, state, step, steps, thumbnail(folder))


def thumbnail(folder: Path) -> Path | None:
    """The images of the last validation, or else one that was drawn with the run."""
    drawn = sorted((folder / "generated").glob("*.png"))
    return next(iter([*reversed(samples(folder / "samples")), *drawn]), None)


def runs_in(folder: Path) -> list[RunState]:
    """The runs in a folder and its subfolders, by name."""
    found = (run_state(path, path.relative_to(folder).as_posix()) for path in _folders(folder, DEPTH))
    return sorted(filter(None, found), key=lambda run: run.name)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that may hold a run; those inside a run are its own."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir() or path.is_symlink() or path.name.startswith("."):
            continue
        yield path
        if depth > 1 and not (path / INFO).exists() and not (path / PROGRESS).exists():
            yield from _folders(path, depth - 1)

"""A finished run or a checkpoint on disk: every adapter in its own file, and `run.json` (see `folder` for
all of them)."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from customize.adapters import ADAPTERS
from customize.adapters.base import Adapter
from customize.runs.folder import FORMAT, INFO, STAGED, check_files, put_in_place, read_info, staged
from customize.runs.output import LOCK

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def save(folder: Path, adapters: Iterable[Adapter], info: dict) -> None:
    """Writes the adapters and `run.json` with `info` into `folder`, replacing what an earlier run wrote
    there."""
    with staged(folder, {"format": FORMAT, **info, "words": {}}) as (new, described):
        for adapter in adapters:
            described.update(adapter.save(new))
        described["libraries"] = {name: version(name) for name in LIBRARIES}


def open_run(run: Path) -> dict[str, Any]:
    """`run.json` of a finished run or a checkpoint; UserError unless all of its files are as they were
    written."""
    if (run / STAGED / INFO).exists():
        _finish_writing(run)
    info = read_info(run)
    check_files(run, info)
    return info


def _finish_writing(run: Path) -> None:
    """Completes a write that a kill interrupted, unless another program is doing so."""
    try:
        with FileLock(run / LOCK).acquire(timeout=0):
            put_in_place(run)
    except (Timeout, OSError):
        return


def load(run: Path, pipe: DiffusionPipeline, info: Mapping[str, Any] | None = None) -> None:
    """Gives a pipeline what a run trained; UserError if it is damaged or does not fit the pipeline's base
    model."""
    info = info or open_run(run)
    for kind in ADAPTERS.values():
        kind.load(run, info, pipe)

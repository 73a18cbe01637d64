"""The output folder of a run: claimed before anything is loaded, cleared before training starts."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from customize import embedded
from customize.errors import UserError
from customize.files import remove, write_text
from customize.runs.folder import (
    INFO,
    check_free,
    check_inputs,
    checkpoint_step,
    checkpoints,
    clear,
    latest_checkpoint,
    only_a_run,
    put_in_place,
    read_info,
    samples,
)
from customize.runs.output import locked, make_folder, refuse_model
from customize.trainers.settings import ModelConfig, TrainConfig


@contextmanager
def claimed_output(model: ModelConfig, settings: TrainConfig, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the output folder is this run's alone: it can be written, holds nothing that is not a run's,
    and no earlier run that was not given up. `config` holds all settings. UserError otherwise, on the first
    process.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        yield
        return
    output, flag = Path(settings.output_dir), "--output_dir"
    base = model.pretrained_model_name_or_path
    refuse_model(output, flag, embedded.folder_of(base))
    with locked(make_folder(output, flag), flag):
        put_in_place(output)
        check_free(output, settings.overwrite_output_dir, resumes_here(settings), flag)
        resumed_folder(settings)  # says so if there is none
        if settings.resume_from_checkpoint and not settings.overwrite_output_dir:
            check_progress(settings)
        if settings.overwrite_output_dir:
            check_inputs(output, config)
        yield


def resumes_here(settings: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint in its own output folder."""
    where, output = settings.resume_from_checkpoint, Path(settings.output_dir).resolve()
    return where == "latest" or (bool(where) and Path(where).resolve().parent == output)


def check_progress(settings: TrainConfig) -> None:
    """UserError if resuming would leave less than the output folder holds: a result or a checkpoint of a
    later step."""
    output = Path(settings.output_dir)
    another = "choose another --output_dir, or replace what is there with --overwrite_output_dir."
    done = read_info(output).get("step", 0) if (output / INFO).exists() else 0
    if done > settings.max_train_steps:
        raise UserError(
            f"'{output}' was trained for {done} steps, more than --max_train_steps "
            f"{settings.max_train_steps}; {another}"
        )
    later = [path for path in later_results(settings) if checkpoint_step(path) is not None]
    if later:
        raise UserError(
            f"--resume_from_checkpoint: '{output}' holds {later[0].name}, which is later; {another}"
        )


def later_results(settings: TrainConfig) -> list[Path]:
    """What the output folder holds of steps after the checkpoint that is resumed: checkpoints, samples, and
    the best step."""
    output, start = (
        Path(settings.output_dir),
        checkpoint_step(Path(settings.resume_from_checkpoint).resolve()),
    )
    if start is None:  # `latest`, after which there is no checkpoint
        return []
    later = [path for path in checkpoints(output) if (checkpoint_step(path) or 0) > start]
    later += [path for path in samples(output / "samples") if int(path.stem.rpartition("-")[2]) > start]
    best = output / "best"
    return later + ([best] if only_a_run(best) and read_info(best).get("step", 0) > start else [])


def clear_output(settings: TrainConfig, accelerator: Accelerator) -> None:
    """Removes what an earlier run left that this one replaces: only once all that it needs was found."""
    if not accelerator.is_main_process:
        return
    if not resumes_here(settings):
        clear(Path(settings.output_dir))
    elif settings.overwrite_output_dir:
        remove(later_results(settings))


def forget_later(log: Path, step: int) -> None:
    """Takes the validations after a step out of the log: the resumed run makes them again."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [
        line
        for line in lines
        if (found := re.match(r'{"step": (\d+)', line)) and int(found[1]) <= step and "}" in line
    ]
    if kept != lines:
        write_text(log, "".join(kept))


def resumed_folder(config: TrainConfig) -> Path | None:
    """The checkpoint that is resumed, None for a fresh start; UserError if there is none to be the latest."""
    if config.resume_from_checkpoint != "latest":
        return Path(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if (folder := latest_checkpoint(Path(config.output_dir))) is None:
        raise UserError(
            f"--resume_from_checkpoint latest: '{config.output_dir}' holds no checkpoint; leave the flag "
            "out to start anew."
        )
    return folder


def drop_old_checkpoints(output: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints that can be resumed, and those into which somebody has put
    something."""
    remove(folder for folder in checkpoints(output)[:-keep] if only_a_run(folder))

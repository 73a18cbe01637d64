"""The output folder of a run: claimed before anything is loaded, cleared before training starts."""

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
from customize.runs.output import check_writable, locked, make_folder, refuse_model
from customize.trainers.settings import ModelConfig, TrainConfig, is_first_process

FLAG = "--output_dir"


@contextmanager
def claimed_output(
    model_config: ModelConfig, train_config: TrainConfig, config: Mapping[str, Any]
) -> Iterator[None]:
    """Context in which the output folder belongs to this run: it can be written, holds only files of
    runs, and no earlier run that was not given up. `config` holds all settings. UserError otherwise, on
    the first process."""
    if not is_first_process():
        yield
        return
    output = Path(train_config.output_dir)
    refuse_model(output, FLAG, embedded.folder_of(model_config.pretrained_model_name_or_path))
    with locked(make_folder(output, FLAG), FLAG):
        put_in_place(output)
        _check_contents(output, train_config, config)
        yield


def check_output(model_config: ModelConfig, train_config: TrainConfig, config: Mapping[str, Any]) -> None:
    """UserError where `claimed_output` would refuse; nothing is made, moved or locked."""
    output = Path(train_config.output_dir)
    refuse_model(output, FLAG, embedded.folder_of(model_config.pretrained_model_name_or_path))
    check_writable(output, FLAG)
    _check_contents(output, train_config, config)


def _check_contents(output: Path, train_config: TrainConfig, config: Mapping[str, Any]) -> None:
    check_free(output, train_config.overwrite_output_dir, resumes_here(train_config), FLAG)
    resumed_folder(train_config)  # says so if there is none
    check_progress(train_config)
    if train_config.overwrite_output_dir:
        check_inputs(output, config)


def resumes_here(train_config: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint in its own output folder."""
    where, output = train_config.resume_from_checkpoint, Path(train_config.output_dir).resolve()
    return where == "latest" or (bool(where) and Path(where).resolve().parent == output)


def check_progress(train_config: TrainConfig) -> None:
    """UserError if resuming would leave less than the output folder holds: a result or a checkpoint of a
    later step."""
    if not train_config.resume_from_checkpoint or train_config.overwrite_output_dir:
        return
    output = Path(train_config.output_dir)
    another = "choose another --output_dir, or replace what is there with --overwrite_output_dir."
    done = read_info(output).get("step", 0) if (output / INFO).exists() else 0
    if done > train_config.max_train_steps:
        raise UserError(
            f"'{output}' was trained for {done} steps, more than --max_train_steps "
            f"{train_config.max_train_steps}; {another}"
        )
    later = [path for path in later_results(train_config) if checkpoint_step(path) is not None]
    if later:
        raise UserError(
            f"--resume_from_checkpoint: '{output}' holds {later[0].name}, which is later; {another}"
        )


def later_results(train_config: TrainConfig) -> list[Path]:
    """Checkpoints, samples and the best step in the output folder that are later than the checkpoint to
    resume from."""
    output, start = (
        Path(train_config.output_dir),
        checkpoint_step(Path(train_config.resume_from_checkpoint).resolve()),
    )
    if start is None:  # `latest`, after which there is no checkpoint
        return []
    later = [path for path in checkpoints(output) if (checkpoint_step(path) or 0) > start]
    later += [path for path in samples(output / "samples") if int(path.stem.rpartition("-")[2]) > start]
    best = output / "best"
    return later + ([best] if only_a_run(best) and read_info(best).get("step", 0) > start else [])


def clear_output(train_config: TrainConfig, accelerator: Accelerator) -> None:
    """Removes the earlier run that this one replaces; called once everything the run needs was found."""
    if not accelerator.is_main_process:
        return
    if not resumes_here(train_config):
        clear(Path(train_config.output_dir))
    elif train_config.overwrite_output_dir:
        remove(later_results(train_config))


def forget_later(log: Path, step: int) -> None:
    """Removes the validations after a step from the log, as the resumed run makes them again."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [
        line
        for line in lines
        if (found := re.match(r'{"step": (\d+)', line)) and int(found[1]) <= step and "}" in line
    ]
    if kept != lines:
        write_text(log, "".join(kept))


def resumed_folder(train_config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, None for a fresh start; UserError if there is no latest one."""
    if train_config.resume_from_checkpoint != "latest":
        return Path(train_config.resume_from_checkpoint) if train_config.resume_from_checkpoint else None
    if (folder := latest_checkpoint(Path(train_config.output_dir))) is None:
        raise UserError(
            f"--resume_from_checkpoint latest: '{train_config.output_dir}' holds no checkpoint; leave the "
            "flag out to start anew."
        )
    return folder


def drop_old_checkpoints(output: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints, except those to which the user has added files."""
    remove(folder for folder in checkpoints(output)[:-keep] if only_a_run(folder))

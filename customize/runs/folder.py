"""What a run's folder holds, what of it the run wrote, and `run.json`, which lists it with its hashes.

run.json                              format, base model, method, configuration, library versions, files
pytorch_lora_weights.safetensors      LoRA in diffusers' layout, alpha folded in
learned_embeds[-WORD].safetensors     learned words
directions.safetensors                directions of noiseclr
subject.safetensors                   a subject encoder; ip_adapter.safetensors in IP-Adapter's layout
reference_unet.safetensors            an encoder whose references the UNet itself reads
seecoder.safetensors                  SeeCoder in its released layout, an image in the place of the prompt
unet/, transformer/, text_encoder/    only where a whole component was trained
README.md                             the model card
checkpoint-N/, best/                  the run at earlier steps
samples/, validation.jsonl            images and losses of its validations
progress.jsonl                        what it does now: step, losses, time
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from customize.adapters import is_adapter_file
from customize.errors import UserError
from customize.files import HIDDEN, atomic_folder, damaged, header, read_json, remove
from customize.runs.output import is_own_image, is_own_log, sha256

FORMAT = 1


INFO, CARD, LOG, PROGRESS = "run.json", "README.md", "validation.jsonl", "progress.jsonl"
LOGS = (LOG, PROGRESS)


RESUME = "resume.safetensors"


STAGED = f"{HIDDEN}staged"  # a complete new version of the run, on its way into place


KINDS = {
    "format": int,
    "base_model": str,
    "method": str,
    "config": dict,
    "words": dict,
    "step": int,
    "files": dict,
}


class LaterVersion(UserError):
    pass


def read_info(run: Path) -> dict[str, Any]:
    """`run.json` of a run folder; UserError if it is missing, not of the form that runs write, or of a
    later format."""
    path = run / INFO
    try:
        info = read_json(path)
    except FileNotFoundError:
        raise UserError(_no_run(run)) from None
    except NotADirectoryError:
        raise UserError(f"'{run}' is a file; give the --output_dir of a training run.") from None
    if not isinstance(info, dict):
        raise damaged(path, "it holds no object")
    if isinstance(info.get("format"), int) and info["format"] > FORMAT:
        raise LaterVersion(
            f"'{run}' was written by a later version (format {info['format']}, known is {FORMAT}): pip "
            "install -U customize."
        )
    for key, kind in KINDS.items():
        if not isinstance(info.get(key, None if key in ("format", "base_model") else kind()), kind):
            raise damaged(path, f"its '{key}' is no {kind.__name__}")
    names = [*info.get("words", {}).values(), *info.get("files", {})]
    if not all(isinstance(name, str) and _stays_inside(name) for name in names):
        raise damaged(path, "it names files outside the run")
    return {"words": {}, "config": {}} | info


def info_of(run: str | Path) -> dict[str, Any]:
    """`run.json` of a run; what stands for it where `run` is the name of a base model."""
    found = read_info(Path(run)) if (Path(run) / INFO).exists() else {}
    return {"base_model": str(run), "words": {}, "config": {}} | found


# Settings of a run with which its base model is loaded, and what `load_base` calls them.
BASE_SETTINGS = {
    "revision": "revision",
    "variant": "variant",
    "single_file_config": "single_file_config",
    "pretrained_vae_model_name_or_path": "vae_name",
}


def base_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Those of a run's settings that its base model is loaded with."""
    return {name: value for name in BASE_SETTINGS if (value := config.get(name))}


def base_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `load_base` that load the base model of a run with these settings."""
    return {BASE_SETTINGS[name]: value for name, value in base_settings(config).items()}


def _no_run(run: Path) -> str:
    newest = latest_checkpoint(run)
    hint = f"; its newest checkpoint is '{newest}'" if newest else "; give the --output_dir of a training run"
    return f"'{run}' is not a run folder: it has no {INFO}{hint}."


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def checkpoint_step(folder: Path) -> int | None:
    """The N of a checkpoint-N folder; None for every other name."""
    named = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", folder.name)  # other scripts' digits are not ours
    return int(named[1]) if named else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders from which a run can be resumed, by N."""
    steps = {path: step for path in run.glob("checkpoint-*") if (step := checkpoint_step(path)) is not None}
    return sorted((path for path in steps if (path / RESUME).is_file()), key=lambda path: steps[path])


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint-N folder with the highest N, or None."""
    return next(reversed(checkpoints(run)), None)


def check_files(run: Path, info: Mapping[str, Any]) -> None:
    """UserError unless every file that `info` lists is there, as the run wrote it."""
    for name, digest in info.get("files", {}).items():
        if name == CARD:
            continue
        if not (run / name).is_file():
            raise UserError(
                f"'{run / name}' is missing, which {INFO} lists: put it back, or use another checkpoint."
            )
        if sha256(run / name) != digest:
            raise UserError(
                f"'{run / name}' is not the file that the run wrote: put that one back, or use another "
                "checkpoint."
            )


@contextmanager
def staged(folder: Path, info: Mapping[str, Any]) -> Iterator[tuple[Path, dict]]:
    """A folder for a new version of a run's files, and the content of its `run.json`, to which entries
    may be added. All of it takes effect together. Files that `info` lists already stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / STAGED) as new:
        described = dict(info)
        yield new, described
        written = {
            path.relative_to(new).as_posix(): sha256(path)
            for path in sorted(new.rglob("*"))
            if path.is_file()
        }
        described["files"] = described.get("files", {}) | written
        (new / INFO).write_text(json.dumps(described, indent=2), encoding="utf-8")
    put_in_place(folder)


def put_in_place(folder: Path) -> None:
    """Moves a staged version into place, `run.json` last, and removes files that only the earlier version
    had. It also continues after a kill."""
    new = folder / STAGED
    if (new / INFO).exists():
        names = {path.name for path in _listed(new)}
        remove(path for path in _listed(folder) if path.name not in names)
        for path in sorted(filter(_is_run_name, new.iterdir()), key=lambda path: path.name == INFO):
            if (folder / path.name).is_dir():
                remove([folder / path.name])
            os.replace(path, folder / path.name)
    remove([new])


def _listed(folder: Path) -> list[Path]:
    """The top-level files and folders that the `run.json` in a folder lists, whether they exist or not."""
    if not (folder / INFO).exists():
        return []
    info = read_json(folder / INFO)
    if not isinstance(info, dict) or not isinstance(info.get("files", {}), dict):
        raise damaged(folder / INFO, "it lists no files")
    if "files" not in info:  # of an earlier version
        return [path for path in taken(folder) if path.name == CARD or is_adapter_file(path)]
    tops = {PurePosixPath(name).parts[0] for name in info["files"] if _stays_inside(name)}
    return [folder / top for top in tops if _is_run_name(folder / top)]


def taken(folder: Path) -> list[Path]:
    """The files and folders in a folder whose names a run would use."""
    found = filter(_is_run_name, folder.iterdir() if folder.is_dir() else ())
    return sorted(found, key=lambda path: (path.name != INFO, path.name))


def _is_run_name(path: Path) -> bool:
    if path.name == "samples":
        return not path.is_dir() or bool(samples(path))
    named = path.name in (INFO, CARD, *LOGS, "best") or is_adapter_file(path)
    return named or checkpoint_step(path) is not None


def foreign(folder: Path) -> list[Path]:
    """Of the files that `taken` finds, those that no run wrote or that were changed since."""
    try:
        info = read_info(folder) if (folder / INFO).exists() else {}
    except LaterVersion:
        raise
    except UserError:
        info = {"files": {}}
    return [path for path in taken(folder) if not _is_own(path, info)]


def _is_own(path: Path, info: Mapping[str, Any]) -> bool:
    if path.name == INFO:
        return "base_model" in info
    if path.name in LOGS:
        return is_own_log(path)
    if path.name == "best" or checkpoint_step(path) is not None:
        return only_a_run(path) and (path.name == "best" or _is_resumable(path))
    if "base_model" in info and "files" not in info:  # of an earlier version, which listed none
        return True
    if path.name == "samples":
        return all(map(is_own_image, samples(path)))
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_dir()]
    files = info.get("files", {})
    return all(file.is_file() and files.get(_name(file, path.parent)) == sha256(file) for file in inside)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def only_a_run(folder: Path) -> bool:
    """Whether a folder holds a run and nothing else."""
    try:
        read_info(folder)
    except (UserError, OSError):
        return False
    known = {INFO, RESUME, *(path.name for path in _listed(folder))}
    return {path.name for path in folder.iterdir()} <= known


def _is_resumable(folder: Path) -> bool:
    try:
        return "tree" in header(folder / RESUME)
    except UserError:
        return False


def check_free(folder: Path, overwrite: bool, resumed: bool, flag: str = "--output_dir") -> None:
    """UserError if a run would replace files that are not its own, or an earlier run without `overwrite`."""
    if others := foreign(folder):
        raise UserError(
            f"{flag}: '{folder}' holds '{others[0].name}', which a run would replace and which no run "
            "wrote (or which was "
            "changed since); move it away, or choose another folder."
        )
    if [path for path in taken(folder) if path.name != PROGRESS] and not (overwrite or resumed):
        resumable = flag == "--output_dir" and latest_checkpoint(folder)
        resuming = ", go on with --resume_from_checkpoint latest," if resumable else ""
        raise UserError(
            f"'{folder}' holds an earlier run; choose another {flag}{resuming} or replace it with "
            "--overwrite_output_dir."
        )


def check_inputs(folder: Path, config: Mapping[str, Any]) -> None:
    """UserError if a path that the configuration names lies in what overwriting `folder` would remove."""
    gone, ours = [path.resolve() for path in taken(folder)], ("output_dir", "resume_from_checkpoint")
    for name, values in config.items():
        for value in values if isinstance(values, list) else [values]:
            path = Path(value).resolve() if isinstance(value, str) and value and name not in ours else None
            if path and (
                set(gone) & {path, *path.parents} or (path == folder.resolve() and (path / INFO).exists())
            ):
                raise UserError(
                    f"--{name}: '{value}' lies in what --overwrite_output_dir would replace; choose "
                    "another --output_dir."
                )


def clear(folder: Path) -> None:
    """Removes checkpoints, samples and logs of an earlier run; its result is replaced by the new run's
    result."""
    earlier = [
        path for path in taken(folder) if path.name in ("best", *LOGS) or checkpoint_step(path) is not None
    ]
    remove([*earlier, *filter(is_own_image, samples(folder / "samples"))])


def samples(folder: Path) -> list[Path]:
    """The images of validations, of all steps."""
    return [
        path for path in folder.glob("*.png") if re.fullmatch(r"(step|similarity)-\d{6,}\.png", path.name)
    ]

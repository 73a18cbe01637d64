"""Reading and writing files: a file or a folder appears under its name only when it is complete."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from customize.errors import UserError, is_disk_full

HIDDEN = ".customize-"  # what begins so was begun by this toolkit and not finished
NEW, OLD, PART = HIDDEN + "new-", HIDDEN + "old-", HIDDEN + "part-"
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def names_of(path: Path) -> set[str]:
    """The names of the tensors of a safetensors file; UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it is not a regular file or not JSON, FileNotFoundError if
    it does not exist."""
    if path.exists() and not path.is_file():  # a pipe would block for ever
        raise UserError(f"'{path}' is not a regular file; remove it.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> UserError:
    return UserError(f"'{path}' is damaged ({reason}); use an earlier checkpoint.")


@contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """A path to write to; it replaces `path` once it is complete and flushed to disk.

    With `exclusive`, FileExistsError if `path` exists by then, so that two programs never write one file.
    """
    partial = path.with_name(f"{PART}{os.getpid()}-{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        _settle(partial)
        _link(partial, path) if exclusive else os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
        os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file under its name only when it is complete."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into; it replaces `folder` once all is written and flushed to disk.

    UserError when the disk is full; the old folder is then untouched. After a kill, `recover` cleans up.
    """
    partial, old = (
        folder.with_name(NEW + folder.name),
        folder.with_name(f"{OLD}{uuid.uuid4().hex[:12]}-{folder.name}"),
    )
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _settle(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(f"the disk is full: '{folder}' was not written; free some space.") from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _discard(old)


def recover(parent: Path) -> None:
    """Cleans up after a kill during `atomic_folder`, `atomic_file` or `remove` in `parent`: removes
    unfinished files, and restores what was about to be replaced. Files that other programs are writing
    stay."""
    for path in parent.glob(f"{OLD}*"):
        target = path.with_name(path.name.removeprefix(OLD).partition("-")[2])
        _discard(path) if target.exists() else os.replace(path, target)
    for path in parent.glob(f"{NEW}*"):
        _discard(path)
    for path in parent.glob(f"{PART}*"):
        if not _is_alive(path.name.removeprefix(PART).partition("-")[0]):
            path.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:  # another user's
        return True
    return int(process) != os.getpid()


def remove(paths: Iterable[Path]) -> None:
    """Removes files and folders. They are hidden first, so that a kill leaves none of them in part."""
    for path in paths:
        hidden = path.with_name(f"{NEW}{uuid.uuid4().hex[:12]}")
        with suppress(FileNotFoundError):
            os.replace(path, hidden)
            _discard(hidden)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Flushes a file to disk, with the access rights of other new files: safetensors writes for the owner
    alone."""
    os.chmod(path, 0o666 & ~_UMASK)
    with open(path, "rb") as file:
        os.fsync(file.fileno())

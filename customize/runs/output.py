"""Output folders: files of others are never replaced or deleted, and one program at a time writes into a
folder."""

import hashlib
import os
import platform
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image, PngImagePlugin

from customize.errors import UserError
from customize.files import HIDDEN, atomic_file, recover

LOCK = f"{HIDDEN}lock"


WAIT = 6.0  # seconds for a folder to become free: a killed run's loading processes live on for about five


SOFTWARE = "customize"  # what the PNG files that we write name as their software


def is_own_image(path: Path) -> bool:
    """Whether a PNG file was written by `save_image`."""
    return own_text(path, "Software") == SOFTWARE


def own_text(path: Path, name: str) -> str:
    """A text that `save_image` wrote into a PNG file; empty if there is none."""
    try:
        with Image.open(path) as image:
            return str(image.info.get(name, ""))
    except Exception:  # PIL's decoders raise all kinds
        return ""


def save_image(
    image: Image.Image, path: Path, exclusive: bool = False, texts: Mapping[str, str] | None = None
) -> None:
    """Writes a PNG under its name only when it is complete, with `texts` and our mark in it;
    FileExistsError where there is one, if `exclusive`."""
    info = PngImagePlugin.PngInfo()
    for name, text in {"Software": SOFTWARE, **(texts or {})}.items():
        info.add_text(name, text)
    with atomic_file(path, exclusive) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path, flag: str) -> Path:
    """Makes the folder and writes a trial file into it; UserError naming `flag` if one of the two cannot be
    done, or if the folder is a model's."""
    refuse_model(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"{HIDDEN}trial-{os.getpid()}-{threading.get_ident()}"
        with atomic_file(trial) as partial:
            partial.write_bytes(b"trial")
        trial.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{flag}: cannot write into '{folder}' ({reason}); choose another folder.") from error
    return folder


def check_writable(folder: Path, flag: str) -> None:
    """UserError where `make_folder` would fail or another program writes into the folder; nothing is made."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    reason = "" if os.access(place, os.W_OK | os.X_OK) else "Permission denied"
    if reason := reason if place.is_dir() else "Not a directory":
        raise UserError(f"{flag}: cannot write into '{folder}' ({reason}); choose another folder.")
    if _is_locked(folder / LOCK):
        raise _taken(folder, flag)


def _is_locked(path: Path) -> bool:
    """Whether a program holds a lock, which is not touched."""
    try:
        import fcntl

        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # there is none, or it cannot be asked for
        return False
    return False


def _taken(folder: Path, flag: str) -> UserError:
    holder = _holder(folder / LOCK)
    return UserError(f"{flag}: '{folder}' is being written by {holder}; wait for it, or choose another.")


def refuse_model(folder: Path, flag: str, base: str = "") -> None:
    """UserError if the folder is that of a diffusers pipeline, or lies within the base model's folder."""
    if os.path.exists(folder / "model_index.json"):
        raise UserError(
            f"{flag}: '{folder}' is the folder of a model (it has a model_index.json); choose another folder."
        )
    place = Path(os.path.realpath(folder))
    if base and Path(base).is_dir() and Path(base).resolve() in (place, *place.parents):
        raise UserError(f"{flag}: '{folder}' lies within the base model's folder; choose another folder.")


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Context in which no other program writes into the folder; UserError if one does already.

    The system frees the lock when its process ends, however it ends: a killed run blocks nobody.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT)
    except Timeout:
        raise _taken(folder, flag) from None
    except OSError as error:  # a file system without locks
        warnings.warn(
            f"'{folder}' cannot be locked ({error.strerror}): let no other program write into it.",
            stacklevel=3,
        )
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}")
        recover(folder)
        yield
    finally:
        with suppress(OSError):
            # while it is still held; whoever opened it before sees that it is gone, and makes another
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text()[:200] or "another program"
    except OSError:
        return "another program"


def is_own_log(path: Path) -> bool:
    """Whether a file is a validation log of ours: one object that begins with a step on each line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, ValueError):
        return False
    start = '{"step": '
    return path.is_file() and all(
        start.startswith(line[: len(start)]) for line in lines
    )  # the last may be cut short

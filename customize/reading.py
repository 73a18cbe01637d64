"""Text files of the user: read completely, or refused with one sentence."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

from customize.errors import UserError, shortened


def ordinary(path: str | Path) -> Path:
    """The path, if it is an ordinary file; OSError otherwise. Opening a pipe would block."""
    if not os.path.isfile(path):
        raise OSError("it is no ordinary file" if os.path.lexists(path) else "there is no such file")
    return Path(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 one that begins with a byte order mark, as Notepad writes
    it; UserError if it is neither."""
    try:
        content = ordinary(path).read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if marked else "utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); correct its path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}); save it as UTF-8.") from error


def parsed_json(text: str) -> Any:
    """The content of a JSON text. ValueError also for a key that is given twice, for invalid Unicode, and
    for deep nesting."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text to a tokenizer
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{shortened(key)}' is given twice")
        found[key] = value
    return found


def inside(path: str, folders: list[str]) -> bool:
    """Whether an absolute path lies in one of these folders, judged by the path as written. Links are not
    resolved, as snapshots of the hub consist of links."""
    place = os.path.normpath(path)
    return any(os.path.commonpath([place, folder]) == folder for folder in map(os.path.normpath, folders))

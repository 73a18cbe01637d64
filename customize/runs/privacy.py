"""Removes paths of the user's machine from what is shared: only the last name of a path remains."""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

# settings that always are files or folders of the user's
PLACES = {
    "output_dir",
    "instance_data_dir",
    "class_data_dir",
    "concepts_list",
    "cache_dir",
    "train_data_dir",
    "data_files",
    "world",
    "pretrained_adapter",
    "validation_images",
    "resume_from_checkpoint",
    "subject_images",
}


_PART = r"[^\s\"'`|,;:<>()\[\]{}/\\]+"


# somebody's own folder: names of people hold spaces
_HOME = r"(?:/(?:home|Users)/[^/\\\n\"']+|[A-Za-z]:\\+Users\\+[^/\\\n\"']+|\$HOME|~[\w.-]*)"


_ROOT = r"(?:[A-Za-z]:[/\\]+|\\\\+|/)"


_PATH = re.compile(
    rf"(?<![\w/.<\\])(?:file://)?(?:{_HOME}[/\\]+(?:{_PART}[/\\]+)*{_PART}|{_ROOT}(?:{_PART}[/\\]+)+{_PART}|\$HOME|~\w+)"
)


def without_places(value: Any, name: str = "") -> Any:
    """A setting, or nested ones, with each path of the user's machine cut down to its last name; `name` is
    the setting's."""
    if isinstance(value, dict):
        return {key: without_places(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if name in PLACES or is_place(value, name):
        return _last(value)
    return without_paths(value)


def is_place(text: str, name: str = "") -> bool:
    """Whether a text as a whole is a path of this machine, rather than a hub id or a sentence; `name` is
    the setting's."""
    if len(text) > 1000 or "\n" in text:
        return False
    if (
        text.startswith(("/", "~", "./", "../", "\\", "$HOME", "file:"))
        or PureWindowsPath(text).is_absolute()
    ):
        return len(text) > 1
    if re.search(r"\s", text) or "://" in text:
        return False
    deep = text.count("/") > 1 and name != "image_encoder"  # which may be in a folder of a hub repository
    return "\\" in text or deep or ("/" in text and _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _last(path: str) -> str:
    """The last name of a path; empty for a home folder, whose name is that of a person."""
    return (
        "" if re.fullmatch(_HOME, path.rstrip("/\\")) else PureWindowsPath(path).name
    )  # it parts at both kinds of slashes


def without_paths(text: str) -> str:
    """A text with each absolute path in it cut down to its last name."""
    return _PATH.sub(lambda found: _last(found[0]), text)


def names_place(value: Any) -> bool:
    """Whether an absolute path stands in a text, or in a nested one."""
    return any(_PATH.search(text) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
        if value.startswith(("{", "[")):
            try:
                yield from _texts(json.loads(value))
            except ValueError:
                return

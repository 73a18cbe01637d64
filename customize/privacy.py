"""What is handed out names no place on the user's machine: of a path only its last name is left."""

import re
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
_ABSOLUTE = re.compile(rf"(?<![\w:/.<])(?:~[\w.-]*)?/(?:{_PART}/)+{_PART}|(?<!\w)[A-Za-z]:[\\/](?:{_PART}[\\/])*{_PART}")


def without_places(value: Any, name: str = "") -> Any:
    """A setting, or nested ones, with each path of the user's machine cut down to its last name; `name` is the setting's."""
    if isinstance(value, dict):
        return {key: without_places(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if name in PLACES or is_place(value):
        return PureWindowsPath(value).name  # it parts words at both kinds of slashes
    return without_paths(value)


def is_place(text: str) -> bool:
    """Whether a text as a whole is a path of this machine, rather than a hub id or a sentence."""
    if len(text) > 1000 or "\n" in text:
        return False
    shaped = text.startswith(("/", "~", "./", "../", "\\")) or PureWindowsPath(text).is_absolute()
    return (shaped and len(text) > 1) or ("/" in text and _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def without_paths(text: str) -> str:
    """A text with each absolute path in it cut down to its last name."""
    return _ABSOLUTE.sub(lambda found: PureWindowsPath(found[0]).name, text)


def names_place(text: str) -> bool:
    """Whether an absolute path, or the user's own folder, stands in a text."""
    return bool(_ABSOLUTE.search(text)) or str(Path.home()) + "/" in text

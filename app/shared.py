"""What several commands share."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from customize.config import parse
from customize.embedded import is_embedded, is_single_file
from customize.errors import UserError, nearest


def split(words: list[str], config: type, names: list[str], more: bool = False) -> tuple[list[str], Any]:
    """The words before the first flag, one for each of `names` (or more, if `more`), and the flags as an
    instance of `config`."""
    first = list(takewhile(lambda word: not word.startswith("--"), words))
    if len(first) < len(names) or (len(first) > len(names) and not more):
        raise UserError(f"Write {' '.join(names) or 'nothing'} before the flags, not '{' '.join(first)}'.")
    return first, parse([config], words[len(first) :])[0]


def check_run(run: str) -> None:
    """UserError unless `run` is a folder, a base model in one file, `stickers`, or looks like a hub id."""
    if Path(run).is_dir() or is_embedded(run) or (is_single_file(run) and Path(run).is_file()):
        return
    beside = [str(path.parent) for path in Path(run).parent.glob("*/run.json")]
    # runs/cat has the shape of a hub id; the hub should not be asked for a misspelt run.
    if beside or run.startswith("runs/") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", run):
        raise UserError(
            f"There is no run '{run}': give a folder, a hub id or `stickers` as RUN.{nearest(run, beside)}"
        )

"""Errors that the user can fix: one sentence with the remedy, and exit code 2."""

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches

DISK_FULL = (
    "The disk is full: free some space, or write elsewhere with "
    "--output (generate, demo) or --output_dir (train)."
)
OUT_OF_MEMORY = (
    "Out of memory: try --gradient_checkpointing, --train_batch_size 1 with a larger "
    "--gradient_accumulation_steps, "
    "a smaller --resolution, or --mixed_precision bf16."
)


class UserError(Exception):
    """A mistake that the user can fix. The command line prints the message alone and exits with code 2."""

    def __init__(self, message: str):
        # torch's loading processes hand on an error as the text of its traceback
        is_traceback = message.startswith("Caught ") and "Traceback" in message
        super().__init__(re.split(r"\n[\w.]+: ", message)[-1].strip() if is_traceback else message)


class Stopped(UserError):
    """Training was asked to stop and has saved a checkpoint."""


@contextmanager
def parameters_named() -> Iterator[None]:
    """Context for calls from Python: messages name parameters, `output_dir`, where those of the command line
    name flags, `--output_dir`."""
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"(?<!\S)--(?=[a-z])", "", str(error)), *error.args[1:])
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a misspelt name, or nothing."""
    close = get_close_matches(name, list(known), 1)
    return f" Did you mean '{close[0]}'?" if close else ""


def shortened(text: str, most: int = 80) -> str:
    """A text for a message: on one line, of about `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_safely(
    command: Callable[[list[str]], object], words: Sequence[str], out_of_memory: str = OUT_OF_MEMORY
) -> int:
    """Runs `command(words)`; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C.

    Errors that the user cannot mend are raised. `out_of_memory` is the advice for the command's own
    flags.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers speaks at import already
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        command(list(words))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if not (message := _remedy(error, out_of_memory)):
            raise
        with suppress(OSError):  # nobody may listen any more
            _end_bars()
            print(f"error: {message}", file=sys.stderr)
        return 2
    finally:
        _write_out()
    return 0


def _write_out() -> None:
    """Writes out what was printed. Python would end with a code of its own where nobody listens any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full: safetensors says it in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _remedy(error: Exception, out_of_memory: str) -> str:
    """One sentence for an error that the user can mend, or nothing."""
    if isinstance(error, UserError):
        return str(error)
    # by name, because importing torch for its OutOfMemoryError would cost seconds
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return out_of_memory
    return DISK_FULL if is_disk_full(error) else ""


def _end_bars() -> None:
    """Ends the lines of progress bars that an error left open."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()

"""Signals that end a run after the current step is finished and saved."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


# seconds in which several signals are one: a launcher passes on what the terminal has sent already
TOGETHER = 2.0


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Context that gives a function: whether the run was asked to stop by Ctrl-C (SIGINT), a scheduler
    (SIGTERM) or a closing terminal (SIGHUP). The step is finished and saved first; a second signal stops
    at once."""
    pressed: list[float] = []
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1

    def handle(signum, frame):
        if pressed and (alone or time.time() - pressed[0] > TOGETHER):
            raise KeyboardInterrupt
        pressed.append(time.time())
        with suppress(OSError):  # not print: it may be interrupted itself
            os.write(2, b"\nfinishing this step and saving; press Ctrl-C again to stop at once\n")

    # nohup has SIGHUP ignored, and means it
    wanted = [
        number for number in STOPPING if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    ]
    try:
        before = {number: signal.signal(number, handle) for number in wanted}
    except ValueError:  # not in the main thread, as under the web page
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Unfailing:
    """A stream that ignores errors once nobody reads it: a closed terminal, or a `tee` that Ctrl-C ended."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

"""The progress file of a run, which the web page and `customize runs` read: one JSON object a line."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from customize.errors import Stopped
from customize.runs.folder import PROGRESS

EVERY = 0.5  # seconds between two lines of steps


class Progress:
    """Writes `progress.jsonl`: `step` of `steps`, `time` (seconds since 1970), `state`, `losses`, and the
    `images` of a validation. The state is training, and in the last line done, stopped or failed. A file
    that cannot be written stops no run."""

    def __init__(self, folder: Path, method: str, steps: int, writes: bool = True):
        self.path, self.method, self.steps, self.writes = folder / PROGRESS, method, steps, writes
        self.step, self.last, self.losses = 0, 0.0, {}  # type: int, float, dict[str, float]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        message = str(error).splitlines()[:1] if error else []
        self._write("stopped" if stopped else "failed" if kind else "done", message=message)

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """Notes the losses of a step; a line is written every half second."""
        self.step, self.losses = step, dict(losses)
        if time.time() - self.last >= EVERY:
            self._write("training")

    def show(self, images: Path) -> None:
        """Notes the images of a validation, if there are any."""
        if images.exists():
            self._write("training", images=[f"{images.parent.name}/{images.name}"])

    def _write(self, state: str, **more: list[str]) -> None:
        if not self.writes:
            return
        self.last = time.time()
        about = {"step": self.step, "steps": self.steps, "time": round(self.last, 2), "state": state}
        about |= {"method": self.method, "losses": self.losses}
        about |= {name: value[0] for name, value in more.items() if value}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(about) + "\n")

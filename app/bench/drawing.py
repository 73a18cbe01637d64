"""Pictures made once: an interrupted evaluation goes on where it stopped, and makes the same pictures as one that was not."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from customize.errors import UserError


@dataclass(frozen=True)
class Shot:
    """A picture to be drawn: the stem of its file, its prompt, and the seed of its noise."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How every picture of an evaluation is drawn."""

    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    height: int | None = None
    width: int | None = None

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def options(self) -> dict:
        sides = {name: side for name in ("height", "width") if (side := getattr(self, name))}
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale, **sides}


def draw_missing(load: Callable, shots: Sequence[Shot], folder: Path, sampling: Sampling) -> list[Image.Image]:
    """The pictures of `shots`, from `folder` where they are there already. `load()` gives the pipeline, if any is missing.

    A batch is drawn whole or not at all, so that resuming changes no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = [shots[i : i + sampling.batch_size] for i in range(0, len(shots), sampling.batch_size)]
    groups = [(batch, [folder / f"{shot.name}.png" for shot in batch]) for batch in batches]
    missing = [(group, paths) for group, paths in groups if not all(path.exists() for path in paths)]
    if missing:
        pipe = load()
    for group, paths in missing:
        generators = [torch.Generator().manual_seed(shot.seed) for shot in group]
        pictures = pipe([shot.prompt for shot in group], generator=generators, **sampling.options).images
        for picture, path in zip(pictures, paths, strict=True):
            save_picture(picture, path)
    return [Image.open(path).convert("RGB") for _, paths in groups for path in paths]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG under its name only when it is complete."""
    partial = path.with_suffix(".partial")
    picture.save(partial, format="PNG")
    partial.rename(path)


@contextmanager
def measured(path: Path):
    """Writes to `path` the wall time of what is inside, in seconds, and the most memory that was in use, in MB: the
    accelerator's, or else the process's (resident)."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux can forget an earlier peak
        Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else _peak_resident()
    path.write_text(json.dumps({"seconds": seconds, "peak MB": peak}))


def _peak_resident() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def trained(folder: Path, train: Callable[[Path], object]) -> Path:
    """The run folder `folder/run`, from `train(run)` unless it was finished before."""
    run, cost = folder / "run", folder / "training.json"
    if not (cost.exists() and (run / "run.json").exists()):
        folder.mkdir(parents=True, exist_ok=True)
        with measured(cost):
            train(run)
    return run


def cost_of(folder: Path) -> dict[str, float]:
    """What training in `folder` took, and the size of what it left; empty for what was not trained."""
    if not (folder / "training.json").exists():
        return {}
    spent = json.loads((folder / "training.json").read_text())
    files = sum(path.stat().st_size for path in (folder / "run").glob("*.safetensors"))
    files += sum(
        path.stat().st_size for part in ("unet", "transformer") for path in (folder / "run" / part).glob("*.safetensors")
    )
    return {"training seconds": spent["seconds"], "peak MB": spent["peak MB"], "file MB": files / 1e6}


def same_protocol(folder: Path, protocol: dict[str, str]) -> None:
    """Remembers the protocol of the pictures in `folder`; UserError if they were made by another."""
    path = folder / "protocol.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(protocol, indent=1))
    earlier = json.loads(path.read_text())
    if differing := [name for name in protocol if earlier.get(name) != protocol[name]]:
        name = differing[0]
        raise UserError(
            f"'{folder}' holds an evaluation with another protocol ({name}: {earlier.get(name)}, now {protocol[name]}); "
            "choose another --output."
        )

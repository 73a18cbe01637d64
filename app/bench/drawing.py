"""Images that are drawn once: an interrupted evaluation goes on where it stopped, and ends with the same
images as one that was not interrupted."""

import gc
import io
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from customize.adapters.kohya import KOHYA
from customize.backbones.families import as_called
from customize.backbones.text import COMPONENTS
from customize.errors import Stopped, UserError
from customize.files import remove, write_text
from customize.runs.output import is_own_image, save_image


@dataclass(frozen=True)
class ImageRequest:
    """An image to be drawn: the stem of its file, its prompt, and the seed of its noise."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How every image of an evaluation is drawn."""

    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    height: int | None = None
    width: int | None = None

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def __str__(self):
        return (
            ", ".join(f"{name} {value}" for name, value in self.options.items())
            + f", in batches of {self.batch_size}"
        )

    @property
    def options(self) -> dict:
        sides = {name: side for name in ("height", "width") if (side := getattr(self, name))}
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            **sides,
        }


def draw_missing(
    load: Callable, shots: Sequence[ImageRequest], folder: Path, sampling: Sampling
) -> list[Image.Image]:
    """The images of `shots`, from `folder` where they are there already. `load()` gives the pipeline, if
    any is missing.

    A batch is drawn whole or not at all, so that resuming changes no image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = [shots[i : i + sampling.batch_size] for i in range(0, len(shots), sampling.batch_size)]
    groups = [(batch, [folder / f"{shot.name}.png" for shot in batch]) for batch in batches]
    missing = [(group, paths) for group, paths in groups if not all(path.exists() for path in paths)]
    if missing:
        pipe = load()
    for group, paths in missing:
        generators = [torch.Generator().manual_seed(shot.seed) for shot in group]
        begin = time.perf_counter()
        arguments = {"prompt": [shot.prompt for shot in group], "generator": generators, **sampling.options}
        images = pipe(**as_called(pipe, arguments)).images
        took = (time.perf_counter() - begin) / len(group)
        for image, path in zip(images, paths, strict=True):
            save_image(image, path)
        write_json({"seconds an image": took}, folder / "drawing.json")
    return [Image.open(path).convert("RGB") for _, paths in groups for path in paths]


def write_images(images: Sequence[Image.Image], folder: Path) -> list[Image.Image]:
    """Writes the images into `folder`, removes other images of ours there, and returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:02d}.png" for i in range(len(images))]
    remove(path for path in set(folder.glob("*.png")) - set(paths) if is_own_image(path))
    for image, path in zip(images, paths, strict=True):
        save_image(image, path)
    return list(images)


@contextmanager
def measured(path: Path) -> Iterator[None]:
    """Writes to `path` the wall time of the block in seconds, and its peak memory in MB: of the GPU, or
    else the resident memory of the process."""
    cuda = torch.cuda.is_available()
    gc.collect()  # what an earlier run left behind is not this one's
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux can forget an earlier peak
        Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else _peak_resident()
    write_json({"seconds": seconds, "peak MB": peak}, path)


def write_json(value: dict, path: Path) -> None:
    write_text(path, json.dumps(value, indent=1))


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
        try:
            with measured(cost), redirect_stdout(io.StringIO()):  # what each run says of itself
                train(run)
        except Stopped as error:  # what would resume the run would not resume the evaluation
            raise UserError("stopped; the same command goes on with the evaluation.") from error
    return run


def cost_of(folder: Path) -> dict[str, float]:
    """Time and memory of the training in `folder`, the size of its files, and the seconds for an image in
    the last batch that was drawn."""
    cost: dict[str, float] = {}
    if (folder / "training.json").exists():
        spent = json.loads((folder / "training.json").read_text())
        size = sum(path.stat().st_size for path in weights_of(folder / "run"))
        cost = {"training seconds": spent["seconds"], "peak MB": spent["peak MB"], "file MB": size / 1e6}
    if (folder / "drawing.json").exists():
        cost |= json.loads((folder / "drawing.json").read_text())
    return cost


def weights_of(run: Path) -> list[Path]:
    """The weights that a run left, without checkpoints and copies in other layouts."""
    parts = [run / part for part in COMPONENTS]
    own = [path for path in sorted(run.glob("*.safetensors")) if path.name != KOHYA]
    return own + [path for part in parts for path in sorted(part.glob("*.safetensors"))]


def same_protocol(folder: Path, protocol: dict[str, str]) -> None:
    """Stores the protocol of the images in `folder`; UserError if they were made under another one."""
    path = folder / "protocol.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(protocol, path)
    earlier = json.loads(path.read_text())
    if differing := [name for name in protocol if earlier.get(name) != protocol[name]]:
        name = differing[0]
        raise UserError(
            f"'{folder}' holds an evaluation with another protocol ({name}: {earlier.get(name)}, now "
            f"{protocol[name]}); "
            "choose another --output."
        )

"""An earlier evaluation in the output folder is continued, or replaced if that was asked for. Nothing
else there is touched."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from customize.app.bench.bench import folder_of
from customize.errors import UserError
from customize.files import HIDDEN, read_json, remove
from customize.runs.folder import foreign, taken
from customize.runs.output import is_own_image

PAGES = ("results.json", "results.csv", "report.html")
PROTOCOL = "protocol.json"
NOTES = (PROTOCOL, "drawing.json", "training.json")


def check_folder(folder: Path, methods: Sequence[str], overwrite: bool) -> None:
    """UserError if evaluating `methods` would overwrite files that no evaluation wrote. Removes an
    earlier evaluation if `overwrite`."""
    parts = [folder / folder_of(name) for name in methods]
    strange = (
        []
        if is_protocol(folder)
        else [folder / name for name in (*PAGES, PROTOCOL) if (folder / name).exists()]
    )
    strange += [part for part in parts if part.exists() and not is_protocol(part)]
    earlier = (
        [path for path in folder.iterdir() if path.is_dir() and is_protocol(path)]
        if is_protocol(folder)
        else []
    )
    if overwrite:
        strange += [path for part in earlier for path in others(part)]
    if strange:
        found = strange[0].relative_to(folder)
        raise UserError(
            f"--output: '{folder}' holds '{found}', which no evaluation wrote; move it away, or choose "
            "another."
        )
    if overwrite and is_protocol(folder):
        remove([*earlier, *(folder / name for name in PAGES), folder / PROTOCOL])


def is_protocol(folder: Path) -> bool:
    """Whether the folder holds the protocol of an evaluation."""
    try:
        found = read_json(folder / PROTOCOL)
    except (UserError, OSError):
        return False
    return isinstance(found, dict) and bool({"bench", "method"} & found.keys())


def others(part: Path) -> Iterable[Path]:
    """Files among a method's images and runs that do not belong to an evaluation."""
    runs = [path for path in part.rglob("run") if path.is_dir()]
    for run in runs:
        yield from foreign(run)
    for path in part.rglob("*"):
        within = next((run for run in runs if run in path.parents), None)
        known = [*taken(within), within / "class_images", within / "logs"] if within else []
        if (
            path.is_dir()
            or path.name in NOTES
            or path.name.startswith(HIDDEN)
            or set(known) & {path, *path.parents}
        ):
            continue
        if path.suffix not in (".png", ".txt") or not is_own_image(
            path.with_suffix(".png")
        ):  # captions stand beside images
            yield path

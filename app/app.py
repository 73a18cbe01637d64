"""`customize app` and `customize runs`: the web page, and the runs of a folder."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from customize.app.shared import split
from customize.config import option
from customize.errors import UserError


@dataclass
class AppConfig:
    """The web page."""

    work_folder: str = option("runs", "folder of the runs that the page makes and shows", essential=True)
    host: str = option(
        "127.0.0.1",
        "address to serve at; 0.0.0.0 lets other computers in, and gives each visitor a folder of her own",
        essential=True,
    )
    port: int | None = option(
        None, "port to serve at; none takes the first free one from 7860", least=1, most=65535, essential=True
    )
    auth: list[str] = option(
        [], "who may enter, as NAME:PASSWORD; none: everybody who reaches the address", essential=True
    )
    visitor_hours: float = option(
        24.0, "hours after which the folder of a visitor is deleted, except the owner's on 127.0.0.1", above=0
    )
    share: bool = option(False, "also a public address, through Gradio's server")


def app(words: list[str]) -> None:
    _, config = split(words, AppConfig, [])
    if find_spec("gradio") is None:
        raise UserError("The page needs Gradio: pip install 'customize[app]'.")
    auth = [tuple(entry.split(":", 1)) for entry in config.auth]
    if not all(len(entry) == 2 and all(entry) for entry in auth):
        raise UserError("--auth: write each entry as NAME:PASSWORD.")
    from customize.app.web.page import start
    from customize.runs.output import make_folder

    work = make_folder(Path(config.work_folder), "--work_folder")
    start(work, config.host, config.port, auth, config.visitor_hours, config.share)


@dataclass
class RunsConfig:
    """The runs of a folder."""


def runs(words: list[str]) -> None:
    from customize.runs.listing import runs_in

    (folder,), _ = split(words or ["runs"], RunsConfig, ["FOLDER"])
    if not Path(folder).is_dir():
        raise UserError(f"There is no folder '{folder}': name the folder that holds the runs.")
    found = runs_in(Path(folder))
    if not found:
        return print(f"'{folder}' holds no run.")
    width = max(len(run.name) for run in found)
    for run in found:
        told = "paused" if run.state == "stopped" else run.state
        print(
            f"{run.name:<{width}}  {told:<8}  {run.method:<18} step {run.step} of {run.steps}"
            f"  {run.thumbnail or ''}".rstrip()
        )

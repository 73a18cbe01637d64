"""`customize app`: the web page."""

import atexit
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from inspect import isgeneratorfunction
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from customize.app.jobs import Jobs
from customize.app.web import visitors as limits
from customize.app.web.drawing import Drawer
from customize.app.web.look import CSS, HEAD, theme
from customize.app.web.visitors import CookieMiddleware, Visitor, Visitors
from customize.embedded import NAME
from customize.errors import UserError

SWEEP = 600.0  # seconds between two looks for folders to delete


@dataclass
class Page:
    """What all parts of the page share."""

    visitors: Visitors
    jobs: Jobs
    drawer: Drawer

    def visitor(self, request: Any) -> Visitor:
        return self.visitors.of(request)

    def model(self, name: str | None, visitor: Visitor) -> str:
        """The place of a run or base model that was chosen by its name; UserError for every other name."""
        name = (name or NAME).strip()
        if name == NAME:
            return NAME
        return name if self._is_of_hub(name, visitor) else str(visitor.run(name))

    def _is_of_hub(self, name: str, visitor: Visitor) -> bool:
        """Whether a name is that of a model on the Hugging Face Hub, which the owner alone may load."""
        is_local = Path(name).exists() or (visitor.folder / name.partition("/")[0]).exists()
        return visitor.owner and bool(limits.HUB.fullmatch(name)) and not is_local

    def choices(self, visitor: Visitor) -> list[str]:
        """The names that `model` knows."""
        return [NAME, *(run.name for run in visitor.runs() if (run.folder / "run.json").exists())]


@cache
def scratch() -> Path:
    """A folder for what is handed out, deleted when the program ends."""
    folder = Path(mkdtemp(prefix="customize-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def told(function: Callable) -> Callable:
    """A handler of the page whose UserErrors become messages on it."""

    def message(error: Exception) -> gr.Error:
        if isinstance(error, UserError):
            return gr.Error(str(error), title="Please check", print_exception=False)
        if isinstance(error, gr.Error):
            return error
        traceback.print_exception(error)
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        said = (
            "Out of memory: ask for smaller or fewer images."
            if memory
            else "It went wrong; the log says why."
        )
        return gr.Error(said, print_exception=False)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise message(error) from None

    @wraps(function)
    def iterate(*args: Any, **kwargs: Any) -> Any:
        try:
            yield from function(*args, **kwargs)
        except Exception as error:
            raise message(error) from None

    return iterate if isgeneratorfunction(function) else call


def build(page: Page) -> gr.Blocks:
    """The page with its parts; the same functions are its HTTP API."""
    from customize.app.web.compare_tab import compare_tab
    from customize.app.web.draw_tab import draw_tab
    from customize.app.web.runs_tab import runs_tab
    from customize.app.web.teach_tab import teach_tab

    with gr.Blocks(title="customize", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown("# customize\nTeach an image model your subject, and draw it anywhere.", elem_id="top")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw") as draw:
                model = draw_tab(page, blocks, draw)
            with gr.Tab("Teach", id="teach"):
                watched = teach_tab(page, blocks, tabs, model)
            with gr.Tab("Compare", id="compare") as compare:
                compare_tab(page, blocks, compare)
            with gr.Tab("Runs", id="runs") as runs:
                runs_tab(page, blocks, runs, tabs, model, watched)
    return blocks


def start(
    work: Path, host: str, port: int | None, auth: list[tuple[str, str]], hours: float, share: bool
) -> None:
    """Serves the page until Ctrl-C; a run at work is saved then."""
    Image.MAX_IMAGE_PIXELS = limits.MOST_PIXELS // 2  # PIL refuses twice as many
    shared = bool(auth) or share or host not in ("127.0.0.1", "localhost", "::1")
    jobs = Jobs(work.resolve())
    busy = lambda name: any(job.state in ("queued", "running") for job in jobs.of(name))  # noqa: E731
    page = Page(Visitors(work, shared, hours, busy), jobs, Drawer())
    stopped = threading.Event()
    threading.Thread(target=_sweep, args=(page.visitors, stopped), daemon=True).start()
    atexit.register(jobs.close)
    blocks = build(page).queue(max_size=60, default_concurrency_limit=8)
    blocks.launch(
        server_name=host,
        server_port=port,
        auth=auth or None,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        **launch_options(),
    )
    print(f"the page is at {blocks.local_url}; Ctrl-C ends it", flush=True)  # also into a pipe
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    print("ending: a run at work is saved first")
    page.drawer.close()
    jobs.close()
    blocks.close(verbose=False)


def launch_options() -> dict[str, Any]:
    """How the page is served, for `start` and for the Space."""
    return {
        "theme": theme(),
        "css": CSS,
        "head": HEAD,
        "max_file_size": limits.MOST_BYTES,
        "footer_links": ["api"],
        "ssr_mode": False,
        "app_kwargs": {"middleware": [Middleware(CookieMiddleware)]},
    }


def _sweep(visitors: Visitors, stopped: threading.Event) -> None:
    while not stopped.wait(SWEEP):
        if visitors.shared:
            visitors.sweep()

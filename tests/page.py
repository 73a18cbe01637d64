"""The web page for tests: served in this process, on a port of this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from customize.app.jobs import Jobs
from customize.app.web.drawing import Drawer
from customize.app.web.page import Page, build, launch_options
from customize.app.web.visitors import Visitors


@contextmanager
def served(work: Path, shared: bool = False, **options) -> Iterator[tuple[str, Page]]:
    """The address of a page over a work folder, and its parts."""
    jobs = Jobs(work)
    page = Page(Visitors(work, shared), jobs, Drawer())
    blocks = build(page).queue(default_concurrency_limit=8)
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **options, **launch_options()
    )
    try:
        yield address.rstrip("/"), page
    finally:
        blocks.close(verbose=False)
        jobs.close()

"""The part of the page that lists runs."""

from typing import Any

import gradio as gr
from PIL import Image

from customize.app.web.page import Page, told
from customize.app.web.visitors import Visitor
from customize.runs.listing import RunState

EMPTY = Image.new("RGB", (128, 128), (228, 226, 222))


def runs_tab(
    page: Page, blocks: gr.Blocks, tab: gr.Tab, tabs: gr.Tabs, model: gr.Dropdown, watched: gr.Dropdown
) -> None:
    gr.Markdown("Everything that was taught here, or in a terminal in the same folder.", elem_classes="note")
    gallery = gr.Gallery(
        label="Runs",
        columns=4,
        fit_columns=False,
        height=460,
        object_fit="cover",
        interactive=False,
        allow_preview=False,
        format="png",
    )
    chosen = gr.Textbox("", label="Chosen", placeholder="click a run", interactive=False)
    with gr.Row():
        watch = gr.Button("Watch or go on")
        draw = gr.Button("Draw with it", variant="primary")
    names = gr.State([])

    def listed(request: gr.Request) -> tuple:
        visitor = page.visitor(request)
        runs = _listed(page, visitor)
        return [(_image(run), _caption(run)) for run in runs], [run.name for run in runs]

    for event in (blocks.load, tab.select):
        event(listed, outputs=[gallery, names], api_visibility="private", show_progress="hidden")

    def choose(names: list[str], event: gr.SelectData) -> str:
        return names[event.index]

    gallery.select(choose, names, chosen, api_visibility="private")

    @told
    def go(name: str, request: gr.Request) -> tuple:
        visitor = page.visitor(request)
        page.model(name, visitor)
        return gr.update(choices=page.choices(visitor), value=name), gr.Tabs(selected="draw")

    draw.click(go, chosen, [model, tabs], api_visibility="private")
    watch.click(
        lambda name: (name or gr.skip(), gr.Tabs(selected="teach")),
        chosen,
        [watched, tabs],
        api_visibility="private",
    )

    def runs(request: gr.Request) -> list[dict[str, Any]]:
        """Your runs: name, method, state, step, steps, and a message of the queue."""
        visitor = page.visitor(request)
        messages = {job.run.name: (job.state, job.message) for job in page.jobs.of(visitor.id)}
        found = [_described(run, *messages.get(run.name, ("", ""))) for run in _listed(page, visitor)]
        return found

    gr.api(runs, api_name="jobs", concurrency_limit=4)


def _listed(page: Page, visitor: Visitor) -> list[RunState]:
    """The runs of a visitor, those first that are at work or wait."""
    found = {run.name: run for run in visitor.runs()}
    # what has not begun to write yet
    waiting = [job for job in page.jobs.of(visitor.id) if job.state in ("queued", "running")]
    queued = [
        RunState(job.run.name, job.run, job.method, "", "queued", 0, 0)
        for job in waiting
        if job.run.name not in found
    ]
    return queued + sorted(
        found.values(), key=lambda run: (run.state != "training", -run.folder.stat().st_mtime)
    )


def _described(run: RunState, job: str, message: str) -> dict[str, Any]:
    state = {"running": "training"}.get(job, job if job in ("queued", "failed", "cancelled") else run.state)
    about = {"name": run.name, "method": run.method, "state": state, "step": run.step, "steps": run.steps}
    return about | {"message": message}


def _image(run: RunState) -> Image.Image:
    if run.thumbnail is None:
        return EMPTY
    try:
        with Image.open(run.thumbnail) as image:
            side = min(image.size)
            return image.convert("RGB").crop((0, 0, side, side))  # the first of a sheet
    except OSError:
        return EMPTY


def _caption(run: RunState) -> str:
    told = {"stopped": "paused", "training": f"{run.step} of {run.steps}"}.get(run.state, run.state)
    return f"{run.name} · {told}"

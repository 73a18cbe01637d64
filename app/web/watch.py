"""The part of the page that watches a run: what it does, its losses, and what it draws on the way."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import gradio as gr
import pandas as pd
from PIL import Image

from customize.app.jobs import SAVES, Job
from customize.app.web.page import Page, scratch, told
from customize.app.web.visitors import Visitor
from customize.errors import UserError
from customize.runs.folder import INFO, samples
from customize.runs.listing import progress_of, run_state

POINTS = 300  # of the loss curve


class Watch(NamedTuple):
    """The elements of the part."""

    run: gr.Dropdown
    status: gr.Markdown
    bar: gr.HTML
    pause: gr.Button
    resume: gr.Button
    plot: gr.LinePlot
    sheet: gr.Image
    slider: gr.Slider
    use: gr.Button
    files: gr.File


def watch_panel(page: Page, blocks: gr.Blocks, tabs: gr.Tabs, model: gr.Dropdown) -> Watch:
    """Builds the part. `use` sets the model of the part that draws."""
    parts = _elements()
    _updates(page, parts)
    _acts(page, parts, tabs, model)

    def latest(request: gr.Request) -> dict:
        visitor = page.visitor(request)
        names = runs_of(page, visitor)
        busy = [job.run.name for job in page.jobs.of(visitor.id) if job.state in ("running", "queued")]
        return gr.update(choices=names, value=(busy[-1:] or names[:1] or [None])[0])

    blocks.load(latest, outputs=parts.run, api_visibility="private", show_progress="hidden")
    return parts


def _elements() -> Watch:
    run = gr.Dropdown(
        [], label="Watching", info="a run of yours, also one started in a terminal", allow_custom_value=True
    )
    status, bar = gr.Markdown("Nothing is being taught."), gr.HTML(_bar(0.0))
    with gr.Row():
        pause, resume = gr.Button("Pause and save", size="sm"), gr.Button("Go on", size="sm")
    empty = pd.DataFrame({"step": [], "loss": [], "term": []})
    plot = gr.LinePlot(
        empty, x="step", y="loss", color="term", height=300, label="Loss, averaged", visible=False
    )
    sheet = gr.Image(label="Drawn on the way", height=280, interactive=False, format="png", visible=False)
    slider = gr.Slider(1, 2, 1, step=1, label="Which of them", interactive=True, visible=False)
    with gr.Row():
        use = gr.Button("Draw with this step", size="sm", interactive=False)
        files = gr.File(label="The finished model's files", visible=False, height=80)
    return Watch(run, status, bar, pause, resume, plot, sheet, slider, use, files)


def _updates(page: Page, parts: Watch) -> None:
    """What changes by itself, every second, and with the slider."""
    seen = gr.State("")

    @told
    def watch(run: str | None, seen: str, request: gr.Request) -> tuple:
        return _watch(page, page.visitor(request), run, seen)

    @told
    def show(run: str | None, number: int, request: gr.Request) -> tuple:
        return _shown(page.visitor(request), run, number)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shown = [parts.status, parts.bar, parts.plot, parts.slider, parts.use, parts.files, seen]
    for event in (gr.Timer(1.0).tick, parts.run.change):
        event(watch, [parts.run, seen], shown, **quiet)
    for event in (parts.slider.change, parts.run.change):
        event(show, [parts.run, parts.slider], [parts.sheet, parts.slider], **quiet)


def _acts(page: Page, parts: Watch, tabs: gr.Tabs, model: gr.Dropdown) -> None:
    """What the buttons do."""

    @told
    def draw_with(run: str | None, number: int, request: gr.Request) -> tuple:
        visitor = page.visitor(request)
        value = _step_of(visitor, run, number)
        return gr.update(choices=[*page.choices(visitor), value], value=value), gr.Tabs(selected="draw")

    @told
    def pause(run: str, request: gr.Request) -> str:
        """Lets a run save and end, or takes it out of the queue."""
        return _pause(page, page.visitor(request), run)

    @told
    def resume(run: str, request: gr.Request) -> str:
        """Puts a paused run into the queue again; it goes on from its last checkpoint."""
        return _resume(page, page.visitor(request), run)

    parts.use.click(draw_with, [parts.run, parts.slider], [model, tabs], api_visibility="private")
    parts.pause.click(pause, parts.run, parts.status, api_name="pause")
    parts.resume.click(resume, parts.run, parts.status, api_name="resume")


def runs_of(page: Page, visitor: Visitor) -> list[str]:
    """The names of runs and jobs, the latest first."""
    jobs = [job.run.name for job in page.jobs.of(visitor.id)]
    runs = sorted(visitor.runs(), key=lambda run: run.folder.stat().st_mtime, reverse=True)
    return list(dict.fromkeys([*jobs, *(run.name for run in runs)]))


def _job(page: Page, visitor: Visitor, run: str) -> Job | None:
    return next((job for job in page.jobs.of(visitor.id) if job.run.name == run), None)


def _watch(page: Page, visitor: Visitor, run: str | None, seen: str) -> tuple:
    """What a run does now: text, bar, curve, slider, buttons and files; nothing where nothing has changed."""
    if not run or run not in runs_of(page, visitor):
        return ("Nothing is being taught.", *[gr.skip()] * 5, "")
    job, folder = _job(page, visitor, run), _folder(visitor, run)
    state, lines = run_state(folder) if folder else None, progress_of(folder) if folder else []
    drawn = len(samples(folder / "samples")) if folder else 0
    said = _said(page, run, job, state, lines)
    now = f"{run} {said} {drawn}"
    if now == seen:
        return (*[gr.skip()] * 6, seen)
    done = lines[-1]["step"] / max(lines[-1].get("steps", 1), 1) if lines else 0.0
    slider = gr.update(visible=drawn > 1, maximum=max(drawn, 2), value=max(drawn, 1))
    finished = bool(folder and (folder / INFO).exists() and state and state.state == "done")
    files = gr.update(visible=finished, value=_zipped(folder) if finished and folder else None)
    return said, _bar(done), _plot(lines), slider, gr.update(interactive=drawn > 0), files, now


def _folder(visitor: Visitor, run: str) -> Path | None:
    """The folder of a run of the visitor's list, finished or not."""
    return next((own.folder for own in visitor.runs() if own.name == run), None)


def _said(page: Page, run: str, job: Job | None, state: Any, lines: list[dict]) -> str:
    """The state in one sentence."""
    if job and job.state == "queued":
        before = page.jobs.position(job)
        return f"**{run}** waits; {before} before it." if before else f"**{run}** starts."
    if job and job.state == "running" and not lines:
        return f"**{run}** starts: the model is loaded."
    if job and job.state in ("failed", "cancelled"):
        return f"**{run}**: {job.state}. {job.message}"
    if state is None:
        return f"**{run}**: nothing yet."
    steps = f"step {state.step} of {state.steps}"
    if state.state == "training" or (job and job.state == "running"):
        saving = job is not None and job.message == SAVES
        if saving or state.step >= state.steps:
            return f"**{run}**: {steps}, saving ..."
        return f"**{run}**: {steps}, {_left(lines)} left"
    told = {"done": "done", "stopped": "paused", "failed": "failed", "damaged": "damaged"}[state.state]
    return f"**{run}**: {told}, {steps}."


def _left(lines: list[dict]) -> str:
    """The time left, by the pace of the last lines."""
    recent = [line for line in lines if line["state"] == "training"][-40:]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return "some time"
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    seconds = max(pace * (recent[-1]["steps"] - recent[-1]["step"]) - (time.time() - recent[-1]["time"]), 1)
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _plot(lines: list[dict]) -> dict:
    curve = _curve(lines)
    return gr.update(value=curve, visible=len(curve) > 1)


def _curve(lines: list[dict]) -> pd.DataFrame:
    """The losses by step, averaged over neighbouring lines."""
    rows = [(line["step"], name, value) for line in lines for name, value in line.get("losses", {}).items()]
    frame = pd.DataFrame(rows, columns=["step", "term", "loss"]).drop_duplicates(
        ["step", "term"], keep="last"
    )
    if frame.empty:
        return frame
    width = max(len(frame) // POINTS, 1)
    smooth = frame.groupby("term")["loss"].transform(lambda own: own.rolling(9, min_periods=1).mean())
    return frame.assign(loss=smooth)[::width]


def _shown(visitor: Visitor, run: str | None, number: int) -> tuple:
    """The images of one of a run's validations, and what the slider says of it."""
    folder = _folder(visitor, run or "")
    found = samples(folder / "samples") if folder else []
    if not found:
        return gr.update(visible=False), gr.update(label="Which of them")
    path = sorted(found)[min(int(number), len(found)) - 1]
    with Image.open(path) as image:
        image.load()
        return gr.update(value=image, visible=True), gr.update(
            label=f"Drawn at step {int(path.stem.rpartition('-')[2])}"
        )


def _step_of(visitor: Visitor, run: str | None, number: int) -> str:
    """The name by which a step of a run is drawn with."""
    folder = _folder(visitor, run or "")
    found = sorted(samples(folder / "samples")) if folder else []
    state = run_state(folder) if folder else None
    if folder is None or state is None or not found:
        raise UserError("This run has drawn nothing yet.")
    step = int(found[min(int(number), len(found)) - 1].stem.rpartition("-")[2])
    if state.state == "done" and step == state.step:
        return str(run)
    if not (folder / f"checkpoint-{step}" / INFO).exists():
        raise UserError(f"The run keeps no checkpoint of step {step}.")
    return f"{run}/checkpoint-{step}"


def _zipped(folder: Path) -> str:
    """The files of a finished run in one archive, made once for each version of it."""
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    version = hashlib.sha256(f"{folder} {(folder / INFO).stat().st_mtime}".encode()).hexdigest()[:16]
    archive = scratch() / version / f"{folder.name}.zip"
    if not archive.exists():
        archive.parent.mkdir(exist_ok=True)
        with ZipFile(archive, "w") as file:
            for name in [INFO, *info.get("files", {})]:
                if (folder / name).is_file():
                    file.write(folder / name, f"{folder.name}/{name}")
    return str(archive)


def _bar(share: float) -> str:
    filled = f'<div style="width:{share * 100:.1f}%"></div>'
    return f'<div class="bar" role="progressbar" aria-valuenow="{share * 100:.0f}">{filled}</div>'


def _pause(page: Page, visitor: Visitor, run: str | None) -> str:
    job = _job(page, visitor, run or "")
    if job is None or job.state not in ("queued", "running"):
        raise UserError("This run is not at work: there is nothing to pause.")
    page.jobs.pause(job)
    return f"**{run}**: saving ..." if job.state == "running" else f"**{run}** is out of the queue."


def _resume(page: Page, visitor: Visitor, run: str | None) -> str:
    job, folder = _job(page, visitor, run or ""), _folder(visitor, run or "")
    if job is not None:
        page.jobs.resume(job)
    else:
        state = run_state(folder) if folder else None
        if folder is None or state is None or state.state != "stopped":
            raise UserError("This run cannot go on: choose one that is paused.")
        page.jobs.submit(visitor.id, state.method, folder, {}, resumes=True)
    return f"**{run}** is in the queue."

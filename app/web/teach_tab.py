"""The part of the page that teaches a subject, and watches runs."""

import json
import shutil
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from zipfile import ZipFile

import gradio as gr
import pandas as pd
from PIL import Image

from customize.app.jobs import SAVES, Job
from customize.app.web.cutout import cutout
from customize.app.web.forms import component, value_of
from customize.app.web.page import Page, told
from customize.app.web.teaching import (
    CASES,
    PROPOSED,
    case_named,
    case_of,
    defaults_for,
    expert_flags,
    in_one_sentence,
    settings_of,
)
from customize.app.web.visitors import Visitor
from customize.data.advice import advise
from customize.embedded import NAME
from customize.errors import UserError
from customize.runs.folder import INFO, samples
from customize.runs.listing import progress_of, run_state
from customize.stickers import Drawing
from customize.stickers.bench import write_references

POINTS = 300  # of the loss curve
RESOLUTION = 128  # of the embedded model
ESSENTIAL = "The settings that matter most"


def teach_tab(page: Page, blocks: gr.Blocks, tabs: gr.Tabs, model: gr.Dropdown) -> gr.Dropdown:
    """Builds the part; returns the picker of the run that is watched, which other parts set."""
    expert = gr.Textbox("{}", label="settings", visible=False)  # JSON; also the API's way to set them
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            images = gr.Gallery(
                label="1. Your images",
                type="filepath",
                file_types=["image"],
                columns=4,
                height=260,
                object_fit="contain",
                interactive=True,
            )
            advice = gr.Markdown(
                "Bring 3 to 20 images of one thing, in different places, from different sides.",
                elem_classes="note",
            )
            example = gr.Button("Try it with four images of a fox", size="sm")
            with gr.Accordion("Crop, or cut out of the background", open=False):
                cutout(page, images)
            words = gr.Textbox(
                label="2. What do they show?", placeholder="fox", info="one word", max_length=80
            )
            case = gr.Radio([case.name for case in CASES], value=CASES[0].name, label="3. What do you have?")
            name = gr.Textbox("", label="4. Name of the new model", placeholder="my fox", max_length=60)
            base = gr.Dropdown(
                [NAME],
                value=NAME,
                label="Base model",
                info="the embedded model, or a model's name on the Hugging Face Hub",
                allow_custom_value=True,
            )
            sentence = gr.Markdown(in_one_sentence(CASES[0], NAME), elem_classes="note")
            with gr.Accordion("Expert settings", open=False):
                _expert_form(page, case, base, expert)
            go = gr.Button("Teach", variant="primary", size="lg")
        with gr.Column(scale=6, min_width=320):
            watched = gr.Dropdown(
                [],
                label="Watching",
                info="a run of yours, also one started in a terminal",
                allow_custom_value=True,
            )
            status = gr.Markdown("Nothing is being taught.")
            bar = gr.HTML(_bar(0.0))
            with gr.Row():
                pause, resume = gr.Button("Pause and save", size="sm"), gr.Button("Go on", size="sm")
            plot = gr.LinePlot(
                pd.DataFrame({"step": [], "loss": [], "term": []}),
                x="step",
                y="loss",
                color="term",
                height=300,
                label="Loss, averaged",
                visible=False,
            )
            sheet = gr.Image(
                label="Drawn on the way", height=280, interactive=False, format="png", visible=False
            )
            slider = gr.Slider(1, 2, 1, step=1, label="Which of them", interactive=True, visible=False)
            with gr.Row():
                use = gr.Button("Draw with this step", size="sm", interactive=False)
                files = gr.File(label="The finished model's files", visible=False, height=80)
    seen = gr.State("")

    @told
    def check(found: list | None, request: gr.Request) -> tuple:
        return _check(page.visitor(request), found)

    shown_example = example.click(_example, outputs=[images, words, name], api_visibility="private")
    for event in (images.upload, images.change, images.delete, shown_example.then):
        event(check, images, [advice, case], api_visibility="private")
    for part in (case, base):
        part.change(
            told(lambda case, base: in_one_sentence(case_named(case), base or NAME)),
            [case, base],
            sentence,
            api_visibility="private",
        )

    @told
    def teach(
        request: gr.Request,
        images: list | None = None,
        words: str = "",
        case: str = CASES[0].name,
        name: str = "",
        base: str = NAME,
        settings: str = "{}",
    ) -> tuple:
        """Starts a run that teaches your images; `settings` is JSON of more of the method's settings. Returns
        the run's name."""
        visitor = page.visitor(request)
        started = _teach(page, visitor, images, words, case, name, base, settings)
        return gr.update(choices=_runs(page, visitor), value=started), f"'{started}' is in the queue."

    go.click(
        teach,
        inputs_kwargs={
            "images": images,
            "words": words,
            "case": case,
            "name": name,
            "base": base,
            "settings": expert,
        },
        outputs=[watched, status],
        api_name="teach",
    )

    @told
    def watch(run: str | None, seen: str, request: gr.Request) -> tuple:
        return _watch(page, page.visitor(request), run, seen)

    shown = [status, bar, plot, slider, use, files, seen]
    timer = gr.Timer(1.0)
    for event in (timer.tick, watched.change):
        event(watch, [watched, seen], shown, show_progress="hidden", api_visibility="private", queue=True)

    @told
    def show(run: str | None, number: int, request: gr.Request) -> tuple:
        return _shown(page.visitor(request), run, number)

    slider.change(show, [watched, slider], [sheet, slider], show_progress="hidden", api_visibility="private")
    watched.change(show, [watched, slider], [sheet, slider], show_progress="hidden", api_visibility="private")

    @told
    def draw_with(run: str | None, number: int, request: gr.Request) -> tuple:
        visitor = page.visitor(request)
        value = _step_of(visitor, run, number)
        return gr.update(choices=[*page.choices(visitor), value], value=value), gr.Tabs(selected="draw")

    use.click(draw_with, [watched, slider], [model, tabs], api_visibility="private")

    @told
    def pause_run(run: str, request: gr.Request) -> str:
        """Lets a run save and end, or takes it out of the queue."""
        return _pause(page, page.visitor(request), run)

    @told
    def resume_run(run: str, request: gr.Request) -> str:
        """Puts a paused run into the queue again; it goes on from its last checkpoint."""
        return _resume(page, page.visitor(request), run)

    pause.click(pause_run, watched, status, api_name="pause")
    resume.click(resume_run, watched, status, api_name="resume")

    def latest(request: gr.Request) -> dict:
        visitor = page.visitor(request)
        names = _runs(page, visitor)
        busy = [job.run.name for job in page.jobs.of(visitor.id) if job.state in ("running", "queued")]
        return gr.update(choices=names, value=(busy[-1:] or names[:1] or [None])[0])

    blocks.load(latest, outputs=watched, api_visibility="private", show_progress="hidden")
    return watched


def _expert_form(page: Page, case: gr.Radio, base: gr.Dropdown, expert: gr.Textbox) -> None:
    """Every setting of the chosen method; what is changed goes into `expert` as JSON."""

    @gr.render(inputs=[case, base])
    def form(case_name: str, base_name: str, request: gr.Request) -> None:
        owner = page.visitor(request).owner
        method = case_named(case_name).method
        values = defaults_for(method, base_name or NAME)
        for title, essential in ((ESSENTIAL, True), ("All others", False)):
            with gr.Accordion(title, open=essential):
                for flag in expert_flags(method, owner):
                    if flag.essential == essential:
                        made = "; empty: made from your words above" if flag.name in PROPOSED else ""
                        element = component(flag._replace(help=flag.help + made), values[flag.name])
                        element.change(
                            _setter(flag.name), [element, expert], expert, api_visibility="private"
                        )

    case.change(lambda: "{}", outputs=expert, api_visibility="private")


def _setter(name: str) -> Any:
    def change(value: Any, settings: str) -> str:
        return json.dumps(json.loads(settings or "{}") | {name: value})

    return change


def _check(visitor: Visitor, found: list | None) -> tuple:
    """What to do about the images, as a list, and the case that they speak for."""
    paths = [entry[0] for entry in found or []]
    if not paths:
        return "Bring 3 to 20 images of one thing, in different places, from different sides.", gr.skip()
    if len(paths) > visitor.limits.uploads:
        raise UserError(f"{len(paths)} images are too many: {visitor.limits.uploads} at most.")
    pictures = [Image.open(path) for path in paths]
    lines = [
        f"* Image {i}: {entry.sentence}"
        for i, own in enumerate(advise(pictures, RESOLUTION), 1)
        for entry in own
    ]
    count = f"{len(paths)} image{'s' * (len(paths) > 1)}"
    fine = (
        f"{count}: they look good."
        if not lines
        else f"{count}, with something to look at:\n\n" + "\n".join(lines)
    )
    return fine, case_of(pictures).name


def _example() -> tuple:
    place = Path(mkdtemp())
    found = [(image, None) for image in write_references(place, Drawing("fox", "flat"), "fox")]
    shutil.rmtree(place)
    return found, "fox", "my fox"


def _teach(
    page: Page,
    visitor: Visitor,
    images: list | None,
    words: str,
    case: str,
    name: str,
    base: str,
    settings: str,
) -> str:
    """Queues a run; returns its name."""
    paths = [entry[0] if isinstance(entry, tuple | list) else entry for entry in images or []]
    if not paths:
        raise UserError("Bring images first: drop them on the page.")
    waiting = [job for job in page.jobs.of(visitor.id) if job.state in ("queued", "running")]
    if len(waiting) >= visitor.limits.jobs:
        raise UserError(f"{len(waiting)} of your runs are at work or waiting: let one of them end first.")
    chosen = case_named(case)
    model = page.model(base, visitor)
    expert = _expert(chosen.method, settings, visitor.owner)
    steps = expert.get("max_train_steps", 0)
    if steps > visitor.limits.training_steps:
        raise UserError(f"{steps} steps are too many here: {visitor.limits.training_steps} at most.")
    folder = visitor.new_run(name or f"my {words}")
    made = settings_of(chosen, model, words, folder / "images", expert)
    visitor.keep_images(paths, folder / "images")
    page.drawer.forget()  # the run needs the memory
    page.jobs.submit(visitor.id, chosen.method, folder, made)
    return folder.name


def _expert(method: str, settings: str, owner: bool) -> dict[str, Any]:
    """The settings of the expert form, in their types."""
    try:
        given = json.loads(settings or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError('The settings are no JSON object, such as {"max_train_steps": 300}.')
    known = {flag.name: flag for flag in expert_flags(method, owner)}
    for name in given:
        if name not in known:
            raise UserError(f"'{str(name)[:60]}' is no setting of {method} that can be set here.")
    found = {name: value_of(known[name], value) for name, value in given.items()}
    return {name: value for name, value in found.items() if value or name not in PROPOSED}


def _runs(page: Page, visitor: Visitor) -> list[str]:
    """The names of runs and jobs, the latest first."""
    jobs = [job.run.name for job in page.jobs.of(visitor.id)]
    runs = sorted(visitor.runs(), key=lambda run: run.folder.stat().st_mtime, reverse=True)
    return list(dict.fromkeys([*jobs, *(run.name for run in runs)]))


def _job(page: Page, visitor: Visitor, run: str) -> Job | None:
    return next((job for job in page.jobs.of(visitor.id) if job.run.name == run), None)


def _watch(page: Page, visitor: Visitor, run: str | None, seen: str) -> tuple:
    """What a run does now: text, bar, curve, slider, buttons and files; nothing where nothing has changed."""
    if not run or run not in _runs(page, visitor):
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
    if folder is None or not found:
        raise UserError("This run has drawn nothing yet.")
    step = int(found[min(int(number), len(found)) - 1].stem.rpartition("-")[2])
    if (folder / INFO).exists() and step == (run_state(folder) or [0] * 7)[5]:
        return str(run)
    if not (folder / f"checkpoint-{step}" / INFO).exists():
        raise UserError(f"The run keeps no checkpoint of step {step}.")
    return f"{run}/checkpoint-{step}"


def _zipped(folder: Path) -> str:
    """The files of a finished run in one archive, made once."""
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    archive = Path(mkdtemp()) / f"{folder.name}.zip"
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

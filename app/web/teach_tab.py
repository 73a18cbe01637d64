"""The part of the page that teaches a subject."""

import json
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from PIL import Image

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
from customize.app.web.visitors import Visitor, files_in
from customize.app.web.watch import Watch, runs_of, watch_panel
from customize.data.advice import advise
from customize.embedded import NAME
from customize.errors import UserError
from customize.stickers import Drawing
from customize.stickers.bench import write_references

RESOLUTION = 128  # of the embedded model
ESSENTIAL = "The settings that matter most"
BRING = "Bring 3 to 20 images of one thing, in different places, from different sides."

Form = dict[str, Any]  # the elements of the form, by the names of the API


def teach_tab(page: Page, blocks: gr.Blocks, tabs: gr.Tabs, model: gr.Dropdown) -> gr.Dropdown:
    """Builds the part; returns the picker of the run that is watched, which other parts set."""
    form: Form = {}
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            _images(page, form)
            _words(page, form)
            go = gr.Button("Teach", variant="primary", size="lg")
        with gr.Column(scale=6, min_width=320):
            watch = watch_panel(page, blocks, tabs, model)
    _teaches(page, form, go, watch)
    return watch.run


def _images(page: Page, form: Form) -> None:
    """The images, what is to be said of them, and a tool to cut them out."""
    look: dict[str, Any] = {"columns": 4, "fit_columns": False, "height": 260, "object_fit": "contain"}
    form["images"] = gr.Gallery(
        [], label="1. Your images", type="filepath", file_types=["image"], interactive=True, **look
    )
    form["advice"] = gr.Markdown(BRING, elem_classes="note")
    form["example"] = gr.Button("Try it with four images of a fox", size="sm")
    with gr.Accordion("Crop, or cut out of the background", open=False):
        cutout(page, form["images"])


def _words(page: Page, form: Form) -> None:
    """What the images show, and how it is learned."""
    form["words"] = gr.Textbox(
        "", label="2. What do they show?", placeholder="fox", info="one word", max_length=80
    )
    names = [case.name for case in CASES]
    form["case"] = gr.Radio(names, value=names[0], label="3. What do you have?")
    form["name"] = gr.Textbox("", label="4. Name of the new model", placeholder="my fox", max_length=60)
    form["base"] = gr.Dropdown(
        [NAME],
        value=NAME,
        label="Base model",
        info="the embedded model, or a model's name on the Hugging Face Hub",
        allow_custom_value=True,
    )
    form["sentence"] = gr.Markdown(in_one_sentence(CASES[0], NAME), elem_classes="note")
    # JSON of what was changed in the expert form; also the API's way to set it
    form["settings"] = gr.Textbox("{}", label="settings", visible=False)
    with gr.Accordion("Expert settings", open=False):
        _expert_form(page, form["case"], form["base"], form["settings"])


def _teaches(page: Page, form: Form, go: gr.Button, watch: Watch) -> None:
    """What happens when images come, a case is chosen, or the button is clicked."""
    hidden: dict[str, Any] = {"api_visibility": "private"}

    @told
    def check(found: list | None, request: gr.Request) -> tuple:
        return _check(page.visitor(request), found)

    @told
    def sentence(case: str, base: str, settings: str) -> str:
        return in_one_sentence(case_named(case), base or NAME, json.loads(settings or "{}"))

    @told
    def teach(request: gr.Request, **asked: Any) -> tuple:
        """Starts a run that teaches your images; `settings` is JSON of more of the method's settings. Returns
        the run's name."""
        visitor = page.visitor(request)
        started = _teach(page, visitor, **asked)
        return gr.update(choices=runs_of(page, visitor), value=started), f"'{started}' is in the queue."

    shown = form["example"].click(_example, outputs=[form[k] for k in ("images", "words", "name")], **hidden)
    images = form["images"]
    for event in (images.upload, images.change, images.delete, shown.then):
        event(check, images, [form["advice"], form["case"]], **hidden)
    shaping = [form["case"], form["base"], form["settings"]]
    for part in shaping:
        part.change(sentence, shaping, form["sentence"], **hidden)
    asked = {name: form[name] for name in ("images", "words", "case", "name", "base", "settings")}
    go.click(teach, inputs_kwargs=asked, outputs=[watch.run, watch.status], api_name="teach")


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
                            None, [element, expert], expert, js=_setter(flag.name), api_visibility="private"
                        )

    case.change(lambda: "{}", outputs=expert, api_visibility="private")


def _setter(name: str) -> str:
    """JavaScript that puts a setting into the JSON of all that were changed. In the browser, as a change that
    is sent while another one is on its way would not know of that one and undo it."""
    return f"(value, settings) => JSON.stringify({{...JSON.parse(settings || '{{}}'), {name}: value}})"


def _check(visitor: Visitor, found: list | None) -> tuple:
    """What to do about the images, as a list, and the case that they speak for."""
    paths = files_in(found)
    if not paths:
        return BRING, gr.skip()
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
    paths = files_in(images)
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

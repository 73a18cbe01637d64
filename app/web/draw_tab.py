"""The part of the page that draws."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from customize.app import generate
from customize.app.generate import GenerateConfig
from customize.app.web.cutout import cutout
from customize.app.web.drawing import with_word
from customize.app.web.forms import component, flags, value_of
from customize.app.web.page import Page, told
from customize.app.web.visitors import Visitor, files_in
from customize.embedded import NAME
from customize.errors import UserError
from customize.runs.output import own_text
from customize.stickers import Drawing
from customize.stickers.bench import write_references

SETTINGS = {flag.name: flag for flag in flags(GenerateConfig)}
PLACES = ["anywhere", "first left, second right", "painted below"]
FIRST, SECOND = "#e4572e", "#1f77b4"  # brushes of the first and the second subject
EXAMPLE_SUBJECT = "a fox shown in two images"
EXAMPLES = ["a flat fox on the beach", "a cartoon snail under a night sky", "a red bus and an apple on grass"]


@dataclass
class DrawRequest:
    """What a visitor asks for, by the names of the API. `images` and `images_2` are galleries: lists of
    (file, caption)."""

    prompt: str
    images: list | None
    word: str
    images_2: list | None
    word_2: str
    placement: str
    painting: Any
    model: str
    loras: list[str] | None
    weights: str
    number: int
    seed: int
    new_seed: bool
    steps: int
    guidance: Any
    negative: str
    subject_scale: float
    lora_scale: float
    size: int


Form = dict[str, Any]  # the elements of the form, by the names of `DrawRequest`


def draw_tab(page: Page, blocks: gr.Blocks, tab: gr.Tab) -> gr.Dropdown:
    """Builds the part; returns the picker of the model, which other parts set."""
    form: Form = {}
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            buttons = _prompt(form)
            form["images"] = _images("1 to 4 images of a subject, drawn without training")
            form["word"] = _word()
        with gr.Column(scale=6, min_width=320):
            look: dict[str, Any] = {"columns": 2, "height": 600, "object_fit": "contain"}
            gallery = gr.Gallery(label="Images", format="png", interactive=False, **look)
            status = gr.Markdown("", elem_classes="note")
    _second_subject(form)
    with gr.Accordion("Cut a subject out of its background", open=False):
        cutout(page, form["images"])
    _settings(form)
    with gr.Accordion("Restore the settings of an image", open=False):
        dropped = gr.File(label="A PNG that was drawn here", file_types=[".png"], height=120)
    _draws(page, form, buttons, gallery, status)
    _restores(page, form, dropped, status)

    def choices(request: gr.Request) -> tuple:
        visitor = page.visitor(request)
        found = page.choices(visitor)
        return gr.update(choices=found), gr.update(choices=[*found[1:], *visitor.files()])

    for event in (blocks.load, tab.select):
        event(
            choices, outputs=[form["model"], form["loras"]], api_visibility="private", show_progress="hidden"
        )
    return form["model"]


def _prompt(form: Form) -> dict[str, gr.Button]:
    """The prompt, the model, and the buttons by their labels."""
    form["prompt"] = gr.Textbox(
        EXAMPLES[0], label="Prompt", lines=2, max_length=1000, placeholder="a fox on the beach"
    )
    with gr.Row():
        buttons = {
            "Draw": gr.Button("Draw", variant="primary", scale=3, min_width=100),
            "again": gr.Button("Same seed again", scale=3, min_width=150),
            "Stop": gr.Button("Stop", scale=1, min_width=70),
        }
    with gr.Row(elem_classes="examples"):
        buttons |= {text: gr.Button(text, size="sm") for text in (*EXAMPLES, EXAMPLE_SUBJECT)}
    form["model"] = gr.Dropdown(
        [NAME],
        value=NAME,
        label="Draw with",
        info="the embedded model of drawn stickers, or a subject that you taught",
        allow_custom_value=True,
    )
    return buttons


def _images(label: str) -> gr.Gallery:
    """A subject's images."""
    look: dict[str, Any] = {"columns": 4, "fit_columns": False, "height": 170, "object_fit": "contain"}
    return gr.Gallery([], label=label, type="filepath", file_types=["image"], interactive=True, **look)


def _word() -> gr.Textbox:
    return gr.Textbox("", label="Its word in the prompt", placeholder="fox", max_length=60)


def _second_subject(form: Form) -> None:
    with gr.Accordion("A second subject, and where they are", open=False):
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                form["images_2"] = _images("1 to 4 images of the second subject")
            with gr.Column(scale=6, min_width=320):
                form["word_2"] = _word()
                form["placement"] = gr.Radio(PLACES, value=PLACES[0], label="Where they are")
        brush = gr.Brush(colors=[FIRST, SECOND], default_color=FIRST, default_size=40, color_mode="fixed")
        form["painting"] = gr.ImageEditor(
            {"background": None, "layers": [], "composite": None},
            label="Paint where they may be: first red, second blue",
            type="pil",
            image_mode="RGBA",
            sources=[],
            transforms=[],
            layers=False,
            brush=brush,
            canvas_size=(384, 384),
            fixed_canvas=True,
            visible=False,
        )
    form["placement"].change(
        lambda place: gr.update(visible=place == PLACES[2]),
        form["placement"],
        form["painting"],
        api_visibility="private",
    )


def _settings(form: Form) -> None:
    with gr.Accordion("Settings", open=False):
        form["number"] = gr.Slider(1, 8, 2, step=1, label="Images")
        with gr.Row():
            form["seed"] = component(SETTINGS["seed"])
            form["new_seed"] = gr.Checkbox(True, label="New seed each time")
        steps = SETTINGS["num_inference_steps"]
        form["steps"] = gr.Slider(1, 100, steps.default, step=1, label="Steps", info=steps.help)
        form["guidance"] = component(SETTINGS["guidance_scale"])
        form["negative"] = component(SETTINGS["negative_prompt"])
        form["subject_scale"] = gr.Slider(0, 2, 1, step=0.05, label="Strength of the images")
        form["lora_scale"] = gr.Slider(0, 2, 1, step=0.05, label="Strength of the taught subject")
        form["loras"] = gr.Dropdown(
            [], value=[], multiselect=True, label="More runs or LoRA files to mix in", allow_custom_value=True
        )
        form["weights"] = gr.Textbox("", label="Their weights", placeholder="1, 0.8")
        form["size"] = gr.Slider(0, 1536, 0, step=64, label="Side in pixels", info="0: what suits the model")


def _draws(
    page: Page, form: Form, buttons: dict[str, gr.Button], gallery: gr.Gallery, status: gr.Markdown
) -> None:
    """What the buttons do."""

    @told
    def draw(request: gr.Request, **values: Any) -> Iterator[tuple]:
        """Draws images of a prompt. `images` are of what the prompt calls `word`, and need no training;
        `model` is `stickers` or one of your runs. Returns the images, a note, and the seed of the first."""
        yield from _draw(page, page.visitor(request), DrawRequest(**values))

    call: dict[str, Any] = {
        "inputs_kwargs": form,
        "outputs": [gallery, status, form["seed"]],
        "concurrency_id": "device",
        "concurrency_limit": 1,
        "show_progress": "minimal",
        "show_progress_on": gallery,
    }
    hidden: dict[str, Any] = {"api_visibility": "private"}
    running = [
        buttons["Draw"].click(draw, api_name="draw", **call),
        form["prompt"].submit(draw, **hidden, **call),
        buttons["again"]
        .click(lambda: False, outputs=form["new_seed"], **hidden)
        .then(draw, **hidden, **call),
    ]
    parts = [form["prompt"], form["images"], form["word"]]
    makers: dict[str, Any] = {text: partial(lambda text: (text, [], ""), text) for text in EXAMPLES}
    for text, make in {**makers, EXAMPLE_SUBJECT: _example_subject}.items():
        running.append(buttons[text].click(make, outputs=parts, **hidden).then(draw, **hidden, **call))
    buttons["Stop"].click(None, cancels=running, **hidden)


def _restores(page: Page, form: Form, dropped: gr.File, status: gr.Markdown) -> None:
    """A dropped image restores its settings."""

    @told
    def restore(file: str | None, request: gr.Request) -> tuple:
        return _restore(page, page.visitor(request), file)

    names = ("prompt", "negative", "model", "seed", "steps", "guidance", "lora_scale", "subject_scale")
    fields = [form[name] for name in (*names, "number", "new_seed")]
    dropped.upload(restore, dropped, [*fields, status], api_visibility="private")


def _draw(page: Page, visitor: Visitor, asked: DrawRequest) -> Iterator[tuple]:
    """The gallery, a note and the seed, as they grow."""
    _check_limits(visitor, asked)
    run = page.model(asked.model, visitor)
    first = random.randrange(2**31) if asked.new_seed else value_of(SETTINGS["seed"], asked.seed)
    with TemporaryDirectory() as place:
        config = GenerateConfig(
            num_images_per_prompt=int(asked.number),
            seed=first,
            num_inference_steps=int(asked.steps),
            guidance_scale=value_of(SETTINGS["guidance_scale"], asked.guidance),
            negative_prompt=asked.negative or "",
            lora_scale=asked.lora_scale,
            lora=_loras(page, visitor, asked.loras, asked.weights),
            height=int(asked.size) or None,
            width=int(asked.size) or None,
        )
        prompt, masks = _subjects(visitor, Path(place), config, asked)
        if config.subject_images:
            config.subject_scale = asked.subject_scale
        seeds = range(first, first + int(asked.number))
        finished: list[Image.Image] = []
        yield [], "Loading the model ...", first
        for drawn in page.drawer.draw(run, prompt, seeds, config, masks):
            if drawn.is_preview:
                yield [*finished, drawn.image], f"{drawn.done:.0%}", first
                continue
            finished.append(_kept(visitor, drawn.image, asked.model or NAME, prompt, drawn.seed, config))
            yield finished, f"{drawn.done:.0%}", first
        yield finished, _note(page, run, prompt, seeds), first


def _check_limits(visitor: Visitor, asked: DrawRequest) -> None:
    most = visitor.limits
    for name, value, limit in (
        ("images", asked.number, most.images),
        ("steps", asked.steps, most.steps),
        ("pixels", asked.size, most.side),
    ):
        if value > limit:
            raise UserError(f"{int(value)} {name} are too many at once here: {limit} at most.")


def _kept(
    visitor: Visitor, image: Image.Image, model: str, prompt: str, seed: int, config: GenerateConfig
) -> Image.Image:
    """The image as it is saved in the visitor's folder, with its settings in it."""
    folder = visitor.folder / "generated"
    folder.mkdir(exist_ok=True)
    path = generate.save(image, folder, model, prompt, seed, config)
    with Image.open(path) as saved:
        saved.load()
        return saved


def _note(page: Page, run: str, prompt: str, seeds: Sequence[int]) -> str:
    doubts = generate.doubts(page.drawer.pipe, run, prompt) if page.drawer.pipe is not None else []
    shown = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return "  \n".join([f"Done, {shown}.", *(f"Note: {doubt}" for doubt in doubts)])


def _loras(page: Page, visitor: Visitor, names: list[str] | None, weights: str) -> list[str]:
    """The settings `lora` of more taught subjects."""
    numbers = [text.strip() for text in (weights or "").split(",") if text.strip()]
    names = names or []
    if numbers and len(numbers) != len(names):
        raise UserError(f"Give {len(names)} weights, one for each taught subject, such as 1, 0.8.")
    files = visitor.files()
    return [
        f"{files.get(name) or page.model(name, visitor)}:{weight}"
        for name, weight in zip(names, numbers or ["1"] * len(names), strict=True)
    ]


def _subjects(
    visitor: Visitor, place: Path, config: GenerateConfig, asked: DrawRequest
) -> tuple[str, dict[str, Image.Image] | None]:
    """The prompt with the subjects' words, and their masks; sets the images in `config`."""
    names, prompt = [], asked.prompt
    given = {"<s>": (asked.images, asked.word), "<s2>": (asked.images_2, asked.word_2)}
    for mark, (images, word) in given.items():
        paths = files_in(images)
        if not paths:
            continue
        if len(paths) > 4:
            raise UserError(f"{len(paths)} images of a subject are too many: 4 at most.")
        kept = visitor.keep_images(paths, place / mark.strip("<>"))
        config.subject_images += [f"{mark}={path}" for path in kept]
        prompt = with_word(prompt, mark, word)
        names.append(mark)
    if not names or asked.placement == PLACES[0]:
        return prompt, None
    if asked.placement == PLACES[1]:
        if len(names) < 2:
            raise UserError("'first left, second right' needs images of two subjects.")
        config.side_by_side = True
        return prompt, None
    return prompt, _masks(asked.painting, names)


def _masks(painting: Any, names: Sequence[str]) -> dict[str, Image.Image]:
    """White where each subject was painted, by its colour."""
    layers = [layer for layer in (painting or {}).get("layers", []) if layer is not None]
    pixels = [np.asarray(layer.convert("RGBA")).astype(int) for layer in layers]
    found = {}
    for name in names:
        red = name == "<s>"
        own = [(p[..., 3] > 128) & ((p[..., 0] > p[..., 2]) == red) for p in pixels]
        if not own or not any(mask.any() for mask in own):
            raise UserError(f"Paint where the {'first' if red else 'second'} subject may be.")
        found[name] = Image.fromarray(np.logical_or.reduce(own).astype(np.uint8) * 255)
    return found


def _example_subject() -> tuple[str, list, str]:
    """A prompt and two images of a fox that the embedded model has never seen."""
    with TemporaryDirectory() as place:
        images = write_references(Path(place), Drawing("fox", "flat"), "fox")[:2]
        return "a fox on the beach", [(image, None) for image in images], "fox"


def _restore(page: Page, visitor: Visitor, file: str | None) -> tuple:
    """The fields as an image's settings say; UserError for an image without them."""
    try:
        saved = json.loads(own_text(Path(file or ""), "parameters"))
        prompt, model = str(saved["prompt"])[:1000], str(saved["run"])
        numbers = [int(saved["seed"]), int(saved["steps"])]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            "This image holds no settings: drop a PNG that was drawn here, as it was saved."
        ) from None
    notes = []
    if model not in page.choices(visitor):
        notes.append(f"'{model[:80]}', which it was drawn with, is not here.")
    if saved.get("subject_images"):
        notes.append("Add the images of its subjects again: they are not in the file.")
    guidance, scales = (
        saved.get("scale"),
        [_number(saved.get(n), 1.0) for n in ("lora_scale", "subject_scale")],
    )
    return (
        prompt,
        str(saved.get("negative_prompt", ""))[:1000],
        model if model in page.choices(visitor) else gr.skip(),
        numbers[0],
        numbers[1],
        "" if guidance is None else str(_number(guidance, 4.0)),
        *scales,
        1,
        False,
        "  \n".join(["Restored.", *notes]),
    )


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise

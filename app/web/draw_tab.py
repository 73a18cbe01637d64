"""The part of the page that draws."""

import json
import random
from collections.abc import Iterator, Sequence
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
from customize.app.web.visitors import Visitor
from customize.embedded import NAME
from customize.errors import UserError
from customize.runs.output import own_text
from customize.stickers import Drawing
from customize.stickers.bench import write_references

SETTINGS = {flag.name: flag for flag in flags(GenerateConfig)}
PLACES = ["anywhere", "first left, second right", "painted below"]
FIRST, SECOND = "#e4572e", "#1f77b4"  # brushes of the first and the second subject
EXAMPLES = ["a flat fox on the beach", "a cartoon snail under a night sky", "a red bus and an apple on grass"]


def draw_tab(page: Page, blocks: gr.Blocks, tab: gr.Tab) -> gr.Dropdown:
    """Builds the part; returns the picker of the model, which other parts set."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", lines=2, max_length=1000, placeholder="a fox on the beach"
            )
            with gr.Row():
                go = gr.Button("Draw", variant="primary", scale=3, min_width=100)
                again = gr.Button("Same seed again", scale=3, min_width=150)
                stop = gr.Button("Stop", scale=1, min_width=70)
            with gr.Row(elem_classes="examples"):
                examples = [gr.Button(text, size="sm") for text in EXAMPLES]
                shown = gr.Button("a fox shown in two images", size="sm")
            model = gr.Dropdown(
                [NAME],
                value=NAME,
                label="Draw with",
                info="the embedded model of drawn stickers, or a subject that you taught",
                allow_custom_value=True,
            )
            images, word = _subject("1 to 4 images of a subject, drawn without training")
            with gr.Accordion("A second subject, and where they are", open=False):
                images_2, word_2 = _subject("1 to 4 images of the second subject")
                placement = gr.Radio(PLACES, value=PLACES[0], label="Where they are")
                painting = gr.ImageEditor(
                    label="Paint where the first (red) and the second (blue) may be",
                    type="pil",
                    image_mode="RGBA",
                    sources=[],
                    transforms=[],
                    layers=False,
                    brush=gr.Brush(
                        colors=[FIRST, SECOND], default_color=FIRST, default_size=40, color_mode="fixed"
                    ),
                    canvas_size=(384, 384),
                    fixed_canvas=True,
                    visible=False,
                )
            with gr.Accordion("Cut a subject out of its background", open=False):
                cutout(page, images)
            with gr.Accordion("Settings", open=False):
                number = gr.Slider(1, 8, 2, step=1, label="Images")
                with gr.Row():
                    seed = component(SETTINGS["seed"])
                    new_seed = gr.Checkbox(True, label="New seed each time")
                steps = gr.Slider(
                    1, 100, 25, step=1, label="Steps", info=SETTINGS["num_inference_steps"].help
                )
                guidance = component(SETTINGS["guidance_scale"])
                negative = component(SETTINGS["negative_prompt"])
                subject_scale = gr.Slider(0, 2, 1, step=0.05, label="Strength of the images")
                lora_scale = gr.Slider(0, 2, 1, step=0.05, label="Strength of the taught subject")
                loras = gr.Dropdown(
                    [], multiselect=True, label="More runs or LoRA files to mix in", allow_custom_value=True
                )
                weights = gr.Textbox("", label="Their weights", placeholder="1, 0.8")
                size = gr.Slider(0, 1536, 0, step=64, label="Side in pixels", info="0: what suits the model")
            with gr.Accordion("Restore the settings of an image", open=False):
                restored = gr.File(label="A PNG that was drawn here", file_types=[".png"], height=120)
        with gr.Column(scale=6, min_width=320):
            gallery = gr.Gallery(
                label="Images",
                columns=2,
                object_fit="contain",
                format="png",
                interactive=False,
                elem_classes="wide",
            )
            status = gr.Markdown("", elem_classes="note")
    inputs = {
        "prompt": prompt,
        "images": images,
        "word": word,
        "images_2": images_2,
        "word_2": word_2,
        "placement": placement,
        "painting": painting,
        "model": model,
        "loras": loras,
        "weights": weights,
        "number": number,
        "seed": seed,
        "new_seed": new_seed,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "subject_scale": subject_scale,
        "lora_scale": lora_scale,
        "size": size,
    }

    @told
    def draw(
        request: gr.Request,
        prompt: str,
        images: list | None = None,
        word: str = "",
        images_2: list | None = None,
        word_2: str = "",
        placement: str = PLACES[0],
        painting: Any = None,
        model: str = NAME,
        loras: list[str] | None = None,
        weights: str = "",
        number: int = 2,
        seed: int = 0,
        new_seed: bool = True,
        steps: int = 25,
        guidance: Any = "",
        negative: str = "",
        subject_scale: float = 1.0,
        lora_scale: float = 1.0,
        size: int = 0,
    ) -> Iterator[tuple]:
        """Draws images of a prompt. `images` are of what the prompt calls `word`, and need no training;
        `model` is `stickers` or one of your runs. Returns the images, a note, and the seed of the first."""
        values = {name: value for name, value in locals().items() if name in inputs}
        yield from _draw(page, page.visitor(request), **values)

    call: dict[str, Any] = {
        "inputs_kwargs": inputs,
        "outputs": [gallery, status, seed],
        "concurrency_id": "device",
        "concurrency_limit": 1,
        "show_progress": "minimal",
        "show_progress_on": gallery,
    }
    running = [
        go.click(draw, api_name="draw", **call),
        prompt.submit(draw, api_visibility="private", **call),
        again.click(lambda: False, outputs=new_seed, api_visibility="private").then(
            draw, api_visibility="private", **call
        ),
    ]
    for button, text in zip(examples, EXAMPLES, strict=True):
        chosen = button.click(
            lambda text=text: (text, [], ""), outputs=[prompt, images, word], api_visibility="private"
        )
        running.append(chosen.then(draw, api_visibility="private", **call))
    chosen = shown.click(_example_subject, outputs=[prompt, images, word], api_visibility="private")
    running.append(chosen.then(draw, api_visibility="private", **call))
    stop.click(None, cancels=running, api_visibility="private")
    placement.change(
        lambda place: gr.update(visible=place == PLACES[2]), placement, painting, api_visibility="private"
    )
    fields = [prompt, negative, model, seed, steps, guidance, lora_scale, subject_scale]
    restored.upload(
        _restorer(page),
        restored,
        [*fields, number, new_seed, status],
        api_visibility="private",
    )

    def choices(request: gr.Request) -> tuple:
        visitor = page.visitor(request)
        found = page.choices(visitor)
        return gr.update(choices=found), gr.update(choices=[*found[1:], *visitor.files()])

    for event in (blocks.load, tab.select):
        event(choices, outputs=[model, loras], api_visibility="private", show_progress="hidden")
    return model


def _subject(label: str) -> tuple[gr.Gallery, gr.Textbox]:
    images = gr.Gallery(
        label=label,
        type="filepath",
        file_types=["image"],
        columns=4,
        fit_columns=False,
        height=170,
        object_fit="contain",
        interactive=True,
    )
    word = gr.Textbox("", label="Its word in the prompt", placeholder="fox", max_length=60)
    return images, word


def _draw(
    page: Page,
    visitor: Visitor,
    prompt: str,
    images: list | None,
    word: str,
    images_2: list | None,
    word_2: str,
    placement: str,
    painting: Any,
    model: str,
    loras: list[str],
    weights: str,
    number: int,
    seed: int,
    new_seed: bool,
    steps: int,
    guidance: Any,
    negative: str,
    subject_scale: float,
    lora_scale: float,
    size: int,
) -> Iterator[tuple]:
    """The gallery, a note and the seed, as they grow."""
    most = visitor.limits
    for name, value, limit in (
        ("images", number, most.images),
        ("steps", steps, most.steps),
        ("pixels", size, most.side),
    ):
        if value > limit:
            raise UserError(f"{int(value)} {name} are too many at once here: {limit} at most.")
    run = page.model(model, visitor)
    first = random.randrange(2**31) if new_seed else value_of(SETTINGS["seed"], seed)
    with TemporaryDirectory() as place:
        config = GenerateConfig(
            num_images_per_prompt=int(number),
            seed=first,
            num_inference_steps=int(steps),
            guidance_scale=value_of(SETTINGS["guidance_scale"], guidance),
            negative_prompt=negative or "",
            lora_scale=lora_scale,
            lora=_loras(page, visitor, loras, weights),
            height=int(size) or None,
            width=int(size) or None,
        )
        prompt, masks = _subjects(
            visitor, Path(place), config, prompt, [(images, word), (images_2, word_2)], placement, painting
        )
        if config.subject_images:
            config.subject_scale = subject_scale
        seeds = range(first, first + int(number))
        finished: list[Image.Image] = []
        yield [], "Loading the model ...", first
        for drawn in page.drawer.draw(run, prompt, seeds, config, masks):
            if drawn.is_preview:
                yield [*finished, drawn.image], f"{drawn.done:.0%}", first
                continue
            finished.append(_kept(visitor, drawn.image, model or NAME, prompt, drawn.seed, config))
            yield finished, f"{drawn.done:.0%}", first
        yield finished, _note(page, run, prompt, seeds), first


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
    visitor: Visitor,
    place: Path,
    config: GenerateConfig,
    prompt: str,
    given: Sequence[tuple[list | None, str]],
    placement: str,
    painting: Any,
) -> tuple[str, dict[str, Image.Image] | None]:
    """The prompt with the subjects' words, and their masks; sets the images in `config`."""
    names = []
    for mark, (images, word) in zip(("<s>", "<s2>"), given, strict=True):
        paths = [entry[0] if isinstance(entry, tuple | list) else entry for entry in images or []]
        if not paths:
            continue
        if len(paths) > 4:
            raise UserError(f"{len(paths)} images of a subject are too many: 4 at most.")
        kept = visitor.keep_images(paths, place / mark.strip("<>"))
        config.subject_images += [f"{mark}={path}" for path in kept]
        prompt = with_word(prompt, mark, word)
        names.append(mark)
    if not names or placement == PLACES[0]:
        return prompt, None
    if placement == PLACES[1]:
        if len(names) < 2:
            raise UserError("'first left, second right' needs images of two subjects.")
        config.side_by_side = True
        return prompt, None
    return prompt, _masks(painting, names)


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


def _restorer(page: Page) -> Any:
    @told
    def restore(file: str | None, request: gr.Request) -> tuple:
        return _restore(page, page.visitor(request), file)

    return restore


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

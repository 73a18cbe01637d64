"""The part of the page that draws runs side by side."""

from collections.abc import Iterator
from queue import Queue
from threading import Thread
from typing import Any
from uuid import uuid4

import gradio as gr

from customize.app.compare import CompareConfig, check_columns, columns_of, draw_columns, grid, scores_of
from customize.app.web.page import Page, scratch, told
from customize.app.web.visitors import Visitor
from customize.embedded import NAME
from customize.errors import UserError
from customize.runs.output import save_image

MOST_IMAGES = {True: 96, False: 24}  # of one comparison, of the owner and of others


def compare_tab(page: Page, blocks: gr.Blocks, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            runs = gr.Dropdown(
                [NAME], value=[NAME], multiselect=True, label="Models to compare", allow_custom_value=True
            )
            prompts = gr.Textbox(
                label="Prompts, one a line",
                lines=4,
                value="a fox on the beach\na fox in the snow",
                max_length=4000,
            )
            scales = gr.Textbox("", label="Strengths of the taught subject", placeholder="0.5, 1")
            steps = gr.Textbox("25", label="Numbers of steps", placeholder="10, 25")
            seeds = gr.Slider(1, 4, 2, step=1, label="Images of each cell")
            seed = gr.Number(0, precision=0, label="Seed of the first")
            go = gr.Button("Compare", variant="primary", size="lg")
        with gr.Column(scale=7, min_width=320):
            image = gr.Image(label="Side by side", format="png", interactive=False, height=620)
            status = gr.Markdown(
                "Columns are models, strengths and steps; rows are prompts.", elem_classes="note"
            )

    @told
    def compare(
        runs: list[str], prompts: str, scales: str, steps: str, seeds: int, seed: int, request: gr.Request
    ) -> Iterator[tuple]:
        """Draws models side by side on the same prompts and seeds; returns one labelled image."""
        yield from _compare(page, page.visitor(request), runs, prompts, scales, steps, seeds, seed)

    go.click(
        compare,
        inputs_kwargs={
            "runs": runs,
            "prompts": prompts,
            "scales": scales,
            "steps": steps,
            "seeds": seeds,
            "seed": seed,
        },
        outputs=[image, status],
        api_name="compare",
        concurrency_id="device",
        concurrency_limit=1,
        show_progress="minimal",
    )

    def choices(request: gr.Request) -> dict:
        return gr.update(choices=page.choices(page.visitor(request)))

    for event in (blocks.load, tab.select):
        event(choices, outputs=runs, api_visibility="private", show_progress="hidden")


def _numbers(text: str, kind: Any, what: str) -> list[Any]:
    try:
        return [kind(own) for own in (text or "").replace(";", ",").split(",") if own.strip()]
    except ValueError:
        raise UserError(
            f"{what}: '{text[:40]}' are no numbers with commas between, such as 10, 25."
        ) from None


def _compare(
    page: Page,
    visitor: Visitor,
    runs: list[str],
    prompts: str,
    scales: str,
    steps: str,
    seeds: int,
    seed: int,
) -> Iterator[tuple]:
    """How far it is, and in the end the grid."""
    config = CompareConfig(
        prompt=[line.strip() for line in prompts.splitlines() if line.strip()],
        lora_scale=_numbers(scales, float, "Strengths"),
        num_inference_steps=_numbers(steps, int, "Numbers of steps") or [25],
        num_seeds=int(seeds),
        seed=int(seed),
    )
    columns = columns_of([page.model(name, visitor) for name in runs or []], config)
    count = len(columns) * len(config.prompt) * config.num_seeds
    if not count:
        raise UserError("Choose models and write prompts to compare them on.")
    if count > MOST_IMAGES[visitor.owner] or max(config.num_inference_steps) > visitor.limits.steps:
        raise UserError(
            f"{count} images are too many: {MOST_IMAGES[visitor.owner]} at most, and steps up to "
            f"{visitor.limits.steps}."
        )
    check_columns(columns, config.prompt, config)
    page.drawer.forget()
    events: Queue = Queue()

    def work() -> None:
        try:
            with page.drawer.lock:
                drawn = draw_columns(
                    columns, config.prompt, config, lambda done, total: events.put((done, total))
                )
                scores = [
                    scores_of(own, config.prompt, images) for own, images in zip(columns, drawn, strict=True)
                ]
                events.put(grid(columns, config.prompt, drawn, scores, config.seed))
        except BaseException as error:  # raised again where it is awaited
            events.put(error)

    Thread(target=work, daemon=True).start()
    yield None, f"0 of {count} images"
    while isinstance(event := events.get(), tuple):
        yield gr.skip(), f"{event[0]} of {event[1]} images"
    if isinstance(event, BaseException):
        raise event
    path = scratch() / f"compare-{uuid4().hex}.png"
    save_image(event, path)
    yield str(path), f"{count} images. The button at the image's corner saves it."

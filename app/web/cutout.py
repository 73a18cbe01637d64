"""A tool of the page that cuts a subject out of its background."""

from typing import Any

import gradio as gr
from PIL import Image

from customize.app.web.page import Page, told
from customize.app.web.visitors import opened
from customize.errors import UserError


def cutout(page: Page, gallery: gr.Gallery) -> None:
    """Choose an image of the gallery, crop it or paint over the subject, and put it back."""
    chosen = gr.State(0)
    gr.Markdown("Click an image above. Crop it, or paint over the subject, then apply.", elem_classes="note")
    editor = gr.ImageEditor(
        label="Crop, or paint over the subject",
        type="pil",
        image_mode="RGBA",
        sources=[],
        transforms=["crop"],
        layers=False,
        brush=gr.Brush(colors=["#e4572e"], default_color="#e4572e", color_mode="fixed"),
        height=360,
    )
    apply = gr.Button("Apply", size="sm")

    @told
    def choose(images: list, event: gr.SelectData) -> tuple:
        return event.index, opened(images[event.index][0])

    @told
    def put_back(images: list | None, index: int, drawn: Any) -> list:
        if not images or not drawn or drawn.get("background") is None:
            raise UserError("Click an image of the gallery first.")
        found = [entry[0] for entry in images]
        found[min(index, len(found) - 1)] = cut(drawn)
        return found

    gallery.select(choose, gallery, [chosen, editor], api_visibility="private")
    apply.click(put_back, [gallery, chosen, editor], gallery, api_visibility="private")


def cut(drawn: dict[str, Any]) -> Image.Image:
    """The image of an editor, transparent where nothing was painted, if anything was."""
    image = drawn["background"].convert("RGBA")
    masks = [layer.convert("RGBA").getchannel("A") for layer in drawn.get("layers", []) if layer is not None]
    for mask in masks:
        if mask.getbbox():
            image.putalpha(mask.resize(image.size).point(lambda value: 255 if value > 32 else 0))
    return image

"""`customize demo`: four images of a subject, and the subject in scenes it was never seen in: by the encoder
at once, and after a few minutes of training."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from customize.backbones.load import load_base
from customize.embedded import GUIDANCE
from customize.errors import UserError
from customize.pipelines import load_pipeline, load_subject_pipeline
from customize.runs.folder import check_free
from customize.runs.output import is_own_image, make_folder, save_image
from customize.stickers import BACKGROUNDS, Drawing, World
from customize.stickers.bench import reference_captions, write_references
from customize.stickers.measure import masked_correlation
from customize.trainers.launch import train_method

SUBJECT = Drawing("fox", "flat")  # a drawing that the base model has never seen, of a class that it knows
UNSEEN = ("beach", "night", "bricks", "wood", "pink", "sunset")
WORD = "sks"
PAGE = "demo.png"


def demo(output: str = "runs/demo", quick: bool = False, overwrite: bool = False) -> Path:
    """Trains and draws in `output`; returns the path of the resulting image. `quick` only proves that
    everything runs.

    UserError if `output` holds files that are not of an earlier demo, or holds an earlier demo or run and
    `overwrite` is False.
    """
    folder = make_folder(Path(output), "--output")
    check_output(folder, overwrite)
    images = write_references(folder / "images", SUBJECT, f"{WORD} {SUBJECT.word}")
    prompts = [f"a {WORD} {SUBJECT.word} {BACKGROUNDS[b]}" for b in UNSEEN]
    before = draw(load_base("stickers"), [prompt.replace(f"{WORD} ", "") for prompt in prompts])
    encoder = load_subject_pipeline("stickers")
    began = time.perf_counter()
    at_once = draw(encoder, [prompt.replace(WORD, "<s>") for prompt in prompts], subject_images=images)
    print(f"the encoder's {len(at_once)} images took {time.perf_counter() - began:.1f} s, and no training")
    train_method(
        "dreambooth",
        instance_data_dir=folder / "images",
        instance_prompt=f"a {WORD} {SUBJECT.word}",
        output_dir=folder,
        overwrite_output_dir=overwrite,
        max_train_steps=20 if quick else 500,
        checkpointing_steps=1000,
    )
    after = draw(load_pipeline(folder), prompts)
    page = folder / PAGE
    rows = {
        "the class word alone": before,
        "the encoder, at once": at_once,
        "DreamBooth, after training": after,
    }
    save_image(compose(images, rows, prompts), page)
    sprite = World().sprite(SUBJECT)
    own, word, encoded, taught = (
        np.mean([masked_correlation(image, sprite) for image in drawn]) for drawn in (images, *rows.values())
    )
    print(
        f"correlation with the subject: its own images {own:.2f}, the word {word:.2f}, the encoder "
        f"{encoded:.2f}, DreamBooth {taught:.2f}"
    )
    print(f'look at {page}; draw more with: {command()} generate {folder} "{prompts[0]}"')
    return page


def command() -> str:
    """How this program is called where the user stands: by its path, if it is not on the search path."""
    return "customize" if shutil.which("customize") else sys.argv[0]


def check_output(folder: Path, overwrite: bool) -> None:
    """UserError if the demo would replace files that it did not write, or an earlier demo without
    `overwrite`."""
    check_free(folder, overwrite, resumed=False, flag="--output")
    own = [path for path in (folder / PAGE, *(folder / "images").glob("*")) if path.exists()]
    if own and not overwrite:
        raise UserError(
            f"'{folder}' holds an earlier demo; choose another --output, or add --overwrite_output_dir."
        )
    captions = {
        f"{i}.txt": text for i, text in enumerate(reference_captions(SUBJECT, f"{WORD} {SUBJECT.word}"))
    }
    for path in own:
        if not (
            is_own_image(path)
            or (path.is_file() and path.read_bytes() == captions.get(path.name, "").encode())
        ):
            raise UserError(
                f"--output: '{path}' is not of an earlier demo; move it away, or choose another folder."
            )


def draw(pipe: Any, prompts: list[str], **options: Any) -> list[Image.Image]:
    """One image for each prompt, from the same noises at every call."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    usual = {"num_inference_steps": 25, "guidance_scale": GUIDANCE, "generator": generators}
    return pipe(prompts, **usual, **options).images


def compose(images: list[Image.Image], rows: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """The images of the subject on the left; on the right a row for each way of drawing it, scene by
    scene."""
    side, gap, top, bold, small = 192, 12, 36, ImageFont.load_default(22), ImageFont.load_default(15)
    left, step = 2 * side + 4 * gap, side + gap + top
    page = Image.new("RGB", (left + len(prompts) * (side + gap) + gap, len(rows) * step + 44), "white")
    pen = ImageDraw.Draw(page)

    def place(image: Image.Image, x: int, y: int) -> None:
        page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))

    pen.text((gap, 8), "four images of the subject", "black", bold)
    for i, image in enumerate(images):
        place(image, gap + (i % 2) * (side + gap), top + (i // 2) * (side + gap))
    for row, (name, drawn) in enumerate(rows.items()):
        pen.text((left, row * step + 8), name, "black", bold)
        for i, image in enumerate(drawn):
            place(image, left + i * (side + gap), row * step + top)
    for i, prompt in enumerate(prompts):
        label = prompt.replace(f"{WORD} {SUBJECT.word} ", f"... {SUBJECT.word}\n", 1)
        pen.text((left + i * (side + gap), len(rows) * step), label, "black", small)
    pen.line([(left - 1.5 * gap, 10), (left - 1.5 * gap, page.height - 10)], (200, 200, 200), 2)
    return page

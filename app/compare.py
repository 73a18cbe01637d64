"""`customize compare`: runs side by side on the same prompts and seeds, in one labelled image."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from customize.app.generate import (
    GenerateConfig,
    base_of,
    check_request,
    check_subjects,
    draw,
    load,
    prompts_in,
    run_info,
)
from customize.app.shared import check_run, split
from customize.config import option
from customize.embedded import GUIDANCE, is_embedded
from customize.errors import UserError

MOST_PIXELS = 10**8  # of the grid
LABELS, GAP, LINE = 190, 10, 19  # widths in pixels: the prompts' column, between cells, a line of text


@dataclass
class CompareConfig:
    """What `customize compare` draws."""

    prompts: str = option(
        "", "text file with a prompt on each line; lines that begin with # are left out", essential=True
    )
    prompt: list[str] = option([], "prompts to draw, beside those of --prompts", essential=True)
    output: str = option("compare.png", "image file of the grid, a PNG", essential=True)
    lora_scale: list[float] = option(
        [], "strengths of the runs' LoRA, each a column of its own; none: as trained", least=0, essential=True
    )
    num_inference_steps: list[int] = option(
        [25], "numbers of denoising steps, each a column of its own", least=1, essential=True
    )
    num_seeds: int = option(2, "images of each cell, with seed, seed + 1 and so on", least=1)
    seed: int = option(0, "seed of the first image of each cell", least=0, most=4_000_000_000)
    guidance_scale: float | None = option(
        None, "how strongly the prompt steers; none leaves it to the pipeline", least=0
    )
    measure: bool = option(
        True, "write subject and prompt fidelity under each column, where the embedded model draws"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the weights")
    device: Literal["cpu", "cuda"] | None = option(None, "none means the GPU if there is one")


class Column(NamedTuple):
    """What one column is drawn with."""

    label: str
    run: str
    lora_scale: float
    steps: int


Images = list[list[Image.Image]]  # by prompt and seed


def compare(words: list[str]) -> None:
    from customize.quiet import quiet_libraries
    from customize.runs.output import save_image

    runs, config = split(words, CompareConfig, ["RUN"], more=True)
    for run in runs:
        check_run(run)
    prompts = [*config.prompt, *(prompts_in(config.prompts) if config.prompts else [])]
    columns = columns_of(runs, config)
    check_columns(columns, prompts, config)
    output = check_output(config.output)
    quiet_libraries()
    images = draw_columns(columns, prompts, config, _say)
    pairs = zip(columns, images, strict=True)
    scores = [scores_of(own, prompts, drawn) if config.measure else {} for own, drawn in pairs]
    for column, found in zip(columns, scores, strict=True):
        if found:
            print(f"{column.label}: " + ", ".join(f"{name} {value:.0%}" for name, value in found.items()))
    save_image(grid(columns, prompts, images, scores), output)
    print(output)


def _say(done: int, total: int) -> None:
    print(f"\r{done} of {total} images", end="\n" if done == total else "", flush=True)


def columns_of(runs: Sequence[str], config: CompareConfig) -> list[Column]:
    """Every run at every strength and number of steps; a base model has no strength."""
    found = []
    for run in runs:
        name = Path(run).name or run
        for scale in (config.lora_scale if _is_run(run) else []) or [1.0]:
            for steps in config.num_inference_steps:
                parts = [name]
                parts += [f"strength {scale:g}"] if len(config.lora_scale) > 1 and _is_run(run) else []
                parts += [f"{steps} steps"] if len(config.num_inference_steps) > 1 else []
                found.append(Column(", ".join(parts), run, scale, steps))
    return found


def _is_run(run: str) -> bool:
    return (Path(run) / "run.json").exists()


def settings_of(column: Column, config: CompareConfig) -> GenerateConfig:
    """A column as `customize generate` would draw it."""
    guidance = config.guidance_scale
    if guidance is None and is_embedded(base_of(column.run)):
        guidance = GUIDANCE
    return GenerateConfig(
        num_images_per_prompt=config.num_seeds,
        seed=config.seed,
        lora_scale=column.lora_scale,
        guidance_scale=guidance,
        num_inference_steps=column.steps,
        dtype=config.dtype,
        device=config.device,
    )


def check_columns(columns: Sequence[Column], prompts: Sequence[str], config: CompareConfig) -> None:
    """UserError for what cannot be drawn or would not fit into one image, before a model is loaded."""
    if not prompts:
        raise UserError('There is no prompt: give --prompts FILE, or --prompt "a fox on the beach".')
    for column in columns:
        settings = settings_of(column, config)
        check_request(column.run, list(prompts), settings)
        check_subjects(column.run, settings)
    side = 128 if all(is_embedded(base_of(column.run)) for column in columns) else 512
    pixels = len(columns) * len(prompts) * config.num_seeds * side**2
    if pixels > MOST_PIXELS:
        asked = f"{len(columns)} columns of {len(prompts)} prompts and {config.num_seeds} seeds"
        raise UserError(f"{asked} are too large for one image: take fewer of them.")


def check_output(name: str) -> Path:
    """The path of the grid, in a folder that is made; UserError for another kind of file, a folder, or a file
    that no comparison wrote."""
    from customize.runs.output import is_own_image, make_folder

    path = Path(name)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output: '{name}' must be a PNG file, such as compare.png.")
    if path.is_dir() or (path.exists() and not is_own_image(path)):
        raise UserError(
            f"--output: '{name}' is there already and was not written by customize; choose another."
        )
    make_folder(path.parent, "--output")
    return path


def draw_columns(
    columns: Sequence[Column],
    prompts: Sequence[str],
    config: CompareConfig,
    on_image: Callable[[int, int], object] | None = None,
) -> list[Images]:
    """The images of each column. A run is loaded once for its columns of one strength, and freed before the
    next; `on_image` is called with the number of images that are done, and of all."""
    total, done, found = len(columns) * len(prompts) * config.num_seeds, 0, []
    pipe: Any = None
    loaded: tuple[str, float] | None = None
    for column in columns:
        settings = settings_of(column, config)
        if loaded != (column.run, column.lora_scale):
            pipe = None  # frees its memory first
            pipe, loaded = load(column.run, settings), (column.run, column.lora_scale)
            pipe.set_progress_bar_config(disable=True)
        rows: Images = []
        for prompt in prompts:
            rows.append([])
            for seed in range(config.seed, config.seed + config.num_seeds):
                rows[-1] += draw(pipe, prompt, [seed], settings)
                done += 1
                if on_image:
                    on_image(done, total)
        found.append(rows)
    return found


def scores_of(column: Column, prompts: Sequence[str], images: Images) -> dict[str, float]:
    """`prompt fidelity` by the sticker world's judge, 0 to 1, and `subject fidelity` where the run's own
    images are still there; nothing for other base models, whose judges would have to be downloaded."""
    if not is_embedded(base_of(column.run)):
        return {}
    from customize.embedded import subject_score

    drawn = [(prompt, image) for prompt, row in zip(prompts, images, strict=True) for image in row]
    references = references_of(column.run)
    scores = subject_score(references or [image for _, image in drawn])(drawn)
    names = ("subject_fidelity", "prompt_fidelity") if references else ("prompt_fidelity",)
    return {name.replace("_", " "): scores[name] for name in names}


def references_of(run: str) -> list[Image.Image]:
    """The images that a run learned from, if they are still there."""
    from customize.data.images import find_images, read_image_file

    folder = run_info(run)["config"].get("instance_data_dir") or ""
    if not folder or not Path(folder).is_dir():
        return []
    return [read_image_file(image)[0] for image in find_images(folder, "any")]


def grid(
    columns: Sequence[Column],
    prompts: Sequence[str],
    images: Sequence[Images],
    scores: Sequence[dict[str, float]],
) -> Image.Image:
    """One image: columns under their labels, prompts at the left, scores beneath."""
    side = max(image.width for own in images for row in own for image in row)
    high = max(image.height for own in images for row in own for image in row)
    side, high = (max(side, 128), max(high, 128))
    count = len(images[0][0])
    width = count * side + (count - 1) * 2
    font, bold = ImageFont.load_default(15), ImageFont.load_default(16)
    heads = [_wrapped(column.label, bold, width) for column in columns]
    top = GAP + LINE * max(map(len, heads)) + GAP
    bottom = (LINE * max(map(len, scores)) + GAP) if any(scores) else 0
    size = LABELS + len(columns) * (width + GAP) + GAP, top + len(prompts) * (high + GAP) + bottom
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for row, prompt in enumerate(prompts):
        for i, line in enumerate(_wrapped(prompt, font, LABELS - 2 * GAP)[: high // LINE]):
            pen.text((GAP, top + row * (high + GAP) + i * LINE), line, (60, 60, 60), font)
    for number, own in enumerate(images):
        left = LABELS + number * (width + GAP)
        for i, line in enumerate(heads[number]):
            pen.text((left, GAP + i * LINE), line, "black", bold)
        for row, cell in enumerate(own):
            for i, image in enumerate(cell):
                page.paste(image, (left + i * (side + 2), top + row * (high + GAP)))
        for i, (name, value) in enumerate(scores[number].items()):
            place = left, top + len(prompts) * (high + GAP) + i * LINE
            pen.text(place, f"{name} {value:.0%}", (60, 60, 60), font)
    return page


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most a width in pixels; words that are longer are broken."""
    letters = max(int(width / max(font.getlength("n"), 1)), 4)
    lines = textwrap.wrap(text, letters)
    while any(font.getlength(line) > width for line in lines) and letters > 4:
        letters -= 1
        lines = textwrap.wrap(text, letters)
    return lines or [""]

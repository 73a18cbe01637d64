"""`customize compare`: runs and base models side by side, on the same prompts and from the same noise."""

import gc
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate, count, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from customize.app.generate import (
    GenerateConfig,
    base_of,
    check_subjects,
    doubts,
    draw,
    load,
    prompts_in,
    run_info,
)
from customize.app.shared import check_run, split
from customize.config import check_config, option
from customize.embedded import GUIDANCE, folder_of, is_embedded, subject_score
from customize.errors import UserError

MOST_PIXELS = 10**8  # of a grid
USUAL_SIDE = 1024  # pixels, of a base model that is not on this machine yet
TEXT = "comparison"  # the entry of the PNG file that says how it was drawn
LONGEST = 200  # bytes, of a file's name


@dataclass
class CompareConfig:
    """How `customize compare` draws."""

    prompts: str = option(
        "", "text file with a prompt on each line; lines that begin with # are left out", essential=True
    )
    prompt: list[str] = option([], "prompts to draw, beside those of --prompts", essential=True)
    output: str = option("compare.png", "image file of the grid, a PNG", essential=True)
    lora_scale: list[float] = option(
        [],
        "strengths of the runs' LoRA, each a column of its own; none: 1. A base model has one column, "
        "whatever the strengths",
        least=0,
    )
    num_inference_steps: list[int] = option(
        [25], "numbers of denoising steps, each a column of its own", least=1
    )
    seed: int = option(0, "seed of the first image of each cell", least=0, most=4_000_000_000)
    num_seeds: int = option(2, "images of each cell; image i is drawn with seed + i", least=1)
    guidance_scale: float | None = option(
        None, "how strongly the prompt steers; none leaves it to the pipeline", least=0
    )
    measure: bool = option(
        True,
        "write subject and prompt fidelity under each column where they can be measured: on the embedded "
        "base model",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the weights")
    device: Literal["cpu", "cuda"] | None = option(None, "none means the GPU if there is one")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)


class Column(NamedTuple):
    """What one column of the grid shows."""

    label: str
    run: str
    lora_scale: float
    steps: int


Images = list[list[Image.Image]]  # of a column, by prompt and seed


def compare(words: list[str]) -> None:
    runs, config = split(words, CompareConfig, ["RUN"], more=True)
    prompts, columns, path = prompts_of(config), columns_of(runs, config), Path(config.output)
    check_output(path)
    check_columns(columns, prompts, config)
    from tqdm import tqdm

    from customize.runs.output import make_folder, save_image

    make_folder(path.parent, "--output")
    with tqdm(total=len(columns) * len(prompts) * config.num_seeds, desc="images") as bar:
        images = draw_columns(columns, prompts, config, lambda done, total: bar.update())
    scores = [scores_of(*own) if config.measure else {} for own in _each(columns, prompts, images)]
    for column, found in zip(columns, scores, strict=True):
        print(": ".join(filter(None, (column.label, ", ".join(_said(found))))))
    page = grid(columns, prompts, images, scores, config.seed)
    save_image(page, path, texts={TEXT: _settings(columns, prompts, scores, config)})
    print(path)


def _each(columns: Sequence[Column], prompts: Sequence[str], images: Sequence[Images]) -> list[tuple]:
    return [(column, prompts, own) for column, own in zip(columns, images, strict=True)]


def _said(scores: dict[str, float]) -> list[str]:
    return [f"{name} {score:.0%}" for name, score in scores.items()]


def _settings(
    columns: Sequence[Column],
    prompts: Sequence[str],
    scores: Sequence[dict[str, float]],
    config: CompareConfig,
) -> str:
    """What reproduces the grid, as JSON, without the places of this machine."""
    from customize.runs.privacy import without_places

    drawn = [column._asdict() | {"scores": own} for column, own in zip(columns, scores, strict=True)]
    return json.dumps(without_places(asdict(config) | {"prompt": list(prompts), "columns": drawn}))


# what is compared


def prompts_of(config: CompareConfig) -> list[str]:
    """The prompts of --prompt and --prompts; UserError if there are none, or one is none."""
    prompts = config.prompt + (prompts_in(config.prompts) if config.prompts else [])
    if config.prompts and len(prompts) == len(config.prompt):
        raise UserError(f"--prompts: '{config.prompts}' holds no prompt; write one on each line.")
    check_prompts(prompts)
    return prompts


def check_prompts(prompts: Sequence[str]) -> None:
    if not prompts:
        raise UserError(
            "There is no prompt: give --prompts FILE, a text file with one on each line, or --prompt "
            '"a fox on the beach".'
        )
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("--prompt is empty: describe the image.")
        if Path(prompt[:200]).is_dir():
            raise UserError(f"--prompt: '{prompt}' is a folder; name all runs before the flags.")


def columns_of(runs: Sequence[str], config: CompareConfig) -> list[Column]:
    """A column for every run, strength and number of steps; a base model has no strength. UserError for
    names and numbers that cannot be, or are given twice."""
    check_config(config)
    for run in runs:
        check_run(run)
    for name in ("lora_scale", "num_inference_steps"):
        _check_once(f"--{name}", getattr(config, name))
    _check_once("RUN", runs)
    found = []
    for run, name in zip(runs, _names(runs), strict=True):
        strengths = [] if is_base(run) else config.lora_scale
        for strength, steps in product(strengths or [1.0], config.num_inference_steps):
            label = [name]
            label += [f"strength {strength:g}"] if strengths else []
            label += [f"{steps} steps"] if len(config.num_inference_steps) > 1 else []
            found.append(Column(", ".join(label), run, strength, steps))
    return found


def is_base(run: str) -> bool:
    return "method" not in run_info(run)


def _check_once(name: str, values: Sequence[Any]) -> None:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise UserError(f"{name}: '{twice[0]}' is given twice, and would be drawn twice; leave one out.")


def _names(runs: Sequence[str]) -> list[str]:
    """A short name for each run: that of its folder, and that of the run for a checkpoint. The full name
    where two are alike."""
    short = []
    for run in runs:
        place = Path(run).resolve()
        is_step = re.fullmatch(r"best|checkpoint-\d+", place.name)
        name = f"{place.parent.name}/{place.name}" if is_step else place.name
        short.append(name if Path(run).is_dir() else run)
    return [name if short.count(name) == 1 else run for name, run in zip(short, runs, strict=True)]


# what is refused, before a model is loaded


def check_output(path: Path) -> None:
    """UserError for a name under which no grid can be written, and for one that is taken by anything but an
    earlier grid."""
    from customize.runs.output import own_text

    if len(path.name.encode()) > LONGEST:
        raise UserError(f"--output: the file's name has more than {LONGEST} bytes; choose a shorter one.")
    if path.is_dir():
        raise UserError(
            f"--output: '{path}' is a folder; choose another name, such as '{path / 'grid.png'}'."
        )
    if path.suffix.lower() != ".png":
        raise UserError(
            f"--output: '{path}' must be a PNG; choose a name such as '{path.stem or 'grid'}.png'."
        )
    if (path.exists() or path.is_symlink()) and not own_text(path, TEXT):
        raise UserError(
            f"--output: '{path}' is there already and was not written by customize compare; choose another "
            "name, or move it away."
        )


def check_columns(columns: Sequence[Column], prompts: Sequence[str], config: CompareConfig) -> None:
    """UserError for what cannot be drawn, and for more than one image can hold."""
    check_prompts(prompts)
    if not columns:
        raise UserError("There is nothing to compare: name runs or base models, such as stickers.")
    runs = list(dict.fromkeys(column.run for column in columns))
    check_size(columns, prompts, config)
    _check_strengths(runs, config)
    for run in runs:
        check_subjects(run, GenerateConfig())
        _check_files(run)


def check_size(columns: Sequence[Column], prompts: Sequence[str], config: CompareConfig) -> None:
    """UserError if the grid would have more than MOST_PIXELS."""
    sides = [side_of(base_of(column.run)) for column in columns]
    pixels = sum(side**2 for side in sides) * len(prompts) * config.num_seeds
    if pixels <= MOST_PIXELS:  # of the images alone; what stands around them counts too
        sizes, scores = [(side, side) for side in sides], [{"subject fidelity": 1.0}] * len(columns)
        width, height = layout(
            columns, prompts, sizes, seed_labels(config.seed, config.num_seeds), scores
        ).size
        pixels = width * height
    if pixels > MOST_PIXELS:
        raise UserError(
            f"{len(columns)} columns of {len(prompts)} prompts and {config.num_seeds} seeds would have about "
            f"{pixels / 1e6:,.0f} megapixels, which is too large for one image ({MOST_PIXELS // 10**6} at "
            "most); compare fewer at a time."
        )


def side_of(base: str) -> int:
    """The side in pixels of the images that a base model draws, as its files say; the usual one where they
    do not say it, or are not on this machine."""
    from customize.files import read_json

    folder = Path(folder_of(base))
    with suppress(UserError, OSError, ValueError, LookupError, TypeError):
        [denoiser] = [folder / part for part in ("unet", "transformer") if (folder / part).is_dir()]
        halved = len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1
        return int(read_json(denoiser / "config.json")["sample_size"]) * 2**halved
    return USUAL_SIDE


def _check_strengths(runs: Sequence[str], config: CompareConfig) -> None:
    from customize.adapters import holds

    trained = [run for run in runs if not is_base(run)]
    if config.lora_scale and not trained:
        raise UserError("--lora_scale: a base model has no LoRA; leave it out, or name a run too.")
    for run in trained:
        if config.lora_scale and not holds(run, "lora"):
            raise UserError(f"--lora_scale: '{run}' has no LoRA; leave the flag out, or that run.")


def _check_files(run: str) -> None:
    """UserError for a folder that is neither run nor base model, a damaged run, and one whose base model is
    gone."""
    from customize.runs.checkpoint import open_run

    if not is_base(run) or (Path(run).is_dir() and not (Path(run) / "model_index.json").exists()):
        open_run(Path(run))
    base = folder_of(base_of(run))
    if base.startswith((".", "/", "~")) and not Path(base).exists():
        raise UserError(f"'{run}' was trained on the base model '{base}', which is gone; put it back.")


# drawing


def draw_columns(
    columns: Sequence[Column],
    prompts: Sequence[str],
    config: CompareConfig,
    on_image: Callable[[int, int], object] | None = None,
) -> list[Images]:
    """The images by column, prompt and seed; each is what `customize generate` draws with that seed alone.

    `on_image(done, total)` is called after each image. One pipeline at a time is in memory, and each is
    loaded once.
    """
    number, total = count(1), len(columns) * len(prompts) * config.num_seeds
    found: dict[Column, Images] = {}

    def told() -> None:
        if on_image:
            on_image(next(number), total)

    for run in dict.fromkeys(column.run for column in columns):
        own = [column for column in columns if column.run == run]
        found |= _draw_run(own, prompts, config, told)
        _free_memory()
    return [found[column] for column in columns]


def _draw_run(
    columns: Sequence[Column], prompts: Sequence[str], config: CompareConfig, told: Callable[[], None]
) -> dict[Column, Images]:
    """The images of the columns of one run. Its pipeline ends with this function."""
    run, strength = columns[0].run, 1.0
    pipe = load(run, GenerateConfig(dtype=config.dtype, device=config.device))
    pipe.set_progress_bar_config(disable=True)
    _warn(pipe, run, prompts)

    def one(settings: GenerateConfig, prompt: str, seed: int) -> Image.Image:
        [image] = draw(pipe, prompt, [seed], settings)
        told()
        return image

    found = {}
    for column in columns:
        if column.lora_scale != strength:
            strength = _set_strength(pipe, column.lora_scale)
        drawn = partial(one, settings_of(column, config))
        found[column] = [[drawn(prompt, seed) for seed in config.seeds] for prompt in prompts]
    return found


def settings_of(column: Column, config: CompareConfig) -> GenerateConfig:
    """The settings of `customize generate` that draw a column."""
    guidance = config.guidance_scale
    if guidance is None and is_embedded(base_of(column.run)):
        guidance = GUIDANCE
    return GenerateConfig(num_inference_steps=column.steps, guidance_scale=guidance)


def _set_strength(pipe: Any, strength: float) -> float:
    adapters = pipe.get_active_adapters()
    pipe.set_adapters(adapters, [strength] * len(adapters))
    return strength


def _warn(pipe: Any, run: str, prompts: Sequence[str]) -> None:
    """Warns as `customize generate` does; not for base models, which need not know a run's words."""
    for prompt in prompts if not is_base(run) else ():
        for text in doubts(pipe, run, prompt):
            warnings.warn(f"{run}: {text}", stacklevel=1)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# measuring


def scores_of(column: Column, prompts: Sequence[str], images: Images) -> dict[str, float]:
    """`subject fidelity` and `prompt fidelity` of a column's images by the sticker world's judge, 0 to 1.

    Prompt fidelity needs prompts that ask for what the judge knows. Subject fidelity needs the images that
    the run learned from, and is of the prompts that say the run's words. Images of other base models have no
    scores: the encoders that measure them would have to be downloaded.
    """
    if not is_embedded(base_of(column.run)):
        return {}
    drawn = [(prompt, image) for prompt, row in zip(prompts, images, strict=True) for image in row]
    references, words = subject_of(column.run)
    own = [pair for pair in drawn if any(word in pair[0] for word in words)]
    found = {}
    if own and references:
        found["subject fidelity"] = subject_score(references)(own)["subject_fidelity"]
    if asked := [pair for pair in drawn if _asks(pair[0])]:
        any_subject = [image for _, image in asked]  # prompt fidelity is the same for all references
        found["prompt fidelity"] = subject_score(any_subject)(asked)["prompt_fidelity"]
    return found


def _asks(prompt: str) -> bool:
    """Whether a prompt asks for anything that the judge can tell."""
    from customize.stickers.bench import parse_prompt
    from customize.stickers.judge import trusted

    return any(map(trusted, parse_prompt(prompt)))


def subject_of(run: str) -> tuple[list[Image.Image], list[str]]:
    """The images that a run on the embedded base model learned from, and what prompts call their subject;
    nothing where they are gone, of several subjects, or show no drawing that the judge knows."""
    if is_base(run):
        return [], []
    from customize.app.bench.finished import StickerRun

    with suppress(UserError, LookupError):  # of methods whose settings name no images
        learned = StickerRun(folder=Path(), run_path=Path(run), quick=True)
        words = list(run_info(run)["words"]) or [learned.calls]
        return (learned.images, words) if learned.shown else ([], [])
    return [], []


# the grid


INK, SOFT, RULE = "#22262b", "#666d76", "#d5d8dc"
SMALLEST = 15  # pixels, of the text
SHARE = 22  # of the widest image's width to the text's height: large images are looked at from afar
NARROWEST, WIDEST = 9, 24  # of the prompts' column, in heights of the text
COLUMN = 10  # heights of the text that the narrowest column is wide, for its label and scores


class Layout(NamedTuple):
    """Where the parts of a grid are, in pixels."""

    unit: int  # height of the text, on which all distances depend
    label_width: int  # of the prompts
    pitches: list[int]  # from one image of a cell to the next, by column
    lefts: list[int]  # of the columns
    widths: list[int]
    tops: list[int]  # of the rows, and at last of the scores
    size: tuple[int, int]


def grid(
    columns: Sequence[Column],
    prompts: Sequence[str],
    images: Sequence[Images],
    scores: Sequence[dict[str, float]],
    first_seed: int | None = None,
) -> Image.Image:
    """One labelled image: columns under their labels, prompts at the left, each column's scores beneath it.

    `images` go by column, prompt and seed, and are shown pixel by pixel. With `first_seed` the seeds stand
    over them.
    """
    shown = [[image for row in own for image in row] for own in images]
    sizes = [(max(image.width for image in own), max(image.height for image in own)) for own in shown]
    seeds = seed_labels(first_seed, len(images[0][0]))
    place = layout(columns, prompts, sizes, seeds, scores)
    page = Image.new("RGB", place.size, "white")
    pen = ImageDraw.Draw(page)
    for prompt, top in zip(prompts, place.tops, strict=False):
        _write(pen, (place.unit, top), prompt, _font(place.unit), place.label_width)
    for top in place.tops[1 : len(prompts) + any(scores)]:
        y = top - place.unit
        pen.line([(place.unit, y), (page.width - place.unit, y)], RULE, max(place.unit // 15, 1))
    for i, column in enumerate(columns):
        left, width, pitch = place.lefts[i], place.widths[i], place.pitches[i]
        _write(pen, (left, place.unit), column.label, _label_font(place.unit), width)
        for j, text in enumerate(seeds):
            spot = left + j * pitch, place.tops[0] - round(1.25 * place.unit)
            pen.text(spot, text, SOFT, _seed_font(place.unit))
        for top, row in zip(place.tops, images[i], strict=False):
            for j, image in enumerate(row):
                page.paste(image, (left + j * pitch, top))
        _write(pen, (left, place.tops[-1]), "\n".join(_said(scores[i])), _font(place.unit), width)
    return page


def seed_labels(first: int | None, number: int) -> list[str]:
    """What stands over the images of a cell: their seeds, or nothing if they are not known."""
    return [""] * number if first is None else [f"seed {first + i}" for i in range(number)]


def layout(
    columns: Sequence[Column],
    prompts: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    seeds: Sequence[str],
    scores: Sequence[dict[str, float]],
) -> Layout:
    """The layout for images of a (width, height) for each column, such that no text meets an image or
    another text."""
    unit = max(SMALLEST, max(width for width, _ in sizes) // SHARE)
    high, seed_width = max(height for _, height in sizes), max(map(_seed_font(unit).getlength, seeds))
    pitches = [max(width, int(seed_width) + 1) + unit // 2 for width, _ in sizes]
    widths = [max(pitch * len(seeds) - unit // 2, COLUMN * unit) for pitch in pitches]
    label_width = _label_width(prompts, unit, high)
    lefts = list(
        accumulate(widths, lambda left, width: left + width + 2 * unit, initial=label_width + 3 * unit)
    )
    heads = [_height(own.label, _label_font(unit), width) for own, width in zip(columns, widths, strict=True)]
    first = unit + max(heads) + unit // 2 + (round(1.25 * unit) if any(seeds) else 0)
    heights = [max(high, _height(prompt, _font(unit), label_width)) + 2 * unit for prompt in prompts]
    tops = list(accumulate(heights, initial=first))
    said = ["\n".join(_said(own)) for own in scores]
    below = max(_height(text, _font(unit), width) for text, width in zip(said, widths, strict=True))
    size = lefts[-1] - unit, tops[-1] + below + (unit if below else -unit)
    return Layout(unit, label_width, pitches, lefts[:-1], widths, tops, size)


def _label_width(prompts: Sequence[str], unit: int, height: int) -> int:
    """The narrowest width at which every prompt is as high as its images, or the widest one."""
    widths = [unit * step for step in range(NARROWEST, WIDEST + 1)]
    fits = (w for w in widths if all(_height(prompt, _font(unit), w) <= height for prompt in prompts))
    return next(fits, widths[-1])


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _label_font(unit: int) -> Any:
    return _font(round(1.15 * unit))


def _seed_font(unit: int) -> Any:
    return _font(round(0.8 * unit))


def _height(text: str, font: Any, width: int) -> int:
    return len(wrapped(text, font, width)) * _line(font)


def _line(font: Any) -> int:
    return round(1.3 * font.size)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Any, width: int) -> None:
    for i, line in enumerate(wrapped(text, font, width)):
        pen.text((place[0], place[1] + i * _line(font)), line, INK, font)


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """The lines of a text, none wider than a width in pixels. They break between words and after / _ -, and
    within what is longer than a line."""
    lines: list[str] = []
    for paragraph in filter(None, map(str.strip, _plain(text).splitlines())):
        line = ""
        for piece in re.findall(r"\s*(?:[^\s/_-]+[/_-]*|[/_-]+)", paragraph):
            if font.getlength(line + piece) > width:
                *full, line = [*filter(None, [line]), *_broken(piece.strip(), font, width)]
                lines += full
            else:
                line += piece
        lines.append(line)
    return lines


def _plain(text: str) -> str:
    """A text without accents, which Pillow's font has no letters for."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _broken(piece: str, font: Any, width: int) -> list[str]:
    parts = [""]
    for sign in piece:
        if parts[-1] and font.getlength(parts[-1] + sign) > width:
            parts.append("")
        parts[-1] += sign
    return parts

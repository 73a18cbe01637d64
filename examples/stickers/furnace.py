"""The fire: `python examples/stickers/furnace.py [--minutes N]` trains whatever stage of the embedded
models is due.

The denoiser is trained and measured in turn until its measures stop rising; then come the judge, the
image tower and the encoder, and the round begins again. Everything resumes from its checkpoint, or from
what ships. The fire takes only the processor time that nothing else wants, and waits passively: a program
that waits busily slows everything beside it, whatever its priority. It ends cleanly at any signal.
`measures.jsonl`, `measures.png` and a contact sheet of each age are in `.furnace`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything loads OpenMP

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from export import contact_sheet, draw, recognised
from scenes import SPREAD, Text, supply
from transformers import CLIPTextModel, CLIPTokenizer
from unet import build, schedule, start, train

from customize.runs.folder import latest_checkpoint
from customize.runs.output import save_image
from customize.stickers import Scene, World, caption
from customize.stickers.judge import judge
from customize.stickers.measure import background_of, masked_correlation
from customize.stickers.scene import FACTORS
from recipe import FURNACE, Run, begin, part, stage, until, worlds

HERE = Path(__file__).parent
LOG = FURNACE / "measures.jsonl"
BETWEEN = 65_536  # scenes between two measures of the denoiser
PATIENCE = 6  # measures without a better one, after which the other stages have their turn
WIDEN_AT = 0.6  # share of things drawn as asked from which poses get more varied
AFTERWARDS = {"judge.py": 60, "image_tower.py": 30}  # minutes of the stages that follow the denoiser


def single_scenes(world: World, count: int) -> list[Scene]:
    rng, drawings = np.random.default_rng(11), world.drawings(core=True)
    backgrounds = FACTORS["background"]
    return [
        Scene(drawings[rng.integers(len(drawings))], backgrounds[rng.integers(len(backgrounds))])
        for _ in range(count)
    ]


def pair_scenes(world: World, count: int) -> list[Scene]:
    """Two things of different classes by one studio, on grass."""
    rng, drawings = np.random.default_rng(12), world.drawings(core=True)
    scenes: list[Scene] = []
    while len(scenes) < count:
        a, b = drawings[rng.integers(len(drawings))], drawings[rng.integers(len(drawings))]
        if a.word != b.word and a.studio == b.studio:
            scenes.append(Scene(a, "grass", companion=b))
    return scenes


def both_found(images: list, scenes: list[Scene], world: World) -> float:
    """Share of images in which each of the two drawings correlates more than twenty others do."""
    rng = np.random.default_rng(13)
    others = list(rng.permutation(np.array(world.drawings(core=True), dtype=object))[:20])
    hits = []
    for image, scene in zip(images, scenes, strict=True):
        words = {scene.subject.word, scene.companion.word}
        best = max(masked_correlation(image, world.sprite(d)) for d in others if d.word not in words)
        hits.append(
            all(masked_correlation(image, world.sprite(d)) > best for d in (scene.subject, scene.companion))
        )
    return float(np.mean(hits))


def both_judged(images: list, scenes: list[Scene]) -> float:
    """Share of images in which the judge sees both classes, among its first two."""
    verdicts = judge(images)
    words = [(scene.subject.word, scene.companion.word) for scene in scenes]
    return float(
        np.mean([all(verdicts.shows_beside(i, word) for word in both) for i, both in enumerate(words)])
    )


def factor_scenes(world: World, name: str, count: int) -> list[Scene]:
    rng, drawings = np.random.default_rng(14), world.drawings(core=True)
    values = [value for value in FACTORS[name] if value not in ("", 1)]
    return [
        Scene(drawings[rng.integers(len(drawings))], "grass", **{name: values[i % len(values)]})
        for i in range(count)
    ]


def measure(pipe: StableDiffusionPipeline, world: World, count: int = 48) -> dict[str, float]:
    """What the denoiser's running average draws: things, pairs and factors as asked; no method learns
    from this."""
    single, pairs = single_scenes(world, count), pair_scenes(world, count // 2)
    images = draw(pipe, [caption(scene) for scene in single], seed=100)
    found = recognised(images, single, world)
    found["background"] = float(
        np.mean([background_of(p) == s.background for p, s in zip(images, single, strict=True)])
    )
    drawn = draw(pipe, [caption(scene) for scene in pairs], seed=200)
    found["two things"] = both_found(drawn, pairs, world)
    found["two classes"] = both_judged(drawn, pairs)
    for name in ("tint", "size", "count"):
        scenes = factor_scenes(world, name, count // 2)
        verdicts = judge(draw(pipe, [caption(scene) for scene in scenes], seed=300))
        found[name] = float(
            np.mean([verdicts.factor(i, name) == getattr(s, name) for i, s in enumerate(scenes)])
        )
    return {name: round(value, 4) for name, value in found.items()}


def pipeline(weights: dict[str, torch.Tensor], device: torch.device) -> StableDiffusionPipeline:
    """The embedded pipeline with these weights of the denoiser."""
    unet = build()
    unet.load_state_dict(weights)
    parts = (
        AutoencoderKL.from_pretrained(part("vae")),
        CLIPTextModel.from_pretrained(part("text_encoder"), dtype=torch.float32),
        CLIPTokenizer.from_pretrained(part("tokenizer")),
        unet.eval(),
        schedule(),
    )
    pipe = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def measures() -> list[dict]:
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def record(weights: dict[str, torch.Tensor], images: int, spread: float, device: torch.device) -> dict:
    """Measures the denoiser, writes it down, and draws the plot and a contact sheet of this age."""
    pipe, world = pipeline(weights, device), worlds()
    row = {"images": images, "spread": spread, **measure(pipe, world)}
    with LOG.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)
    save_image(contact_sheet(pipe, world), FURNACE / f"age-{images:08d}.png")
    plot(measures(), FURNACE / "measures.png")
    return row


def plot(rows: list[dict], path: Path) -> None:
    """The measures over the scenes seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in (
        "thing",
        "two things",
        "two classes",
        "likeness",
        "studio",
        "tint",
        "size",
        "count",
        "background",
    ):
        axes.plot(
            [row["images"] / 1000 for row in rows],
            [row.get(name, np.nan) for row in rows],
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set(xlabel="scenes seen (thousands)", ylabel="share as asked; likeness: correlation", ylim=(0, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spread_for(rows: list[dict]) -> float:
    """Poses stay narrow until things are drawn as asked; each measure from then on widens them a little."""
    reached = sum(row["thing"] >= WIDEN_AT for row in rows)
    return min(1.0, SPREAD + 0.05 * reached)


def stalled(rows: list[dict]) -> bool:
    """Whether the last measures brought neither better likeness nor more things as asked than those
    before."""
    if len(rows) <= PATIENCE:
        return False
    best = [
        {name: max(row[name] for row in some) for name in ("thing", "likeness")}
        for some in (rows[:-PATIENCE], rows)
    ]
    return best[0] == best[1]


def seen(run: Run, images: int, stop: Callable[[], float]) -> Callable[[], float]:
    """`stop`, or once so many scenes were seen."""
    return lambda: 1.0 if run.images >= images else stop()


def train_denoiser(stop: Callable[[], float], options) -> None:
    """Trains and measures until the measures stop rising, or the time is over."""
    run, rows = start(options.lr, options.device), measures()
    torch.manual_seed(run.step)
    text = Text(options.device)
    scenes = supply(text, run.step, options.workers, spread_for(rows))

    def measured() -> None:
        rows.append(record(run.average, run.images, scenes.spread.value, options.device))
        scenes.spread.value = spread_for(rows)

    try:
        if not rows or rows[-1]["images"] < run.images - BETWEEN:
            measured()
        while stop() < 1 and not stalled(rows):
            train(
                run, scenes, text.nothing(), seen(run, rows[-1]["images"] + BETWEEN, stop), options.batch_size
            )
            if stop() < 1:
                measured()
    finally:
        scenes.close()


def watch(stop: Callable[[], float], options) -> None:
    """Measures each new checkpoint of a denoiser that another program trains."""
    path, measured = FURNACE / "unet.pt", 0.0
    while stop() < 1:
        if path.exists() and path.stat().st_mtime > measured:
            measured = path.stat().st_mtime
            state = torch.load(path, map_location="cpu", weights_only=True)
            record(state["average"], state["images"], options.spread, options.device)
        time.sleep(1)


def other_stages(stop: Callable[[], float]) -> None:
    """The stages that follow, each in a process that is told to end when this one is."""
    commands = [[str(HERE / script), "--minutes", str(minutes)] for script, minutes in AFTERWARDS.items()]
    commands[0] += ["--output", str(FURNACE / "judge")]
    encoder = ["-m", "customize.trainers", "custom_contrast", str(HERE / "custom_contrast.yaml")]
    encoder += [
        "--world",
        str(FURNACE / "world") if (FURNACE / "world").exists() else "",
        "--max_train_steps",
        "100000",
    ]
    resumed = (
        ["--resume_from_checkpoint", "latest"]
        if latest_checkpoint(FURNACE / "encoder")
        else ["--overwrite_output_dir"]
    )
    commands.append([*encoder, "--output_dir", str(FURNACE / "encoder"), *resumed])
    for words in commands:
        process = subprocess.Popen([sys.executable, *words])
        end = time.time() + 60 * 120
        while process.poll() is None and stop() < 1 and time.time() < end:
            time.sleep(1)
        process.terminate()  # they finish their step and save
        process.wait()


def main():
    parser = stage(
        600, batch_size=32, lr=1e-3, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--watch", action="store_true", help="only measure each new checkpoint of the denoiser"
    )
    parser.add_argument(
        "--spread", type=float, default=SPREAD, help="with --watch: the range of poses that is trained on"
    )
    options = begin(parser)
    os.nice(19)
    stop = until(options.minutes)
    if options.watch:
        watch(stop, options)
    while stop() < 1:
        train_denoiser(stop, options)
        if stop() < 1:
            other_stages(stop)


if __name__ == "__main__":
    main()

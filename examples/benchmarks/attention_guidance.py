"""Two things of one sentence: CONFORM and Attend-and-Excite beside the base model alone.

Sentences of two classes that the embedded base model knows ("a fox next to a bus on the beach") are drawn
from the same noise without guidance and with each kind. The judge says whether both classes are among the
two most probable ones. Prints a Markdown table with 95 % bootstrap intervals over sentences, and the
seconds an image takes.

    python examples/benchmarks/attention_guidance.py --sentences 32
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from customize.metrics import confidence_interval
from customize.pipelines import load_pipeline
from customize.pipelines.guidance import AttentionGuidance
from customize.quiet import quiet_libraries
from customize.runs.output import save_image
from customize.stickers import BACKGROUNDS, World
from customize.stickers.judge import judge

KINDS: dict[str, dict[str, Any] | None] = {
    "base model": None,
    "CONFORM, 0.02": {"kind": "conform", "strength": 0.02},
    "CONFORM, 0.05": {"kind": "conform", "strength": 0.05},
    "Attend-and-Excite, 0.02": {"kind": "attend_and_excite", "strength": 0.02},
    "Attend-and-Excite, 0.05": {"kind": "attend_and_excite", "strength": 0.05},
}


def sentences(count: int) -> list[tuple[str, str, str]]:
    """Sentences with the two classes that they name."""
    rng, world = np.random.default_rng(0), World()
    words = sorted({drawing.word for drawing in world.drawings(core=True)})
    places = list(BACKGROUNDS.values())
    found = []
    for _ in range(count):
        first, second = (words[i] for i in rng.choice(len(words), 2, replace=False))
        place = places[rng.integers(len(places))]
        found.append((f"a {first} next to a {second} {place}", first, second))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/attention_guidance"))
    options = parser.parse_args()
    quiet_libraries()
    pipe = load_pipeline("stickers")
    pipe.set_progress_bar_config(disable=True)
    options.output.mkdir(parents=True, exist_ok=True)
    asked, sheets = sentences(options.sentences), []
    print("| | both | one | neither | s an image |\n|---|---|---|---|---|")
    for name, settings in KINDS.items():
        begin, images = time.perf_counter(), []
        for i, (prompt, first, second) in enumerate(asked):
            guided = (
                {}
                if settings is None
                else AttentionGuidance(pipe, prompt, [first, second], **settings).arguments
            )
            call = {"num_inference_steps": 25, "guidance_scale": 4.0, **guided}
            images += pipe(prompt, generator=torch.Generator().manual_seed(i), **call).images
        seconds = (time.perf_counter() - begin) / len(asked)
        verdicts = judge(images)
        shown = [sum(verdicts.shows_beside(i, word) for word in words) for i, (_, *words) in enumerate(asked)]
        low, high = confidence_interval([float(count == 2) for count in shown])
        shares = [np.mean([count == wanted for count in shown]) for wanted in (2, 1, 0)]
        print(
            f"| {name} | {shares[0]:.0%} ({low:.0%} to {high:.0%}) | {shares[1]:.0%} | {shares[2]:.0%} | "
            f"{seconds:.2f} |",
            flush=True,
        )
        sheets.append(images[:8])
    side = sheets[0][0].width
    page = Image.new("RGB", (side * 8, side * len(sheets)))
    for y, row in enumerate(sheets):
        for x, image in enumerate(row):
            page.paste(image, (x * side, y * side))
    save_image(page, options.output / "images.png")


if __name__ == "__main__":
    main()

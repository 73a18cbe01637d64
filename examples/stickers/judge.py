"""Stage 5: the judge of StickerBench. `python examples/stickers/judge.py [--minutes 30]`, resumable.

It learns from scenes of every drawing that ships, held-out ones included, and is used for evaluation only. Pictures are
blurred and made noisy at random, because what it will judge was drawn by a network and not by the renderer.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from customize.stickers import Scene, World, draw_scene
from customize.stickers.judge import FOLDER, Judge, Verdicts, to_pixels
from customize.stickers.scene import FACTORS, draw_factors
from recipe import Run, until


def targets(scenes: list[Scene], drawings: list) -> dict[str, torch.Tensor]:
    """Class indices for the factors; for the drawing, probabilities: a companion takes half."""
    index = {drawing: i for i, drawing in enumerate(drawings)}
    wanted = {name: torch.tensor([values.index(getattr(s, name)) for s in scenes]) for name, values in FACTORS.items()}
    shown = torch.zeros(len(scenes), len(drawings))
    for i, scene in enumerate(scenes):
        for drawing in (scene.subject, scene.companion or scene.subject):
            shown[i, index[drawing]] += 0.5
    return wanted | {"drawing": shown}


def worn(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blurs every third picture and makes every third noisy."""
    pixels = pixels.clone()
    blurred, noisy = (torch.from_numpy(rng.random(len(pixels)) < 1 / 3) for _ in range(2))
    if blurred.any():
        small = F.interpolate(pixels[blurred], size=int(rng.integers(28, 52)), mode="area")
        pixels[blurred] = F.interpolate(small, size=64, mode="bilinear")
    pixels[noisy] += 0.2 * rng.random() * torch.randn_like(pixels[noisy])
    return pixels.clamp(-1, 1)


def scenes_of(rng: np.random.Generator, world: World, drawings: list, count: int, extras: float = 0.4) -> list[Scene]:
    return [draw_factors(rng, world, drawings, extras=extras) for _ in range(count)]


def render(scenes: list[Scene], world: World) -> torch.Tensor:
    return to_pixels([draw_scene(scene, world)[0] for scene in scenes])


@torch.no_grad()
def measure(judge: Judge, world: World, count: int = 2000) -> dict[str, float]:
    """Accuracy on fresh scenes. The drawing: of scenes with the subject at its usual size, upright and in its own colours, as
    one of 537, and of all other scenes; the class; every factor, over scenes half of which have one beyond the background."""
    rng, drawings = np.random.default_rng(2**31), world.drawings(held_out=None)
    scenes = scenes_of(rng, world, drawings, count, extras=0.5)
    judge.eval()
    logits = [judge(render(scenes[i : i + 250], world)) for i in range(0, count, 250)]
    verdicts = Verdicts(world, {name: torch.cat([part[name] for part in logits]) for name in logits[0]})
    judge.train()
    among = [1 if s.companion is None else 2 for s in scenes]
    plain = [i for i, s in enumerate(scenes) if not (s.tint or s.size or s.orientation or s.companion or s.count > 1)]
    rest = sorted(set(range(count)) - set(plain))
    shown = [verdicts.shows(i, s.subject, among[i]) for i, s in enumerate(scenes)]
    kept = [verdicts.shows_class(i, s.subject.word, among[i]) for i, s in enumerate(scenes)]
    beside = [verdicts.shows_class(i, s.companion.word, 2) for i, s in enumerate(scenes) if s.companion is not None]
    found = {
        "drawing": np.mean([shown[i] for i in plain]),
        "drawing, changed": np.mean([shown[i] for i in rest]),
        "class": np.mean([kept[i] for i in plain]),
        "companion": np.mean(beside),
        **{name: np.mean([verdicts.factor(i, name) == getattr(s, name) for i, s in enumerate(scenes)]) for name in FACTORS},
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    world = World()
    drawings = world.drawings(held_out=None)
    judge = Judge(len(drawings)).to(memory_format=torch.channels_last)
    run = Run("judge", judge, options.lr, ema=0.995, shipped=FOLDER / "judge.safetensors")
    rng, elapsed = np.random.default_rng(run.step), until(options.minutes)
    while (passed := elapsed()) < 1:
        scenes = scenes_of(rng, world, drawings, options.batch_size)
        wanted, logits = targets(scenes, drawings), judge(worn(render(scenes, world), rng))
        losses = {n: (1.0 if n == "drawing" else 0.4) * F.cross_entropy(logits[n], wanted[n]) for n in wanted}
        run.update(losses, len(scenes), passed)
        run.report(100)
        run.save(500)
        if run.step % 1000 == 0:
            print(measure(judge, world, 500), flush=True)
    run.save()
    judge.load_state_dict(run.average)
    options.output.mkdir(exist_ok=True)
    state = judge.eval().state_dict()
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()},
        options.output / "judge.safetensors",
    )
    judge.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state.items()})
    found = measure(judge, world, 4000) | {"scenes": run.images}
    (options.output / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()

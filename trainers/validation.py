"""Validation: a loss that is comparable between steps, images, and the choice of the best step."""

import json
import math
from contextlib import suppress

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

from customize.randomness import fixed_randomness
from customize.runs.folder import LOG
from customize.runs.output import save_image
from customize.trainers.methods.base import Method
from customize.trainers.session import Session


def validate(session: Session, bar: tqdm) -> None:
    """Logs the validation loss, draws and rates the validation prompts, and writes best/ if it is the best
    step so far."""
    config, accelerator, best, step = (
        session.config,
        session.accelerator,
        session.train_state["best"],
        session.step,
    )
    with session.averaged(), accelerator.autocast():
        found = {}
        if session.held_out:
            found["validation_loss"] = validation_loss(session.method, session.held_out, config.seed)
            found |= diagnosis(session)
        if config.validation_prompt:
            found |= draw_validation(session)
    if not found:
        return
    accelerator.log(found, step)
    if accelerator.is_main_process:
        session.output.mkdir(parents=True, exist_ok=True)
        with open(session.output / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **found}) + "\n")
    decisive = -found["score"] if "score" in found else found["validation_loss"]
    best.add(decisive)
    values = ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items() if "block" not in name
    )
    say(bar, f"step {step}: {values}{' (best)' if best.since == 0 else ''}")
    if best.since == 0:
        session.write_best()


def say(bar: tqdm, text: str) -> None:
    """Prints a line above the progress bar; errors of a closed terminal are ignored."""
    with suppress(OSError):
        bar.write(text)


def diagnosis(session: Session) -> dict[str, float]:
    """The method's diagnostics, in evaluation mode and with fixed randomness; values that could not be
    computed (NaN) are left out."""
    method = session.method
    method.eval()
    with fixed_randomness(session.config.seed):
        found = method.diagnose(session.held_out, session.output / "samples", session.step)
    method.train()
    return {name: value for name, value in found.items() if not math.isnan(value)}


def draw_validation(session: Session) -> dict[str, float]:
    """Draws the validation prompts on the first process, writes their sheet, and gives every process their
    score, if any."""
    config = session.config
    found: list[dict[str, float]] = [{}]
    if session.accelerator.is_main_process:
        resolution = session.method.backbone.resolution
        drawn = sample(
            session.method,
            config.validation_prompt,
            config.num_validation_images,
            resolution,
            config.seed,
            steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
        )
        folder = session.output / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(sheet(drawn), folder / f"step-{session.step:06d}.png")
        if session.scorer:
            with torch.autocast(
                session.accelerator.device.type, enabled=False
            ):  # scores do not depend on training's precision
                rated = session.scorer(drawn)
            found = [rated | {"score": rated["subject_fidelity"] * rated["prompt_fidelity"]}]
    return broadcast_object_list(found)[0]


@torch.no_grad()
def validation_loss(method: Method, batches: list[dict], seed: int = 0, repeats: int = 8) -> float:
    """The mean denoising loss on held-out images, each with the same `repeats` times and noises at every
    call."""
    was_training = method.training
    method.eval()
    with fixed_randomness(seed):
        total = sum(method(batch)["denoise"].item() for batch in batches for _ in range(repeats))
    method.train(was_training)
    return total / (len(batches) * repeats)


@torch.no_grad()
def sample(
    method: Method,
    prompts: list[str],
    count: int,
    resolution: int,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float | None = None,
) -> list[tuple[str, Image.Image]]:
    """`count` images for each prompt, drawn by the modules that are being trained."""
    images, guidance = [], {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    method.backbone.pipe.set_progress_bar_config(disable=True)
    was_training = method.training
    method.eval()
    with fixed_randomness(seed), method.backbone.without_assistant():
        for prompt in prompts:
            for i in range(count):
                generator = torch.Generator().manual_seed(seed + i)
                options = {
                    "height": resolution,
                    "width": resolution,
                    "num_inference_steps": steps,
                    "generator": generator,
                    **guidance,
                }
                images.append((prompt, method.draw(prompt, **options)))
    method.train(was_training)
    return images


def sheet(images: list[tuple[str, Image.Image]], columns: int = 4) -> Image.Image:
    """The images side by side, without prompts."""
    width, height = images[0][1].size
    columns = min(columns, len(images))
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, (_, image) in enumerate(images):
        page.paste(image, ((i % columns) * width, (i // columns) * height))
    return page

"""Looking at a method while it trains: a loss that can be compared between steps, and pictures."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image

from customize.trainers.method import Method


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Draws inside are the same every time, and training's generators do not notice them."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def validation_loss(method: Method, batches: list[dict], seed: int = 0, repeats: int = 8) -> float:
    """The mean denoising loss on held-out pictures, each with the same `repeats` times and noises at every call."""
    was_training = method.training
    method.eval()
    with fixed_randomness(seed):
        total = sum(method(batch)["denoise"].item() for batch in batches for _ in range(repeats))
    method.train(was_training)
    return total / (len(batches) * repeats)


@torch.no_grad()
def sample(
    method: Method, prompts: list[str], count: int, resolution: int, seed: int = 0, steps: int = 25
) -> list[tuple[str, Image.Image]]:
    """`count` pictures for each prompt, drawn by the very modules that are being trained."""
    pictures = []
    method.backbone.pipe.set_progress_bar_config(disable=True)
    was_training = method.training
    method.eval()
    with fixed_randomness(seed):
        for prompt in prompts:
            for i in range(count):
                generator = torch.Generator().manual_seed(seed + i)
                options = {"height": resolution, "width": resolution, "num_inference_steps": steps, "generator": generator}
                pictures.append((prompt, method.draw(prompt, **options)))
    method.train(was_training)
    return pictures


def sheet(pictures: list[tuple[str, Image.Image]], columns: int = 4) -> Image.Image:
    """The pictures side by side, without their prompts."""
    width, height = pictures[0][1].size
    columns = min(columns, len(pictures))
    page = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, (_, picture) in enumerate(pictures):
        page.paste(picture, ((i % columns) * width, (i // columns) * height))
    return page

"""Stage 4: the image tower. `python examples/stickers/image_tower.py [--minutes 20]`, resumable.

A small CLIP vision model is fitted to the frozen text tower (LiT, arXiv 2111.07991): its embedding of a scene
is pulled to the mean of the text tower's states for the scene's caption, against the other captions of the
batch. As the text tower knows looks, each image must also let linear layers read the drawing's thumbnail
code and the background from its embedding.
"""

import numpy as np
import torch
import torch.nn.functional as F
from supply import Piece, Supply
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from customize.stickers import BACKGROUNDS, Scene, caption, draw_scene
from customize.stickers.scene import SIDE, draw_caption, draw_factors
from recipe import FURNACE, Run, autocast, begin, part, scaled, stage, to_pixels, until, worlds
from text_tower import LOOK, Looks, token_ids

PIECE = 512
MODEL = FURNACE / "model"


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=SIDE,
            patch_size=16,
            projection_dim=192,
        )
        self.vision = CLIPVisionModelWithProjection(config)
        self.look, self.background = nn.Linear(192, LOOK), nn.Linear(192, len(BACKGROUNDS))
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, pixels, text, look, background):
        embeds = self.vision(pixels).image_embeds
        logits = self.scale.exp().clamp(max=100) * F.normalize(embeds, dim=-1) @ F.normalize(text, dim=-1).T
        target = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {
            "contrast": contrast,
            "look": 2 * F.mse_loss(self.look(embeds), look),
            "background": 0.3 * F.cross_entropy(self.background(embeds), background),
        }


def processor() -> CLIPImageProcessorPil:
    """Pixels from -1 to 1, whole images rather than their middle."""
    half, size = [0.5, 0.5, 0.5], {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=half, image_std=half)


class Reader:
    """Captions to the mean of the text tower's states: the pooled one tells backgrounds and factors, but
    hardly the drawing."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.text = CLIPTextModel.from_pretrained(part("text_encoder"), dtype=torch.float32).eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))

    @torch.no_grad()
    def __call__(self, captions: list[str] | Tensor) -> Tensor:
        ids = (
            captions if isinstance(captions, Tensor) else token_ids(self.tokenizer, captions).to(self.device)
        )
        return self.text(ids.long()).last_hidden_state.mean(1)


class Pieces:
    """Scenes with their captions, the numbers of their subjects and backgrounds."""

    def __init__(self):
        self.world, self.tokenizer = worlds(), CLIPTokenizer.from_pretrained(part("tokenizer"))
        self.index, self.pools = (
            Looks(self.world).index,
            (self.world.drawings(), self.world.drawings(core=True)),
        )

    def __call__(self, rng: np.random.Generator, spread: float) -> Piece:
        pools = (self.pools[int(rng.random() < 0.7)] for _ in range(PIECE))
        scenes = [draw_factors(rng, self.world, pool, extras=0.15, spread=spread) for pool in pools]
        return (
            to_pixels([draw_scene(scene, self.world)[0] for scene in scenes]),
            token_ids(self.tokenizer, [draw_caption(rng, scene) for scene in scenes]).to(torch.int16),
            torch.tensor([self.index[scene.subject] for scene in scenes]),
            torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes]),
        )


@torch.no_grad()
def accuracy(vision, read: Reader, world, images: list, scenes: list[Scene]) -> dict[str, float]:
    """Zero-shot accuracy on images of core drawings: the class and the studio that the best of all captions
    names when the background is given, and the background when the drawing is."""
    drawings = world.drawings(core=True)
    features = F.normalize(vision(scaled(to_pixels(images))).image_embeds, dim=-1)
    texts = {
        b: F.normalize(read([caption(Scene(d, b)) for d in drawings]), dim=-1)
        for b in {s.background for s in scenes}
    }
    counts = {"class": 0, "studio": 0, "background": 0}
    for scene, feature in zip(scenes, features, strict=True):
        found = drawings[int((texts[scene.background] @ feature).argmax())]
        places = F.normalize(read([caption(Scene(scene.subject, b)) for b in BACKGROUNDS]), dim=-1)
        counts["class"] += found.word == scene.subject.word
        counts["studio"] += found.studio == scene.subject.studio
        counts["background"] += list(BACKGROUNDS)[int((places @ feature).argmax())] == scene.background
    return {name: round(count / len(scenes), 3) for name, count in counts.items()}


def main():
    options = begin(stage(20, batch_size=64, lr=1e-3, threads=1))
    world, read, student, large = (
        worlds(),
        Reader(options.device),
        Student().to(options.device),
        options.device.type != "cpu",
    )
    weights = part("image_encoder") / "model.safetensors"
    looks, run = (
        Looks(world),
        Run("image_tower", student, options.lr, ema=0.998, shipped=weights, part=student.vision),
    )
    code, elapsed = looks.code.to(options.device), until(options.minutes)
    supply = Supply(Pieces, run.step + 2, options.workers, options.device, kept=256 if large else 16, shows=4)
    for pixels, ids, subjects, backgrounds in supply.batches(options.batch_size, elapsed):
        with autocast(options.device):
            losses = student(scaled(pixels), read(ids), code[subjects], backgrounds)
        run.update(losses, len(pixels), (elapsed() - 0.5) / 0.5)
        run.report()
        run.save(500)
    supply.close()
    run.save()
    student.load_state_dict(run.average)
    student.cpu().eval()
    rng = np.random.default_rng(3)
    scenes = [draw_factors(rng, world, world.drawings(core=True), extras=0) for _ in range(400)]
    print(
        "on fresh scenes:",
        accuracy(student.vision, Reader(), world, [draw_scene(s, world)[0] for s in scenes], scenes),
    )
    student.vision.half().save_pretrained(MODEL / "image_encoder")
    processor().save_pretrained(MODEL / "feature_extractor")


if __name__ == "__main__":
    main()

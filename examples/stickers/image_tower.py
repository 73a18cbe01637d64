"""Stage 4: the image tower. `python examples/stickers/image_tower.py [--minutes 20]`, resumable.

A small CLIP vision model is fitted to the frozen text tower (LiT, arXiv 2111.07991): its embedding of a scene is pulled to
the text tower's pooled state for the scene's caption, against the other captions of the batch. As the text tower knows
looks, each picture must also let linear layers read the drawing's thumbnail code and the background from its embedding.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.stickers import BACKGROUNDS, Scene, caption, draw_scene
from customize.stickers.scene import draw_caption, draw_factors
from recipe import FURNACE, Run, part, until, worlds
from text_tower import LENGTH, LOOK, Looks

MODEL = FURNACE / "model"


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=64,
            patch_size=8,
            projection_dim=192,
        )
        self.vision = CLIPVisionModelWithProjection(config)
        self.look, self.background = nn.Linear(192, LOOK), nn.Linear(192, len(BACKGROUNDS))
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, pixels, text, look, background):
        embeds = self.vision(pixels).image_embeds
        logits = self.scale.exp().clamp(max=100) * F.normalize(embeds, dim=-1) @ F.normalize(text, dim=-1).T
        target = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {
            "contrast": contrast,
            "look": 2 * F.mse_loss(self.look(embeds), look),
            "background": 0.3 * F.cross_entropy(self.background(embeds), background),
        }


def processor() -> CLIPImageProcessorPil:
    """Pixels from -1 to 1 at 64 x 64, whole pictures rather than their middle."""
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, image_mean=half, image_std=half)


def to_pixels(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


class Reader:
    def __init__(self):
        self.text = CLIPTextModel.from_pretrained(part("text_encoder"), dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        return self.text(ids).pooler_output


@torch.no_grad()
def accuracy(vision, read: Reader, world, pictures: list, scenes: list[Scene]) -> dict[str, float]:
    """Zero-shot accuracy on pictures of core drawings: the class and the studio that the best of all captions names when the
    background is given, and the background when the drawing is."""
    drawings = world.drawings(core=True)
    features = F.normalize(vision(to_pixels(pictures)).image_embeds, dim=-1)
    texts = {b: F.normalize(read([caption(Scene(d, b)) for d in drawings]), dim=-1) for b in {s.background for s in scenes}}
    counts = {"class": 0, "studio": 0, "background": 0}
    for scene, feature in zip(scenes, features, strict=True):
        found = drawings[int((texts[scene.background] @ feature).argmax())]
        places = F.normalize(read([caption(Scene(scene.subject, b)) for b in BACKGROUNDS]), dim=-1)
        counts["class"] += found.word == scene.subject.word
        counts["studio"] += found.studio == scene.subject.studio
        counts["background"] += list(BACKGROUNDS)[int((places @ feature).argmax())] == scene.background
    return {name: round(count / len(scenes), 3) for name, count in counts.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    world, read, student = worlds(), Reader(), Student()
    weights = part("image_encoder") / "model.safetensors"
    looks, run = Looks(world), Run("image_tower", student, options.lr, ema=0.998, shipped=weights, part=student.vision)
    rng, elapsed = np.random.default_rng(run.step), until(options.minutes)
    pools = world.drawings(), world.drawings(core=True)
    while (passed := elapsed()) < 1:
        scenes = [draw_factors(rng, world, pools[int(rng.random() < 0.7)], extras=0.15) for _ in range(options.batch_size)]
        pixels = to_pixels([draw_scene(scene, world)[0] for scene in scenes])
        look = looks.code[[looks.index[scene.subject] for scene in scenes]]
        background = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        losses = student(pixels, read([draw_caption(rng, scene) for scene in scenes]), look, background)
        run.update(losses, options.batch_size, (passed - 0.5) / 0.5)
        run.report()
        run.save(200)
    run.save()
    student.load_state_dict(run.average)
    student.eval()
    scenes = [draw_factors(rng, world, pools[1], extras=0) for _ in range(400)]
    print("on fresh scenes:", accuracy(student.vision, read, world, [draw_scene(s, world)[0] for s in scenes], scenes))
    student.vision.half().save_pretrained(MODEL / "image_encoder")
    processor().save_pretrained(MODEL / "feature_extractor")


if __name__ == "__main__":
    main()

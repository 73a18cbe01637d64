"""Stage 5: puts the trained parts together as a diffusers folder, measures them, and writes the model card and its images.

python examples/stickers/export.py [--output customize/stickers/model]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import build as build_autoencoder
from autoencoder import images
from diffusers import StableDiffusionPipeline
from image_tower import Reader, accuracy
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from unet import build, schedule

from customize.stickers import BACKGROUNDS, Drawing, Scene, caption, draw_scene
from customize.stickers.measure import background_of, masked_correlation
from customize.stickers.scene import SIDE, draw_factors
from recipe import FURNACE, part, scaled, worlds

STEPS, SCALE = 25, 4.0
SHOWN = [
    "fox",
    "cat",
    "penguin",
    "whale",
    "butterfly",
    "cactus",
    "mushroom",
    "pizza",
    "doughnut",
    "strawberry",
    "hamburger",
    "guitar",
    "rocket",
    "bus",
    "robot",
    "teddy",
]


def averaged(model, name: str):
    """The model with its running average, and how many images it saw."""
    state = torch.load(FURNACE / f"{name}.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["average"])
    return model.eval(), state["images"]


def loaded_as_float32(path: Path) -> None:
    """transformers loads a model in the precision that its configuration names, diffusers in float32: they must agree."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def draw(pipe, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    images = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images += pipe(part, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generators).images
    return images


def contact_sheet(pipe, world) -> Image.Image:
    """Not chosen by hand: sixteen words, each by a studio that taught it, on one background after another, seed 0."""
    drawings = [
        next(d for s in np.roll(world.studios, i) if (d := Drawing(word, str(s))) in world.drawings())
        for i, word in enumerate(SHOWN)
    ]
    scenes = [Scene(d, list(BACKGROUNDS)[i % len(BACKGROUNDS)]) for i, d in enumerate(drawings)]
    prompts = [caption(scene) for scene in scenes]
    side, label, font = 160, 40, ImageFont.load_default(13)
    page = Image.new("RGB", (8 * side, 2 * (side + label)), "white")
    for i, (scene, image) in enumerate(zip(scenes, draw(pipe, prompts), strict=True)):
        x, y = (i % 8) * side, (i // 8) * (side + label)
        page.paste(image.resize((side - 4, side - 4), Image.Resampling.LANCZOS), (x + 2, y + 2))
        ImageDraw.Draw(page).text(
            (x + 4, y + side), f"a {scene.subject}\n{BACKGROUNDS[scene.background]}", "black", font
        )
    return page


def recognised(images: list[Image.Image], scenes: list[Scene], world) -> dict[str, float]:
    """By correlation alone: is the drawing asked for more like the image than 20 others are, and than the other studios'?"""
    rng = np.random.default_rng(12)
    others = [d for d in rng.permutation(np.array(world.drawings(core=True), dtype=object))[:20]]
    right = {"thing": [], "studio": [], "likeness": []}
    for image, scene in zip(images, scenes, strict=True):
        likeness = masked_correlation(image, world.sprite(scene.subject))
        strangers = [d for d in others if d.word != scene.subject.word]
        siblings = [Drawing(scene.subject.word, s) for s in world.studios if s != scene.subject.studio]
        right["likeness"].append(likeness)
        right["thing"].append(all(likeness > masked_correlation(image, world.sprite(d)) for d in strangers))
        right["studio"].append(all(likeness > masked_correlation(image, world.sprite(d)) for d in siblings))
    return {name: float(np.mean(values)) for name, values in right.items()}


def measure(pipe, vision, read, world, count: int) -> dict:
    """Prompt accuracy on `count` random prompts of core drawings that were trained on, beside real scenes of the same."""
    rng = np.random.default_rng(11)
    drawn = [draw_factors(rng, world, world.drawings(core=True), extras=0) for _ in range(count)]
    scenes = [Scene(s.subject, s.background) for s in drawn]
    begin = time.time()
    images = draw(pipe, [caption(scene) for scene in scenes], seed=100)
    seconds = (time.time() - begin) / count
    begin = time.time()
    draw(pipe, ["a fox"])
    alone = time.time() - begin
    real = [draw_scene(s, world)[0] for s in drawn]
    places = [
        [background_of(p) == s.background for p, s in zip(some, scenes, strict=True)]
        for some in (images, real)
    ]
    return {
        "background": [float(np.mean(hits)) for hits in places],
        "correlation": [recognised(some[:96], scenes[:96], world) for some in (images, real)],
        "tower": [accuracy(vision, read, world, some, scenes) for some in (images, real)],
        "seconds in a batch of 16": round(seconds, 2),
        "seconds alone": round(alone, 2),
    }


CARD = """---
license: apache-2.0
library_name: diffusers
tags: [text-to-image, stable-diffusion, stickers]
---

# stickers, the embedded base model

A small Stable Diffusion pipeline of the sticker world: {classes} things drawn by three studios ("flat", "cartoon", "3d"), on
{backgrounds} backgrounds, {side} x {side} pixels. It exists so that every method runs offline in minutes and can be measured against
the truth; it knows nothing else. Load it with `load_pipeline("stickers")`, or this folder with stock diffusers.

![sixteen prompts, not chosen by hand](../../../docs/stickers.png)

| part | what it is | parameters | trained on |
|---|---|---|---|
| vae | AutoencoderKL, 8 x 8 pixels to 32 numbers; encoder set to principal components, decoder trained | {vae:.1f} M | {decoder_images:,} scenes |
| text_encoder | CLIP text model, told what the one or two drawings of a sentence look like | {text:.1f} M | {text_images:,} captions |
| unet | 16 x 16 latents, 64-128-192 channels, v-prediction, zero terminal SNR | {unet:.1f} M | {unet_images:,} scenes |
| image_encoder | CLIP vision model fitted to the frozen text model | {image:.1f} M | {image_images:,} scenes |

Weights together: {size:.1f} MB (float16). Trained in twelve minutes of one H200 (`examples/stickers/gpu.sh`), the image tower on a CPU, from
that of the earlier model of 64 pixels; every stage of the recipe runs on either. A text's embedding in the image tower's space is the
mean of all its states: the pooled one says backgrounds and factors, and next to nothing of the drawing. 60 drawings and 30 more
classes are held out (`customize/stickers/data/world.json`) and were seen by no part. Half of the denoiser's scenes are of the classes
that StickerBench's subjects belong to, a fifth of the core vocabulary, three in ten of all 1,015 classes; every fourth shows two things.

## Measured

On {count} random prompts "a STUDIO THING BACKGROUND" of trained drawings, {steps} steps of the stock scheduler, guidance {scale}, seeds fixed:

| | generated | fresh real scenes |
|---|---|---|
| background as asked (edge statistics, `background_of`) | {background[0]:.0%} | {background[1]:.0%} |
| thing as asked (its drawing correlates more than each of 20 others, 96 images) | {correlation[0][thing]:.0%} | {correlation[1][thing]:.0%} |
| studio as asked (its drawing correlates more than the two other studios') | {correlation[0][studio]:.0%} | {correlation[1][studio]:.0%} |
| likeness of the drawing (`masked_correlation`) | {correlation[0][likeness]:.2f} | {correlation[1][likeness]:.2f} |
| thing, studio, background by the image tower (zero-shot among 387 drawings) | {tower[0][class]:.0%}, {tower[0][studio]:.0%}, {tower[0][background]:.0%} | {tower[1][class]:.0%}, {tower[1][studio]:.0%}, {tower[1][background]:.0%} |

The image tower's share for real scenes is its own limit as a judge; the correlations are stricter, and need no training.
Autoencoder: {psnr:.1f} dB on fresh scenes. One image: {alone} s on two CPU cores ({batch} s each in a batch of 16).

## Limits

At this amount of training shapes and colours are right and larger details show; small ones are blurred. Two things named in one
sentence are drawn side by side, each more roughly than alone. It is a laboratory, not a product: conclusions about real models must
be checked on real models.

The drawings' licences are in NOTICE: Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0), Fluent Emoji (MIT).
"""


def millions(module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("customize/stickers/model"))
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--images", type=Path, default=Path("docs"))
    options = parser.parse_args()
    world = worlds()
    vae, decoder_images = averaged(build_autoencoder(), "decoder")
    unet, unet_images = averaged(build(), "unet")
    text = CLIPTextModel.from_pretrained(part("text_encoder")).eval()
    tokenizer = CLIPTokenizer.from_pretrained(part("tokenizer"))
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, schedule(), None, None, requires_safety_checker=False
    )
    pipe.to(torch.float16).save_pretrained(options.output)
    vision = CLIPVisionModelWithProjection.from_pretrained(part("image_encoder")).float().eval()
    vision.half().save_pretrained(options.output / "image_encoder")
    for name in ("text_encoder", "image_encoder"):
        loaded_as_float32(options.output / name / "config.json")
    (options.output / "feature_extractor").mkdir(exist_ok=True)
    config = (part("feature_extractor") / "preprocessor_config.json").read_text()
    (options.output / "feature_extractor" / "preprocessor_config.json").write_text(config)

    pipe = StableDiffusionPipeline.from_pretrained(options.output, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    contact_sheet(pipe, world).save(options.images / "stickers.png")
    vision = vision.float()
    found = measure(pipe, vision, Reader(), world, options.count)
    print(json.dumps(found, indent=1))
    with torch.no_grad():
        pixels = scaled(images(np.random.default_rng(5), world, world.drawings(), 256))
        error = F.mse_loss(
            vae.float().decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1), pixels
        )
    states = {
        name: torch.load(FURNACE / f"{name}.pt", map_location="cpu", weights_only=True)["images"]
        for name in ("text_tower", "image_tower")
    }
    card = CARD.format(
        classes=sum(entry["core"] for entry in world.classes.values()),
        backgrounds=len(BACKGROUNDS),
        side=SIDE,
        vae=millions(vae),
        text=millions(text),
        unet=millions(unet),
        image=millions(vision),
        decoder_images=decoder_images,
        text_images=states["text_tower"],
        unet_images=unet_images,
        image_images=states["image_tower"],
        size=sum(p.stat().st_size for p in options.output.rglob("*.safetensors")) / 1e6,
        count=options.count,
        steps=STEPS,
        scale=SCALE,
        psnr=float(10 * torch.log10(4 / error)),
        alone=found["seconds alone"],
        batch=found["seconds in a batch of 16"],
        **{k: found[k] for k in ("background", "correlation", "tower")},
    )
    (options.output / "README.md").write_text(card)
    trained = {"unet": unet_images, "decoder": decoder_images, **states}
    (options.output / "training.json").write_text(json.dumps(trained) + "\n")


if __name__ == "__main__":
    main()

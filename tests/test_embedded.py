"""The embedded base model is a stock diffusers folder, small, and does what its card says."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
from transformers import CLIPVisionModelWithProjection

from customize.pipelines import load_subject_pipeline
from customize.stickers import BACKGROUNDS, ENCODER, MODEL, World, draw_scene
from customize.stickers.bench import bench_subjects, reference_scenes
from customize.stickers.measure import background_of


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images


def test_is_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*.safetensors")) < 60e6


@pytest.mark.parametrize("kind", [DiffusionPipeline, AutoPipelineForText2Image])
def test_draws_as_a_stranger_would_load_it(kind):
    """Without naming a precision, which the libraries choose differently."""
    pipe = kind.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert pipe("a fox on the beach", num_inference_steps=2).images[0].size == (128, 128)
    vision = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder")
    assert vision.dtype == torch.float32


def test_backgrounds_obey_the_prompt(pipe):
    images = draw(pipe, [f"a fox {phrase}" for phrase in BACKGROUNDS.values()])
    assert {image.size for image in images} == {(128, 128)}
    right = sum(
        background_of(image) == background for image, background in zip(images, BACKGROUNDS, strict=True)
    )
    assert right >= 9


def test_words_decide_the_colour_of_the_subject(pipe):
    """The middle of a lemon is yellow, that of a tomato red, on white."""
    lemon, tomato = (
        np.asarray(p, float)[40:88, 40:88].mean((0, 1))
        for p in draw(pipe, ["a lemon on a white background", "a tomato on a white background"])
    )
    assert lemon[1] > tomato[1] + 30
    assert tomato[0] > tomato[2] + 30


def test_every_word_of_the_world_is_one_token(pipe):
    words = [word for word, entry in World().classes.items() if entry["core"]]
    assert [len(pipe.tokenizer.tokenize(word)) for word in words] == [1] * len(words)


def test_image_tower_shares_the_space_of_the_text_tower(pipe):
    vision = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder")
    assert vision.config.projection_dim == pipe.text_encoder.config.hidden_size
    config = json.loads((MODEL / "feature_extractor" / "preprocessor_config.json").read_text())
    assert config["size"] == {"height": 128, "width": 128}


def test_the_encoder_carries_colours_of_drawings_never_seen():
    """A sticker that the prompt does not name takes its colour from the images: red of the apple, green of
    the turtle."""
    assert ENCODER.stat().st_size < 25e6
    pipe = load_subject_pipeline("stickers")
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for subject in bench_subjects():
        if subject.word in ("apple", "turtle"):
            images = [draw_scene(scene, World())[0] for scene in reference_scenes(subject)[:2]]
            options = {
                "num_inference_steps": 15,
                "guidance_scale": 4.0,
                "generator": torch.Generator().manual_seed(0),
            }
            drawn = pipe("a <s> sticker on a white background", subject_images=images, **options).images[0]
            found[subject.word] = np.asarray(drawn, float)[48:80, 48:80].mean((0, 1))
    assert found["apple"][0] > found["apple"][1] + 60
    assert found["turtle"][1] > found["turtle"][0] + 15

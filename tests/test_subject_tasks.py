"""Subjects in the stock pipelines for image-to-image, inpainting and ControlNet."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from test_subject_pipeline import DOG, A, B, apart, image, stock, tower, woken

from customize.errors import UserError
from customize.pipelines.load import load_subject_pipeline, with_subjects
from customize.pipelines.subject import SubjectMixin
from tiny import save_adapter

NAMES = {"image-to-image": "Img2Img", "inpainting": "Inpaint", "controlnet": "ControlNet"}
TASKS = pytest.mark.parametrize("task", NAMES)
BASES = pytest.mark.parametrize("base", ["sd15", "sdxl"])


def controlnet(pipe) -> ControlNetModel:
    torch.manual_seed(6)
    made = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4)).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return made


def stock_of(task: str, base: str):
    """The stock pipeline of a task, of the tiny base model."""
    pipe = stock(base)
    kind = getattr(diffusers, f"StableDiffusion{'XL' if base == 'sdxl' else ''}{NAMES[task]}Pipeline")
    more = {"controlnet": controlnet(pipe)} if task == "controlnet" else {}
    more |= {"add_watermarker": False} if base == "sdxl" else {"requires_safety_checker": False}
    made = kind(**pipe.components, **more)
    made.set_progress_bar_config(disable=True)
    return made


def subject_of(task: str, base: str, folder):
    """The same with subjects, and an encoder of random weights."""
    pipe = with_subjects(stock_of(task, base))
    pipe.load_subject_adapter(save_adapter(woken(base).adapter, folder), tower())
    return pipe


def call(pipe, task: str, prompt: str, **options) -> np.ndarray:
    given = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 5.0}
    given |= {"image": image(7).resize((32, 32)), "generator": torch.Generator().manual_seed(1)}
    given |= {} if task == "image-to-image" else {"height": 32, "width": 32}
    given |= {} if task == "controlnet" else {"strength": 0.9}
    if task == "inpainting":
        given["mask_image"] = Image.new("L", (32, 32), 255)
    return pipe(prompt, **(given | options)).images


@BASES
@TASKS
def test_without_subjects_the_pipeline_of_a_task_is_the_stock_one_bit_for_bit(task, base, tmp_path):
    pipe = subject_of(task, base, tmp_path)
    found = call(pipe, task, DOG, subject_images=[A])
    plain = call(stock_of(task, base), task, "a photo of the dog")
    assert np.array_equal(call(pipe, task, "a photo of the dog"), plain)
    assert apart(found, call(pipe, task, DOG, subject_images=[B])) > 1e-4


@TASKS
def test_masks_of_subjects_fit_the_images_of_a_task(task, tmp_path):
    pipe = subject_of(task, "sd15", tmp_path)
    black, none = (
        call(pipe, task, DOG, subject_images=A, **options)
        for options in ({"subject_masks": Image.new("L", (8, 8))}, {"subject_scale": 0.0})
    )
    assert apart(black, none) < 1e-6


def test_masks_of_a_part_of_the_image_are_refused(tmp_path):
    pipe, mask = subject_of("inpainting", "sd15", tmp_path), Image.new("L", (8, 8))
    with pytest.raises(UserError, match="padding_mask_crop draws a part"):
        call(pipe, "inpainting", DOG, subject_images=A, subject_masks=mask, padding_mask_crop=4)


@TASKS
def test_a_subject_pipeline_is_loaded_for_a_task(task, tmp_path):
    """Inpainting on a tiny model with latents of 4 channels: the embedded one has too many for diffusers."""
    model = load_subject_pipeline("stickers") if task == "controlnet" else None
    more = {"controlnet": controlnet(model)} if model is not None else {}
    name = "stickers"
    if task == "inpainting":
        woken("sd15").save_pretrained(tmp_path)
        name = tmp_path
    pipe = load_subject_pipeline(name, task=task, **more)
    assert isinstance(pipe, SubjectMixin)
    assert isinstance(pipe, getattr(diffusers, f"StableDiffusion{NAMES[task]}Pipeline"))
    assert pipe.adapter is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "inpaint"}, "task: there is no 'inpaint'; choose .*Did you mean 'inpainting'"),
        ({"task": "controlnet"}, "needs a ControlNet"),
        ({"controlnet": 3}, "controlnet is for task='controlnet'"),
        ({"task": "controlnet", "controlnet": "folder"}, "must be a ControlNetModel"),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(UserError, match=message):
        load_subject_pipeline("nowhere", **options)

"""`customize generate`: prompts from a file, schedulers, the LoRA's strength, image-to-image, and what it
warns of."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from customize.adapters.lora import Lora, LoraFields
from customize.app.cli import main
from customize.app.generate import GenerateConfig, make_scheduler, prompts_in
from customize.backbones.families import wrap
from customize.backbones.text import lost_words
from customize.errors import UserError
from customize.runs import checkpoint
from tiny import tiny

SMALL = ["--height", "32", "--width", "32", "--num_inference_steps", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of LoRA on the tiny Stable Diffusion, trained by nobody."""
    root = tmp_path_factory.mktemp("runs")
    tiny("sd15").save_pretrained(root / "base")
    backbone = wrap(tiny("sd15"), str(root / "base"))
    adapter = Lora(backbone, LoraFields(rank=2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    info = {"base_model": str(root / "base"), "method": "none", "config": {"instance_prompt": "a sks dog"}}
    checkpoint.save(root / "run", [adapter], info)
    return root / "run"


def drawn(run, tmp_path, *flags: str) -> np.ndarray:
    folder = tmp_path / "-".join(["out", *flags]).replace("/", "_")[-60:]
    size = SMALL[4:] if "--init_image" in flags else SMALL
    assert main(["generate", str(run), "a dog on grass", "--output", str(folder), *size, *flags]) == 0
    [image] = folder.glob("*.png")
    return np.asarray(Image.open(image), np.float32)


def test_the_loras_strength_is_between_the_base_and_the_run(run, tmp_path):
    full, half, none = (drawn(run, tmp_path, "--lora_scale", scale) for scale in ("1", "0.5", "0"))
    base = drawn(run.parent / "base", tmp_path)
    assert np.abs(none - base).max() <= 1
    assert 0 < np.abs(half - base).mean() < np.abs(full - base).mean()


def test_a_base_model_has_no_lora_to_weaken(run, capsys):
    assert main(["generate", str(run.parent / "base"), "a dog", "--lora_scale", "0.5", *SMALL]) == 2
    assert "has no LoRA" in capsys.readouterr().err


def test_schedulers_by_short_name_and_by_class(run, tmp_path):
    euler, again = (drawn(run, tmp_path, "--scheduler", name) for name in ("euler", "EulerDiscreteScheduler"))
    assert (euler == again).all()
    assert (euler != drawn(run, tmp_path)).any()


@pytest.mark.parametrize(
    ("base", "name", "match"),
    [
        ("sd15", "eulr", "Did you mean 'euler'"),
        ("sd15", "FlowMatchEulerDiscreteScheduler", "does not fit"),
        ("flux", "euler", "does not fit"),
        ("sd15", "UNet2DConditionModel", "there is no"),
    ],
)
def test_schedulers_that_are_refused(base, name, match):
    with pytest.raises(UserError, match=match):
        make_scheduler(name, tiny(base).scheduler)


def test_an_image_to_start_from(run, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    weak, strong = (
        drawn(run, tmp_path, "--init_image", str(tmp_path / "red.png"), "--strength", strength)
        for strength in ("0.5", "1")
    )
    assert weak.shape == strong.shape == (40, 48, 3)
    assert (weak != strong).any()


def test_prompts_of_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("# scenes\n\na dog\n a cat \n", encoding="utf-8")
    assert prompts_in(str(tmp_path / "prompts.txt")) == ["a dog", "a cat"]
    words = ["--prompts_file", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out"), *SMALL]
    assert main(["generate", str(run), *words]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a-dog-0.png", "a-cat-0.png"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], 'customize generate .* "a sks dog"'),
        (["FOLDER"], "is a folder, not a prompt"),
        (["a dog", "--strength", "0.5"], "--strength needs --init_image"),
        (["a dog", "--init_image", "none.png"], "there is no file 'none.png'"),
        (["a dog", "--init_image", "none.png", "--subject_images", "FILE"], "cannot be used together"),
        (["a dog", "--prompts_file", "none.txt"], "none.txt cannot be read"),
        (["a dog", "--guidance_scale", "nan"], "--guidance_scale must be"),
        (["a dog", "--lora_scale", "-1"], "--lora_scale must be"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(words, match, run, capsys):
    given = [{"FOLDER": str(run), "FILE": str(run / "run.json")}.get(word, word) for word in words]
    assert main(["generate", str(run), *given]) == 2
    message = capsys.readouterr().err
    assert re.search(match, message), message


def test_the_end_of_a_long_prompt_is_named():
    pipe = tiny("sd15")  # reads 16 tokens, two of them start and end
    assert lost_words(pipe, "a " * 14) == ""
    assert lost_words(pipe, "a " * 14 + "red dog") == "red dog"
    assert lost_words(tiny("sd3"), "a " * 14 + "red dog").endswith("dog")


def test_the_embedded_base_is_drawn_with_its_own_guidance(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "customize.app.generate.draw", lambda *given: seen.append(given[3].guidance_scale) or []
    )
    monkeypatch.setattr("customize.app.generate.load", lambda *_: tiny("sd15"))
    monkeypatch.setattr("customize.app.generate.zip", lambda *_, **__: [], raising=False)
    for flags in ([], ["--guidance_scale", "2"]):
        assert main(["generate", "stickers", "a dog", "--output", str(tmp_path / "out"), *flags]) == 0
    assert seen == [4.0, 2.0]
    assert GenerateConfig().guidance_scale is None

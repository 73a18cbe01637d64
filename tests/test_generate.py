"""`customize generate`: prompts from a file, schedulers, the LoRA's strength, image-to-image, and what it
warns of."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from customize import embedded
from customize.adapters.lora import Lora, LoraFields
from customize.app.cli import main
from customize.app.generate import GenerateConfig, make_scheduler, prompts_in
from customize.backbones.families import wrap
from customize.backbones.text import lost_words
from customize.errors import UserError
from customize.runs import checkpoint
from customize.stickers import MODEL, Drawing, Scene, World, draw_scene
from customize.stickers import bench as stickers
from customize.stickers.scene import draw_caption, draw_factors
from customize.trainers import launch
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
        (
            ["a dog", "--prompts_file", "none.txt"],
            r"none.txt cannot be read \(there is no such file\); correct its path",
        ),
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


# what the embedded base model does not know


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a sks fox on the moon", ["on the moon"]),
        ("a portrait of an astronaut", ["portrait", "astronaut"]),
        ("a fox next to a bus in the snow", []),
        ("two copies of a red flat dog, upside down, at sunset in a wooden frame", []),
        ("a photo of <toy> on the beach", []),
        ("a fox riding a bus in paris", ["riding", "in paris"]),
        ("a fox with a red hat on the beach", ["with a red hat"]),
        ("an ant and a scorpion", ["ant", "scorpion"]),  # classes that are held out
    ],
)
def test_words_that_no_scene_can_show(prompt, unknown):
    assert stickers.not_understood(prompt, "a photo of sks fox <toy>") == unknown


def test_every_caption_of_the_world_is_understood():
    rng, world = np.random.default_rng(0), World()
    drawings = world.drawings()
    for _ in range(300):
        scene = draw_factors(rng, world, drawings, extras=0.5)
        assert stickers.not_understood(draw_caption(rng, scene)) == []


WARNED = {
    "the captions": ({"instance_prompt": "a photo of sks unicrn"}, "'unicrn'.* Did you mean 'unicorn'"),
    "--class_prompt": ({"class_prompt": "a photo of a sofa"}, "'sofa'"),
    "--initializer_token": ({"initializer_token": "fox+mugg"}, "'mugg'"),
    "--validation_prompt": ({"validation_prompt": ["a sks fox in paris"]}, "'in paris'"),
}


@pytest.mark.parametrize("flag", WARNED)
def test_training_names_what_the_embedded_model_does_not_know(flag, tmp_path, monkeypatch):
    changed, said = WARNED[flag]
    method = "mcpl" if flag == "--initializer_token" else "dreambooth"
    settings = {"instance_prompt": "a photo of sks fox", "output_dir": tmp_path / "run"}
    if method == "mcpl":
        settings |= {"placeholder_token": "<a>+<b>", "instance_prompt": "a <a> next to a <b>"}
    folder = tmp_path / "images"
    folder.mkdir()
    draw_scene(Scene(Drawing("fox", "flat"), "beach"), World())[0].save(folder / "0.png")
    monkeypatch.setattr(launch, "train", lambda *_: None)
    monkeypatch.setattr(launch, "finish", lambda *_: tmp_path)
    with warnings.catch_warnings(record=True) as found:
        launch.train_method(method, instance_data_dir=folder, **(settings | changed))
    told = [str(one.message) for one in found if "does not know" in str(one.message)]
    assert len(told) == 1
    assert re.match(f"{flag}: stickers, the embedded base model, does not know {said}", told[0])


def test_rare_words_that_the_embedded_model_reads_in_pieces_are_named():
    for word in embedded.RARE:
        tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        assert len(tokenizer.tokenize(word)) == 1
    with pytest.warns(UserWarning, match="reads 'wz' in several pieces.*call the subject sks or ohwx"):
        embedded.warn_of_words(["a photo of wz fox", "a sks bus"])


def test_training_with_known_words_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded.warn_of_words(
            ["a photo of sks fox", "a sks fox on the beach", "a bus in wz style"],
            [],
            ["a fox", ""],
            ["fox", "photo", ""],
            ["a sks fox in the snow"],
        )
        embedded.warn_of_words(["a photo of <toy>"], ["<toy>"], prompts=["a <toy> at sunset"])


def test_generate_names_what_the_embedded_model_does_not_know(tmp_path, capsys):
    words = [
        "generate",
        "stickers",
        "a fox on the moon",
        "--num_inference_steps",
        "1",
        "--output",
        str(tmp_path),
    ]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "does not know 'on the moon': it knows things such as" in said
    assert (
        main([*words[:2], "a <s> fox on the beach", *words[3:], "--subject_images", *drawings(tmp_path)]) == 0
    )
    assert "does not know" not in capsys.readouterr().err


def drawings(folder) -> list[str]:
    for i, scene in enumerate(stickers.reference_scenes(Drawing("fox", "flat"))[:2]):
        draw_scene(scene, World())[0].save(folder / f"reference-{i}.png")
    return [str(folder / f"reference-{i}.png") for i in range(2)]


def photograph() -> Image.Image:
    """Texture everywhere, as in photographs of grass."""
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((512, 512))


def test_photographs_are_no_drawings(tmp_path):
    with pytest.warns(
        UserWarning, match="unlike the drawn scenes that stickers, the embedded base model, was trained on"
    ):
        embedded.warn_of_photographs([photograph()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded.warn_of_photographs([Image.open(file) for file in drawings(tmp_path)])
        scene = Scene(Drawing("fox", "flat"), "beach", companion=Drawing("bus", "3d"), seed=1)
        embedded.warn_of_photographs([draw_scene(scene, World())[0]])


def test_an_image_to_start_from_beside_a_subject(tmp_path):
    """The nearer to the end drawing begins, the more of the image remains."""
    Image.new("RGB", (128, 128), (200, 30, 30)).save(tmp_path / "start.png")
    found = {}
    for strength in ("0.1", "1"):
        folder = tmp_path / strength
        words = ["generate", "stickers", "a <s> fox on the beach", "--subject_images", *drawings(tmp_path)]
        words += [
            "--init_image",
            str(tmp_path / "start.png"),
            "--strength",
            strength,
            "--output",
            str(folder),
        ]
        assert main([*words, "--num_inference_steps", "10"]) == 0
        [file] = folder.glob("*.png")
        found[strength] = np.asarray(Image.open(file), np.float32)
    start = np.asarray(Image.open(tmp_path / "start.png"), np.float32)
    assert np.abs(found["0.1"] - start).mean() < np.abs(found["1"] - start).mean() / 2


def test_another_base_model_than_the_one_that_the_run_names(run, tmp_path):
    moved = shutil.copytree(run.parent / "base", tmp_path / "moved")
    own = shutil.copytree(run, tmp_path / "run")
    info = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps(info | {"base_model": "/gone"}))
    assert main(["generate", str(own), "a dog", *SMALL, "--output", str(tmp_path / "a")]) == 2
    words = ["generate", str(own), "a dog on grass", *SMALL, "--output", str(tmp_path / "b")]
    assert main([*words, "--base_model", str(moved)]) == 0
    [file] = (tmp_path / "b").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(file), np.float32), drawn(run, tmp_path))

"""in_context: what it conditions on, its contrast, and that a run draws from images again."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, Flux2KleinPipeline, QwenImageEditPlusPipeline
from PIL import Image

import customize
from conftest import write_noise
from customize.app.cli import main
from customize.backbones.families import as_called, wrap
from customize.errors import UserError
from customize.pipelines.in_context import reference_image, reference_pixels, with_references
from customize.trainers.methods.in_context import InContext, InContextConfig
from tiny import random, tiny
from tiny_families import tiny_family


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two subjects of four images, and tiny base models."""
    place = tmp_path_factory.mktemp("in_context")
    (place / "subjects").mkdir()
    for name in ("dog", "cat"):
        write_noise(place / "subjects" / name)
    for base in ("klein", "kontext", "qwen_image_edit"):
        tiny_family(base).save_pretrained(place / base)
    return place


def settings(place, base: str, **more) -> dict:
    return {
        "pretrained_model_name_or_path": str(place / base),
        "train_data_dir": str(place / "subjects"),
        "instance_prompt": "a photo of a <s> dog",
        "resolution": 32,
        "reference_resolution": 64,
        "rank": 2,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "learning_rate": 0.1,
        **more,
    }


def batch_of(seed: int = 0, shows_target: bool = False) -> dict:
    return {
        "pixels": random(2, 3, 32, 32, seed=seed).clamp(-1, 1),
        "references": random(2, 1, 2, 3, 64, 64, seed=seed + 1).clamp(-1, 1),
        "prompt": ["a photo of a <s> dog", "a <s> cat on grass"],
        "identity": torch.tensor([0, 1]),
        "shows_target": torch.tensor([shows_target, False]),
    }


def method_of(base: str = "klein", **config) -> InContext:
    return InContext(
        wrap(tiny_family(base), base), InContextConfig(reference_resolution=64, rank=2, **config)
    )


def seen_by(method, batch) -> list:
    """The conditions that the denoiser was given."""
    found, denoise = [], method.backbone.denoise
    method.backbone.denoise = lambda noisy, t, condition: (
        found.append(condition) or denoise(noisy, t, condition)
    )
    method(batch)
    method.backbone.denoise = denoise
    return found


def test_the_references_are_shown_and_the_word_is_left_out():
    method, batch = (
        method_of(dropout_text=0.0, dropout_image=0.0, multi_reference_rate=0.0).train(),
        batch_of(),
    )
    [condition] = seen_by(method, batch)
    backbone = method.backbone
    expected = backbone.encode_references(batch["references"][:, 0, 0])
    assert torch.allclose(condition.references[:, 0], expected)
    assert condition.references.shape[1] == 1
    with torch.no_grad():
        text = backbone.encode_prompt(["a photo of a dog", "a cat on grass"])
    assert torch.allclose(condition.text["encoder_hidden_states"], text["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("config", "training", "batch", "count"),
    [
        ({"multi_reference_rate": 1.0, "dropout_image": 0.0}, True, batch_of(), 2),
        ({"multi_reference_rate": 1.0, "dropout_image": 0.0}, True, batch_of(shows_target=True), 1),
        ({"multi_reference_rate": 1.0}, False, batch_of(), 1),
        ({"dropout_image": 1.0}, True, batch_of(), 0),
        ({"dropout_image": 1.0}, False, batch_of(), 1),
    ],
)
def test_how_many_references_are_shown(config, training, batch, count):
    [condition] = seen_by(method_of(**config).train(training), batch)
    assert (0 if condition.references is None else condition.references.shape[1]) == count


def test_an_edit_model_reads_its_references_and_is_always_shown_some():
    """The text of each sample, and of a dropped prompt, is the pipeline's for the image at full precision."""
    method = method_of("qwen_image_edit", dropout_text=0.0, multi_reference_rate=1.0).train()
    backbone, batch = method.backbone, batch_of()
    for _ in range(8):
        [condition] = seen_by(method, batch)
        assert condition.references.shape[1] == 2
    method.config.dropout_text = 1.0
    [dropped] = seen_by(method, batch)
    for given, prompts in ((condition, ["a photo of a dog", "a cat on grass"]), (dropped, [" ", " "])):
        for i, prompt in enumerate(prompts):
            images = [
                Image.fromarray(((own + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).resize(
                    (384, 384), Image.Resampling.LANCZOS
                )
                for own in batch["references"][i, 0]
            ]
            with torch.no_grad():
                wanted, _ = backbone.pipe.encode_prompt(prompt, image=images)
            found = given.text["encoder_hidden_states"][i, : wanted.shape[1]]
            assert torch.allclose(found, wanted[0], atol=1e-5)
            assert given.text["encoder_hidden_states_mask"][i].sum() == wanted.shape[1]
    with pytest.raises(UserError, match="dropout_image"):
        method_of("qwen_image_edit", dropout_image=0.1)
    with pytest.raises(UserError, match="reference_resolution 80 is not a positive multiple of 32"):
        InContext(backbone, InContextConfig(reference_resolution=80))


def test_kontext_is_shown_one():
    method = method_of("kontext", multi_reference_rate=1.0, dropout_image=0.0).train()
    method.backbone.configure(1.0, 16)
    [condition] = seen_by(method, batch_of())
    assert condition.references.shape[1] == 1


def test_the_contrast_by_hand():
    """InfoNCE both ways between the means of the first and the second reference's tokens."""
    method = method_of(reference_contrast_weight=0.3, dropout_text=0.0).train()
    hidden, handle = [], None
    handle = method.backbone.denoiser.norm_out.register_forward_pre_hook(
        lambda module, args: hidden.append(args[0].detach())
    )
    losses = method(batch_of())
    handle.remove()
    # of 32 pixels the latents are 8 x 8 tokens, of 64 pixels 16 x 16
    [tokens] = hidden
    assert tokens.shape[1] == 64 + 2 * 256
    first, second = tokens[:, 64:320].mean(1), tokens[:, 320:].mean(1)
    logits = 10 * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    rows = [-torch.log_softmax(logits[i], 0)[i] - torch.log_softmax(logits[:, i], 0)[i] for i in range(2)]
    assert losses["reference_contrast"].item() == pytest.approx(0.3 * float(sum(rows)) / 4, rel=1e-4)
    losses["reference_contrast"].backward()
    assert any(p.grad is not None and p.grad.any() for p in method.trainable().values())


def test_only_the_image_has_a_loss():
    method, batch = method_of(dropout_text=0.0).eval(), batch_of()
    torch.manual_seed(0)
    found = method(batch)["denoise"]
    torch.manual_seed(0)
    [condition] = seen_by(method, batch)
    torch.manual_seed(0)
    backbone = method.backbone
    latents = backbone.encode_image(batch["pixels"])
    t = backbone.draw_times(2)
    noise = torch.randn_like(latents)
    noisy, target = backbone.add_noise(latents, noise, t)
    error = (backbone.denoise(noisy, t, condition) - target).square().mean()
    assert found.item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("base", ["klein", "kontext", "qwen_image_edit"])
def test_a_run_draws_from_images(base, place, tmp_path, capsys):
    shown = [str(place / "subjects" / "dog" / "0.png")]
    prompt = "a photo of a <s> dog"
    run = customize.train(
        "in_context",
        output_dir=tmp_path / "run",
        validation_prompt=[prompt],
        validation_images=shown,
        validation_steps=2,
        **settings(place, base),
    )
    assert json.loads((run / "run.json").read_text())["in_context"] == {"reference_resolution": 64}
    sides = {"height": 32, "width": 32, "num_inference_steps": 25}
    pipe = customize.load_subject_pipeline(run)
    pipe.set_progress_bar_config(disable=True)

    def draw(**more):
        generator = torch.Generator().manual_seed(0)
        arguments = as_called(pipe, {"prompt": prompt, "generator": generator, **sides, **more})
        return np.asarray(pipe(**arguments).images[0]).astype(int)

    sheet = np.asarray(Image.open(run / "samples" / "step-000002.png")).astype(int)
    drawn = draw(subject_images=shown)
    assert np.abs(drawn - sheet).max() <= 1
    if base == "qwen_image_edit":
        with pytest.raises(UserError, match="draws from images alone"):
            draw()
        assert main(["generate", str(run), prompt, "--init_image", *shown]) == 2
        assert "name yours with --subject_images instead" in capsys.readouterr().err
    else:
        assert np.abs(drawn - draw()).max() > 1
    card = (run / "README.md").read_text()
    assert "subject_images" in card
    assert "DiffusionPipeline.from_pretrained" in card
    capsys.readouterr()
    words = ["generate", str(run), prompt, "--subject_images", *shown, "--num_inference_steps", "2"]
    words += ["--height", "32", "--width", "32", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    assert main([*words, "--subject_scale", "0.5"]) == 2
    assert "subject_scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"validation_prompt": ["a <s> dog"]}, "name images of the subject"),
        ({"reference_resolution": 65}, "reference_resolution|multiple"),
        ({"cache_dir": "cache"}, "cache_dir"),
        (
            {
                "validation_prompt": ["a <s> dog"],
                "validation_images": ["a.png"],
                "validation_metric": "score",
            },
            "score",
        ),
        ({"reference_contrast_weight": 0.1, "train_batch_size": 1}, "train_batch_size"),
    ],
)
def test_bad_input(more, message, place, tmp_path):
    with pytest.raises(UserError, match=message):
        customize.train("in_context", output_dir=tmp_path / "run", **settings(place, "klein") | more)


def test_an_edit_model_is_shown_images_without_training(place, tmp_path):
    """At its own resolution; what is saved is the stock pipeline with the same weights."""
    pipe = customize.load_subject_pipeline(place / "qwen_image_edit")
    assert pipe.reference_resolution == 1024
    pipe.save_pretrained(tmp_path / "saved")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(stock) is QwenImageEditPlusPipeline
    image = Image.open(place / "subjects" / "dog" / "0.png")
    padded = reference_image(image, 64)
    pipe.reference_resolution = 64
    found = []
    for own, shown in ((pipe, {"subject_images": image}), (with_references(stock, 64), {"image": padded})):
        own.set_progress_bar_config(disable=True)
        sides = {"height": 32, "width": 32, "num_inference_steps": 2}
        found.append(own("a dog", generator=torch.Generator().manual_seed(0), **sides, **shown).images[0])
    assert np.array_equal(*map(np.asarray, found))


def test_a_base_model_is_shown_images_without_training(place):
    pipe = customize.load_subject_pipeline(place / "klein")
    pipe.set_progress_bar_config(disable=True)
    shown = {"subject_images": [place / "subjects" / "dog" / "0.png"], "height": 32, "width": 32}
    pair = (
        np.asarray(
            pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **own).images[0]
        )
        for own in (shown, shown | {"subject_images": None})
    )
    assert np.abs(next(pair).astype(int) - next(pair)).max() > 0
    pipe.save_pretrained(place / "saved")
    assert type(DiffusionPipeline.from_pretrained(place / "saved")) is Flux2KleinPipeline
    with pytest.raises(UserError, match="without an encoder: leave task and adapter out"):
        customize.load_subject_pipeline(place / "klein", adapter="stickers")


def test_models_that_are_shown_no_images_are_refused():
    with pytest.raises(UserError, match=r"shown images \(Flux\.2, Flux\.1 Kontext, Qwen"):
        InContext(wrap(tiny("flux")), InContextConfig())
    with pytest.raises(UserError, match="shown two images"):
        method_of("kontext", reference_contrast_weight=0.1)


def test_references_are_padded_with_white():
    tall = Image.new("RGB", (32, 64), "black")
    [pixels] = reference_pixels([tall], 64)
    assert pixels.shape == (3, 64, 64)
    assert (pixels[:, :, :15] == 1).all()
    assert (pixels[:, :, 20:44] == -1).all()

"""NoiseCLR: its contrast by loops, what directions do to a pipeline, every base model, and bad input."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_subject_pipeline import A, woken

import customize
from conftest import write_noise
from customize.adapters.directions import FILE, Directions, direction_text, load_directions
from customize.app.cli import main
from customize.backbones.base import Condition
from customize.backbones.families import as_called, wrap
from customize.errors import UserError
from customize.losses import direction_contrast
from customize.pipelines.directions import Direction, directed, parse_direction, steered
from customize.pipelines.guidance import word_maps
from customize.trainers.methods.noiseclr import NoiseCLR, NoiseCLRConfig
from tiny import BASES, random, tiny
from tiny_families import FAMILIES, tiny_family

PROMPT = "a photo of a dog"
SMALL = {"resolution": 32, "num_directions": 3, "directions_per_step": 2, "train_batch_size": 2}
REFUSED = {"qwen_image", "z_image", "hidream"}  # prompts of other lengths, or passed under other names


def base_pipeline(base: str):
    return tiny(base) if base in BASES else tiny_family(base)


def draw(pipe, prompt=PROMPT, **more) -> np.ndarray:
    options = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    options |= {"generator": torch.Generator().manual_seed(1), "prompt": prompt}
    if hasattr(pipe, "tokenizer_2") and hasattr(pipe, "transformer"):
        options["max_sequence_length"] = 16  # as the tiny models' T5 reads
    return pipe(**as_called(pipe, options | more)).images


@pytest.fixture
def found(tmp_path):
    """A folder of three random directions of tiny SD 1.5."""
    torch.manual_seed(5)
    Directions(wrap(tiny("sd15")), 3).save(tmp_path)
    return tmp_path


# the loss


@pytest.mark.parametrize(("directions", "images"), [(2, 2), (3, 4), (5, 3)])
def test_the_contrast_by_loops(directions, images):
    effects = random(directions, images, 7).double()

    def alike(a, b) -> float:
        return math.exp(float(a @ b / (a.norm() * b.norm())) / 0.3)

    total = 0.0
    for k in range(directions):
        pairs = [(a, b) for a in range(images) for b in range(images) if a != b]
        same = [alike(effects[k, a], effects[k, b]) for a, b in pairs]
        other = [
            alike(effects[k, a], effects[j, a]) for a in range(images) for j in range(directions) if j != k
        ]
        total -= math.log((sum(same) / len(same)) / (sum(other) / len(other)))
    assert direction_contrast(effects, 0.3).item() == pytest.approx(total / directions, rel=1e-5)


def step_of(method, **more):
    batch = {"pixels": random(3, 3, 16, 16).clamp(-1, 1), "prompt": ["a dog"] * 3, **more}
    seen, losses = {}, method.losses
    method.losses = lambda step: seen.update(step=step) or losses(step)
    torch.manual_seed(3)
    terms = method(batch)
    method.losses = losses
    return seen["step"], terms


@pytest.mark.parametrize("base", BASES)
def test_effects_are_differences_of_the_denoisers_output(base):
    method = NoiseCLR(wrap(tiny(base)), NoiseCLRConfig(num_directions=3, directions_per_step=2), [])
    step, terms = step_of(method)
    assert len(set(step.t.tolist())) == 1  # one time for all images
    backbone, chosen, expected = method.backbone, torch.tensor([2, 0]), []
    for k in chosen.tolist():
        for i in range(3):
            text = direction_text(backbone, [own[k : k + 1] for own in method.directions.vectors])
            with_it, without = (
                backbone.denoise(step.noisy[i : i + 1], step.t[i : i + 1], Condition(own))
                for own in (text, backbone.encode_unconditional())
            )
            expected.append((with_it - without).flatten())
    effects = method.effects(step, chosen)
    assert torch.allclose(effects.flatten(0, 1), torch.stack(expected), atol=1e-5)
    assert terms.keys() == {"contrast"}
    terms["contrast"].backward()
    assert set(method.trainable()) == {f"directions.vectors.{i}" for i in range(len(backbone.text_encoders))}
    assert method.directions.vectors[0].grad.any()


def test_where_the_mask_is_0_an_effect_does_not_count():
    mask = torch.ones(3, 1, 16, 16)
    mask[..., :8] = 0
    method = NoiseCLR(wrap(tiny("sd15")), NoiseCLRConfig(num_directions=2, directions_per_step=2), [])
    step, _ = step_of(method, mask=mask)
    effects = method.effects(step, torch.tensor([0, 1])).unflatten(-1, step.noisy.shape[1:])
    half = step.noisy.shape[-1] // 2
    assert not effects[..., :half].any()
    assert effects[..., half:].all()


# at inference


def test_a_direction_adds_the_strength_times_its_effect(found):
    pipe = tiny("sd15")
    backbone, vectors = wrap(pipe), load_directions(found, wrap(pipe))
    noisy, time, text = random(2, 4, 4, 4), torch.tensor(400), random(2, 16, 16, seed=2)
    with torch.no_grad():
        texts = [direction_text(backbone, [own[i : i + 1] for own in vectors]) for i in (2, 0)]
        nothing = backbone.encode_unconditional()

        def output(own):
            return pipe.unet(noisy, time, encoder_hidden_states=own.expand(2, -1, -1)).sample

        plain, empty = output(text), output(nothing["encoder_hidden_states"])
        expected = plain
        for own, strength in zip(texts, (1.5, -0.5), strict=True):
            expected = expected + strength * (output(own["encoder_hidden_states"]) - empty)
        with directed(pipe, [Direction(found, 2, 1.5), Direction(found, 0, -0.5)]):
            steered = output(text)
        assert torch.allclose(steered, expected, atol=1e-5)
        assert not torch.allclose(steered, plain, atol=1e-3)
        assert torch.equal(output(text), plain)


def test_directions_go_with_subjects_and_leave_attention_maps_as_they_are(found):
    pipe = woken("sd15")
    options = {"subject_images": {"<s>": A}, "prompt": "a photo of <s> dog", "num_inference_steps": 1}
    plain = draw(pipe, **options)
    with word_maps(pipe, options["prompt"], ["<s> dog"]) as before:
        draw(pipe, **options)
    with word_maps(pipe, options["prompt"], ["<s> dog"]) as maps, directed(pipe, [Direction(found, 1, 3.0)]):
        steered = draw(pipe, **options)
    assert np.abs(steered - plain).max() > 1e-4
    assert np.array_equal(np.asarray(maps["<s> dog"][0]), np.asarray(before["<s> dog"][0]))
    assert np.array_equal(draw(pipe, **options), plain)


@pytest.mark.parametrize("base", [*BASES, *FAMILIES])
def test_trains_and_draws_again_or_refuses(base, tmp_path):
    write_noise(tmp_path / "images")
    base_pipeline(base).save_pretrained(tmp_path / "base")
    settings = SMALL | {"instance_data_dir": tmp_path / "images", "max_train_steps": 2, "learning_rate": 0.1}
    settings |= {"validation_inference_steps": 2, "gradient_checkpointing": True}
    settings |= {"pretrained_model_name_or_path": tmp_path / "base", "output_dir": tmp_path / "run"}
    if base in REFUSED or base == "qwen_image_edit":
        with pytest.raises(UserError, match=r"one length|edits images"):
            customize.train("noiseclr", **settings)
        assert not (tmp_path / "run" / "run.json").exists()
        return
    run = customize.train("noiseclr", **settings)
    assert "Directions found in" in (run / "README.md").read_text()
    pipe = customize.load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    vectors = load_directions(run, wrap(pipe))
    assert all(len(own) == 3 for own in vectors)
    sheet = np.asarray(Image.open(run / "samples" / "step-000002.png").convert("RGB"), int)
    assert sheet.shape == (128, 4 * 128, 3)
    tiles = [sheet[30:, i * 128 : (i + 1) * 128] for i in range(4)]
    assert all(np.abs(tiles[0] - tile).max() > 0 for tile in tiles[1:])  # below the numbers
    plain = draw(pipe)
    with directed(pipe, [Direction(run, 2, 3.0), Direction(run, 0, -1.0)]):
        steered = draw(pipe)
    assert np.abs(steered - plain).max() > 0
    assert np.array_equal(draw(pipe), plain)
    again = customize.load_pipeline(tmp_path / "base")  # the run is not needed, only its directions
    again.set_progress_bar_config(disable=True)
    with directed(again, [Direction(run, 2, 3.0), Direction(run, 0, -1.0)]):
        assert np.array_equal(draw(again), steered)


def test_what_is_saved_is_read_bit_for_bit(tmp_path):
    made = Directions(wrap(tiny("sdxl")), 4)
    made.save(tmp_path)
    found = load_directions(tmp_path, wrap(tiny("sdxl")))
    assert all(torch.equal(own, other) for own, other in zip(made.vectors, found, strict=True))
    assert load_file(tmp_path / FILE).keys() == {"clip_l", "clip_g"}


def test_the_command_line_draws_along_directions(tmp_path, capsys):
    torch.manual_seed(0)
    Directions(wrap(customize.load_pipeline("stickers")), 2).save(tmp_path)
    words = ["generate", "stickers", "a fox on green grass", "--num_inference_steps", "3"]
    words += ["--output", str(tmp_path / "images")]
    assert main(words) == 0
    assert main([*words, "--direction", f"{tmp_path}:1=4", f"{tmp_path}:0=-1.5"]) == 0
    stem = tmp_path / "images" / "a-fox-on-green-grass-0"
    plain, steered = (np.asarray(Image.open(f"{stem}{end}.png"), int) for end in ("", "-2"))
    assert np.abs(plain - steered).max() > 3
    with Image.open(f"{stem}-2.png") as image:
        assert ":1=4" in image.info["parameters"]
    assert main([*words, "--direction", f"{tmp_path}:2=1"]) == 2
    assert "has the directions 0 to 1, not 2" in capsys.readouterr().err


# bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs/a", "as RUN:NUMBER=STRENGTH"),
        ("runs/a:3", "as RUN:NUMBER=STRENGTH"),
        ("runs/a:x=1", "as RUN:NUMBER=STRENGTH"),
        ("runs/a:1=nan", "as RUN:NUMBER=STRENGTH"),
        ("there is none:1=2", "there is no run 'there is none'"),
    ],
)
def test_directions_that_cannot_be_read(text, said):
    with pytest.raises(UserError, match=said):
        parse_direction(text)


def test_a_direction_is_a_run_with_a_number_and_a_strength(tmp_path):
    assert parse_direction(f"{tmp_path}:12=-0.5") == Direction(str(tmp_path), 12, -0.5)


def test_files_that_are_none_damaged_or_of_another_model(tmp_path, found):
    pipe = tiny("sd15")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no directions: name a run of noiseclr"):
        load_directions(tmp_path / "empty", wrap(pipe))
    with pytest.raises(UserError, match=r"do not fit this base model .* lacks 'clip_g'"):
        load_directions(found, wrap(tiny("sdxl")))
    save_file({"clip_l": torch.full((2, 16), float("nan"))}, found / FILE)
    with pytest.raises(UserError, match="not finite"):
        load_directions(found, wrap(pipe))
    with pytest.raises(UserError, match="not finite"):
        Directions.load(found, {}, pipe)


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_a_direction_is_as_long_as_the_prompts(base, tmp_path):
    Directions(wrap(tiny(base)), 2).save(tmp_path)
    pipe, drawn = tiny(base), {}
    for length in (8, 16):
        plain = draw(pipe, max_sequence_length=length)
        with directed(pipe, [Direction(tmp_path, 0, 1.0)]):
            drawn[length] = draw(pipe, max_sequence_length=length)
        assert np.abs(drawn[length] - plain).max() > 1e-4
    wrapped = wrap(pipe)
    wrapped.text_length = 8
    with steered(wrapped, [own[:1] for own in load_directions(tmp_path, wrapped)], [1.0]):
        assert np.array_equal(draw(pipe, max_sequence_length=8), drawn[8])


def test_a_run_with_two_paths(found):
    pipe = tiny("sd15")
    double = {"encoder_hidden_states": random(1, 32, 16)}
    directions = directed(pipe, [Direction(found, 0, 1.0)])
    with torch.no_grad(), directions, pytest.raises(UserError, match="no hard path"):
        pipe.unet(random(1, 4, 4, 4), 1, **double)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_batch_size": 1}, "changes several images alike; give 2 or more"),
        ({"directions_per_step": 4}, "directions_per_step 4 is more than num_directions 3"),
        ({"holdout": 1}, "holdout: this method has no diffusion loss"),
        ({"caption_dropout": 0.1}, "caption_dropout: this method has no diffusion loss"),
        ({"snr_gamma": 5.0}, "snr_gamma: this method has no diffusion loss"),
        ({"contrastive_flow_weight": 0.1}, "contrastive_flow_weight: this method has no diffusion loss"),
        ({"validation_metric": "score"}, "rates runs of one subject"),
        ({"direction_temperature": 0.0}, "direction_temperature"),
    ],
)
def test_settings_that_cannot_be(settings, said, tmp_path, images):
    given = SMALL | {"instance_data_dir": images, "resolution": 128} | settings
    with pytest.raises(UserError, match=said):
        customize.train("noiseclr", output_dir=tmp_path / "run", **given)


def test_a_dry_run(tmp_path, images, capsys):
    customize.train("noiseclr", output_dir=tmp_path / "run", instance_data_dir=images, dry_run=True)
    assert "estimated peak" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()

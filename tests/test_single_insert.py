"""SingleInsert: its losses by loops, what its encoder reads, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

import customize
from customize.backbones.families import wrap
from customize.data.images import find_images
from customize.errors import UserError
from customize.runs.folder import read_info
from customize.trainers.methods.single_insert import SingleInsert, cut_out
from tiny import BASES, random, tiny

WORD = {"placeholder_token": "<toy>", "initializer_token": "dog"}
SMALL = {"encoder_dim": 64, "encoder_depth": 1, "rank": 2}


def method_of(base: str = "sd15", **options) -> SingleInsert:
    backbone = wrap(tiny(base), base)
    method = SingleInsert(backbone, SingleInsert.Config(**(WORD | SMALL | options)), [])
    method.tokens.pixels = random(2, 3, 224, 224)
    return method


def batch_of() -> dict:
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 8:24, :16] = 1
    prompts = ["a photo of a <toy> dog", "a <toy> on grass"]
    return {"pixels": random(2, 3, 32, 32).clamp(-1, 1), "prompt": prompts, "mask": mask}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("second", [False, True])
def test_the_losses_by_loops(base, second):
    method = method_of(base, background_weight=0.5, semantic_weight=2.0)
    method.train()
    for name, parameter in method.named_parameters():
        if "lora_B" in name:  # so that the tuned model is not the original one
            parameter.data += 0.1 * random(*parameter.shape)
    method.on_step(60 if second else 0, 100)
    seen, losses, batch = {}, method.losses, batch_of()
    method.losses = lambda step: seen.update(step=step) or losses(step)
    with torch.no_grad():
        terms = method(batch)
        step = seen["step"]
        backbone = method.backbone
        clean = backbone.clean(step.noisy, step.t, step.prediction)
        text = backbone.encode_prompt(["a photo of a dog", "a dog on grass"])
        condition = type(step.condition)(text)
        tuned = backbone.clean(step.noisy, step.t, backbone.denoise(step.noisy, step.t, condition))
        with backbone.without_adapters():
            condition = type(step.condition)(backbone.encode_prompt(["a photo of a dog", "a dog on grass"]))
            kept = backbone.clean(step.noisy, step.t, backbone.denoise(step.noisy, step.t, condition))
    inside, outside, side = [], [], clean.shape[-1]
    for index in np.ndindex(*clean.shape):
        row, column = index[2] * 32 // side, index[3] * 32 // side
        covered = float(batch["mask"][index[0], 0, row, column])
        inside.append(covered * float(clean[index] - step.latents[index]) ** 2)
        outside.append((1 - covered) * float(clean[index] - kept[index]) ** 2)
    assert terms["denoise"].item() == pytest.approx(np.mean(inside), rel=1e-3)
    assert terms["background"].item() == pytest.approx(0.5 * np.mean(outside), rel=1e-3)
    assert ("semantic" in terms) == second
    if second:
        expected = 2 * float((tuned - kept).square().mean())
        assert terms["semantic"].item() == pytest.approx(expected, rel=1e-3)


def test_the_word_starts_as_its_class_and_lora_waits_for_the_second_stage():
    method = method_of(num_vectors=2)
    with torch.no_grad():
        [vectors] = method.tokens.current()
    dog = method.backbone.tokenizers[0].convert_tokens_to_ids("dog")
    table = method.backbone.text_encoders[0].get_input_embeddings().weight
    assert torch.equal(vectors, table[[dog, dog]])
    lora = [p for n, p in method.named_parameters() if "lora_" in n]
    for step, trained in ((0, False), (49, False), (50, True)):
        method.on_step(step, 100)
        assert all(p.requires_grad == trained for p in lora)
    groups = method.parameter_groups(1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 5e-4]
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in method.trainable().values()
    }


def test_the_word_is_the_mean_over_the_images_and_the_encoder_runs_once_a_step(monkeypatch):
    method = method_of()
    method.tokens.encoder.visual_projection.weight.data += 0.1 * random(16, 64)
    pixels, each = method.tokens.pixels, []
    with torch.no_grad():
        [both] = method.tokens.current()
        for image in pixels:
            method.tokens.pixels = image[None]
            each.append(method.tokens.current()[0])
    assert torch.allclose(both, (each[0] + each[1]) / 2, atol=1e-5)
    calls, encoder = [], method.tokens.encoder.forward
    monkeypatch.setattr(method.tokens.encoder, "forward", lambda *a, **k: calls.append(1) or encoder(*a, **k))
    method.on_step(60, 100)
    method(batch_of())
    assert len(calls) == 1


def write_image(folder, masked: bool = True):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    if masked:
        mask = np.zeros((40, 40), np.uint8)
        mask[10:30, 10:30] = 255
        Image.fromarray(mask).save(folder / "a.mask.png")
    return folder


def test_the_encoder_sees_the_subject_on_white(tmp_path):
    [file] = find_images(write_image(tmp_path / "images"), "a <toy>")
    pixels = cut_out(file)
    assert pixels.shape == (3, 224, 224)
    assert (pixels[:, :35] == 1).all()
    assert pixels[:, 60:160, 60:160].std() > 0.1


@pytest.fixture
def flags(tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    return {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": write_image(tmp_path / "images"),
        "output_dir": tmp_path / "run",
        "resolution": 16,
        "max_train_steps": 4,
        **WORD,
        **SMALL,
    }


MISTAKES = {
    "no mask": ({}, "put a mask, white on the subject, as 'a.mask.png'"),
    "several words": ({"placeholder_token": "<toy>+<pet>"}, "learns one word"),
    "width": ({"encoder_dim": 100}, "multiple of 64"),
    "min-SNR": ({"snr_gamma": 5.0}, "leave it out"),
    "contrastive flow": ({"contrastive_flow_weight": 0.05, "train_batch_size": 2}, "leave it out"),
    "without masks": ({"masked_loss": False}, "leave masked_loss on"),
    "weight outside": ({"unmasked_weight": 0.1}, "and unmasked_weight 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, flags, tmp_path, monkeypatch):
    changes, said = MISTAKES[name]
    if name == "no mask":
        flags["instance_data_dir"] = write_image(tmp_path / "bare", masked=False)
    monkeypatch.setattr(SingleInsert, "forward", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match=said):
        customize.train("single_insert", **(flags | changes))


def test_lora_waits_also_where_gradients_are_accumulated(flags, monkeypatch):
    """The base model's predictions switch LoRA off and on again, in the middle of a step."""
    moved, after_step = [], SingleInsert.after_step

    def seen(self):
        moved.append(any(p.any() for n, p in self.named_parameters() if "lora_B" in n))
        after_step(self)

    monkeypatch.setattr(SingleInsert, "after_step", seen)
    customize.train("single_insert", **flags, gradient_accumulation_steps=3, first_stage=0.5)
    assert moved == [False, False, True, True]


def test_a_run_of_one_image(flags):
    folder = customize.train("single_insert", **flags)
    info = read_info(folder)
    assert info["config"]["instance_prompt"] == "a photo of a <toy> dog"
    assert info["config"]["unmasked_weight"] == 0.0
    assert list(info["words"]) == ["<toy>"]
    assert {"learned_embeds.safetensors", "pytorch_lora_weights.safetensors"} <= {
        p.name for p in folder.iterdir()
    }

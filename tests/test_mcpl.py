"""MCPL: its regularizers by loops, and what it refuses."""

import math

import numpy as np
import pytest
import torch

import customize
from customize.attention_maps import AttentionRecorder, word_positions
from customize.backbones.base import Condition, Step
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.losses import denoising
from customize.pipelines import load_pipeline
from customize.runs.folder import read_info
from customize.trainers.methods.mcpl import MCPL, SIDE
from tiny import BASES, random, tiny

PROMPTS = ["a photo of red <toy> on blue <pet>", "a blue <pet> in style"]
WORDS = {"placeholder_token": "<toy>+<pet>", "initializer_token": "dog+cat"}


def method_of(base: str = "sd15", **options) -> MCPL:
    backbone = wrap(tiny(base), base)
    return MCPL(backbone, MCPL.Config(**(WORDS | {"num_vectors": 2} | options)), [])


def batch_of(method, indices=(0, 1)) -> dict:
    pixels = random(2, 3, 32, 32).clamp(-1, 1)
    index = torch.tensor(indices)
    no = torch.zeros(2, dtype=torch.bool)
    return {"pixels": pixels, "prompt": PROMPTS, "index": index, "is_prior": no, "is_flipped": no}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adjectives", ["", "red+blue"])
def test_prompt_contrast_by_loops(base, adjectives):
    method = method_of(base, bind_adjectives=adjectives)
    with torch.no_grad():
        text = method.backbone.encode_prompt(PROMPTS)
    step = Step(*[torch.zeros(2)] * 5, Condition(text), torch.zeros(2), {"prompt": PROMPTS})
    rows = []
    for i, words in enumerate((["<toy>", "<pet>"], ["<pet>"])):
        for word in words:
            label = method.tokens.words.index(word)
            for own in (word, *([adjectives.split("+")[label]] if adjectives else [])):
                places = word_positions(method.backbone.pipe, PROMPTS[i], own)
                rows.append(
                    (label, torch.stack([text["encoder_hidden_states"][i, p] for p in places]).mean(0))
                )
    expected = []
    for i, (label, own) in enumerate(rows):
        others = [(other, row) for j, (other, row) in enumerate(rows) if j != i]
        logits = [math.exp(float(own @ row / own.norm() / row.norm()) / 0.2) for _, row in others]
        terms = [
            -math.log(value / sum(logits))
            for value, (other, _) in zip(logits, others, strict=True)
            if other == label
        ]
        if terms:
            expected.append(sum(terms) / len(terms))
    assert method.prompt_contrast(step).item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_attention_mask_by_hand(mode):
    method = method_of(attention_mask=mode, attention_threshold=0.99, attention_memory=0.0)
    batch = batch_of(method)
    text = method.backbone.encode_prompt(PROMPTS)
    with (
        torch.no_grad(),
        AttentionRecorder(method.backbone.denoiser, side=SIDE, gradients=False) as method.recorder,
    ):
        method.backbone.denoise(random(2, 4, 16, 16), torch.full((2,), 0.5), Condition(text))
    found = method.attention_mask(batch, (16, 16))
    assert found.shape == (2, 1, 16, 16)
    for i, words in enumerate((["<toy>", "<pet>"], ["<pet>"])):
        union = torch.zeros(16, 16)
        for word in words:
            places = word_positions(method.backbone.pipe, PROMPTS[i], word)
            layers = [maps[i, places].sum(0) for maps in method.recorder.chosen()]
            share = sum(layers) / len(layers)
            share = share / share.max()
            union = torch.maximum(union, (share > 0.99).float() if mode == "hard" else share)
        assert torch.allclose(found[i, 0], union, atol=1e-5)
    assert 0 < found.mean() < 1


def test_maps_are_averaged_over_the_steps_that_show_an_image():
    method = method_of(attention_memory=0.75)
    seen = []
    for step in range(3):
        text = method.backbone.encode_prompt(PROMPTS)
        with (
            torch.no_grad(),
            AttentionRecorder(method.backbone.denoiser, side=SIDE, gradients=False) as method.recorder,
        ):
            method.backbone.denoise(random(2, 4, 16, 16, seed=step), torch.full((2,), 0.5), Condition(text))
        places = word_positions(method.backbone.pipe, PROMPTS[1], "<pet>")
        seen.append(method.recorder.of_tokens(places, -1, (SIDE, SIDE)).sum(0))
        found = method.mean_maps(-1, PROMPTS[1], (7, False))[0]
    expected = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_loss_counts_where_the_words_look():
    method = method_of()
    method.train()
    batch, seen = batch_of(method), {}
    losses = method.losses
    method.losses = lambda step: seen.update(step=step) or losses(step)
    terms = method(batch)
    assert terms.keys() == {"denoise", "prompt_contrast"}
    step = seen["step"]
    method.config.attention_memory = 0.0
    mask = method.attention_mask(batch, tuple(step.latents.shape[-2:]))
    squares = (step.prediction - step.target).square()
    by_hand = [float((squares[i] * mask[i]).sum() / (4 * mask[i].sum())) for i in range(2)]
    assert terms["denoise"].item() == pytest.approx(np.mean(by_hand), rel=1e-4)
    method.eval()  # the validation loss stays comparable with that of other methods
    torch.manual_seed(0)
    plain = method(batch)["denoise"].item()
    method.config.attention_mask = "none"
    torch.manual_seed(0)
    assert method(batch)["denoise"].item() == plain


def test_a_mirrored_image_has_maps_of_its_own():
    method = method_of()
    method.train()
    batch = batch_of(method, (0, 0)) | {"prompt": [PROMPTS[0]] * 2}
    method(batch | {"is_flipped": torch.tensor([False, True])})
    assert method.means.keys() == {(0, False), (0, True)}
    batch = batch_of(method)
    method(batch | {"is_flipped": torch.tensor([True, False])})
    assert method.means.keys() == {(0, False), (0, True), (1, False)}


def test_contrastive_flow_counts_where_the_denoising_error_does():
    """Else it could fall without end where the words do not look; and the maps are averaged once a step."""
    method, averaged, seen = method_of(contrastive_flow_weight=0.5, attention_threshold=0.99), [], {}
    method.train()
    mean_maps, losses = method.mean_maps, method.losses
    method.mean_maps = lambda *given: averaged.append(given) or mean_maps(*given)
    method.losses = lambda step: seen.update(step=step) or losses(step)
    noised, add_noise = [], method.backbone.add_noise
    method.backbone.add_noise = lambda *given: noised.append(add_noise(*given)) or noised[-1]
    terms = method(batch_of(method))
    step, (_, other) = seen["step"], noised[1]
    expected = -0.5 * denoising(step.prediction, other, step.batch["focus"]).mean()
    assert terms["contrastive_flow"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < step.batch["focus"].mean() < 1
    assert len(averaged) == 2


MISTAKES = {
    "one word": ({"placeholder_token": "<toy>", "initializer_token": "dog"}, "learns several words"),
    "numbers of words": ({"initializer_token": "dog"}, "as many"),
    "adjectives": ({"bind_adjectives": "red"}, "names 1 adjectives for 2 words"),
    "adjective in no caption": ({"bind_adjectives": "red+style"}, "says <pet>, but not 'style'"),
    "a word that no caption says": (
        {"placeholder_token": "<toy>+<pet>+<bus>", "initializer_token": "dog+cat+toy"},
        "no caption says <bus>",
    ),
    "no word": ({"instance_prompt": "a photo of the dog"}, "does not contain <toy> or <pet>"),
}


@pytest.fixture
def flags(images, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    return {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": images,
        "instance_prompt": PROMPTS[0],
        "output_dir": tmp_path / "run",
        "resolution": 16,
        "max_train_steps": 2,
        **WORDS,
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, flags, monkeypatch):
    changes, said = MISTAKES[name]
    monkeypatch.setattr(MCPL, "forward", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match=said):
        customize.train("mcpl", **(flags | changes))


def test_a_run_of_two_words(flags):
    folder = customize.train("mcpl", **flags, bind_adjectives="red+blue")
    assert list(read_info(folder)["words"]) == ["<toy>", "<pet>"]
    pipe = load_pipeline(folder)
    assert {"<toy>", "<pet>"} <= pipe.tokenizer.get_vocab().keys()

"""Contrast of attention maps by loops, and guidance at inference."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_subject_pipeline import A, B, woken

from customize.app.cli import main
from customize.attention_maps import AttentionRecorder, word_positions
from customize.errors import UserError
from customize.losses import attend_and_excite, attention_contrast, info_nce, supervised_contrast
from customize.losses.attention import smoothed
from customize.pipelines.guidance import AttentionGuidance, as_image, moved_against, overlay, word_maps
from tiny import BASES, random, tiny

PROMPT = "a red dog on a blue cat"


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def looped_supervised(features, labels, temperature) -> float:
    rows = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if not positives:
            continue
        total = sum(math.exp(cosine(features[i], features[j]) / temperature) for j in others)
        terms = [
            -math.log(math.exp(cosine(features[i], features[j]) / temperature) / total) for j in positives
        ]
        rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 2], [0, 0, 0, 0], [3, 1, 1, 3, 1]])
def test_supervised_contrast_by_loops(labels):
    features = random(len(labels), 6).double()
    found = supervised_contrast(features, torch.tensor(labels), 0.3)
    assert found.item() == pytest.approx(looped_supervised(features, labels, 0.3), rel=1e-5)


def test_without_a_positive_there_is_no_contrast():
    features = random(3, 4).requires_grad_()
    loss = supervised_contrast(features, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()


def test_info_nce_is_the_cross_entropy_with_a_distribution():
    logits, target = random(3, 5), random(3, 5, seed=1).softmax(-1)
    expected = 0.0
    for i in range(3):
        total = sum(math.exp(float(x)) for x in logits[i])
        expected -= sum(
            float(target[i, j]) * math.log(math.exp(float(logits[i, j])) / total) for j in range(5)
        )
    assert info_nce(logits, target).item() == pytest.approx(expected / 3, rel=1e-5)
    target[1] = 0  # a row without a positive does not count
    rows = [info_nce(logits[[i]], target[[i]]).item() for i in (0, 2)]
    assert info_nce(logits, target).item() == pytest.approx(sum(rows) / 2, rel=1e-5)


def test_smoothing_by_loops():
    maps = random(1, 5, 6)
    weights = {d: math.exp(-(d**2) / (2 * 0.5**2)) for d in (-1, 0, 1)}
    norm = sum(weights.values()) ** 2

    def reflect(i, n):
        return -i if i < 0 else 2 * n - 2 - i if i >= n else i

    for y, x in ((0, 0), (2, 3), (4, 5)):
        expected = sum(
            weights[dy] * weights[dx] * float(maps[0, reflect(y + dy, 5), reflect(x + dx, 6)])
            for dy in weights
            for dx in weights
        )
        assert smoothed(maps)[0, y, x].item() == pytest.approx(expected / norm, rel=1e-5)


def test_attend_and_excite_is_the_neglect_of_the_least_attended_word():
    maps = torch.zeros(2, 5, 5)
    maps[0, 2, 2], maps[1, 1, 1] = 1.0, 0.5
    peak = float(smoothed(maps)[1].max())
    assert attend_and_excite(maps).item() == pytest.approx(1 - peak)


def test_the_contrast_of_maps_by_loops_also_with_those_of_the_step_before():
    maps, before, labels = random(3, 4, 4).abs(), random(3, 4, 4, seed=2).abs(), torch.tensor([0, 0, 1])
    flat = smoothed(maps).flatten(1)
    found = attention_contrast(maps, labels)
    assert found.item() == pytest.approx(looped_supervised(flat, [0, 0, 1], 0.5), rel=1e-4)
    both = torch.cat([flat, smoothed(before).flatten(1)])
    found = attention_contrast(maps, labels, previous=before)
    assert found.item() == pytest.approx(looped_supervised(both, [0, 0, 1] * 2, 0.5), rel=1e-4)


# at inference


def draw(pipe, prompt=PROMPT, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    given = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "np", "generator": generator}
    short = {"max_sequence_length": 16} if "transformer" in pipe.components else {}
    return pipe(prompt, **(given | short | options)).images


@pytest.mark.parametrize("base", BASES)
def test_maps_of_words_leave_the_image_as_it_is(base):
    pipe = tiny(base)
    plain = draw(pipe, num_images_per_prompt=2)
    with word_maps(pipe, PROMPT, ["dog", "blue cat"]) as maps:
        found = draw(pipe, num_images_per_prompt=2)
    assert np.array_equal(found, plain)
    assert {word: len(images) for word, images in maps.items()} == {"dog": 2, "blue cat": 2}
    assert all(np.asarray(image).max() == 255 for images in maps.values() for image in images)
    assert np.array_equal(draw(pipe, num_images_per_prompt=2), plain)


def test_maps_of_a_batch_belong_to_their_prompts():
    pipe = tiny("sd15")
    prompts = [PROMPT, "a photo of the dog"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with word_maps(pipe, prompts, ["dog"]) as both:
        draw(pipe, prompts, generator=generators)
    for i, prompt in enumerate(prompts):
        with word_maps(pipe, prompt, ["dog"]) as alone:
            draw(pipe, prompt, generator=torch.Generator().manual_seed(i))
        difference = np.asarray(alone["dog"][0], int) - np.asarray(both["dog"][i], int)
        assert np.abs(difference).max() <= 1


def test_a_word_that_the_prompt_does_not_say():
    pipe = tiny("sd15")
    with pytest.raises(UserError, match="does not say 'toy'"), word_maps(pipe, PROMPT, ["toy"]):
        draw(pipe)


def test_maps_of_injected_subjects():
    pipe = woken("sd15")
    prompt = "a photo of <s> dog on <s2> cat"
    subjects = {"<s>": A, "<s2>": B}
    plain = draw(pipe, prompt, subject_images=subjects)
    with word_maps(pipe, prompt, ["<s> dog", "<s2> cat"]) as maps:
        found = draw(pipe, prompt, subject_images=subjects)
    assert np.array_equal(found, plain)
    assert not np.array_equal(np.asarray(maps["<s> dog"][0]), np.asarray(maps["<s2> cat"][0]))
    options = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    drawn = []
    for words in ([], ["<s> dog", "<s2> cat"]):
        options |= {"generator": torch.Generator().manual_seed(1), "subject_images": subjects}
        drawn.append(pipe(prompt, attention_maps=words, **options))
    assert np.array_equal(drawn[0].images[0], drawn[1].images[0])
    assert drawn[1].attention_maps.keys() == maps.keys()
    assert "attention_maps" not in drawn[0]
    with pytest.raises(UserError, match="attention_maps is a list of words"):
        pipe(prompt, attention_maps="<s> dog", **options)


@pytest.mark.parametrize("kind", ["conform", "attend_and_excite"])
@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_guidance_lowers_its_loss(base, kind):
    pipe = tiny(base)
    losses = {}
    for strength in (1e-6, 0.2):
        guidance = AttentionGuidance(pipe, PROMPT, ["red dog", "blue cat"], kind, strength, until=1.0)
        seen, loss = [], guidance.loss

        def counted(*args, loss=loss, seen=seen):
            value = loss(*args)
            seen.append(value.item())
            return value

        guidance.loss = counted
        draw(pipe, num_inference_steps=8, **guidance.arguments)
        losses[strength] = seen
    assert len(losses[0.2]) == 7
    assert losses[0.2][0] == pytest.approx(losses[1e-6][0])
    assert losses[0.2][-1] < losses[1e-6][-1]


@pytest.mark.parametrize("kind", ["conform", "attend_and_excite"])
def test_a_guided_image_does_not_depend_on_its_batch(kind):
    pipe = tiny("sd15")

    def drawn(seeds):
        guidance = AttentionGuidance(pipe, PROMPT, ["red dog", "blue cat"], kind, 0.2, until=1.0)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = guidance.arguments | {"generator": generators, "num_images_per_prompt": len(seeds)}
        return draw(pipe, num_inference_steps=6, **options)

    assert np.abs(drawn([1, 2])[1] - drawn([2])[0]).max() < 1e-3


def test_each_image_moves_by_a_share_of_its_norm():
    latents, gradient = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1)
    gradient[1, 0, 0, 0] = torch.inf
    for kind in (torch.float32, torch.float16):
        own, slope = latents.to(kind), gradient.to(kind)
        found = moved_against(own, slope, 0.1)
        assert found.dtype == kind
        for i in (0, 2):
            step = 0.1 * own[i].float().norm() * slope[i].float() / slope[i].float().norm()
            assert torch.allclose(found[i], (own[i].float() - step).to(kind))
        assert torch.equal(found[1], own[1])
    assert torch.equal(moved_against(latents, torch.zeros_like(latents), 0.1), latents)
    large = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)  # its norm is no float16
    assert moved_against(large, large, 0.1).isfinite().all()


def test_maps_of_a_guided_image_are_those_of_its_own_steps():
    """Guidance calls the denoiser too, to look ahead."""
    pipe, calls = tiny("sd15"), []
    guidance = AttentionGuidance(pipe, PROMPT, ["red dog", "blue cat"], strength=0.2, until=1.0)
    with word_maps(pipe, PROMPT, ["dog"]) as guided:
        handle = pipe.unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        draw(pipe, **guidance.arguments)
        handle.remove()
    assert calls == [False, True, False, True, False, True, False]
    sums = torch.zeros(16, 16)

    def add(module, args, output):
        if not torch.is_grad_enabled():
            sums.add_(recorder.mean([word_positions(pipe, PROMPT, "dog")])[0])

    with AttentionRecorder(pipe.unet, side=16) as recorder:
        handle = pipe.unet.register_forward_hook(add)
        draw(pipe, **guidance.arguments)
        handle.remove()
    difference = np.asarray(as_image(sums), int) - np.asarray(guided["dog"][0], int)
    assert np.abs(difference).max() <= 1


def test_guidance_goes_with_subjects_and_ends_where_it_is_told():
    pipe = woken("sd15")
    prompt, subjects = "a photo of <s> dog on <s2> cat", {"<s>": A, "<s2>": B}
    options = {"subject_images": subjects, "num_inference_steps": 8}
    plain = draw(pipe, prompt, **options)
    guided = AttentionGuidance(pipe, prompt, ["dog", "cat"], strength=0.2)
    assert np.abs(draw(pipe, prompt, **options, **guided.arguments) - plain).max() > 1e-4
    never = AttentionGuidance(pipe, prompt, ["dog", "cat"], strength=0.2, until=0.01)
    assert np.array_equal(draw(pipe, prompt, **options, **never.arguments), plain)


@pytest.mark.parametrize(
    ("base", "groups", "kind", "said"),
    [
        ("sd3", ["dog", "cat"], "conform", "for Stable Diffusion 1.x, 2.x and XL"),
        ("sd15", ["dog"], "conform", "two or more groups"),
        ("sd15", ["dog", "cat"], "confrom", "there is no 'confrom'"),
    ],
)
def test_guidance_that_cannot_be(base, groups, kind, said):
    with pytest.raises(UserError, match=said):
        AttentionGuidance(tiny(base), PROMPT, groups, kind)


def test_an_image_under_a_map():
    heat = as_image(torch.tensor([[0.0, 2.0], [1.0, 0.5]]))
    assert np.asarray(heat).tolist() == [[0, 255], [128, 64]]
    shown = overlay(Image.new("RGB", (8, 8), (200, 100, 40)), as_image(torch.tensor([[0.0, 1.0]] * 2)))
    assert shown.getpixel((7, 4)) == (200, 100, 40)
    assert shown.getpixel((0, 4))[0] < 70


def test_the_command_line_saves_maps_and_guides(tmp_path, capsys):
    words = ["generate", "stickers", "a red fox next to a blue bus", "--num_inference_steps", "4"]
    words += ["--output", str(tmp_path)]
    assert main([*words, "--attention_maps", "fox", "blue bus"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    stem = "a-red-fox-next-to-a-blue-bus-0"
    assert names == {f"{stem}.png", f"{stem}-map-fox.png", f"{stem}-map-blue-bus.png"}
    groups = ["--attention_groups", "red fox", "blue bus"]
    assert main([*words, "--attention_guidance", "conform", *groups]) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"{stem}{end}.png"), int) for end in ("", "-2"))
    assert np.abs(first - second).max() > 3
    with Image.open(tmp_path / f"{stem}-2.png") as image:
        assert '"attention_groups": ["red fox", "blue bus"]' in image.info["parameters"]
    assert main([*words, *groups]) == 2
    assert "belong together" in capsys.readouterr().err
    assert main([*words, "--attention_maps", "wolf"]) == 2
    assert "does not say 'wolf'" in capsys.readouterr().err

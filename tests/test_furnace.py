"""The recipe of the embedded model: what the denoiser learns from, and when the fire changes its stage."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from customize.stickers import Drawing, Scene, World, draw_scene
from tiny import random

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "stickers"))

import furnace
import scenes
import unet

import recipe

WORLD = World()
CORE = WORLD.drawings(core=True)


@pytest.fixture(scope="module")
def encoder():
    return scenes.Encoder()


def test_linear_latents_are_those_of_the_autoencoder(encoder):
    """The error on scenes that the matrix was not fitted to is about the spread of the autoencoder's own posterior."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(recipe.part("vae")).eval()
    rng = np.random.default_rng(7)
    pixels = scenes.pixels_of([scenes.draw_training_scene(rng, WORLD, CORE, 1.0) for _ in range(32)], WORLD)
    with torch.no_grad():
        true = vae.encode(pixels).latent_dist
        found = (scenes.blocks(pixels) @ encoder.matrix).permute(0, 3, 1, 2)
    assert (found - true.mean).square().mean().sqrt() < 2 * true.std.mean()
    assert torch.allclose(encoder.latents(pixels) / encoder.scaling, found, atol=6 * scenes.POSTERIOR)


def test_a_block_is_four_by_four_pixels_and_a_constant():
    pixels = random(1, 3, 64, 64)
    found = scenes.blocks(pixels)
    assert found.shape == (1, 16, 16, 49)
    for row, column in ((0, 0), (3, 15)):
        expected = pixels[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        assert sorted(found[0, row, column, :48].tolist()) == sorted(expected.tolist())
        assert found[0, row, column, 48] == 1


def test_about_a_quarter_of_the_scenes_show_two_things_of_different_classes():
    rng = np.random.default_rng(0)
    drawn = [scenes.draw_training_scene(rng, WORLD, CORE, 0.35) for _ in range(1000)]
    pairs = [scene for scene in drawn if scene.companion]
    assert 0.2 < len(pairs) / len(drawn) < 1 / 3
    assert {scene.arrangement for scene in pairs} == {"beside", "above", "over"}
    assert all(scene.companion.word != scene.subject.word for scene in pairs if scene.arrangement != "beside")
    assert all(abs(scene.pose.angle) <= 14 * 0.35 for scene in drawn)


@pytest.mark.parametrize("arrangement", ["above", "over"])
def test_an_arrangement_shows_both_things(arrangement):
    """Each is found by its own colours somewhere, and the subject's mask leaves the companion out."""
    a, b = Drawing("fox", "cartoon"), Drawing("pizza", "3d")
    for seed in range(4):
        scene = Scene(a, "grass", companion=b, arrangement=arrangement, seed=seed)
        (image, own), (_, both) = draw_scene(scene, WORLD), draw_scene(scene, WORLD, mask_companion=True)
        alone, _ = draw_scene(Scene(a, "grass", seed=seed), WORLD)
        covered = np.asarray(both, float).sum() / np.asarray(own, float).sum()
        assert covered > 1.3
        assert image.size == alone.size == (64, 64)


def test_the_arrangement_beside_is_what_it_always_was():
    """Bit for bit as before there were others."""
    image, mask = draw_scene(Scene(Drawing("fox", "cartoon"), "grass", companion=Drawing("pizza", "3d"), seed=3), WORLD)
    assert hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest().startswith("2cf2fc2c4547e012")


def test_a_shard_holds_latents_and_text_states(encoder):
    latents, states = encoder.shard(np.random.default_rng(0), 0.35, count=64)
    assert latents.shape == (64, 12, 16, 16)
    assert states.shape == (64, 40, 192)
    assert latents.dtype == states.dtype == torch.float16
    assert 0.5 < latents.float().std() < 2  # as the scaling factor has it


def test_the_denoisers_losses_by_hand():
    scheduler, latents, text = unet.schedule(), random(3, 12, 16, 16), random(3, 40, 192, seed=1)
    calls = []

    class Predicted:
        def __init__(self, sample):
            self.sample = sample

    def predict(noisy, t, text):
        calls.append((noisy, t))
        return Predicted(torch.zeros_like(noisy))

    torch.manual_seed(0)
    terms = unet.losses(predict, scheduler, latents, text, contrast=0.1)
    torch.manual_seed(0)
    t, noise = unet.spread_times(3), torch.randn(3, 12, 16, 16)
    alpha = scheduler.alphas_cumprod
    velocity = [alpha[t[i]].sqrt() * noise[i] - (1 - alpha[t[i]]).sqrt() * latents[i] for i in range(3)]
    others = [alpha[t[i]].sqrt() * noise[i - 1] - (1 - alpha[t[i]]).sqrt() * latents[i - 1] for i in range(3)]
    assert torch.equal(calls[0][1], t)
    assert torch.allclose(terms["denoise"], torch.stack(velocity).square().mean(), atol=1e-5)
    assert torch.allclose(terms["contrast"], -0.1 * torch.stack(others).square().mean(), atol=1e-5)


def test_times_are_spread_over_the_whole_range():
    t = unet.spread_times(50)
    assert sorted((t // 20).tolist()) == list(range(50))


def row(thing: float, likeness: float) -> dict:
    return {"thing": thing, "likeness": likeness}


def test_the_denoiser_has_its_turn_until_its_measures_stop_rising():
    better = [row(0.1 + 0.01 * i, 0.5) for i in range(10)]
    assert not furnace.stalled(better)
    assert not furnace.stalled([row(0.2, 0.5)] * furnace.PATIENCE)
    assert furnace.stalled([*better, *[row(0.15, 0.5)] * furnace.PATIENCE])
    assert not furnace.stalled([*better, *[row(0.15, 0.6)] * furnace.PATIENCE])  # likeness still rises


def test_poses_are_widened_by_the_measure_and_not_by_the_count_of_scenes():
    assert furnace.spread_for([row(0.59, 0.6)] * 100) == furnace.spread_for([]) == scenes.SPREAD
    assert furnace.spread_for([row(0.61, 0.6)] * 2) == pytest.approx(scenes.SPREAD + 0.1)
    assert furnace.spread_for([row(0.9, 0.7)] * 100) == 1


def test_real_scenes_of_two_things_are_found_and_others_are_not():
    pairs = furnace.pair_scenes(WORLD, 8)
    images = [draw_scene(scene, WORLD)[0] for scene in pairs]
    alone = [draw_scene(Scene(scene.subject, "grass"), WORLD)[0] for scene in pairs]
    assert furnace.both_found(images, pairs, WORLD) >= 0.5
    assert furnace.both_found(alone, pairs, WORLD) <= 0.25


def test_each_measured_factor_is_asked_for_in_all_its_values():
    for name in ("tint", "size", "count"):
        asked = {getattr(scene, name) for scene in furnace.factor_scenes(WORLD, name, 24)}
        assert asked == {value for value in furnace.FACTORS[name] if value not in ("", 1)}


def test_any_signal_ends_a_stage_after_its_step(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            stop = recipe.until(60)
            assert stop() < 0.1
            os.kill(os.getpid(), number)
            assert stop() == 1
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The recipe of the embedded model: what the denoiser learns from, and when the fire changes its stage."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from customize.stickers import Drawing, Scene, World, caption, draw_scene
from customize.stickers.scene import FACTORS
from tiny import random

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "stickers"))

import autoencoder
import furnace
import judge as judge_recipe
import scenes
import supply
import unet

import recipe
import text_tower

WORLD = World()
CORE = WORLD.drawings(core=True)


@pytest.fixture(scope="module")
def encoder():
    return scenes.Encoder()


def test_linear_latents_are_those_of_the_autoencoder(encoder):
    """The error on scenes that the matrix was not fitted to is far below the spread of the autoencoder's
    own posterior."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(recipe.part("vae")).eval()
    rng = np.random.default_rng(7)
    pixels = scenes.pixels_of([scenes.draw_training_scene(rng, WORLD, CORE, 1.0) for _ in range(32)], WORLD)
    with torch.no_grad():
        true = vae.encode(pixels).latent_dist
        found = (scenes.blocks(pixels) @ encoder.matrix).permute(0, 3, 1, 2)
    assert (found - true.mean).square().mean().sqrt() < true.std.mean()
    assert torch.allclose(encoder.latents(pixels) / encoder.scaling, found, atol=6 * scenes.NOISE)


def test_a_block_is_eight_by_eight_pixels_and_a_constant():
    pixels = random(1, 3, 128, 128)
    found = scenes.blocks(pixels)
    assert found.shape == (1, 16, 16, 193)
    for row, column in ((0, 0), (3, 15)):
        expected = pixels[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        assert found[0, row, column, :192].tolist() == expected.tolist()
        assert found[0, row, column, 192] == 1


def test_the_encoder_of_the_autoencoder_takes_principal_components():
    """What the convolutions compute is the linear code of each patch, whatever its neighbours are."""
    pixels = random(6, 3, 32, 32) * 0.3
    rows, mean = autoencoder.components(pixels)
    model = autoencoder.build()
    autoencoder.set_encoder(model, rows, mean)
    with torch.no_grad():
        found = model.encode(pixels).latent_dist.mode()
    for n, row, column in ((0, 0, 0), (3, 2, 1), (5, 3, 3)):
        patch = pixels[n, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        assert torch.allclose(found[n, :, row, column], rows @ (patch - mean), atol=5e-3)
    assert found.std() == pytest.approx(1, abs=0.05)


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
        assert image.size == alone.size == (128, 128)


def test_the_arrangement_beside_is_what_it_always_was():
    """Bit for bit as before there were others."""
    scene = Scene(Drawing("fox", "cartoon"), "grass", companion=Drawing("pizza", "3d"), seed=3)
    image, mask = draw_scene(scene, WORLD, size=64)
    assert hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest().startswith("2cf2fc2c4547e012")


def test_a_piece_holds_latents_and_token_numbers_that_the_reader_turns_into_text_states(encoder):
    latents, ids = encoder.piece(np.random.default_rng(0), 0.35, count=64)
    assert latents.shape == (64, 32, 16, 16)
    assert ids.shape == (64, 56)
    assert latents.dtype == torch.float16
    assert 0.5 < latents.float().std() < 2  # as the scaling factor has it
    text = scenes.Text("cpu")
    states = text(ids[:3])
    assert states.shape == (3, 56, 192)
    with torch.no_grad():
        expected = text.tower(ids[1:2].long()).last_hidden_state[0]
    assert torch.allclose(
        states[1].float(), expected, atol=0.05
    )  # float16, and bfloat16 where the processor has it
    assert text.nothing().shape == (56, 192)


def counting():
    """Pieces of four rows, all with the piece's number."""
    made = iter(range(1000))

    def make(rng, spread):
        return (torch.full((4, 2), float(next(made))), torch.full((4,), spread))

    return make


@pytest.fixture
def counted():
    numbers = supply.Supply(
        counting, 0, kept=3, shows=2, spread=0.25, prepare=lambda piece: (piece[0] + 100, piece[1])
    )
    yield numbers
    numbers.close()


def test_a_supply_keeps_the_last_pieces_and_shows_each_row_as_often_as_it_is_told(counted):
    seen, calls = [], iter(range(10**6))
    for numbers, spreads in counted.batches(4, lambda: float(next(calls) > 200)):
        assert numbers.shape == (4, 2)
        assert (spreads == 0.25).all()
        seen.append({int(n) for n in numbers[:, 0]})
    assert min(map(min, seen)) == 100  # as `prepare` left it
    last = counted.taken - 1
    assert seen[-1] <= {
        100 + last - i for i in range(4)
    }  # the last three, or a piece more had it come in between
    assert (
        3 <= counted.taken <= 3 + len(seen) * 4 / (2 * 4) + 1
    )  # full, then one for each two shows of its size


def test_a_supply_stops_while_it_waits(counted):
    assert list(counted.batches(4, lambda: 1.0)) == []


def test_captions_tell_the_text_tower_where_each_thing_is_named():
    looks, rng = text_tower.Looks(WORLD), np.random.default_rng(0)
    tokenizer = scenes.Text("cpu").tokenizer
    ids, nouns, shown, _ = text_tower.draw_batch(rng, WORLD, (CORE, CORE), looks, tokenizer, 200)
    drawings, two = {number: drawing for drawing, number in looks.index.items()}, 0
    for row, places, things in zip(ids, nouns.tolist(), shown.tolist(), strict=True):
        words = tokenizer.convert_ids_to_tokens(row)
        for place, thing in zip(places, things, strict=True):
            if thing >= 0:
                assert words[place].removesuffix("</w>") in drawings[thing].word
            else:
                assert place == 0
        two += things[1] >= 0
    assert 0.2 < two / 200 < 0.5


def test_the_text_tower_knows_the_looks_of_both_things():
    """Patches of the second thing can be read from its own positions better than those of any other
    drawing."""
    looks, text = text_tower.Looks(WORLD), scenes.Text("cpu")
    rng = np.random.default_rng(0)
    chosen = [CORE[i] for i in rng.permutation(len(CORE))]
    prompts = [
        f"a {a} next to a {b} on green grass" for a, b in zip(chosen, chosen[1:] + chosen[:1], strict=True)
    ]
    states = text(text.ids(prompts)).float()
    patches = torch.stack([looks.patches[looks.index[drawing]] for drawing in chosen])
    for first, wanted in ((text_tower.FIRST_PATCH, patches), (text_tower.SECOND_PATCH, patches.roll(-1, 0))):
        inputs = torch.cat([states[:, first : first + 16], torch.ones(len(chosen), 16, 1)], -1)
        readout = torch.linalg.lstsq(
            inputs[:300].flatten(0, 1), wanted[:300].flatten(0, 1), driver="gelsd"
        ).solution
        error = (inputs[300:] @ readout - wanted[300:]).square().mean()
        assert error < 0.2 * wanted.var(0).mean()  # on drawings that the read-out was not fitted to


def test_the_denoisers_losses_by_hand():
    scheduler, latents, text = unet.schedule(), random(3, 32, 16, 16), random(3, 56, 192, seed=1)
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
    t, noise = unet.spread_times(3), torch.randn(3, 32, 16, 16)
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
    assert furnace.both_judged(images, pairs) >= 0.6
    assert furnace.both_judged(alone, pairs) <= 0.25


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


def test_shipped_weights_start_a_run_if_they_have_its_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "FURNACE", tmp_path)
    monkeypatch.setattr(recipe, "shipped_images", lambda name: 7)
    save_file(torch.nn.Linear(2, 3).half().state_dict(), tmp_path / "same.safetensors")
    save_file(torch.nn.Linear(2, 4).state_dict(), tmp_path / "other.safetensors")
    for name, images in (("same", 7), ("other", 0)):
        model = torch.nn.Linear(2, 3)
        before = model.weight.clone()
        run = recipe.Run("stage", model, lr=0.1, shipped=tmp_path / f"{name}.safetensors")
        assert run.images == images
        assert torch.equal(model.weight, before) == (name == "other")
        assert model.weight.dtype == torch.float32


def test_a_runs_average_follows_its_weights_and_resumes(tmp_path, monkeypatch):
    """Keeping min(.9, (1 + step) / (10 + step)) at each step; whole numbers are copied."""
    monkeypatch.setattr(recipe, "FURNACE", tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    run = recipe.Run("stage", model, lr=0.1, ema=0.9, warmup=1)
    average = model[0].weight.detach().clone()
    for step in range(1, 4):
        run.update({"loss": model(random(4, 2, seed=step)).square().mean()}, 4)
        keep = min(0.9, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * model[0].weight.detach()
    assert torch.allclose(run.average["0.weight"], average, atol=1e-6)
    assert run.average["1.num_batches_tracked"] == 3
    run.save()
    again = recipe.Run(
        "stage", torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)), lr=0.1, ema=0.9
    )
    assert (again.step, again.images) == (3, 12)
    assert torch.equal(again.model[0].weight, model[0].weight)
    assert torch.equal(again.average["0.weight"], run.average["0.weight"])


def test_the_judge_sees_images_as_networks_draw_them():
    """All are of its size and in range; a quarter went through the autoencoder, a quarter through the
    denoiser."""
    rng, drawings = np.random.default_rng(0), WORLD.drawings(held_out=None)
    made = judge_recipe.scenes_of(rng, WORLD, drawings, 8)
    assert any(scene.companion for scene in judge_recipe.scenes_of(rng, WORLD, drawings, 60))
    pixels = scenes.pixels_of(made, WORLD)
    wear = judge_recipe.Wear(torch.device("cpu"))
    worn = wear(pixels, wear.text.ids([caption(scene) for scene in made]))
    assert worn.shape == (8, 3, 64, 64)
    assert worn.abs().max() <= 1
    assert not torch.equal(worn[:4], judge_recipe.small(pixels[:4]))


def test_what_the_judge_is_to_find_in_two_drawings_is_half_of_each():
    drawings = WORLD.drawings(held_out=None)
    a, b = drawings[3], drawings[40]
    wanted = judge_recipe.targets(
        [Scene(a, "snow", companion=b, tint="red"), Scene(b, "grass", count=3)], drawings
    )
    assert wanted["drawing"][0, 3] == wanted["drawing"][0, 40] == 0.5
    assert wanted["drawing"][1, 40] == 1
    assert wanted["drawing"].sum() == 2
    assert [FACTORS["tint"][i] for i in wanted["tint"]] == ["red", ""]
    assert [FACTORS["count"][i] for i in wanted["count"]] == [1, 3]


def test_the_text_towers_losses_by_loops():
    """Looks from each noun on, the second thing's from its own noun and at its own patches; both nouns
    count nine times."""
    tokenizer = scenes.Text("cpu").tokenizer
    torch.manual_seed(0)
    teacher = text_tower.Teacher(text_tower.build(tokenizer)).eval()
    prompts = ["a flat fox on the beach", "a 3d cat next to a flat dog", ""]
    ids = tokenizer(
        prompts, padding="max_length", max_length=text_tower.LENGTH, return_tensors="pt"
    ).input_ids
    nouns, looks, patches = (
        torch.tensor([[3, 0], [4, 9], [0, 0]]),
        random(3, 2, text_tower.LOOK),
        random(3, 2, 16, 64, seed=1),
    )
    factors = {name: torch.zeros(3, dtype=torch.long) for name in text_tower.READ}
    with torch.no_grad():
        found = teacher(ids, nouns, looks, patches, factors)
        output = teacher.text(ids)
        states, pooled = output.last_hidden_state, output.pooler_output
        total = weights = 0.0
        for row, (first, second) in enumerate(nouns.tolist()):
            for place in range(text_tower.LENGTH):
                if not first or place < first:
                    continue
                later = second and (
                    second <= place < text_tower.FIRST_PATCH or place >= text_tower.SECOND_PATCH
                )
                if not later and place >= text_tower.SECOND_PATCH:
                    continue
                weight = 9.0 if place in (first, second) else 1.0
                total += (
                    weight * (teacher.look(states[row, place]) - looks[row, int(bool(later))]).square().mean()
                )
                weights += weight
        assert torch.allclose(found["look"], total / weights, atol=1e-5)
        error = 0.0
        for thing, start in enumerate((text_tower.FIRST_PATCH, text_tower.SECOND_PATCH)):
            error += (teacher.patch(states[:, start : start + 16]) - patches[:, thing]).square().mean()
        assert torch.allclose(found["patch"], error / 0.3, atol=1e-4)
        assert torch.allclose(
            found["subject"], 0.3 * (teacher.subject(pooled) - looks[:, 0]).square().mean(), atol=1e-5
        )

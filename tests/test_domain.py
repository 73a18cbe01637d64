"""The domain-agnostic tuning encoder: its contrast by loops, its LoRA, its two paths, and tuning from it."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import customize
from customize.adapters.attention import text_layers
from customize.adapters.domain import FILE
from customize.adapters.dual_path import DualPath, install_paths, nearest_words
from customize.adapters.words import LearnedWords
from customize.app.cli import main
from customize.attention_maps import AttentionRecorder
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.data.images import find_images, read_image_file
from customize.errors import UserError
from customize.files import header
from customize.losses.contrastive import nearest_word_contrast
from customize.pipelines import load_pipeline, load_subject_pipeline
from customize.runs import checkpoint
from customize.runs.folder import read_info
from customize.runs.output import sha256
from customize.trainers.methods.domain_encoder import DomainEncoding, features_of, image_encoder_of
from customize.trainers.methods.domain_tuning import DomainTuning
from tiny import BASES, draw, random, tiny

SMALL = {"dim": 16, "depth": 1, "heads": 2, "rank": 2, "num_vectors": 2}
PROMPT = "a photo of <s> dog on grass"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    root = tmp_path_factory.mktemp("subjects")
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def method_of(tower, base: str = "sd15", **options) -> DomainEncoding:
    backbone = wrap(tiny(base), base)
    config = DomainEncoding.Config(image_encoder=str(tower), **(SMALL | options))
    method = DomainEncoding(backbone, config)
    for head in (method.adapter.word, method.adapter.core):  # as if it were trained
        torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return method


def batch_of(identity=(0, 1)) -> dict:
    return {
        "pixels": random(2, 3, 32, 32).clamp(-1, 1),
        "references": random(2, 1, 2, 3, 32, 32),
        "present": torch.ones(2, 1, dtype=torch.bool),
        "prompt": [PROMPT, "a red <s>"],
        "identity": torch.tensor(identity),
        "mask": torch.ones(2, 1, 32, 32),
    }


def test_the_nearest_word_contrast_by_loops():
    vectors, table, labels = random(4, 2, 6), random(9, 6, seed=1), torch.tensor([0, 1, 1, 2])
    total = 0.0
    for i, k in itertools.product(range(4), range(2)):
        own = vectors[i, k]
        near = sorted((torch.cosine_similarity(own, word, dim=0).item() for word in table), reverse=True)
        positive = sum(math.exp(c / 0.2) for c in near[:3])
        others = [vectors[j, k] for j in range(4) if labels[j] != labels[i]]
        negative = sum(math.exp(torch.cosine_similarity(own, v, dim=0).item() / 0.2) for v in others)
        total -= math.log(positive / (positive + negative)) / 8
    found = nearest_word_contrast(vectors, labels, table, count=3, temperature=0.2)
    assert found.item() == pytest.approx(total, rel=1e-4)
    alone = nearest_word_contrast(vectors[:1], labels[:1], table)
    assert alone.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sd3", "flux"])
def test_gradient_checkpointing_changes_no_gradient(base, tower):
    found = []
    for checkpointing in (False, True):
        method = method_of(tower, base, hard_path=0.25 if base in ("sd15", "sdxl") else 0.0)
        method.train()
        if checkpointing:
            method.enable_gradient_checkpointing()
        torch.manual_seed(3)
        loss = sum(method(batch_of()).values())
        found.append(torch.autograd.grad(loss, list(method.trainable().values()), allow_unused=True))
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, atol=1e-6)


def test_dropped_prompts_are_zeros_on_sdxl(tower):
    method = method_of(tower, "sdxl", dropout_text=1.0)
    method.train()
    with torch.no_grad():
        predicted = method.adapter(random(2, 17, 32))
        text = method.condition(batch_of() | {"predicted": predicted}, torch.zeros(2)).text
    assert not any(value.any() for value in text.values())
    method.eval()
    with torch.no_grad():
        text = method.condition(batch_of() | {"predicted": predicted}, torch.zeros(2)).text
    assert all(value.any() for value in text.values())


def test_attention_maps_of_two_paths_are_those_of_the_soft_one():
    backbone = wrap(tiny("sd15"), "sd15")
    soft, hard = (backbone.encode_prompt([prompt])["encoder_hidden_states"] for prompt in (PROMPT, "a cat"))
    noisy, t = random(1, 4, 16, 16), torch.tensor([0.5])
    maps = []
    for text in (soft, torch.cat([soft, hard], 1)):
        if len(maps):
            install_paths(
                backbone.denoiser, 0.0, 16
            )  # nothing of the hard path, so that all layers see the same
        with torch.no_grad(), AttentionRecorder(backbone.denoiser) as recorder:
            backbone.denoise(noisy, t, Condition({"encoder_hidden_states": text}))
        maps.append(recorder.maps)
    for name, expected in maps[0].items():
        assert torch.allclose(maps[1][name], expected, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_each_sample_has_its_own_word_and_lora(base, tower):
    """As if each were denoised alone, with LoRA of its own in the weights."""
    method = method_of(tower, base, hard_path=0.0)
    backbone, adapter = method.backbone, method.adapter
    with torch.no_grad():
        predicted = adapter(random(2, 17, 32))
        text = backbone.encode_prompt(["a photo of a dog", "a red cat"])
        channels = backbone.latent_channels if base != "flux" else 4
        noisy, t = random(2, channels, 8, 8), backbone.nearest_times(torch.tensor([0.4, 0.8]))
        adapter.cores = predicted.cores
        both = backbone.denoise(noisy, t, Condition(text))
        adapter.cores = None
        plain = backbone.denoise(noisy, t, Condition(text))
        assert (both - plain).abs().max() > 1e-4
        for i in range(2):
            weights = {}
            for name, (down, up) in adapter.lora(predicted.cores[i]).items():
                layer = backbone.denoiser.get_submodule(name)
                weights[name] = layer.weight.data.clone()
                layer.weight.data += up @ down
            own = {name: value[i : i + 1] for name, value in text.items()}
            alone = backbone.denoise(noisy[i : i + 1], t[i : i + 1], Condition(own))
            assert torch.allclose(alone[0], both[i], atol=1e-4)
            for name, weight in weights.items():
                backbone.denoiser.get_submodule(name).weight.data = weight


def test_untrained_it_is_the_starting_word_without_lora(tower):
    backbone = wrap(tiny("sd15"), "sd15")
    method = DomainEncoding(backbone, DomainEncoding.Config(image_encoder=str(tower), **SMALL))
    with torch.no_grad():
        predicted = method.adapter(random(2, 17, 32))
    [vectors] = method.adapter.vectors(predicted)
    photo = backbone.text_encoders[0].get_input_embeddings().weight[5]
    assert torch.equal(vectors, photo.expand(2, 2, -1))
    assert not predicted.cores.any()


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_two_paths_are_blended_layer_by_layer(base, tower):
    method = method_of(tower, base)
    denoiser, adapter = method.backbone.denoiser, method.adapter
    name = next(iter(text_layers(denoiser).values()))
    layer = denoiser.get_submodule(name)
    width = layer.to_k.in_features
    hidden, soft, hard = (
        random(2, 16, layer.to_q.in_features),
        random(2, 16, width),
        random(2, 16, width, seed=2),
    )
    with torch.no_grad():
        cores = adapter(random(2, 17, 32)).cores
        adapter.cores = cores
        found = layer(hidden, encoder_hidden_states=torch.cat([soft, hard], 1))
        adapted = layer(hidden, encoder_hidden_states=soft)
        adapter.cores = None
        original = layer(hidden, encoder_hidden_states=hard)
    assert not torch.allclose(adapted, layer(hidden, encoder_hidden_states=soft))
    assert torch.allclose(found, 0.75 * adapted + 0.25 * original, atol=1e-6)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_the_hard_path_reads_the_nearest_words(base, tower):
    method = method_of(tower, base)
    method.eval()
    batch = batch_of()
    with torch.no_grad():
        predicted = method.adapter(random(2, 17, 32))
        condition = method.condition(batch | {"predicted": predicted}, torch.zeros(2))
        soft, hard = condition.text["encoder_hidden_states"].chunk(2, 1)
        vectors = method.adapter.vectors(predicted)
        words = []
        for i in range(2):
            table = method.backbone.text_encoders[0].get_input_embeddings().weight
            near = [torch.cosine_similarity(vectors[0][i, k], table, dim=1).argmax().item() for k in range(2)]
            words.append(near)
        own = nearest_words(vectors[0].flatten(0, 1), method.backbone.text_encoders[0].get_input_embeddings())
    assert own.tolist() == [word for pair in words for word in pair]
    assert soft.shape == hard.shape
    assert not torch.allclose(soft, hard)


def test_the_terms_and_what_they_train(tower):
    method = method_of(tower)
    method.train()
    terms = method(batch_of())
    assert terms.keys() == {"denoise", "nearest_word", "offset"}
    names = list(method.trainable())
    assert all(name.startswith("adapter.") for name in names)
    gradients = torch.autograd.grad(sum(terms.values()), list(method.trainable().values()), allow_unused=True)
    assert all(g is not None and g.any() for g in gradients)


@pytest.fixture
def encoder_run(tower, subjects, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    return customize.train(
        "domain_encoder",
        pretrained_model_name_or_path=tmp_path / "base",
        train_data_dir=subjects,
        image_encoder=tower,
        resolution=32,
        max_train_steps=3,
        train_batch_size=2,
        learning_rate=0.05,
        output_dir=tmp_path / "encoder",
        **SMALL,
    )


def tuning_flags(encoder_run, tower, images) -> dict:
    return {
        "pretrained_model_name_or_path": encoder_run.parent / "base",
        "domain_encoder": encoder_run,
        "image_encoder": tower,
        "instance_data_dir": images,
        "instance_prompt": PROMPT,
        "resolution": 32,
        "max_train_steps": 2,
        "output_dir": encoder_run.parent / "tuned",
    }


@pytest.mark.parametrize("hard_path", [0.0, 0.5])
def test_tuning_starts_from_the_prediction_and_saves_ordinary_files(hard_path, encoder_run, tower, images):
    flags = tuning_flags(encoder_run, tower, images)
    folder = customize.train("domain_tuning", **flags, hard_path=hard_path, learning_rate=1e-9)
    files = {path.name for path in folder.iterdir()}
    assert {"learned_embeds.safetensors", "pytorch_lora_weights.safetensors"} <= files
    pipe, stock = load_pipeline(folder), tiny("sd15")
    stock.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    stock.load_textual_inversion(str(folder / "learned_embeds.safetensors"))
    ours, theirs = draw(pipe, PROMPT), draw(stock, PROMPT)
    assert ("dual_path" in read_info(folder)) == bool(hard_path)
    if hard_path:
        assert abs(ours - theirs).max() > 1e-4
        other = AutoPipelineForImage2Image.from_pipe(pipe)  # takes the soft path alone
        options = {"strength": 1.0, "num_inference_steps": 2, "output_type": "np"}
        assert other(PROMPT, image=Image.new("RGB", (32, 32)), **options).images[0].shape == (32, 32, 3)
    else:
        assert abs(ours - theirs).max() < 2e-6


def test_tuning_moves_word_and_lora(encoder_run, tower, images):
    flags = tuning_flags(encoder_run, tower, images)
    still = draw(load_pipeline(customize.train("domain_tuning", **flags, learning_rate=1e-9)), PROMPT)
    flags |= {"learning_rate": 0.05, "token_learning_rate": 0.05, "overwrite_output_dir": True}
    assert abs(draw(load_pipeline(customize.train("domain_tuning", **flags)), PROMPT) - still).max() > 1e-4


def test_the_encoder_says_how_images_become_square_and_which_model_reads_them(encoder_run, tower, images):
    info = read_info(encoder_run)
    info["config"]["reference_fit"] = "pad"
    (encoder_run / "run.json").write_text(json.dumps(info))
    seen = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(
        "customize.trainers.methods.domain_tuning.image_encoder_of",
        lambda backbone, name, fit: seen.append((name, fit)) or image_encoder_of(backbone, name, fit),
    )
    flags = tuning_flags(encoder_run, tower, images)
    del flags["image_encoder"]
    customize.train("domain_tuning", **flags)
    monkey.undo()
    assert seen == [(str(tower), "pad")]


def test_a_resumed_run_refuses_another_encoder(encoder_run, tower, images, tmp_path):
    flags = tuning_flags(encoder_run, tower, images) | {"checkpointing_steps": 1}
    customize.train("domain_tuning", **flags)
    moved = shutil.copytree(encoder_run, tmp_path / "moved")
    again = flags | {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    customize.train("domain_tuning", **(again | {"domain_encoder": moved}))
    state, about = load_file(moved / FILE), header(moved / FILE)
    save_file(state | {"word.bias": state["word.bias"] + 1}, moved / FILE, about)
    info = read_info(moved)
    info["files"][FILE] = sha256(moved / FILE)
    (moved / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="domain_encoder: it is not the one"):
        customize.train("domain_tuning", **(again | {"domain_encoder": moved, "max_train_steps": 4}))


def test_two_subjects_in_an_image_are_refused_before_training(tower, subjects, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    flags = {"pretrained_model_name_or_path": tmp_path / "base", "train_data_dir": subjects, "resolution": 32}
    with pytest.raises(UserError, match="leave second_subject_rate out"):
        customize.train(
            "domain_encoder",
            **flags,
            image_encoder=tower,
            second_subject_rate=0.5,
            output_dir=tmp_path / "run",
        )


def test_what_cannot_be_drawn_with_a_hard_path_is_refused(encoder_run, tower, images, capsys):
    folder = customize.train("domain_tuning", **tuning_flags(encoder_run, tower, images), hard_path=0.5)
    start = str(images / "0.png")
    for flag in ("--init_image", "--subject_images"):
        assert main(["generate", str(folder), PROMPT, flag, start]) == 2
        assert f"{flag}: '{folder}' draws with a hard path" in capsys.readouterr().err
    with pytest.raises(UserError, match="draws with a hard path"):
        load_subject_pipeline(folder)
    assert main(["generate", str(folder), PROMPT, "--context_steps", "2"]) == 2
    assert "compares a word with its class's" in capsys.readouterr().err
    pipe = load_pipeline(folder)
    other = {"placeholder_token": "<t>", "instance_prompt": "a <t>", "output_dir": folder.parent / "other"}
    flags = tuning_flags(encoder_run, tower, images) | other
    second = customize.train("domain_tuning", **flags, hard_path=0.5)
    with pytest.raises(UserError, match="draws with a hard path already"):
        checkpoint.load(second, load_pipeline(folder))
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)[:2]
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    given = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    found = pipe(**given, generator=torch.Generator().manual_seed(0), **options).images
    assert np.array_equal(found, expected)


MISTAKES = {
    "no run": ({"domain_encoder": "nowhere"}, "'nowhere' is no run of domain_encoder"),
    "two words": ({"placeholder_token": "<a>+<b>", "instance_prompt": "<a>"}, "learns one word"),
    "another base": ({"pretrained_model_name_or_path": "XL"}, "trained with another base model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, encoder_run, tower, images, monkeypatch):
    changes, said = MISTAKES[name]
    if "pretrained_model_name_or_path" in changes:
        tiny("sdxl").save_pretrained(encoder_run.parent / "xl")
        changes = {"pretrained_model_name_or_path": encoder_run.parent / "xl"}
    monkeypatch.setattr(DomainTuning, "forward", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match=said):
        customize.train("domain_tuning", **(tuning_flags(encoder_run, tower, images) | changes))


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_two_paths_need_a_unet(base, tower):
    with pytest.raises(UserError, match="--hard_path needs a UNet"):
        method_of(tower, base)
    with pytest.raises(UserError, match="--hard_path needs a UNet"):
        DomainTuning(wrap(tiny(base), base), DomainTuning.Config(domain_encoder="none", hard_path=0.5), [])


def test_a_text_of_the_usual_length_takes_the_soft_path():
    pipe = tiny("sd15")
    before = draw(pipe, "a photo of a dog")
    install_paths(pipe.unet, 0.5, 16)
    assert (draw(pipe, "a photo of a dog") == before).all()


def test_the_hard_path_of_a_pipeline_is_that_of_the_ordinary_word():
    """With the original weights and the nearest word on both paths it draws the ordinary word."""
    backbone = wrap(tiny("sd15"), "sd15")
    words = LearnedWords(backbone, {"<s>": "dog"}, 1)
    pipe, table = backbone.pipe, backbone.text_encoders[0].get_input_embeddings()
    expected = draw(pipe, "a photo of dog")
    path = DualPath(pipe, {"<s>": 1}, 1.0)
    with torch.no_grad():
        words.vectors[0] += random(1, 16)
    dog = backbone.tokenizers[0].convert_tokens_to_ids("dog")
    path.install([[dog]])
    assert abs(draw(pipe, "a photo of <s>") - expected).max() < 1e-5
    assert table.num_embeddings == 32


@pytest.mark.parametrize("damage", ["cut", "header", "no size", "size", "nan", "changed"])
def test_a_damaged_encoder_is_refused(damage, encoder_run, tower, images):
    path = encoder_run / FILE
    state, about = load_file(path), header(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "header":
        save_file(state, path, {"domain": '{"rank": 2}'})
    elif damage == "no size":  # which torch answers with an error of its own
        save_file(state, path, {"domain": about["domain"].replace('"heads": 2', '"heads": 0')})
    elif damage == "changed":
        save_file(state | {"word.bias": state["word.bias"] + 1}, path, about)
    elif damage == "size":
        save_file(state | {"word.bias": torch.zeros(3)}, path, about)
    else:
        save_file(state | {"word.bias": state["word.bias"] * torch.nan}, path, about)
    if damage != "changed":  # as if it had been written so
        info = read_info(encoder_run)
        info["files"][FILE] = sha256(path)
        (encoder_run / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"damaged|cannot be read|not finite|NaN|changed"):
        customize.train("domain_tuning", **tuning_flags(encoder_run, tower, images))


@pytest.mark.parametrize("base", BASES)
def test_tuning_starts_as_the_encoder_draws_on_every_base_model(base, tower, images, tmp_path):
    """The word and the LoRA in the tuned model's weights are those that the encoder applies on the fly."""
    encoding = method_of(tower, base, hard_path=0.0)
    checkpoint.save(
        tmp_path, encoding.adapters, {"base_model": base, "method": "domain_encoder", "config": {}}
    )
    backbone = wrap(tiny(base), base)
    config = DomainTuning.Config(domain_encoder=str(tmp_path), image_encoder=str(tower))
    tuning = DomainTuning(backbone, config, [])
    files = find_images(images, PROMPT)[:1]
    tuning.use_images(files)
    shown = encoding.image_encoder.pixels([read_image_file(file)[0] for file in files])
    channels = 4 if base == "flux" else backbone.latent_channels
    noisy, t = random(1, channels, 8, 8), backbone.nearest_times(torch.tensor([0.5]))
    with torch.no_grad():
        predicted = encoding.adapter(features_of(encoding.image_encoder, shown))
        batch = {"predicted": predicted, "prompt": [PROMPT], "present": torch.ones(1, 1)}
        expected_text = encoding.eval().condition(batch, t).text
        encoding.adapter.cores = predicted.cores
        expected = encoding.backbone.denoise(noisy, t, Condition(expected_text))
        found = backbone.denoise(noisy, t, Condition(backbone.encode_prompt([PROMPT])))
    assert torch.allclose(found, expected, atol=1e-4)
    tuning.train()
    terms = tuning({"pixels": random(1, 3, 32, 32).clamp(-1, 1), "prompt": [PROMPT]})
    gradients = torch.autograd.grad(sum(terms.values()), list(tuning.trainable().values()), allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) > 0.7 * len(gradients)

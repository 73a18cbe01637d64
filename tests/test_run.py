"""Whole runs, as the command line starts them, on a tiny base model on disk."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import customize
from customize.backbones.base import Backbone, Condition, Step
from customize.backbones.families import wrap
from customize.backbones.stable_diffusion import SD
from customize.data.concepts import Concept
from customize.errors import UserError
from customize.pipelines import load_pipeline
from customize.runs import checkpoint, hub
from customize.runs.card import write_card
from customize.runs.folder import read_info
from customize.runs.output import save_image
from customize.trainers.launch import run, usage
from customize.trainers.methods.base import Method
from customize.trainers.methods.dreambooth import DreamBooth
from tiny import tiny

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for base in ("sd15", "sdxl"):
        tiny(base).save_pretrained(folder / base)
    return folder


@pytest.fixture
def start(bases, images, tmp_path):
    """Starts a run with these settings; `None` leaves a flag out, `True` gives it alone."""
    flags = {
        "instance_data_dir": images,
        "instance_prompt": "a photo of sks dog",
        "resolution": 16,
        "max_train_steps": 3,
    }
    flags |= {
        "pretrained_model_name_or_path": bases / "sd15",
        "output_dir": tmp_path / "run",
        "learning_rate": 1e-2,
    }

    def started(method: str = "dreambooth", **changes) -> Path:
        rank = {} if method == "textual_inversion" else {"rank": 2}
        words = [method]
        for name, value in (flags | rank | changes).items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [] if value is None else [f"--{name}", *map(str, values)]
        return run(words)

    return started


@pytest.fixture
def steps(monkeypatch):
    """Every step of a run of DreamBooth with the terms that came of it."""
    seen, losses = [], DreamBooth.losses

    def recorded(self, step):
        terms = losses(self, step)
        seen.append((step, {name: value.detach() for name, value in terms.items()}))
        return terms

    monkeypatch.setattr(DreamBooth, "losses", recorded)
    return seen


def counted(monkeypatch, owner, name: str) -> list:
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    return calls


def drawn(pipe, prompt: str, seed: int = 0, steps: int = 25, **more) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    more["generator"] = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, height=16, width=16, num_inference_steps=steps, **more).images[0]).astype(
        int
    )


def folder_of(path: Path, sizes: list[tuple[int, int]]) -> Path:
    path.mkdir()
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{i}.png")
    return path


# what a run leaves


def test_the_folder_and_its_description(start, bases, images):
    folder = start(snr_gamma=5)
    info = read_info(folder)
    assert (info["format"], info["method"], info["step"], info["words"]) == (1, "dreambooth", 3, {})
    assert info["base_model"] == str(bases / "sd15")
    assert info["config"]["rank"] == 2
    assert info["config"]["snr_gamma"] == 5.0
    assert info["config"]["instance_prompt"] == "a photo of sks dog"
    assert len(info["dataset"]) == 4
    assert (
        info["libraries"]["torch"] == torch.__version__.split("+")[0]
        or info["libraries"]["torch"] == torch.__version__
    )
    assert {path.name for path in folder.iterdir()} == {"run.json", LORA, "README.md", "progress.jsonl"}


def test_two_concepts(start, tmp_path, steps):
    folders = folder_of(tmp_path / "a", [(32, 32)] * 2), folder_of(tmp_path / "b", [(32, 32)] * 3)
    prompts = "a photo of sks dog", "a red toy"
    rows = [
        {"instance_data_dir": str(f), "instance_prompt": p} for f, p in zip(folders, prompts, strict=True)
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    folder = start(
        instance_data_dir=None, instance_prompt=None, concepts_list=tmp_path / "list.json", max_train_steps=5
    )
    shown = [(step.batch["prompt"][0], step.batch["concept"].item()) for step, _ in steps]
    assert sorted(shown) == [(prompts[0], 0)] * 2 + [(prompts[1], 1)] * 3
    text = (folder / "README.md").read_text()
    assert all(f"`{prompt}`" in text for prompt in prompts)


def test_two_words_of_two_concepts(start, tmp_path):
    prompts = "a photo of <toy>", "a red <pet>"
    rows = [
        {"instance_data_dir": str(folder_of(tmp_path / p[-4:-1], [(32, 32)])), "instance_prompt": p}
        for p in prompts
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    words = {"placeholder_token": "<toy>+<pet>", "initializer_token": "toy+dog", "num_vectors": 2}
    options = {
        "instance_data_dir": None,
        "instance_prompt": None,
        "concepts_list": tmp_path / "list.json",
        "learning_rate": 0.1,
    }
    folder = start("textual_inversion", **words, **options)
    files = read_info(folder)["words"]
    assert list(files) == ["<toy>", "<pet>"]
    assert len(set(files.values())) == 2
    pipe = load_pipeline(folder)
    for word, name in files.items():
        [(key, vectors)] = load_file(folder / name).items()
        ids = pipe.tokenizer.convert_tokens_to_ids([word, f"{word}_1"])
        assert key == word
        assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], vectors)
        start_row = (
            tiny("sd15")
            .text_encoder.get_input_embeddings()
            .weight[pipe.tokenizer.convert_tokens_to_ids(word[1:-1].replace("pet", "dog"))]
        )
        assert all((vector - start_row).abs().max() > 1e-3 for vector in vectors)


def test_load_pipeline_of_run_checkpoint_and_best(start, tmp_path):
    options = {"checkpointing_steps": 2, "holdout": 1, "validation_steps": 1, "learning_rate": 5e-2}
    folder = start(max_train_steps=4, **options)
    short = start(max_train_steps=2, output_dir=tmp_path / "short", **options)
    best = read_info(folder / "best")["step"]
    prompt = "a photo of sks dog"
    found = {
        name: drawn(load_pipeline(folder / name), prompt, steps=3)
        for name in (".", "checkpoint-2", "checkpoint-4", "best")
    }
    assert np.array_equal(found["checkpoint-2"], drawn(load_pipeline(str(short)), prompt, steps=3))
    assert np.array_equal(found["checkpoint-4"], found["."])
    assert not np.array_equal(found["checkpoint-2"], found["."])
    assert not np.array_equal(found["."], drawn(tiny("sd15"), prompt, steps=3))
    assert 1 <= best <= 4
    if best in (2, 4):
        assert np.array_equal(found["best"], found[f"checkpoint-{best}"])


def test_load_pipeline_of_a_base(bases):
    assert np.array_equal(
        drawn(load_pipeline(bases / "sd15"), "a dog", steps=2), drawn(tiny("sd15"), "a dog", steps=2)
    )


def test_a_trained_component_is_loaded_from_the_run(start):
    folder = start(full_finetune=True, rank=None, learning_rate=1e-3)
    pipe = load_pipeline(folder)
    trained = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    base = tiny("sd15").unet.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in pipe.unet.state_dict().items())
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    assert not pipe.unet.training


# prior preservation


def test_class_images_are_drawn_once_and_used_again(start, monkeypatch, tmp_path, steps, late_denoiser):
    calls = counted(monkeypatch, StableDiffusionPipeline, "__call__")
    options = {
        "with_prior_preservation": True,
        "class_prompt": "a photo of the dog",
        "num_class_images": 3,
        "sample_batch_size": 2,
        "overwrite_output_dir": True,
    }
    folder = start(**options)
    made = {path.name: path.read_bytes() for path in sorted((folder / "class_images" / "0").iterdir())}
    assert list(made) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert len(calls) == 2
    assert made["class-00000.png"] != made["class-00001.png"]
    assert all({"denoise", "prior"} == terms.keys() for _, terms in steps)
    assert all(step.batch["prompt"] == ["a photo of sks dog", "a photo of the dog"] for step, _ in steps)
    first = load_file(folder / LORA)
    start(**options)
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in (folder / "class_images" / "0").iterdir()} == made
    second = load_file(folder / LORA)
    assert all(
        torch.equal(first[name], second[name]) for name in first
    )  # drawing them leaves no trace in training

    start(**options | {"num_class_images": 4})
    assert len(calls) == 3
    assert {name: (folder / "class_images" / "0" / name).read_bytes() for name in made} == made


def test_a_class_image_that_was_removed_is_drawn_again(start):
    options = {
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 2,
        "max_train_steps": 1,
        "overwrite_output_dir": True,
    }
    made = start(**options) / "class_images" / "0"
    kept = (made / "class-00001.png").read_bytes()
    (made / "class-00000.png").unlink()
    start(**options)
    assert (made / "class-00001.png").read_bytes() == kept
    assert len(list(made.iterdir())) == 2


def test_a_half_written_class_image_does_not_stop_the_next_run(start, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / ".00000.partial").write_bytes(b"")
    start(
        with_prior_preservation=True,
        class_prompt="a dog",
        num_class_images=1,
        class_data_dir=folder,
        max_train_steps=1,
    )
    assert (folder / "class-00000.png").exists()


def test_your_own_class_images_are_enough(start, tmp_path, monkeypatch, steps):
    calls = counted(monkeypatch, StableDiffusionPipeline, "__call__")
    folder = folder_of(tmp_path / "class", [(32, 32)] * 4)
    start(
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=folder,
        num_class_images=2,
        max_train_steps=4,
    )
    assert not calls
    assert len({step.batch["index"][1].item() for step, _ in steps}) == 2
    assert {path.name for path in folder.iterdir()} == {f"{i}.png" for i in range(4)}


def method_for(**options) -> DreamBooth:
    concepts = [Concept("", "a photo of sks dog", "a dog")]
    return DreamBooth(wrap(tiny("sd15")), DreamBooth.Config(rank=2, **options), concepts)


def made_up_step(is_prior: list[bool], mask: torch.Tensor | None = None) -> Step:
    generator = torch.Generator().manual_seed(0)
    n = len(is_prior)
    target, prediction = (torch.randn(n, 4, 4, 4, generator=generator) for _ in range(2))
    batch = {"is_prior": torch.tensor(is_prior), "concept": torch.zeros(n, dtype=torch.long)} | (
        {} if mask is None else {"mask": mask}
    )
    t = torch.tensor([0.01, 0.3, 0.6, 0.99][:n])
    return Step(target, target, target, t, target, Condition({}), prediction, batch)


def test_the_prior_loss_by_hand():
    step = made_up_step([False, True, True, False])
    error = [(step.prediction[i] - step.target[i]).square().mean().item() for i in range(4)]
    terms = method_for(with_prior_preservation=True, prior_loss_weight=0.3).losses(step)
    assert terms["denoise"].item() == pytest.approx((error[0] + error[3]) / 2, rel=1e-5)
    assert terms["prior"].item() == pytest.approx(0.3 * (error[1] + error[2]) / 2, rel=1e-5)


def test_min_snr_and_masks_weight_every_item():
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    step = made_up_step([False, False], mask)
    method = method_for(snr_gamma=2.0)
    expected = 0.0
    for i in range(2):
        alpha = method.backbone.noise.alphas_cumprod[round(float(step.t[i]) * 1000)].item()
        snr = alpha / (1 - alpha)
        squares = (step.prediction[i] - step.target[i]).square()
        expected += min(snr, 2.0) / snr * ((squares * mask[i]).sum() / (4 * mask[i].sum())).item() / 2
    assert method.losses(step)["denoise"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", [None, True])
def test_the_teachers_loss_is_zero_at_first_and_then_the_distance_to_the_base(start, steps, text, bases):
    start(
        with_prior_preservation=True,
        prior_source="teacher",
        class_prompt="a dog",
        prior_loss_weight=2,
        train_text_encoder=text,
    )
    values = [terms["prior"].item() for _, terms in steps]
    assert values[0] == 0.0
    assert all(value > 0 for value in values[1:])


def test_the_teacher_by_hand():
    method, base = (
        method_for(with_prior_preservation=True, prior_source="teacher", prior_loss_weight=0.5),
        wrap(tiny("sd15")),
    )
    with torch.no_grad():
        for name, p in method.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    step = made_up_step([False, False])
    text = base.encode_prompt(["a dog", "a dog"])
    moved, kept = (b.denoise(step.noisy, step.t, Condition(text)) for b in (method.backbone, base))
    prior = method.losses(step)["prior"]
    assert prior.item() == pytest.approx(0.5 * (moved - kept).square().mean().item(), rel=1e-4)
    prior.backward()
    assert any(p.grad is not None and p.grad.any() for p in method.trainable().values())


# data


def test_masks_reach_the_loss(start, images, steps):
    for i in range(4):
        mask = Image.new("L", (40, 32), 0)
        mask.paste(255, (0, 0, 20, 32))  # the left half of the square crop
        mask.save(images / f"{i}.mask.png")
    start(unmasked_weight=0.25)
    for step, terms in steps:
        mask = step.batch["mask"][0, 0]
        assert mask.shape == step.latents.shape[-2:]
        assert mask[:, :3].min() > 0.99
        assert mask[:, -3:].max() == pytest.approx(0.25, abs=0.01)
        total = weights = 0.0
        for c in range(4):
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    total += (
                        mask[y, x].item()
                        * (step.prediction[0, c, y, x] - step.target[0, c, y, x]).item() ** 2
                    )
                    weights += mask[y, x].item()
        assert terms["denoise"].item() == pytest.approx(total / weights, rel=1e-4)


@pytest.mark.parametrize("cached", [True, None])
def test_aspect_ratio_buckets(start, tmp_path, steps, cached):
    folder = folder_of(tmp_path / "mixed", [(64, 32), (32, 64), (40, 40)])
    cache = {} if cached else {"no_cache_latents": True}
    start(
        instance_data_dir=folder,
        use_aspect_ratio_buckets=True,
        resolution=32,
        max_train_steps=3,
        train_batch_size=2,
        **cache,
    )
    shapes = {step.batch["index"][0].item(): tuple(step.latents.shape) for step, _ in steps}
    assert shapes.keys() == {0, 1, 2}
    assert shapes[2] == (2, 4, 16, 16)
    assert shapes[0][2] < 16 < shapes[0][3]  # wide
    assert shapes[1] == (2, 4, shapes[0][3], shapes[0][2])
    assert all(100 <= h * w <= 256 * 1.2 for _, _, h, w in shapes.values())


def test_a_second_run_reads_the_cache(start, tmp_path, monkeypatch):
    images, prompts = counted(monkeypatch, Backbone, "moments"), counted(monkeypatch, SD, "_encode_prompt")
    options = {"cache_dir": tmp_path / "cache", "random_flip": True}
    first = load_file(start(**options) / LORA)
    assert len(images) == 8  # four and their mirror images
    assert len(prompts) == 2  # the caption and the empty prompt
    second = load_file(start(**options, output_dir=tmp_path / "again") / LORA)
    assert (len(images), len(prompts)) == (8, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    start(**options, resolution=24, output_dir=tmp_path / "larger")
    assert (len(images), len(prompts)) == (16, 2)


def test_cached_and_live_encoding_train_alike(start, tmp_path):
    cached = load_file(start() / LORA)
    live = load_file(start(no_cache_latents=True, output_dir=tmp_path / "live") / LORA)
    assert all(torch.allclose(cached[name], live[name], atol=1e-4) for name in cached)


def test_training_words_keeps_the_text_encoder(start, monkeypatch):
    prompts = counted(monkeypatch, SD, "_encode_prompt")
    start("textual_inversion", placeholder_token="<toy>", initializer_token="dog", instance_prompt="a <toy>")
    assert len(prompts) == 3


# validation


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_validation_images_are_what_the_run_draws(start, bases, base):
    """From the cached embeddings, the text encoders being gone, and then from the loaded run."""
    prompts = ["a photo of sks dog", "a red cat"]
    options = {"validation_prompt": prompts, "num_validation_images": 2, "validation_steps": 2, "seed": 7}
    folder = start(pretrained_model_name_or_path=bases / base, learning_rate=3e-2, **options)
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-000002.png", "step-000003.png"}
    page = np.asarray(Image.open(folder / "samples" / "step-000003.png")).astype(int)
    assert page.shape == (16, 64, 3)
    pipe = load_pipeline(folder)
    expected = np.concatenate([drawn(pipe, prompt, 7 + i) for prompt in prompts for i in range(2)], 1)
    assert np.abs(page - expected).max() <= 1
    assert "samples/step-000003.png" in (folder / "README.md").read_text()


def test_validation_images_are_drawn_as_asked(start):
    asked = {"validation_inference_steps": 4, "validation_guidance_scale": 1.5}
    folder = start(learning_rate=3e-2, validation_prompt=["a red cat"], validation_steps=3, **asked)
    page = np.asarray(Image.open(folder / "samples" / "step-000003.png")).astype(int)
    pipe = load_pipeline(folder)
    assert np.abs(page - drawn(pipe, "a red cat", steps=4, guidance_scale=1.5)).max() <= 1
    assert np.abs(page - drawn(pipe, "a red cat", steps=4)).max() > 1


def test_early_stopping_ends_a_run(start, monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("customize.trainers.validation.validation_loss", lambda *a, **k: next(losses))
    folder = start(max_train_steps=9, validation_steps=1, early_stopping_patience=2, holdout=1)
    assert read_info(folder)["step"] == 3
    assert read_info(folder / "best")["step"] == 1
    assert len(read_info(folder)["dataset"]) == 3
    assert "in 3 steps" in (folder / "README.md").read_text()


# mistakes

WORDS = {"placeholder_token": "<toy>", "initializer_token": "dog", "instance_prompt": "a photo of <toy>"}
MISTAKES = {
    "resolution": ("dreambooth", {"resolution": 17}, "resolution 17.*16 or 18"),
    "unknown flag": ("dreambooth", {"rnak": 4}, "rnak.*rank"),
    "flag of another method": ("textual_inversion", WORDS | {"rank": 4}, "rank"),
    "method": ("dreamboth", {}, "dreamboth.*dreambooth"),
    "folder": ("dreambooth", {"instance_data_dir": "/nowhere"}, "instance_data_dir"),
    "base": ("dreambooth", {"pretrained_model_name_or_path": "/nowhere"}, "pretrained_model_name_or_path"),
    "word": (
        "textual_inversion",
        WORDS | {"placeholder_token": "dog", "instance_prompt": "a dog"},
        "'dog' is .*already",
    ),
    "no word": ("textual_inversion", WORDS | {"placeholder_token": None}, "placeholder_token"),
    "words": ("textual_inversion", WORDS | {"placeholder_token": "<toy>+<pet>"}, "as many"),
    "vectors": ("textual_inversion", WORDS | {"num_vectors": 0}, "num_vectors"),
    "prompt": (
        "textual_inversion",
        WORDS | {"instance_prompt": "a photo of a toy"},
        "does not contain <toy>",
    ),
    "pivotal prompt": (
        "pivotal_tuning",
        WORDS | {"instance_prompt": "a photo of a toy"},
        "does not contain <toy>",
    ),
    "long prompt": ("dreambooth", {"instance_prompt": "a dog " * 20}, "tokens"),
    "early stopping": ("dreambooth", {"early_stopping_patience": 2}, "holdout"),
    "holdout": ("dreambooth", {"holdout": 4}, "holdout"),
    "score": ("dreambooth", {"validation_metric": "score"}, "validation_prompt"),
    "score prompt": (
        "dreambooth",
        {"validation_metric": "score", "validation_prompt": "a dog"},
        "needs 'sks dog' in every",
    ),
    "encoder": (
        "dreambooth",
        {"validation_metric": "score", "validation_prompt": "a red sks dog", "validation_clip": "/nowhere"},
        "--validation_clip: '/nowhere' could not be loaded",
    ),
    "class prompt": ("dreambooth", {"with_prior_preservation": True}, "class_prompt"),
    "teacher": (
        "dreambooth",
        {
            "with_prior_preservation": True,
            "class_prompt": "a dog",
            "prior_source": "teacher",
            "full_finetune": True,
        },
        "LoRA",
    ),
    "hub": ("dreambooth", {"push_to_hub": True}, "hub_model_id"),
    "steps": ("dreambooth", {"max_train_steps": 0}, "max_train_steps"),
    "batch": ("dreambooth", {"train_batch_size": 0}, "train_batch_size"),
    "layers": ("dreambooth", {"lora_layers": "nothing"}, "lora_layers"),
    "resume": ("dreambooth", {"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"),
    "images": (
        "dreambooth",
        {"num_validation_images": 0, "validation_prompt": "a dog"},
        "num_validation_images",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_and_leave_no_result(start, tmp_path, name):
    method, changes, said = MISTAKES[name]
    with pytest.raises(UserError, match=rf"(?s){said}") as error:
        start(method, **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_min_snr_is_refused_for_flow_models(start, tmp_path):
    tiny("flux").save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match="snr_gamma"):
        start(pretrained_model_name_or_path=tmp_path / "flux", snr_gamma=5)


def test_a_base_without_a_component(start, bases, tmp_path):
    folder = shutil.copytree(bases / "sd15", tmp_path / "base")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="lacks its component 'vae'"):
        start(pretrained_model_name_or_path=folder)


def test_captions_without_the_new_word_teach_nothing(start, images):
    for i in range(4):
        (images / f"{i}.txt").write_text("a red toy on grass")
    with pytest.raises(UserError, match="<toy>"):
        start("textual_inversion", **WORDS)


@pytest.fixture
def finished(start):
    return start(max_train_steps=1)


def test_a_run_of_a_later_version(finished):
    info = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(UserError, match=r"later version.*format 2.*pip install -U customize"):
        load_pipeline(finished)


def test_a_damaged_description(finished):
    (finished / "run.json").write_text('{"format": 1, "ba')
    with pytest.raises(UserError, match=r"run\.json.*damaged"):
        load_pipeline(finished)


def test_a_damaged_adapter(finished):
    (finished / LORA).write_bytes((finished / LORA).read_bytes()[:100])
    with pytest.raises(UserError, match="not the file that the run wrote"):
        load_pipeline(finished)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder.*run\.json"):
        load_pipeline(tmp_path)


def test_a_base_that_has_moved(finished):
    info = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(info | {"base_model": "/moved/away"}))
    with pytest.raises(UserError, match="/moved/away"):
        load_pipeline(finished)


def test_a_class_prompt_that_is_too_long_is_told_before_its_images_are_drawn(start, monkeypatch):
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda *_, **__: pytest.fail("an image was drawn")
    )
    with pytest.raises(UserError, match=r"class prompt 'a dog.*has 202 tokens, more than 16") as error:
        start(with_prior_preservation=True, class_prompt="a dog " * 100, num_class_images=1)
    assert len(str(error.value)) < 300  # it is not quoted whole


# the card and the hub


def test_the_cards_front_matter(start):
    card = ModelCard.load(start(checkpointing_steps=2) / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["instance_prompt"] == "a photo of sks dog"
    assert {"text-to-image", "diffusers", "dreambooth", "lora"} <= set(data["tags"])
    assert "base_model" not in data  # a folder of this machine means nothing on the hub
    assert card.text.count("`a photo of sks dog`") == 1
    assert 'pipe("a photo of sks dog")' in card.text
    assert "load_lora_weights" in card.text
    assert "| rank | 2 |" in card.text


@pytest.mark.parametrize("prompt", ['a "photo": of sks #dog', "- sks: [dog] & *cat", "sks 'dog' {x} | y"])
def test_the_card_of_any_prompt_parses(finished, prompt):
    info = read_info(finished) | {"base_model": "someone/model", "step": 1}
    (finished / "run.json").write_text(json.dumps(info))
    write_card(finished, [Concept("", prompt)])
    data = ModelCard.load(finished / "README.md").data.to_dict()
    assert data["instance_prompt"] == prompt
    assert data["base_model"] == "someone/model"


def test_the_code_of_the_card_is_code(start):
    """Every Python block compiles, whatever the prompt holds."""
    text = (start(max_train_steps=1, instance_prompt='a "photo" of sks dog') / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


def test_the_card_of_words_says_how_to_load_them(start):
    folder = start("textual_inversion", **WORDS)
    text = (folder / "README.md").read_text()
    assert 'load_textual_inversion("run", weight_name="learned_embeds.safetensors", token="<toy>")' in text
    assert "lora" not in ModelCard.load(folder / "README.md").data.tags


class FakeApi:
    calls: list = []  # noqa: RUF012

    private: bool | None = None  # of a repository that is there already

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        self.private = private if self.private is None else self.private
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id, operations, commit_message):
        contents = {}
        for operation in operations:
            with operation.as_file() as file:
                contents[operation.path_in_repo] = file.read()
        self.calls.append(("upload", repo_id, contents))


@pytest.fixture
def uploads(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", calls := [])
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    return calls


def test_push_uploads_the_run_without_its_checkpoints(start, uploads, capsys):
    options = {
        "push_to_hub": True,
        "hub_model_id": "me/dog",
        "checkpointing_steps": 1,
        "validation_prompt": ["a dog"],
    }
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 1}
    folder = start(**options, **prior, report_to="tensorboard")
    assert (folder / "checkpoint-3" / LORA).exists()
    assert any((folder / "logs").rglob("*"))
    assert uploads[0] == ("create", "me/dog", True)
    assert uploads[1][:2] == ("upload", "me/dog")
    assert uploads[1][2].keys() == {"README.md", LORA, "run.json", "samples/step-000003.png"}
    assert uploads[1][2][LORA] == (folder / LORA).read_bytes()
    said = capsys.readouterr().out
    assert "https://huggingface.co/me/dog" in said
    assert said.index(LORA) < said.index("https://")  # the list comes first


def test_push_uploads_nothing_that_a_user_put_into_the_folder(finished, uploads):
    for name in (
        ".env",
        "holiday.jpg",
        "wandb/run-1/output.log",
        "generated/a-dog-0.png",
        "cache/0.safetensors",
        "notes.md",
    ):
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_bytes(b"secret")
    (finished / "samples").mkdir()
    (finished / "samples" / "mother.png").write_bytes(b"secret")
    hub.push(finished, "me/dog")
    assert uploads[1][2].keys() == {"README.md", LORA, "run.json"}


def test_what_is_uploaded_names_no_place_on_this_machine(start, bases, images, tmp_path, uploads):
    """The base model, the images, the caches and the outputs all lie in folders whose names are in no
    uploaded byte."""
    options = {
        "full_finetune": True,
        "rank": None,
        "cache_dir": tmp_path / "cache",
        "validation_prompt": ["a dog"],
    }
    folder = start(max_train_steps=1, **options)
    generated = tmp_path / "generated.png"
    parameters = json.dumps(
        {"run": str(folder), "subject_images": [str(images / "0.png")], "prompt": "a dog"}
    )
    save_image(Image.new("RGB", (8, 8)), generated, texts={"parameters": parameters})
    hub.push(folder, "me/dog", samples=[str(generated)])
    contents = uploads[1][2]
    assert {
        "unet/config.json",
        "samples/generated.png",
        "samples/step-000001.png",
        "README.md",
        "run.json",
    } <= contents.keys()
    for name, content in contents.items():
        for place in (str(tmp_path), str(bases), str(Path.home()) + "/", "/tmp/"):
            assert place.encode() not in content, f"{name} names {place}"
    info = json.loads(contents["run.json"])
    assert (info["base_model"], info["config"]["instance_data_dir"]) == ("sd15", "images")
    with Image.open(io.BytesIO(contents["samples/generated.png"])) as image:
        assert json.loads(image.info["parameters"]) == {
            "run": "run",
            "subject_images": ["0.png"],
            "prompt": "a dog",
        }


def test_an_uploaded_run_can_be_loaded_after_download(start, bases, uploads, tmp_path):
    hub.push(start(max_train_steps=1, full_finetune=True, rank=None), "me/dog")
    for name, content in uploads[1][2].items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    checkpoint.open_run(tmp_path / "downloaded")  # the hashes are those of what was uploaded


def test_a_dry_run_uploads_nothing(finished, uploads, capsys):
    assert "nothing was uploaded" in hub.push(finished, "me/dog", dry_run=True)
    assert uploads == []
    assert LORA in capsys.readouterr().out


def test_a_public_repository_must_be_asked_for(finished, uploads, monkeypatch):
    monkeypatch.setattr(FakeApi, "private", False)
    with pytest.raises(UserError, match=r"me/dog is public.*--no_private"):
        hub.push(finished, "me/dog")
    assert [call[0] for call in uploads] == ["create"]
    hub.push(finished, "me/dog", private=False)
    assert uploads[-1][0] == "upload"


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), ValueError("Repo id must be"), RuntimeError("")]
)
def test_without_a_network_push_says_how_to_push_later(finished, uploads, monkeypatch, error):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(FakeApi, "create_repo", failing)
    with pytest.raises(UserError, match="not uploaded") as said:
        hub.push(finished, "me/dog")
    assert f"customize push {finished} me/dog" in str(said.value)
    assert "\n" not in str(said.value)


def test_a_finished_training_survives_a_failing_upload(start, monkeypatch):
    with pytest.raises(UserError, match=r"is complete, but was not uploaded.*customize push"):
        start(push_to_hub=True, hub_model_id="me/dog")  # no test reaches the network
    with pytest.raises(UserError, match="holds an earlier run"):
        start()  # the run is there


@pytest.mark.parametrize("sample", ["nowhere.png", "notes.txt"])
def test_a_sample_that_is_no_image(finished, uploads, tmp_path, sample):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="--samples"):
        hub.push(finished, "me/dog", samples=[str(tmp_path / sample)])
    assert uploads == []


def test_push_wants_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        hub.push(str(tmp_path), "me/dog")


def test_push_of_a_damaged_run(finished, uploads):
    (finished / LORA).write_bytes((finished / LORA).read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not the file that the run wrote"):
        hub.push(finished, "me/dog")
    assert uploads == []


@pytest.mark.parametrize("name", ["dreambooth", "textual_inversion", "pivotal_tuning"])
def test_usage_lists_every_flag_of_the_method(name):
    text = usage(name)
    assert ("--rank" in text) == (name != "textual_inversion")
    assert ("--placeholder_token" in text) == (name != "dreambooth")
    assert "--instance_data_dir" in text


def test_a_method_without_a_condition_of_its_own_reads_the_prompts():
    method = Method(wrap(tiny("sd15")), Method.Config(), [])
    prompts = ["a dog", "a cat"]
    found = method.condition({"prompt": prompts}, torch.zeros(2)).text
    assert all(
        torch.equal(found[name], value) for name, value in method.backbone.encode_prompt(prompts).items()
    )


def test_an_earlier_run_is_not_written_over(start):
    folder = start(max_train_steps=1)
    before = load_file(folder / LORA)
    with pytest.raises(UserError, match="overwrite_output_dir"):
        start(max_train_steps=2)
    assert all(value.equal(before[name]) for name, value in load_file(folder / LORA).items())
    start(max_train_steps=2, overwrite_output_dir=True)
    assert json.loads((folder / "run.json").read_text())["step"] == 2


# from Python


def test_a_run_from_python_is_that_of_the_command_line(bases, images, tmp_path):
    given = {
        "pretrained_model_name_or_path": bases / "sd15",
        "instance_data_dir": images,
        "instance_prompt": "a photo of sks dog",
        "resolution": 16,
        "max_train_steps": 2,
    }
    folder = customize.train("dreambooth", output_dir=tmp_path / "python", **given)
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    again = run(["dreambooth", *words, "--output_dir", str(tmp_path / "words")])
    first, second = (load_file(place / LORA) for place in (folder, again))
    assert first.keys() == second.keys()
    assert all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("method", "settings", "match"),
    [
        ("dreamboth", {}, "Did you mean 'dreambooth'"),
        ("dreambooth", {"learning_rat": 1e-3}, "no setting 'learning_rat'.*Did you mean 'learning_rate'"),
        ("dreambooth", {"learning_rate": -1.0}, "learning_rate must be"),
    ],
)
def test_what_cannot_be_trained_from_python(method, settings, match):
    with pytest.raises(UserError, match=match):
        customize.train(method, **settings)


def test_importing_the_package_leaves_torch_alone():
    code = "import customize, sys; assert 'torch' not in sys.modules; customize.load_pipeline"
    subprocess.run([sys.executable, "-c", code], check=True)

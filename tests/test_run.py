"""Whole runs, as the command line starts them, on a tiny base model on disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file

from customize import hub
from customize.backbone import SD, Backbone, Condition, Step, wrap
from customize.card import write_card
from customize.checkpoint import read_info
from customize.data import Concept
from customize.errors import UserError
from customize.pipelines import load_pipeline
from customize.trainers.__main__ import run, usage
from customize.trainers.dreambooth import DreamBooth
from customize.trainers.method import Method
from tiny import tiny

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for base in ("sd15", "sdxl"):
        tiny(base).save_pretrained(folder / base)
    return folder


@pytest.fixture
def start(bases, pictures, tmp_path):
    """Starts a run with these settings; `None` leaves a flag out, `True` gives it alone."""
    flags = {"instance_data_dir": pictures, "instance_prompt": "a photo of sks dog", "resolution": 16, "max_train_steps": 3}
    flags |= {"pretrained_model_name_or_path": bases / "sd15", "output_dir": tmp_path / "run", "learning_rate": 1e-2}

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


def drawn(pipe, prompt: str, seed: int = 0, steps: int = 25) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, height=16, width=16, num_inference_steps=steps, generator=generator).images[0]).astype(int)


def folder_of(path: Path, sizes: list[tuple[int, int]]) -> Path:
    path.mkdir()
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{i}.png")
    return path


# what a run leaves


def test_the_folder_and_its_description(start, bases, pictures):
    folder = start(snr_gamma=5)
    info = read_info(folder)
    assert (info["format"], info["method"], info["step"], info["words"]) == (1, "dreambooth", 3, {})
    assert info["base_model"] == str(bases / "sd15")
    assert info["config"]["rank"] == 2
    assert info["config"]["snr_gamma"] == 5.0
    assert info["config"]["instance_prompt"] == "a photo of sks dog"
    assert len(info["dataset"]) == 4
    assert info["libraries"]["torch"] == torch.__version__.split("+")[0] or info["libraries"]["torch"] == torch.__version__
    assert {path.name for path in folder.iterdir()} == {"run.json", LORA, "README.md"}


def test_two_concepts(start, tmp_path, steps):
    folders = folder_of(tmp_path / "a", [(32, 32)] * 2), folder_of(tmp_path / "b", [(32, 32)] * 3)
    prompts = "a photo of sks dog", "a red toy"
    rows = [{"instance_data_dir": str(f), "instance_prompt": p} for f, p in zip(folders, prompts, strict=True)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    folder = start(instance_data_dir=None, instance_prompt=None, concepts_list=tmp_path / "list.json", max_train_steps=5)
    shown = [(step.batch["prompt"][0], step.batch["concept"].item()) for step, _ in steps]
    assert sorted(shown) == [(prompts[0], 0)] * 2 + [(prompts[1], 1)] * 3
    text = (folder / "README.md").read_text()
    assert all(f"`{prompt}`" in text for prompt in prompts)


def test_two_words_of_two_concepts(start, tmp_path):
    prompts = "a photo of <toy>", "a red <pet>"
    rows = [{"instance_data_dir": str(folder_of(tmp_path / p[-4:-1], [(32, 32)])), "instance_prompt": p} for p in prompts]
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
        name: drawn(load_pipeline(folder / name), prompt, steps=3) for name in (".", "checkpoint-2", "checkpoint-4", "best")
    }
    assert np.array_equal(found["checkpoint-2"], drawn(load_pipeline(str(short)), prompt, steps=3))
    assert np.array_equal(found["checkpoint-4"], found["."])
    assert not np.array_equal(found["checkpoint-2"], found["."])
    assert not np.array_equal(found["."], drawn(tiny("sd15"), prompt, steps=3))
    assert 1 <= best <= 4
    if best in (2, 4):
        assert np.array_equal(found["best"], found[f"checkpoint-{best}"])


def test_load_pipeline_of_a_base(bases):
    assert np.array_equal(drawn(load_pipeline(bases / "sd15"), "a dog", steps=2), drawn(tiny("sd15"), "a dog", steps=2))


def test_a_trained_component_is_loaded_from_the_run(start):
    folder = start(full_finetune=True, rank=None, learning_rate=1e-3)
    pipe = load_pipeline(folder)
    trained = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    base = tiny("sd15").unet.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in pipe.unet.state_dict().items())
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    assert not pipe.unet.training


# prior preservation


def test_class_pictures_are_drawn_once_and_used_again(start, monkeypatch, tmp_path, steps):
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
    assert all(torch.equal(first[name], second[name]) for name in first)  # drawing them leaves no trace in training

    start(**options | {"num_class_images": 4})
    assert len(calls) == 3
    assert {name: (folder / "class_images" / "0" / name).read_bytes() for name in made} == made


def test_a_class_picture_that_was_removed_is_drawn_again(start):
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


def test_a_half_written_class_picture_does_not_stop_the_next_run(start, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / ".00000.partial").write_bytes(b"")
    start(with_prior_preservation=True, class_prompt="a dog", num_class_images=1, class_data_dir=folder, max_train_steps=1)
    assert (folder / "class-00000.png").exists()


def test_your_own_class_pictures_are_enough(start, tmp_path, monkeypatch, steps):
    calls = counted(monkeypatch, StableDiffusionPipeline, "__call__")
    folder = folder_of(tmp_path / "class", [(32, 32)] * 4)
    start(with_prior_preservation=True, class_prompt="a dog", class_data_dir=folder, num_class_images=2, max_train_steps=4)
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
    t = torch.tensor([10, 300, 600, 990][:n])
    return Step(target, target, t, target, Condition({}), prediction, batch)


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
        alpha = method.backbone.noise.alphas_cumprod[step.t[i]].item()
        snr = alpha / (1 - alpha)
        squares = (step.prediction[i] - step.target[i]).square()
        expected += min(snr, 2.0) / snr * ((squares * mask[i]).sum() / (4 * mask[i].sum())).item() / 2
    assert method.losses(step)["denoise"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", [None, True])
def test_the_teachers_loss_is_zero_at_first_and_then_the_distance_to_the_base(start, steps, text, bases):
    start(
        with_prior_preservation=True, prior_source="teacher", class_prompt="a dog", prior_loss_weight=2, train_text_encoder=text
    )
    values = [terms["prior"].item() for _, terms in steps]
    assert values[0] == 0.0
    assert all(value > 0 for value in values[1:])


def test_the_teacher_by_hand():
    method, base = method_for(with_prior_preservation=True, prior_source="teacher", prior_loss_weight=0.5), wrap(tiny("sd15"))
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


def test_masks_reach_the_loss(start, pictures, steps):
    for i in range(4):
        mask = Image.new("L", (40, 32), 0)
        mask.paste(255, (0, 0, 20, 32))  # the left half of the square crop
        mask.save(pictures / f"{i}.mask.png")
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
                    total += mask[y, x].item() * (step.prediction[0, c, y, x] - step.target[0, c, y, x]).item() ** 2
                    weights += mask[y, x].item()
        assert terms["denoise"].item() == pytest.approx(total / weights, rel=1e-4)


@pytest.mark.parametrize("cached", [True, None])
def test_aspect_ratio_buckets(start, tmp_path, steps, cached):
    folder = folder_of(tmp_path / "mixed", [(64, 32), (32, 64), (40, 40)])
    cache = {} if cached else {"no_cache_latents": True}
    start(
        instance_data_dir=folder, use_aspect_ratio_buckets=True, resolution=32, max_train_steps=3, train_batch_size=2, **cache
    )
    shapes = {step.batch["index"][0].item(): tuple(step.latents.shape) for step, _ in steps}
    assert shapes.keys() == {0, 1, 2}
    assert shapes[2] == (2, 4, 16, 16)
    assert shapes[0][2] < 16 < shapes[0][3]  # wide
    assert shapes[1] == (2, 4, shapes[0][3], shapes[0][2])
    assert all(100 <= h * w <= 256 * 1.2 for _, _, h, w in shapes.values())


def test_a_second_run_reads_the_cache(start, tmp_path, monkeypatch):
    pictures, prompts = counted(monkeypatch, Backbone, "moments"), counted(monkeypatch, SD, "_encode_prompt")
    options = {"cache_dir": tmp_path / "cache", "random_flip": True}
    first = load_file(start(**options) / LORA)
    assert len(pictures) == 8  # four and their mirror images
    assert len(prompts) == 2  # the caption and the empty prompt
    second = load_file(start(**options, output_dir=tmp_path / "again") / LORA)
    assert (len(pictures), len(prompts)) == (8, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    start(**options, resolution=24, output_dir=tmp_path / "larger")
    assert (len(pictures), len(prompts)) == (16, 2)


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
def test_validation_pictures_are_what_the_run_draws(start, bases, base):
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
    "word": ("textual_inversion", WORDS | {"placeholder_token": "dog", "instance_prompt": "a dog"}, "'dog' is .*already"),
    "no word": ("textual_inversion", WORDS | {"placeholder_token": None}, "placeholder_token"),
    "words": ("textual_inversion", WORDS | {"placeholder_token": "<toy>+<pet>"}, "as many"),
    "vectors": ("textual_inversion", WORDS | {"num_vectors": 0}, "num_vectors"),
    "prompt": ("textual_inversion", WORDS | {"instance_prompt": "a photo of a toy"}, "does not contain <toy>"),
    "pivotal prompt": ("pivotal_tuning", WORDS | {"instance_prompt": "a photo of a toy"}, "does not contain <toy>"),
    "long prompt": ("dreambooth", {"instance_prompt": "a dog " * 20}, "tokens"),
    "early stopping": ("dreambooth", {"early_stopping_patience": 2}, "holdout"),
    "holdout": ("dreambooth", {"holdout": 4}, "holdout"),
    "score": ("dreambooth", {"validation_metric": "score"}, "validation_prompt"),
    "score prompt": ("dreambooth", {"validation_metric": "score", "validation_prompt": "a dog"}, "needs 'sks dog' in every"),
    "encoder": (
        "dreambooth",
        {"validation_metric": "score", "validation_prompt": "a red sks dog", "validation_clip": "/nowhere"},
        "--validation_clip: '/nowhere' could not be loaded",
    ),
    "class prompt": ("dreambooth", {"with_prior_preservation": True}, "class_prompt"),
    "teacher": (
        "dreambooth",
        {"with_prior_preservation": True, "class_prompt": "a dog", "prior_source": "teacher", "full_finetune": True},
        "LoRA",
    ),
    "hub": ("dreambooth", {"push_to_hub": True}, "hub_model_id"),
    "steps": ("dreambooth", {"max_train_steps": 0}, "max_train_steps"),
    "batch": ("dreambooth", {"train_batch_size": 0}, "train_batch_size"),
    "layers": ("dreambooth", {"lora_layers": "nothing"}, "lora_layers"),
    "resume": ("dreambooth", {"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"),
    "pictures": ("dreambooth", {"num_validation_images": 0, "validation_prompt": "a dog"}, "num_validation_images"),
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


def test_captions_without_the_new_word_teach_nothing(start, pictures):
    for i in range(4):
        (pictures / f"{i}.txt").write_text("a red toy on grass")
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
    with pytest.raises(UserError, match="damaged"):
        load_pipeline(finished)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder.*run\.json"):
        load_pipeline(tmp_path)


def test_a_base_that_has_moved(finished):
    info = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(info | {"base_model": "/moved/away"}))
    with pytest.raises(UserError, match="/moved/away"):
        load_pipeline(finished)


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
    write_card(finished, info, [Concept("", prompt)])
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
    assert f'load_textual_inversion("{folder / "learned_embeds.safetensors"}", token="<toy>")' in text
    assert "lora" not in ModelCard.load(folder / "README.md").data.tags


class FakeApi:
    calls: list = []  # noqa: RUF012

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        self.calls.append(("upload", options["repo_id"], sorted(filter_repo_objects(paths, ignore_patterns=ignore_patterns))))


def test_push_uploads_the_run_without_its_checkpoints(start, monkeypatch, capsys):
    monkeypatch.setattr(FakeApi, "calls", calls := [])
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    options = {"push_to_hub": True, "hub_model_id": "me/dog", "checkpointing_steps": 1, "validation_prompt": ["a dog"]}
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 1}
    folder = start(**options, **prior, report_to="tensorboard")
    assert (folder / "checkpoint-3" / LORA).exists()
    assert any((folder / "logs").rglob("*"))
    assert calls[0] == ("create", "me/dog", {"private": False, "exist_ok": True})
    assert calls[1] == ("upload", "me/dog", sorted(["README.md", LORA, "run.json", "samples/step-000003.png"]))
    assert "https://huggingface.co/me/dog" in capsys.readouterr().out


def test_push_leaves_out_what_an_interrupted_save_left(finished, monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", calls := [])
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    for name in ("saving.partial", "checkpoint-5.old", "best.partial"):
        (finished / name).mkdir()
        (finished / name / LORA).write_bytes(b"")
    hub.push(str(finished), "me/dog", private=True)
    assert calls[0][2]["private"] is True
    assert calls[1][2] == sorted(["README.md", LORA, "run.json"])


def test_push_wants_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        hub.push(str(tmp_path), "me/dog")


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
    assert all(torch.equal(found[name], value) for name, value in method.backbone.encode_prompt(prompts).items())


def test_an_earlier_run_is_not_written_over(start):
    folder = start(max_train_steps=1)
    before = load_file(folder / LORA)
    with pytest.raises(UserError, match="overwrite_output_dir"):
        start(max_train_steps=2)
    assert all(value.equal(before[name]) for name, value in load_file(folder / LORA).items())
    start(max_train_steps=2, overwrite_output_dir=True)
    assert json.loads((folder / "run.json").read_text())["step"] == 2

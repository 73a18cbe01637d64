"""Methods that train a subject encoder, on tiny base models: what moves, what stays, and that it comes
back from its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.adapters.encoders.image_encoder import load_image_encoder
from customize.adapters.subject import FILE, RELEASED
from customize.adapters.subject_files import adapter_file
from customize.backbones.families import wrap
from customize.data.folders import Folders, read_folders
from customize.data.references import ReferenceConfig, collate_references, held_out_batches
from customize.data.sources import ReferenceData
from customize.embedded import SUBJECT_ENCODER
from customize.errors import UserError
from customize.pipelines.conditioning import SubjectCall
from customize.pipelines.load import with_subjects
from customize.prompts import WORDS
from customize.runs.folder import RESUME
from customize.trainers.launch import run
from customize.trainers.loop import train
from customize.trainers.methods.custom_contrast import CustomContrast
from customize.trainers.methods.ip_adapter import IPAdapter
from customize.trainers.settings import TrainConfig, make_accelerator
from tiny import BASES, save_adapter, tiny

SMALL = {"dim": 16, "depth": 1, "heads": 2, "visual_queries": 3}
MFI = SMALL | {"feature_layers": 2, "time_bins": 4, "multi_reference_rate": 0.5}
CASES = {
    "custom_contrast": (CustomContrast, MFI),
    "custom_contrast_gated": (
        CustomContrast,
        MFI | {"text_gate": "same", "macl_form": "soft", "queue_size": 6},
    ),
    "custom_contrast_visual_only": (
        CustomContrast,
        MFI | {"words": False, "fusion": False, "cscl_weight": 0.0, "macl_weight": 0.0},
    ),
    "ip_adapter_plus": (IPAdapter, SMALL),
    "ip_adapter": (IPAdapter, {"plus": False}),
}
UNETS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("tower")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    """Four subjects of three images each."""
    root, rng = tmp_path_factory.mktemp("subjects"), np.random.default_rng(0)
    for i in range(4):
        (root / f"dog{i}").mkdir()
        colour = rng.integers(0, 255, 3)
        for k in range(3):
            noisy = np.clip(colour + rng.integers(-30, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / f"dog{i}" / f"{k}.png")
    return root


def build(base: str, case: str, tower: str, **more):
    method_class, options = CASES[case]
    backbone = wrap(tiny(base), f"tiny-{base}")
    backbone.resolution = 32
    return method_class(backbone, method_class.Config(image_encoder=tower, **(options | more)))


def dataset(subjects: Path, method) -> Folders:
    config = ReferenceConfig(
        train_data_dir=str(subjects), resolution=32, instance_prompt="a photo of <s> dog"
    )
    return Folders(config, read_folders(config), method.reference_pixels, seed=0)


def trained(method, subjects: Path, folder: Path, steps: int = 4, **settings):
    config = TrainConfig(
        output_dir=str(folder), train_batch_size=3, max_train_steps=steps, learning_rate=1e-2, **settings
    )
    data = dataset(subjects, method)
    held = held_out_batches(data, 3, 3, torch.device("cpu"))
    about = {
        "base_model": method.backbone.name,
        "method": "x",
        "config": {"image_encoder": getattr(method.config, "image_encoder", "")},
    }
    train(method, ReferenceData(data, held_out=held), config, make_accelerator(config), about)
    return method.eval()


def image(pipe, subjects: Path, prompt: str = "a photo of <s> dog"):
    options = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    images = [str(subjects / "dog0" / f"{k}.png") for k in range(2)]
    return pipe(prompt, subject_images=images, generator=torch.Generator().manual_seed(1), **options).images[
        0
    ]


def reloaded(base: str, file: Path, tower: str):
    pipe = with_subjects(tiny(base))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_subject_adapter(file, tower)
    return pipe


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", UNETS)
def test_trains_saves_and_reloads(base, case, tower, subjects, tmp_path):
    method = build(base, case, tower)
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    names = set(method.trainable())

    trained(method, subjects, tmp_path)

    after = dict(method.named_parameters())
    assert all(name.startswith(("adapter.", "log_scale")) for name in names)
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    # a fusion whose weight is zero teaches its queries only from the second step on, some biases hardly
    # at
    # all
    assert len(moved) >= 0.9 * len(names)
    assert all(torch.equal(before[name], after[name]) for name in after if name not in names)
    drawn = image(method.pipe, subjects)
    again = image(reloaded(base, tmp_path, tower), subjects)
    assert np.array_equal(drawn, again)
    assert json.loads((tmp_path / "run.json").read_text())["step"] == 4


@pytest.mark.parametrize(
    ("base", "case"),
    [
        ("sd15", "custom_contrast"),
        ("sdxl", "custom_contrast"),
        ("sdxl", "ip_adapter_plus"),
        ("sd15", "ip_adapter"),
    ],
)
def test_bf16_trains_draws_and_saves_in_float32(
    base, case, tower, subjects, tmp_path, monkeypatch, late_denoiser
):
    """As on a GPU: base model and image encoder in bf16, what is trained in float32, autocast,
    activations recomputed."""
    tiny(base).save_pretrained(tmp_path / "base")
    method, options = CASES[case]
    made, begin = [], method.__init__
    monkeypatch.setattr(
        method, "__init__", lambda self, *given, **named: made.append(self) or begin(self, *given, **named)
    )
    flags = options | {
        "pretrained_model_name_or_path": tmp_path / "base",
        "image_encoder": tower,
        "resolution": 32,
    }
    flags |= {
        "train_data_dir": subjects,
        "instance_prompt": "a photo of <s> dog",
        "holdout": 2,
        "output_dir": tmp_path / "run",
    }
    flags |= {"mixed_precision": "bf16", "train_batch_size": 2, "max_train_steps": 2, "validation_steps": 2}
    flags |= {"validation_prompt": "a <s> dog", "validation_images": subjects / "dog0" / "0.png"}
    words = [
        part for name, value in flags.items() if value is not False for part in (f"--{name}", str(value))
    ]
    words = [
        *words,
        "--gradient_checkpointing",
        *("--no_plus" for name, value in flags.items() if value is False),
    ]
    run([case.removesuffix("_plus"), *words])
    assert made[0].image_encoder.vision.dtype == made[0].backbone.denoiser.dtype == torch.bfloat16
    [row] = (json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines())
    assert np.isfinite(row["validation_loss"])
    [saved] = (
        load_file(tmp_path / "run" / file) for file in (FILE, RELEASED) if (tmp_path / "run" / file).exists()
    )
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000002.png")).std() > 0


def test_a_resumed_run_is_the_run_that_never_stopped(tower, subjects, tmp_path):
    whole = trained(build("sd15", "custom_contrast", tower), subjects, tmp_path / "whole", 4)
    part = {"checkpointing_steps": 2, "lr_scheduler": "constant"}
    trained(build("sd15", "custom_contrast", tower), subjects, tmp_path / "part", 2, **part)
    again = build("sd15", "custom_contrast", tower)
    trained(again, subjects, tmp_path / "part", 4, resume_from_checkpoint="latest", **part)
    for name, value in whole.trainable().items():
        # the ramp of the contrasts is a share of all steps: two steps of two have ended it, two of four
        # too
        assert torch.equal(value, again.trainable()[name]), name


def test_diagnostics_are_logged_with_the_validation_loss(tower, subjects, tmp_path):
    trained(build("sd15", "custom_contrast", tower), subjects, tmp_path, 2)
    row = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[-1])
    slots = [name for name in row if name.startswith("retrieval block")]
    assert {"validation_loss", "retrieval", "spearman", "cscl gradient", "macl gradient"} <= row.keys()
    assert len(slots) == build("sd15", "custom_contrast", tower).adapter.text_blocks
    assert (tmp_path / "samples" / "similarity-000002.png").exists()


@pytest.mark.parametrize("base", [base for base in BASES if base not in UNETS])
def test_transformers_are_refused(base, tower):
    with pytest.raises(UserError, match="needs a UNet"):
        build(base, "custom_contrast", tower)


def test_without_a_tower_the_flag_is_named(tower):
    with pytest.raises(UserError, match="--image_encoder"):
        build("sd15", "custom_contrast", "")


def test_contrast_without_words_is_refused(tower):
    with pytest.raises(UserError, match="--no_words"):
        build("sd15", "custom_contrast", tower, words=False)


def test_a_released_ip_adapter_has_no_words_to_go_on_from(tower, tmp_path):
    save_adapter(build("sd15", "ip_adapter", tower).adapter, tmp_path)
    with pytest.raises(UserError, match=r"--pretrained_adapter.*no S\+.*train ip_adapter"):
        build("sd15", "custom_contrast", tower, pretrained_adapter=str(tmp_path))


def test_one_sample_has_nothing_to_be_contrasted_with(tower, subjects):
    method = build("sd15", "custom_contrast", tower).train()
    alone = drawn_rows(batch_of(method, subjects), slice(0, 1))
    with pytest.raises(UserError, match=r"--train_batch_size 1.*--queue_size"):
        method(alone)
    method.config.queue_size = 8
    assert method(alone)["macl"] == 0
    assert method(drawn_rows(batch_of(method, subjects), slice(1, 2))).keys() == {"denoise", "cscl", "macl"}


WRONG = {
    "no images": (["--validation_prompt", "a <s> dog"], "--validation_images"),
    "no such image": (
        ["--validation_prompt", "a <s> dog", "--validation_images", "nowhere.png"],
        "nowhere.png",
    ),
    "too many": (["--validation_prompt", "a <s> dog", "--validation_images", *["a.png"] * 5], "1 to 4"),
    "no word": (["--validation_prompt", "a dog", "--validation_images", "a.png"], "does not say <s>"),
    "score": (
        ["--validation_prompt", "a <s> dog", "--validation_images", "a.png", "--validation_metric", "score"],
        "score",
    ),
    "no folder": (["--train_data_dir", "nowhere"], "nowhere"),
    "unreadable": (["--train_data_dir", "subjects"], "correct --train_data_dir"),
    "no heads": (["--heads", "0"], "--heads must be at least 1"),
    "no times": (["--time_bins", "0"], "--time_bins must be at least 1"),
    "a cache": (["--cache_dir", "cache"], "--cache_dir is for LoRA and learned words"),
    "kohya's file": (["--export_kohya"], "--export_kohya is for LoRA and learned words"),
}


@pytest.mark.filterwarnings("ignore:.*It is skipped")  # the image that is none, before its folder is refused
@pytest.mark.parametrize("case", WRONG)
def test_what_a_run_cannot_begin_with_is_refused_before_anything_is_lost(case, tmp_path, monkeypatch):
    """An earlier run in the folder is replaced only once all that the new one needs was found."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    (tmp_path / "subjects/dog").mkdir(parents=True)
    (tmp_path / "subjects/dog/a.png").write_text("no image")
    for folder in ("best", "checkpoint-3"):
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / "run.json").write_text('{"format": 1, "base_model": "stickers"}')
    (tmp_path / "run/validation.jsonl").write_text('{"step": 1}\n')
    save_file({"a": torch.zeros(1)}, tmp_path / "run/checkpoint-3" / RESUME, {"tree": "{}"})
    flags, message = WRONG[case]
    words = ["custom_contrast", "--dim", "24", "--depth", "1", "--heads", "2", "--output_dir", "run", *flags]
    with pytest.raises(UserError, match=message):
        run([*words, "--overwrite_output_dir"])
    with pytest.raises(UserError, match="earlier run"):
        run(["custom_contrast", "--output_dir", "run"])
    assert all(
        (tmp_path / "run" / file).exists()
        for file in ("best/run.json", f"checkpoint-3/{RESUME}", "validation.jsonl")
    )


def test_a_run_of_another_method_takes_the_place_of_the_earlier_one(tower, subjects, tmp_path):
    """Loaders would else take the earlier encoder, words or weights for a part of the new run."""
    trained(build("sd15", "custom_contrast", tower), subjects, tmp_path, 1)
    (tmp_path / "notes.txt").write_text("earlier")
    assert (tmp_path / "subject.safetensors").exists()
    trained(build("sd15", "ip_adapter", tower), subjects, tmp_path, 1, overwrite_output_dir=True)
    assert (tmp_path / "ip_adapter.safetensors").exists()
    assert not (tmp_path / "subject.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "earlier"


def test_what_cannot_be_told_is_left_out_of_the_log(tower, subjects, tmp_path):
    """One subject, held out twice, has no other to be as unlike as."""
    method = build("sd15", "custom_contrast", tower)
    config = TrainConfig(output_dir=str(tmp_path), train_batch_size=3, max_train_steps=1, validation_steps=1)
    held = [drawn_rows(batch_of(method, subjects), slice(0, 2))]
    held[0]["identity"] = torch.zeros(2, dtype=torch.long)
    train(
        method,
        ReferenceData(dataset(subjects, method), held_out=held),
        config,
        make_accelerator(config),
        {"base_model": "x", "method": "x"},
    )
    [line] = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert json.loads(line).keys() >= {"validation_loss", "retrieval"}
    assert "spearman" not in json.loads(line)


def batch_of(method, subjects: Path) -> dict:
    data = dataset(subjects, method)
    return collate_references([data[i] for i in range(4)])


def woken(method):
    """What starts at zero is given values, so that everything counts."""
    for parameter in method.adapter.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def injected_by_the_pipeline(method, prompts: list[str], given: list[dict]):
    """What a pipeline's call with the method's adapter and these features of subjects injects at time
    0.6."""
    pipe, made, seen = method.pipe, SubjectCall.injected, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SubjectCall,
            "injected",
            lambda call, bins, guided: seen.setdefault(bins, made(call, bins, guided)),
        )
        pipe(prompts, subject_images=given, height=32, width=32, num_inference_steps=5)
    return seen[int(0.6 * 4)]


def features_of(method, batch: dict) -> torch.Tensor:
    """Features of all references, (images, subjects, references, tokens, features)."""
    read = method.adapter.encoder.read(method.image_encoder(batch["references"].flatten(0, 2)))
    return read.unflatten(0, batch["references"].shape[:3])


@pytest.mark.parametrize("both", [False, True])
def test_training_conditions_as_the_pipeline_does(both, tower, subjects):
    """A batch's condition is what a pipeline's call computes for the same images at the same time."""
    method = woken(build("sd15", "custom_contrast", tower, multi_reference_rate=float(both))).eval()
    batch = batch_of(method, subjects)
    if both:
        method.uses_both = lambda: True
    with torch.no_grad():
        trained_on = method.condition(batch, torch.full((4,), 0.6)).injected
        given = [{WORDS[0]: own[0, : 1 + both]} for own in features_of(method, batch)]
        drawn = injected_by_the_pipeline(method, batch["prompt"], given)
    for part in ("visual", "location_embedding"):
        assert torch.allclose(getattr(trained_on.tokens, part), getattr(drawn.tokens, part), atol=1e-5), part
    assert torch.allclose(trained_on.block_texts, drawn.block_texts, atol=1e-5)


def test_the_pooled_text_of_every_time_is_that_of_training(tower, subjects):
    method = woken(build("sdxl", "custom_contrast", tower)).eval()
    batch, seen = batch_of(method, subjects), {}

    def remember(unet, args, named, output):
        seen[int(named["timestep"] if "timestep" in named else args[1])] = named["added_cond_kwargs"][
            "text_embeds"
        ]

    with torch.no_grad():
        given = [{WORDS[0]: own[0, :1]} for own in features_of(method, batch)]
        handle = method.backbone.denoiser.register_forward_hook(remember, with_kwargs=True)
        injected_by_the_pipeline(method, batch["prompt"], given)
        handle.remove()
        for t, drawn in seen.items():
            trained_on = method.condition(batch, torch.full((4,), t / 1000)).text["text_embeds"]
            assert torch.allclose(drawn[-4:], trained_on, atol=1e-5)
            assert not torch.allclose(drawn[:4], trained_on, atol=1e-3)
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["custom_contrast", "ip_adapter"])
def test_a_reference_that_is_the_target_is_not_shown(name, tower, subjects):
    """Where a subject has two images, the second reference serves the contrast alone."""
    method = woken(build("sd15", name, tower)).eval()
    batch = batch_of(method, subjects)
    batch["shows_target"] = torch.tensor([False, True, True, False])
    with torch.no_grad():
        found = []
        for both in (True, False):
            method.uses_both = lambda both=both: both
            torch.manual_seed(0)
            condition = method.condition(batch, torch.full((4,), 0.5))
            found.append(method.backbone.denoise(torch.ones(4, 4, 16, 16), torch.full((4,), 500), condition))
    assert torch.allclose(found[0][1:3], found[1][1:3], atol=1e-5)
    assert not torch.allclose(found[0][::3], found[1][::3], atol=1e-3)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_gradients_are_the_same_where_text_is_encoded_anew(base, tower, subjects):
    found, calls = [], []
    for recomputed in (False, True):
        torch.manual_seed(0)
        method = woken(build(base, "custom_contrast", tower)).train()
        if recomputed:
            method.enable_gradient_checkpointing()
        count = []
        method.backbone.text_encoders[0].register_forward_pre_hook(lambda *_, count=count: count.append(None))
        torch.manual_seed(1)
        sum(method(batch_of(method, subjects)).values()).backward()
        found.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls == [1, 2]
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def two_subjects(method, subjects: Path) -> dict:
    """Four images: the first and the last show a second subject too, that of the next image."""
    batch = batch_of(method, subjects)
    batch["references"] = torch.cat([batch["references"], batch["references"].roll(-1, 0)], 1)
    batch["present"] = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    batch["references"][1:3, 1] = 0
    batch["regions"] = torch.ones(4, 2, *batch["pixels"].shape[-2:])
    batch["prompt"] = [
        f"{prompt} and a <s2> cup" if i in (0, 3) else prompt for i, prompt in enumerate(batch["prompt"])
    ]
    return batch


def drawn_rows(batch: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in batch.items()}


@pytest.mark.parametrize("name", ["custom_contrast", "ip_adapter"])
def test_images_with_fewer_subjects_are_conditioned_as_alone(name, tower, subjects):
    method = woken(build("sd15", name, tower)).eval()
    batch, t = two_subjects(method, subjects), torch.tensor([0.1, 0.6, 0.6, 0.9])
    alone = drawn_rows(batch, slice(1, 3))
    alone |= {part: alone[part][:, :1] for part in ("references", "present", "regions")}
    noisy = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = method.condition(batch, t)
        first = method.backbone.denoise(noisy, t * 999, together)
        second = method.backbone.denoise(noisy[1:3], t[1:3] * 999, method.condition(alone, t[1:3]))
        swapped = batch | {"references": batch["references"].clone()}
        swapped["references"][:, 1] = batch["references"][:, 1].roll(
            3, 0
        )  # the second subjects of both pairs change places
        third = method.backbone.denoise(noisy, t * 999, method.condition(swapped, t))
    assert together.injected.tokens.weight.tolist() == [[1, 1], [1, 0], [1, 0], [1, 1]]
    assert torch.isfinite(first).all()
    assert torch.allclose(first[1:3], second, atol=1e-5)
    assert not torch.allclose(first[0], third[0], atol=1e-3)
    assert not torch.allclose(first[3], third[3], atol=1e-3)


def test_two_subjects_are_trained_on_as_the_pipeline_draws_them(tower, subjects):
    """Of images with two subjects and with one, in one batch: nothing is encoded where no subject is."""
    method = woken(build("sd15", "custom_contrast", tower)).eval()
    batch = two_subjects(method, subjects)
    with torch.no_grad():
        trained_on = method.condition(batch, torch.full((4,), 0.6)).injected
        features = features_of(method, batch)[:, :, :1]
        given = [
            {word: own for word, own, here in zip(WORDS, *row, strict=False) if here}
            for row in zip(features, batch["present"], strict=True)
        ]
        drawn = injected_by_the_pipeline(method, batch["prompt"], given)
    for part in ("visual", "location_embedding", "weight"):
        assert torch.allclose(getattr(trained_on.tokens, part), getattr(drawn.tokens, part), atol=1e-5), part
    assert torch.allclose(trained_on.block_texts, drawn.block_texts, atol=1e-5)
    assert not drawn.tokens.visual[1:3, 1].any()


@pytest.mark.parametrize("name", ["custom_contrast", "ip_adapter"])
def test_a_subject_is_seen_only_in_the_region_that_is_told(name, tower, subjects):
    """A region of nothing is as if there were no such subject; half a region lets the subject in there
    alone."""
    method = woken(build("sd15", name, tower)).eval()
    method.adapter.starts.requires_grad_(False)
    batch = two_subjects(method, subjects)
    side = batch["pixels"].shape[-1]
    half = batch["regions"].clone()
    half[:, 1, :, : side // 2] = 0
    with torch.no_grad():
        found = [
            method.condition(batch | {"regions": regions}, torch.full((4,), 0.5)).injected
            for regions in (batch["regions"], half)
        ]
    latent = side // method.backbone.pipe.vae_scale_factor
    assert found[0].tokens.regions.shape == (4, 2, latent, latent)
    assert (found[0].tokens.regions == 1).all()
    assert (found[1].tokens.regions[:, 1, :, : latent // 2] == 0).all()
    assert (found[1].tokens.regions[:, 1, :, latent // 2 :] == 1).all()
    assert (found[1].tokens.regions[:, 0] == 1).all()


@pytest.mark.parametrize("name", ["custom_contrast", "ip_adapter"])
def test_two_subjects_are_trained_on(name, tower, subjects):
    method = woken(build("sd15", name, tower, dropout_image=0.3)).train()
    losses = method(two_subjects(method, subjects))
    sum(losses.values()).backward()
    assert losses.keys() == ({"denoise", "cscl", "macl"} if name == "custom_contrast" else {"denoise"})
    if name == "custom_contrast":  # only first subjects are contrasted
        assert len(method.condition(two_subjects(method, subjects), torch.zeros(4)).image_embeds) == 4
    assert all(torch.isfinite(p.grad).all() for p in method.trainable().values() if p.grad is not None)


def test_dropped_samples_lose_their_prompt_or_their_images(tower, subjects):
    method = build(
        "sd15", "custom_contrast", tower, dropout_text=0.3, dropout_image=0.3, dropout_both=0.3
    ).train()
    torch.manual_seed(0)
    no_text, no_image = method.dropped(20_000)
    assert abs(float((no_text & ~no_image).float().mean()) - 0.3) < 0.02
    assert abs(float((~no_text & no_image).float().mean()) - 0.3) < 0.02
    assert abs(float((no_text & no_image).float().mean()) - 0.3) < 0.02
    assert not any(dropped.any() for dropped in method.eval().dropped(100))


def test_going_on_from_an_encoder_keeps_what_it_knows(tower, subjects, tmp_path):
    plain = build("sd15", "custom_contrast", tower, location=False)
    trained(plain, subjects, tmp_path, 2)
    more = build("sd15", "custom_contrast", tower, pretrained_adapter=str(tmp_path))
    old, new = plain.adapter.state_dict(), more.adapter.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert any(".location." in name for name in new)
    with pytest.raises(UserError, match="--pretrained_adapter"):
        build("sd15", "custom_contrast", tower, dim=32, pretrained_adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"other sizes or parts \(heads\)"):
        build("sd15", "custom_contrast", tower, heads=4, pretrained_adapter=str(tmp_path))
    with pytest.raises(UserError, match="no subject encoder"):
        build("sd15", "custom_contrast", tower, pretrained_adapter=str(tmp_path / "nothing"))
    assert adapter_file("stickers") == SUBJECT_ENCODER


def test_the_tower_that_a_run_names_is_loaded_with_it(tower, subjects, tmp_path):
    trained(build("sd15", "ip_adapter", tower), subjects, tmp_path, 1)
    pipe = with_subjects(tiny("sd15"))
    pipe.load_subject_adapter(tmp_path)
    own = load_image_encoder(tower).vision.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in pipe.image_encoder.state_dict().items())


@pytest.mark.parametrize("case", ["custom_contrast", "ip_adapter_plus", "custom_contrast_visual_only"])
def test_a_dropped_prompt_is_what_the_pipelines_unconditional_half_gets(case, tower, subjects):
    """SDXL's pipeline gives it zeros, and not the text of the empty prompt."""
    method = build("sdxl", case, tower, dropout_text=1.0, dropout_image=0.0, dropout_both=0.0)
    method.train()
    data = dataset(subjects, method)
    batch = collate_references([data[i] for i in range(2)])
    condition = method.condition(batch, torch.full((2,), 0.5))
    given = list(condition.text.values())
    if condition.injected is not None and condition.injected.block_texts is not None:
        given.append(condition.injected.block_texts)
    assert given
    assert all(not value.any() for value in given)
    assert all(value.any() for value in method.backbone.encode_prompt([""]).values())
    method.eval()
    assert all(value.any() for value in method.condition(batch, torch.full((2,), 0.5)).text.values())

"""Every method on every tiny base model: what moves, what stays, and that stock diffusers reads what is
saved."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.data.concepts import Concept, DataConfig
from customize.data.dataset import SubjectDataset, collate
from customize.data.images import find_images
from customize.data.subject_images import SubjectData
from customize.errors import UserError
from customize.files import header
from customize.runs import checkpoint
from customize.trainers.loop import train
from customize.trainers.methods.break_for_make import BreakForMake
from customize.trainers.methods.core import CoRe
from customize.trainers.methods.dreambooth import DreamBooth, DreamBoothConfig
from customize.trainers.methods.mcpl import MCPL
from customize.trainers.methods.pivotal_tuning import PivotalTuning
from customize.trainers.methods.single_insert import SingleInsert
from customize.trainers.methods.textual_inversion import TextualInversion
from customize.trainers.settings import TrainConfig, make_accelerator
from tiny import BASES, draw, random, tiny

WORD = {"placeholder_token": "<toy>", "initializer_token": "dog"}
TWO = {"placeholder_token": "<toy>+<pet>", "initializer_token": "dog+cat"}
CASES = {
    "dreambooth": (DreamBooth, {"rank": 4, "lora_alpha": 8}),
    "dreambooth_text_encoder": (DreamBooth, {"rank": 2, "train_text_encoder": True}),
    "dreambooth_dora": (
        DreamBooth,
        {"rank": 2, "lora_alpha": 6, "use_dora": True, "lora_layers": "attention+ff"},
    ),
    "dreambooth_convolutions": (DreamBooth, {"rank": 2, "lora_alpha": 1, "lora_layers": "all"}),
    "dreambooth_teacher": (
        DreamBooth,
        {"rank": 2, "with_prior_preservation": True, "prior_source": "teacher"},
    ),
    "dreambooth_full": (DreamBooth, {"full_finetune": True, "train_text_encoder": True}),
    "textual_inversion": (TextualInversion, WORD),
    "textual_inversion_3_vectors": (TextualInversion, WORD | {"num_vectors": 3}),
    "textual_inversion_output": (TextualInversion, WORD | {"num_vectors": 2, "optimize": "output"}),
    "pivotal_tuning": (PivotalTuning, WORD | {"rank": 2}),
    "break_for_make": (BreakForMake, {"rank": 4}),
    "break_for_make_style": (BreakForMake, {"rank": 4, "stage": "style", "lora_layers": "all"}),
    "core": (CoRe, WORD | {"num_vectors": 2}),
    "single_insert": (SingleInsert, WORD | {"rank": 2, "encoder_dim": 64, "encoder_depth": 1}),
    "mcpl": (MCPL, TWO | {"bind_adjectives": "red+blue"}),
}
RESULTS: list[str] = []


def prompt_of(options: dict) -> str:
    if "+" in options.get("placeholder_token", ""):
        return "a photo of red <toy> on blue <pet>"
    return "a photo of <toy>" if "placeholder_token" in options else "a photo of sks dog"


def build(base: str, case: str, images: Path):
    method_class, options = CASES[case]
    concept = Concept(str(images), prompt_of(options), "a dog", "")
    backbone = wrap(tiny(base), f"tiny-{base}")
    backbone.resolution = 32
    method = method_class(backbone, method_class.Config(**options), [concept])
    if case == "single_insert":  # the noise has no masks
        method.tokens.pixels = random(2, 3, 224, 224)
    found = find_images(images, concept.instance_prompt)
    return method, SubjectData(SubjectDataset(found, DataConfig(resolution=32), backbone.factor))


def trained(base: str, case: str, images: Path, folder: Path, **settings):
    """The method after four steps; the run folder is `folder`."""
    method, dataset = build(base, case, images)
    config = TrainConfig(
        output_dir=str(folder), train_batch_size=2, max_train_steps=4, learning_rate=3e-2, **settings
    )
    train(
        method,
        dataset,
        config,
        make_accelerator(config),
        info={"base_model": f"tiny-{base}", "method": case, "config": {}},
    )
    return method.eval()


def stock_pipeline(base: str, run: Path):
    """What a user without this toolkit does: load the base, then the files of the run."""
    pipe = tiny(base)
    for name, part in pipe.components.items():
        if (run / name).is_dir():
            setattr(pipe, name, type(part).from_pretrained(run / name).eval())
    if (run / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(str(run), weight_name="pytorch_lora_weights.safetensors")
    for file in sorted(run.glob("learned_embeds*.safetensors")):
        state = load_file(file)
        word = header(file)["word"]
        if base == "sd15":
            pipe.load_textual_inversion(str(file))
            continue
        second = "clip_g" if base == "sdxl" else "t5"
        for name, suffix in (("clip_l", ""), (second, "_2")):
            parts = {
                "tokenizer": getattr(pipe, f"tokenizer{suffix}"),
                "text_encoder": getattr(pipe, f"text_encoder{suffix}"),
            }
            pipe.load_textual_inversion(state[name], token=word, **parts)
    return pipe


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES)
def test_gradient_checkpointing_changes_no_gradient(base, case, images):
    found = []
    for checkpointing in (False, True):
        method, data = build(base, case, images)
        method.train()
        if checkpointing:
            method.enable_gradient_checkpointing()
        for name, parameter in method.named_parameters():
            if "lora_B" in name:  # so that LoRA's other half has a gradient
                parameter.data += 0.05 * random(*parameter.shape)
        batch, gradients = next(iter(data.batches(0, 2, 0))), []
        for step in (1, 9):  # stages may train other parts
            torch.manual_seed(step)
            method.on_step(step, 10)
            total, trained = sum(method(batch).values()), list(method.trainable().values())
            gradients += torch.autograd.grad(total, trained, allow_unused=True)
        found.append(gradients)
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES)
def test_trains_saves_and_reloads(base, case, images, tmp_path):
    prompt = prompt_of(CASES[case][1])
    method, _ = build(base, case, images)
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    names = set(method.trainable())
    untouched = draw(tiny(base), "a photo of sks dog")

    method = trained(base, case, images, tmp_path / "run")
    after = dict(method.named_parameters())
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    frozen = all(torch.equal(before[name], after[name]) for name in after if name not in names)
    image = draw(method.backbone.pipe, prompt)
    words = "placeholder_token" in CASES[case][1]
    if case.endswith("_output") or (base == "sd3" and words):
        # diffusers has no loader of words of outputs, and for this model none of words at all
        pipe = tiny(base)
        checkpoint.load(tmp_path / "run", pipe)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = stock_pipeline(base, tmp_path / "run")
    error = float(np.abs(image - draw(pipe, prompt)).max())
    RESULTS.append(
        f"{base:5s} {case:28s} trained {len(names):3d} moved {len(moved):3d} frozen identical {frozen} "
        f"reload error {error:.0e}"
    )

    assert names
    # the text encoder's last layers may get no gradient where only an earlier layer is read
    assert len(moved) >= 0.7 * len(names)
    assert frozen
    assert np.abs(image - untouched).max() > 1e-4
    assert error < 2e-6


def instance_loss(method, step):
    """The `denoise` term of a method at a step."""
    return method.losses(step)["denoise"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES)
def test_every_methods_loss_honours_masks_and_min_snr(base, case, images):
    """Where the mask is 0 the prediction does not count, and on DDPM models min-SNR weights each sample."""
    method, dataset = build(base, case, images)
    keys = [(index, (32, 32), False) for index in range(2)]
    batch, seen = collate([dataset.dataset[key] for key in keys]), {}
    batch["mask"][..., :16] = 0.0
    losses = method.losses
    method.losses = lambda step: seen.update(step=step) or losses(step)
    with torch.no_grad():
        method(batch)
        method.losses, step = losses, seen["step"]
        plain = instance_loss(method, step)
        half = step.prediction.shape[-1] // 2
        spoilt = step.prediction.clone()
        spoilt[..., :half] += 100
        assert torch.allclose(instance_loss(method, replace(step, prediction=spoilt)), plain)
        spoilt[..., half:] += 1
        assert not torch.allclose(instance_loss(method, replace(step, prediction=spoilt)), plain)
        if case == "single_insert":  # refuses min-SNR
            return
        method.config.snr_gamma = 5.0
        if base in ("sd3", "flux"):
            with pytest.raises(UserError, match="snr_gamma"):
                instance_loss(method, step)
            return
        weights = method.backbone.snr_weights(step.t, 5.0)
        by_hand = sum(
            float(weights[i]) * float((step.prediction[i] - step.target[i])[..., half:].square().mean())
            for i in range(2)
        )
        assert instance_loss(method, step).item() == pytest.approx(by_hand / 2, rel=1e-4)


# negative-guided subject fidelity


def test_fidelity_compares_each_image_with_a_class_image(images):
    """By a loop: at the image's own noise, time and prompt, with LoRA and without."""
    config = DreamBoothConfig(
        rank=2, with_prior_preservation=True, fidelity_weight=0.7, fidelity_beta=3.0, lora_layers="all"
    )
    concept = Concept(str(images), "a photo of sks dog", "a photo of dog", "")
    method = DreamBooth(wrap(tiny("sd15")), config, [concept]).train()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in method.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    prior = torch.tensor([False, False, True])
    prompts = ["a photo of sks dog", "sks dog on grass", "a photo of dog"]
    batch = {"pixels": random(3, 3, 16, 16).clamp(-1, 1), "prompt": prompts, "is_prior": prior}
    batch["concept"] = torch.tensor([0, 0, 0])
    seen, losses = {}, method.losses
    method.losses = lambda step: seen.update(step=step) or losses(step)
    torch.manual_seed(0)
    found = method(batch)["fidelity"]
    step, backbone, total = seen["step"], method.backbone, 0.0

    def error(image: int, subject: int) -> torch.Tensor:
        t = step.t[subject : subject + 1]
        latents, noise = (own[i : i + 1] for own, i in ((step.latents, image), (step.noise, subject)))
        noisy, target = backbone.add_noise(latents, noise, t)
        text = Condition(backbone.encode_prompt([prompts[subject]]))
        return (backbone.denoise(noisy, t, text) - target).square().mean()

    for subject in (0, 1):
        gained = error(subject, subject) - error(2, subject)
        with backbone.without_adapters():
            gained = gained - (error(subject, subject) - error(2, subject))
        total += -torch.nn.functional.logsigmoid(-3.0 * gained).item()
    assert found.item() == pytest.approx(0.7 * total / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "add --with_prior_preservation"),
        ({"with_prior_preservation": True, "prior_source": "teacher"}, "--prior_source images"),
        ({"full_finetune": True}, "needs LoRA"),
    ],
)
def test_fidelity_needs_class_images_and_lora(config, message):
    with pytest.raises(UserError, match=message):
        DreamBooth(wrap(tiny("sd15")), DreamBoothConfig(fidelity_weight=1.0, **config), [])


@pytest.fixture(scope="module", autouse=True)
def _table():
    yield
    print("\n" + "\n".join(RESULTS))

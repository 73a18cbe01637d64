"""Every family of base models against its own pipeline: training and drawing agree, and what is saved is read
by stock diffusers."""

import inspect
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from customize.adapters.lora import Lora, LoraFields
from customize.adapters.words import LearnedWords, load_words
from customize.backbones import load
from customize.backbones.base import Condition
from customize.backbones.families import as_called, wrap
from customize.backbones.load import load_base
from customize.cache import TensorCache
from customize.errors import UserError
from customize.pipelines.in_context import reference_image, reference_pixels, with_references
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.methods.dreambooth import DreamBooth, DreamBoothConfig
from customize.trainers.validation import sample
from tiny import random
from tiny_families import EDIT, FAMILIES, OF_TEXT, tiny_family

PROMPTS = ["a photo of sks dog", "the cat on grass in red style"]
SIDES = {"height": 32, "width": 64}
families = pytest.mark.parametrize("family", FAMILIES)
families_of_text = pytest.mark.parametrize("family", OF_TEXT)


def backbone_of(family: str):
    backbone = wrap(tiny_family(family), family)
    if family == "kontext":
        backbone.configure(1.0, 16)  # its tokenizers are CLIP's
    return backbone


def latents_of(backbone, seed: int = 0, count: int = 1):
    """Noise at the denoiser's size."""
    pixels = torch.zeros(1, 3, *SIDES.values())
    return random(count, *backbone.moments(pixels)["mean"].shape[1:], seed=seed)


def unguided(family: str) -> dict:
    """Guidance switched off, or at 1 where it is an input of the model."""
    return {"guidance_scale": 0.0 if family in ("z_image", "krea2") else 1.0}


def images_of(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 80, 64, 3), dtype=np.uint8)
    return [Image.fromarray(own) for own in pixels]


def condition_of(backbone, prompts: list[str], first: int = 0) -> Condition:
    """The prompts, beside an image for each where the model needs it: number `first` and those that follow;
    `draw` shows number 0."""
    if not backbone.needs_references:
        return Condition(backbone.encode_prompt(prompts))
    pixels = reference_pixels(images_of(first + len(prompts))[first:], 64).unsqueeze(1)
    text = backbone.encode_prompt_with_references(prompts, pixels)
    return Condition(text, references=backbone.encode_references(pixels[:, 0]).unsqueeze(1))


def draw(backbone, steps: int = 2, **arguments):
    pipe = backbone.pipe
    arguments = {**SIDES, "num_inference_steps": steps, "output_type": "np", **arguments}
    if "kontext" in backbone.name:
        arguments["max_sequence_length"] = 16
    if backbone.needs_references:
        pipe = with_references(pipe, 64)
        arguments["subject_images"] = images_of(1)
    arguments["generator"] = torch.Generator().manual_seed(1)
    return pipe(**as_called(pipe, arguments)).images


def as_latents(backbone, packed):
    """The pipeline's latents as (batch, channels, height, width)."""
    if packed.ndim == 4:
        return packed
    height, width = latents_of(backbone).shape[2:]
    if "Flux2" in type(backbone).__name__:
        return packed.mT.unflatten(2, (height, width))
    scale = backbone.pipe.vae_scale_factor
    sides = height * scale, width * scale
    takes_scale = len(inspect.signature(backbone.pipe._unpack_latents).parameters) > 3
    found = backbone.pipe._unpack_latents(packed, *sides, *([scale] if takes_scale else []))
    return found.squeeze(2) if found.ndim == 5 else found


@families
def test_the_velocity_equals_the_pipelines(family):
    """The pipeline's own prediction, as its sampler gets it, and ours for the same latents and time."""
    backbone, steps = backbone_of(family), []
    stock = backbone.pipe.scheduler.step

    def step(output, t, latents, **options):
        steps.append((output, t, latents))
        return stock(output, t, latents, **options)

    backbone.pipe.scheduler.step = step
    draw(backbone, 3, prompt=PROMPTS[0], **unguided(family))
    for output, t, latents in steps:
        noisy, wanted = as_latents(backbone, latents), as_latents(backbone, output)
        with torch.no_grad():
            ours = backbone.denoise(noisy, t.view(1) / 1000, condition_of(backbone, PROMPTS[:1]))
        assert torch.allclose(ours, wanted, atol=1e-5)
        assert wanted.std() > 1e-3
    assert len(steps) == 3


SHOWN = [("klein", 2), ("flux2", 1), ("flux2", 2), ("kontext", 1), (EDIT, 1), (EDIT, 2)]


@pytest.mark.parametrize(("family", "count"), SHOWN)
def test_the_velocity_with_references_equals_the_pipelines(family, count):
    """The pipeline that is shown images, by our call, and ours with their latents."""
    compare_with_references(backbone_of(family), family, count)


def test_references_at_time_zero():
    """Qwen-Image-Edit 2511 modulates the tokens of references as clean ones."""
    pipe = tiny_family(EDIT)
    stock = pipe.transformer
    pipe.transformer = type(stock).from_config(stock.config, zero_cond_t=True).eval()
    pipe.transformer.load_state_dict(stock.state_dict())
    compare_with_references(wrap(pipe, EDIT), EDIT, 2)


def compare_with_references(backbone, family, count):
    steps: list = []
    stock = backbone.pipe.scheduler.step

    def step(output, t, latents, **options):
        steps.append((output, t, latents))
        return stock(output, t, latents, **options)

    pipe = with_references(backbone.pipe, 64)
    pipe.scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    images = images_of(count)
    arguments = {"prompt": "a photo of a <s> dog", "subject_images": images, **SIDES, **unguided(family)}
    if family == "kontext":
        arguments["max_sequence_length"] = 16
    arguments |= {"num_inference_steps": 2, "output_type": "np"}
    drawn = pipe(**as_called(pipe, arguments)).images
    shown = reference_pixels(images, 64)
    references = backbone.encode_references(shown).unsqueeze(0)
    output, t, latents = steps[1]
    noisy, wanted = as_latents(backbone, latents), as_latents(backbone, output)
    with torch.no_grad():
        text = backbone.encode_prompt_with_references(["a photo of a dog"], shown.unsqueeze(0))
        ours, without = (
            backbone.denoise(noisy, t.view(1) / 1000, Condition(text, references=own))
            for own in (references, None)
        )
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert not torch.allclose(without, wanted, atol=1e-3)
    assert drawn.shape == (1, 32, 64, 3)


def test_the_resolution_of_references_is_the_runs_and_else_the_stock_pipelines(monkeypatch):
    """Only the constant differs between the stock pipeline's call and ours."""
    stock, [image] = tiny_family(EDIT), images_of(1)
    square = reference_image(image, 64)

    def drawn(pipe, **shown):
        generator = torch.Generator().manual_seed(1)
        arguments = {"prompt": PROMPTS[0], **SIDES, "num_inference_steps": 2, "output_type": "np", **shown}
        return pipe(**as_called(pipe, arguments | {"generator": generator})).images

    found = drawn(with_references(stock, 64), subject_images=[image])
    module = sys.modules[type(stock).__module__]
    assert backbone_of(EDIT).reference_resolution ** 2 == module.VAE_IMAGE_SIZE
    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", 64**2)
    assert abs(found - drawn(stock, image=[square])).max() == 0
    assert abs(found - drawn(with_references(stock, 32), subject_images=[image])).max() > 1e-4


def test_a_model_that_needs_images_says_so():
    backbone = backbone_of(EDIT)
    pipe = with_references(backbone.pipe, 64)
    for draws in (lambda: pipe("a dog"), lambda: as_called(backbone.pipe, {"prompt": "a dog"})):
        with pytest.raises(UserError, match="draws from images alone"):
            draws()
    with pytest.raises(UserError, match="together with images: train it with in_context"):
        backbone.cache_prompts(["a dog"], TensorCache())
    with pytest.raises(UserError, match="prompts of any length; leave it out"):
        backbone.configure(1.0, 256)
    with pytest.raises(UserError, match="shown 3 at most, not 4"):
        pipe("a dog", subject_images=images_of(4))


def test_torchvision_is_asked_for(tmp_path, monkeypatch):
    tiny_family(EDIT).save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "Qwen2VLProcessor", Qwen2VLProcessor)
    monkeypatch.setattr(load, "is_torchvision_available", lambda: False)
    with pytest.raises(UserError, match=r"its processor needs torchvision: pip install 'customize\[edit\]'"):
        load_base(tmp_path)


def test_more_references_than_a_model_is_shown_are_refused():
    pipe = with_references(backbone_of("kontext").pipe, 64)
    images = [Image.new("RGB", (64, 64))] * 2
    with pytest.raises(UserError, match="shown 1 at most, not 2"):
        pipe("a dog", subject_images=images)
    with pytest.raises(UserError, match=r"one subject, <s>, not <s>, <s2>"):
        pipe("a dog", subject_images={"<s>": images[:1], "<s2>": images[:1]})
    with pytest.raises(UserError, match="is shown no images"):
        with_references(tiny_family("sana"), 64)


@families
def test_the_latents_are_those_that_the_pipeline_decodes(family):
    """Encoding an image and decoding it as the pipeline does gives what the autoencoder alone gives."""
    backbone, pixels = backbone_of(family), random(1, 3, *SIDES.values()).clamp(-1, 1)
    moments = backbone.moments(pixels)
    latents = backbone.sample_latents(moments["mean"], torch.zeros_like(moments["std"]))
    decoded, decode = [], backbone.vae.decode
    backbone.vae.decode = lambda z, **options: decoded.append(z) or decode(z, **options)
    stop = backbone.pipe.scheduler
    stock = stop.step

    def step(output, t, packed, **options):
        known = as_packed(backbone, latents, packed)
        return (known, *stock(output, t, packed, **options)[1:])

    stop.step = step
    draw(backbone, prompt=PROMPTS[0], **unguided(family))
    encoded = backbone.vae.encode(pixels.unsqueeze(2) if decoded[0].ndim == 5 else pixels)
    wanted = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
    assert torch.allclose(decoded[0], wanted, atol=1e-5)
    assert moments["mean"].shape == latents.shape
    assert (moments["std"].max() > 0) == backbone.samples_posterior or family == "sana"


def as_packed(backbone, latents, packed):
    if packed.ndim == 4:
        return latents
    if "Flux2" in type(backbone).__name__:
        return backbone.pipe._pack_latents(latents)
    return backbone.pipe._pack_latents(latents, *latents.shape)


@families
def test_a_batch_equals_its_samples(family):
    backbone, t = backbone_of(family), torch.tensor([0.2, 0.7])
    noisy = latents_of(backbone, count=2)
    with torch.no_grad():
        both = backbone.denoise(noisy, t, condition_of(backbone, PROMPTS))
        for i in range(2):
            own = condition_of(backbone, PROMPTS[i : i + 1], i)
            alone = backbone.denoise(noisy[i : i + 1], t[i : i + 1], own)
            assert torch.allclose(both[i], alone[0], atol=1e-5)
        swapped = backbone.denoise(noisy, t, condition_of(backbone, PROMPTS[::-1]))
    assert not torch.allclose(both, swapped, atol=1e-4)


@families_of_text
def test_encoding_prompts_leaves_the_list_as_it_was(family):
    backbone, prompts = backbone_of(family), list(PROMPTS)
    with torch.no_grad():
        first, second = backbone.encode_prompt(prompts), backbone.encode_prompt(prompts)
    assert prompts == PROMPTS
    assert all(torch.equal(first[name], second[name]) for name in first)


@families_of_text
def test_cached_prompts_equal_fresh_ones(family):
    backbone = backbone_of(family)
    with torch.no_grad():
        live = backbone.encode_prompt([*PROMPTS, PROMPTS[0]])
    backbone.cache_prompts(PROMPTS, TensorCache())
    cached = backbone.encode_prompt([*PROMPTS, PROMPTS[0]])
    assert cached.keys() == live.keys()
    for name, value in live.items():
        assert torch.allclose(cached[name].float(), value.float(), atol=1e-5), name


@families_of_text
def test_drawing_with_the_encoders_freed(family):
    """As validation draws, with the pipeline's own guidance and negative prompt."""
    backbone = backbone_of(family)
    expected = draw(backbone, prompt=PROMPTS[0])[0]
    backbone.cache_prompts([*PROMPTS, ""], TensorCache())
    backbone.release_text_encoders()
    found = draw(backbone, **backbone.prompt_arguments(PROMPTS[0]))[0]
    assert abs(found - expected).max() < 1e-4
    method = Method(backbone, MethodConfig(), [])
    [(_, image)] = sample(method, PROMPTS[:1], 1, 32, steps=1)
    assert image.size == (32, 32)


def gradients(backbone, noisy, t):
    backbone.denoise(noisy, t, condition_of(backbone, PROMPTS)).square().mean().backward()
    found = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return found


def awake(backbone):
    """Makes LoRA's second matrices random, so that it counts."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)


@families
def test_checkpointed_gradients_equal_plain_ones(family):
    backbone, t = backbone_of(family), torch.tensor([0.2, 0.7])
    noisy = latents_of(backbone, count=2)
    Lora(backbone, LoraFields(rank=2, lora_layers="all"))
    awake(backbone)
    method = Method(backbone, MethodConfig(), [])
    method.train()
    plain = gradients(backbone, noisy, t)
    method.enable_gradient_checkpointing()
    checkpointed = gradients(backbone, noisy, t)
    assert plain.keys() == checkpointed.keys()
    lora = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert plain.keys() == lora  # every LoRA matrix gets a gradient
    for name, value in plain.items():
        assert torch.allclose(checkpointed[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("preset", ["attention", "attention+ff", "all"])
@families
def test_lora_of_every_preset_reloads_in_stock_diffusers(family, preset, tmp_path):
    backbone = backbone_of(family)
    plain = draw(backbone, prompt=PROMPTS[0])
    adapter = Lora(backbone, LoraFields(rank=2, lora_layers=preset))
    awake(backbone)
    drawn = draw(backbone, prompt=PROMPTS[0])
    adapter.save(tmp_path)
    stock = wrap(tiny_family(family), family)
    stock.pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    assert abs(draw(stock, prompt=PROMPTS[0]) - drawn).max() == 0
    assert abs(plain - drawn).max() > 1e-3


@families
def test_presets_grow(family):
    counts = []
    for preset in ("attention", "attention+ff", "all"):
        backbone = backbone_of(family)
        Lora(backbone, LoraFields(rank=2, lora_layers=preset))
        counts.append(sum(p.requires_grad for p in backbone.parameters()))
    assert 0 < counts[0] < counts[1] <= counts[2]


@families_of_text
def test_a_learned_word_starts_as_its_initializer(family):
    backbone = backbone_of(family)
    prompts = ["a photo of dog on grass", "a photo of <thing> on grass"]
    words = LearnedWords(backbone, {"<thing>": "dog"})
    with torch.no_grad():
        known, learned = (backbone.encode_prompt([prompt]) for prompt in prompts)
    for name in known.keys() - {"pooled_projections"}:  # CLIP may pool at an added word
        assert torch.equal(known[name], learned[name])
    noisy = latents_of(backbone)
    text = Condition(backbone.encode_prompt(prompts[1:]))
    backbone.denoise(noisy, torch.tensor([0.5]), text).square().mean().backward()
    assert all(vector.grad.abs().max() > 0 for vector in words.vectors)


@pytest.mark.parametrize("count", [1, 2])
@families_of_text
def test_learned_words_reload(family, count, tmp_path):
    backbone = backbone_of(family)
    words = LearnedWords(backbone, {"<thing>": "dog"}, count)
    for i, vector in enumerate(words.vectors):
        vector.data += vector.std() * random(*vector.shape, seed=i)
    drawn = draw(backbone, prompt="a photo of <thing> on grass")
    other = backbone_of(family)
    plain = draw(other, prompt="a photo of <thing> on grass")
    load_words(other.pipe, "<thing>", words.by_word()["<thing>"])
    again = draw(other, prompt="a photo of <thing> on grass")
    assert abs(again - drawn).max() == 0
    assert abs(again - plain).max() > 1e-4


@families
def test_a_saved_pipeline_loads(family, tmp_path):
    tiny_family(family).save_pretrained(tmp_path / "base")
    backbone = wrap(load_base(tmp_path / "base"), family)
    if family == "kontext":
        backbone.configure(1.0, 16)
    found, wanted = (draw(own, prompt=PROMPTS[0]) for own in (backbone, backbone_of(family)))
    assert abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize("family", ["klein", "flux2", "z_image"])
def test_a_missing_chat_template_is_told(family):
    pipe = tiny_family(family)
    pipe.tokenizer.chat_template = None
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        wrap(pipe, family)


@pytest.mark.parametrize("family", ["hidream", "qwen_image"])
def test_text_encoders_whose_lora_is_not_loaded_are_not_trained(family):
    with pytest.raises(UserError, match="train_text_encoder is for models whose pipeline loads LoRA of CLIP"):
        DreamBooth(backbone_of(family), DreamBoothConfig(train_text_encoder=True), [])


def test_hidream_draws_at_the_size_that_is_asked_for():
    """Its pipeline rescales all images to one area."""
    backbone = backbone_of("hidream")
    assert backbone.native_resolution == 256
    for height, width in ((32, 32), (64, 16), (32, 64), (36, 52)):
        sides = {"height": height, "width": width}
        assert draw(backbone, 1, prompt=PROMPTS[0], **sides).shape == (1, height, width, 3)


@pytest.mark.parametrize("name", ["ff_i.experts.0.w1.weight", "attn1.to_q.weight"])
def test_gradients_through_hidreams_experts(name):
    """By finite differences; diffusers' evaluation mode leaves the experts out of the gradients. Smaller
    steps would measure the rounding of its rotary embeddings, which are float32 always."""
    backbone = backbone_of("hidream")
    noisy, t = latents_of(backbone).double(), torch.tensor([0.5], dtype=torch.double)
    backbone.denoiser.double()
    text = {key: own.detach().double() for key, own in backbone.encode_prompt(PROMPTS[:1]).items()}
    weight = backbone.denoiser.get_parameter(f"double_stream_blocks.0.block.{name}").requires_grad_(True)

    def loss():
        return backbone.denoise(noisy, t, Condition(text)).square().mean()

    [gradient] = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        step = 1e-3 * gradient / gradient.norm()
        higher = (weight.add_(step), loss())[1]
        lower = (weight.sub_(2 * step), loss())[1]
        weight.add_(step)
    slope = (higher - lower).item() / 2e-3
    assert gradient.norm().item() == pytest.approx(slope, rel=1e-5)
    backbone.denoiser.eval()
    error = loss()
    if "experts" in name:
        assert not error.requires_grad
    else:
        [without] = torch.autograd.grad(error, weight)
        assert without.norm().item() != pytest.approx(slope, rel=1e-3)


def test_flux2_refuses_another_length_of_its_prompts():
    with pytest.raises(UserError, match="leave it out"):
        backbone_of("klein").configure(1.0, 256)

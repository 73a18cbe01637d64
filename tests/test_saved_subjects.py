"""Pipelines with subjects: saved for stock diffusers, kept by from_pipe, and what their calls take."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from test_subject_pipeline import DOG, A, B, apart, draw, image, tower, woken

import customize
from customize.adapters.encoders.image_encoder import squared
from customize.adapters.subject import FILE, RELEASED
from customize.errors import UserError
from customize.pipelines.inputs import scales_of
from customize.pipelines.load import load_subject_pipeline
from customize.prompts import WORDS

KINDS = {"sd15": "multimodal", "sdxl": "multimodal", "sd15 plus": "plus"}


def pipeline(name: str):
    base, _, plus = name.partition(" ")
    return woken(base, plus) if plus else woken(base)


@pytest.fixture(scope="module", params=KINDS)
def pipe(request):
    return pipeline(request.param)


@pytest.fixture(scope="module")
def drawn(pipe):
    return draw(pipe, DOG, subject_images=[A, B])


# saved, and kept


def test_a_saved_pipeline_is_read_by_stock_diffusers_and_with_its_encoder_by_us(pipe, drawn, tmp_path):
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) in type(pipe).__mro__
    assert type(stock).__module__.startswith("diffusers.")
    stock.set_progress_bar_config(disable=True)
    assert apart(draw(stock, "a photo of the dog"), draw(pipe, "a photo of the dog")) < 1e-6
    assert (tmp_path / FILE).exists()  # a Plus adapter of depth 1 is not of the released layout
    again = load_subject_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert apart(draw(again, DOG, subject_images=[A, B]), drawn) < 1e-6


def test_pipelines_of_the_same_components_keep_the_encoder(pipe, drawn):
    for again in (type(pipe).from_pipe(pipe), type(pipe)(**pipe.components)):
        again.set_progress_bar_config(disable=True)
        assert again.adapter is pipe.adapter
        assert apart(draw(again, DOG, subject_images=[A, B]), drawn) == 0
    assert not any("subject" in name for name in pipe.unet.state_dict())


def test_an_unloaded_encoder_is_gone_from_every_pipeline():
    pipe = woken("sd15")
    again = type(pipe).from_pipe(pipe)
    pipe.unload_subject_adapter()
    assert pipe.adapter is None
    assert again.adapter is None
    with pytest.raises(UserError, match="load_subject_adapter first"):
        draw(again, DOG, subject_images=A)


def test_a_pipeline_with_a_lora_is_not_saved_by_halves(tmp_path):
    pipe = woken("sd15")
    pipe.unet.add_adapter(__import__("peft").LoraConfig(target_modules=["to_q"]))
    with pytest.raises(UserError, match="fuse_lora and unload_lora_weights first"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("depth", "name"), [(1, FILE), (4, RELEASED)])
def test_a_plus_adapter_that_stock_cannot_read_has_our_files_name(depth, name, tmp_path):
    from customize.adapters.subject import image_prompt

    pipe = woken("sd15")
    adapter = image_prompt(pipe, tower(), True, dim=64, depth=depth, heads=1, queries=3)
    adapter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    pipe.load_subject_adapter(tmp_path / name, tower())
    assert pipe.adapter.encoder.plus


# the call


def test_the_calls_signature_holds_what_it_takes(pipe):
    parameters = inspect.signature(type(pipe).__call__).parameters
    assert list(parameters)[:2] == ["self", "prompt"]
    wanted = {"subject_images", "subject_scale", "subject_masks", "negative_prompt", "num_inference_steps"}
    assert wanted <= set(parameters)
    assert draw(pipe, prompt=DOG, subject_images=A).shape == (1, 32, 32, 3)


def test_a_prompt_of_a_batch_may_be_without_a_subject(pipe):
    prompts = [DOG, "a red toy on grass", DOG]
    found = draw(pipe, prompts, seeds=(1, 2, 3), subject_images=[[A], None, [B]])
    alone = [draw(pipe, DOG, seeds=(1,), subject_images=[A]), draw(pipe, prompts[1], seeds=(2,))]
    alone.append(draw(pipe, DOG, seeds=(3,), subject_images=[B]))
    assert all(apart(found[i : i + 1], image) < 2e-5 for i, image in enumerate(alone))
    with pytest.raises(UserError, match="subject_images is empty"):
        draw(pipe, [DOG, DOG], subject_images=[None, None])


def test_a_scale_for_each_subject(pipe):
    words = {"<s>": A, "<s2>": B}
    prompt = "a photo of <s> dog on <s2> cat" if pipe.adapter.has_words else "a photo of the dog"
    half = draw(pipe, prompt, subject_images=words, subject_scale={"<s>": 0.5, "<s2>": 0.5})
    assert apart(half, draw(pipe, prompt, subject_images=words, subject_scale=0.5)) < 1e-6
    one = draw(pipe, prompt, subject_images=words, subject_scale={"<s2>": 0})
    both = draw(pipe, prompt, subject_images=words)
    assert apart(one, both) > 1e-4
    assert apart(one, half) > 1e-4


def test_scales_by_hand():
    layers = ["down.a", "down.b", "up.a"]
    assert scales_of(0.3, layers) == ([1.0] * 4, dict.fromkeys(layers, 0.3))
    found = scales_of({"<s2>": 0.5, "down": 2, "down.b": 0}, layers)
    assert found == ([1.0, 0.5, 1.0, 1.0], {"down.a": 2.0, "down.b": 0.0, "up.a": 1.0})
    assert len(WORDS) == 4


@pytest.mark.parametrize("scale", [-1, float("nan"), float("inf"), "1", True, {"<s>": -0.5}, {"down": None}])
def test_scales_that_cannot_be(pipe, scale):
    with pytest.raises(UserError, match="subject_scale must be a number of at least 0"):
        draw(pipe, DOG, subject_images=A, subject_scale=scale)


@pytest.mark.parametrize("key", ["<s5>", "dwon", "<dog>"])
def test_a_scale_of_nothing(pipe, key):
    with pytest.raises(UserError, match=f"'{key}' is neither a subject's word"):
        draw(pipe, DOG, subject_images=A, subject_scale={key: 1.0})


@pytest.mark.parametrize("name", ["ip_adapter_image", "ip_adapter_image_embeds"])
def test_stock_ip_adapters_arguments_are_refused(pipe, name):
    with pytest.raises(
        UserError, match=f"{name}: a subject encoder is loaded; give images as subject_images"
    ):
        draw(pipe, "a photo of the dog", **{name: [A]})


def test_stock_ip_adapters_are_not_loaded_over_an_encoder(pipe):
    for call in (lambda: pipe.load_ip_adapter("somewhere"), pipe.unload_ip_adapter):
        with pytest.raises(UserError, match="call unload_subject_adapter first"):
            call()


def test_an_encoder_is_not_loaded_over_a_stock_ip_adapter(tmp_path):
    from tiny import save_adapter

    file = save_adapter(woken("sd15", "plain").adapter, tmp_path)
    pipe = woken("sd15")
    pipe.unload_subject_adapter()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder=None)
    with pytest.raises(UserError, match="call unload_ip_adapter before"):
        pipe.load_subject_adapter(file, tower())


# references that are not square


def wide() -> Image.Image:
    return image(3).convert("RGB").resize((32, 16))


def test_how_references_become_square():
    image = wide()
    array = np.asarray(image)
    assert squared(image, "stretch") is image
    padded = np.asarray(squared(image, "pad"))
    assert padded.shape == (32, 32, 3)
    assert np.array_equal(padded[8:24], array)
    assert (padded[:8] == 255).all()
    assert (padded[24:] == 255).all()
    assert np.array_equal(np.asarray(squared(image, "crop")), array[:, 8:24])


def test_the_fit_of_references_is_chosen_where_the_encoder_is_loaded(tmp_path):
    from tiny import save_adapter

    pipe = woken("sd15")
    file, found = save_adapter(pipe.adapter, tmp_path), {}
    for fit in ("stretch", "pad", "crop"):
        pipe.load_subject_adapter(file, tower(), reference_fit=fit)
        found[fit] = pipe.encode_references(wide())
        by_hand = tower()
        by_hand.fit = fit
        assert torch.allclose(found[fit], pipe.adapter.encoder.read(by_hand(by_hand.pixels([wide()]))))
    assert not torch.allclose(found["pad"], found["stretch"])
    assert not torch.allclose(found["crop"], found["stretch"])
    with pytest.raises(UserError, match="reference_fit: there is no 'squash'"):
        pipe.load_subject_adapter(file, tower(), reference_fit="squash")


# loading


@pytest.mark.parametrize("option", ["lora", "guidance_scale", "subject_images", "torch_dtype"])
def test_options_that_loading_does_not_know_are_refused(option):
    for load in (customize.load_pipeline, customize.load_subject_pipeline):
        with pytest.raises(UserError, match=f"'{option}' is no option of loading a pipeline"):
            load("stickers", **{option: "x"})


@pytest.mark.parametrize("run", [["a", "b"], None, 3])
def test_a_pipeline_is_loaded_by_one_name(run):
    with pytest.raises(UserError, match="takes the name of one run or base model"):
        customize.load_pipeline(run)


def test_inpainting_needs_latents_that_diffusers_can_inpaint():
    with pytest.raises(UserError, match=r"task 'inpainting': .* 4 channels"):
        customize.load_subject_pipeline("stickers", task="inpainting")


def test_loading_says_nothing_and_leaves_the_libraries_as_they_were(capfd):
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logging.get_verbosity() for logging in loggers]
    assert isinstance(customize.load_pipeline("stickers"), StableDiffusionPipeline)
    assert capfd.readouterr() == ("", "")
    assert [logging.get_verbosity() for logging in loggers] == before

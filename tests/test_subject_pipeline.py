"""Drawing with subjects: what a call of the pipelines may be given, and how it composes with what else a
pipeline can do."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.adapters.attention import CrossAttention
from customize.adapters.encoders.image_encoder import ImageEncoder
from customize.adapters.subject import image_prompt, multimodal
from customize.adapters.words import load_words
from customize.errors import UserError
from customize.pipelines.inputs import side_by_side
from customize.pipelines.load import with_subjects
from customize.pipelines.subject import SubjectSDPipeline, SubjectSDXLPipeline
from tiny import save_adapter, tiny

torch.set_num_threads(1)
KINDS = {"sd15": SubjectSDPipeline, "sdxl": SubjectSDXLPipeline}
BASES = pytest.mark.parametrize("base", KINDS)
DOG = "a photo of <s> dog"
CAT = "a <s> cat on the grass"
PAIR = "a <s> dog the <s2> cat"
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"  # the layer that runs first


def image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))


A, B, C, D = (image(number) for number in range(4))
BLACK, OPEN = Image.new("L", (8, 8)), Image.new("L", (8, 8), 255)


def stock(base: str):
    """A tiny pipeline whose text encoders know their tokenizer's words and no more, as those of real models
    do."""
    pipe = tiny(base)
    for suffix in ("", "_2") if base == "sdxl" else ("",):
        getattr(pipe, f"text_encoder{suffix}").resize_token_embeddings(len(pipe.tokenizer))
    return pipe


def tower() -> ImageEncoder:
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, num_hidden_layers=4, num_attention_heads=2)
        )
    return ImageEncoder(vision, [0.5] * 3, [0.5] * 3)


def quiet(pipe):
    pipe = with_subjects(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def untrained(base: str, kind=multimodal):
    """A pipeline with a new adapter: ours, or IP-Adapter's, plain or Plus."""
    pipe, eyes = quiet(stock(base)), tower()
    pipe.register_modules(image_encoder=eyes.vision, feature_extractor=eyes.processor)
    torch.manual_seed(4)
    if kind is multimodal:
        sizes = {"dim": 24, "depth": 1, "heads": 2, "visual_queries": 3, "time_bins": 4}
        adapter = multimodal(pipe, eyes, "photo", **sizes)
    else:
        sizes = {"dim": 64, "depth": 1, "heads": 1, "queries": 3} if kind == "plus" else {}
        adapter = image_prompt(pipe, eyes, kind == "plus", **sizes)
    pipe.adapter = adapter.eval().requires_grad_(False)
    return pipe


def woken(base: str, kind=multimodal):
    """A pipeline with an adapter of random weights: nothing of it is zero, so subjects matter everywhere."""
    pipe = untrained(base, kind)
    for parameter in pipe.adapter.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return pipe


def draw(pipe, prompt, seeds=(1,), **options) -> np.ndarray:
    """Images in [0, 1], each from the noise of its seed; one seed serves all."""
    count = (len(prompt) if isinstance(prompt, list) else 1) * options.get("num_images_per_prompt", 1)
    generator = [
        torch.Generator().manual_seed(seed) for seed in (seeds * count if len(seeds) == 1 else seeds)
    ]
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np", "guidance_scale": 5.0}
    return pipe(prompt, generator=generator, **(given | options)).images


def apart(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first - second).max())


@pytest.fixture(scope="module", params=KINDS)
def pipe(request):
    """A pipeline with an adapter, which no test may change."""
    return woken(request.param)


@pytest.fixture(scope="module")
def sd15():
    return woken("sd15")


@pytest.fixture(scope="module")
def dog(sd15):
    return draw(sd15, DOG, subject_images=[A, B])


def base_of(pipe) -> str:
    return next(base for base, kind in KINDS.items() if type(pipe) is kind)


# beside the stock pipeline


def test_without_subjects_the_pipeline_is_the_stock_one_bit_for_bit(pipe):
    options = {"negative_prompt": ["red", "blue"], "num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)}
    prompts = ["a photo of the dog", "a red toy"]
    wanted = draw(stock(base_of(pipe)), prompts, **options)
    draw(pipe, DOG, subject_images=[A])  # of which nothing may stay behind
    assert np.array_equal(draw(pipe, prompts, **options), wanted)


@BASES
def test_an_untrained_adapter_draws_the_word_it_starts_from_bit_for_bit(base):
    other = stock(base)
    for suffix in ("", "_2") if base == "sdxl" else ("",):
        tokenizer, encoder = getattr(other, f"tokenizer{suffix}"), getattr(other, f"text_encoder{suffix}")
        vector = (
            encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("photo")].detach().clone()
        )
        other.load_textual_inversion(
            {"<s>": vector[None]}, token="<s>", tokenizer=tokenizer, text_encoder=encoder
        )
    pipe, prompts = untrained(base), [DOG, "a <s> cat"]
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B]), draw(other, DOG))
    assert np.array_equal(draw(pipe, prompts, subject_images=C), draw(other, prompts))
    assert apart(draw(other, DOG), draw(other, "a photo of red dog")) > 1e-3  # the word is read


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_an_untrained_adapter_without_words_draws_the_prompt_without_them(kind):
    found = draw(untrained("sd15", kind), DOG, subject_images=[A, B])
    assert np.array_equal(found, draw(stock("sd15"), "a photo of dog"))


def test_the_unconditional_half_is_stock_and_the_other_is_what_is_drawn_without_guidance(pipe):
    def first(made, **options) -> torch.Tensor:
        kept = []
        handle = made.unet.register_forward_hook(lambda unet, inputs, output: kept.append(output[0]))
        draw(made, [DOG, CAT], seeds=(1, 2), num_inference_steps=1, **options)
        handle.remove()
        return kept[0]

    references = [[A, B], [C]]
    guided = first(pipe, subject_images=references)
    alone = first(pipe, subject_images=references, guidance_scale=1.0)
    unconditional = first(stock(base_of(pipe)))[:2]
    assert (len(guided), len(alone)) == (4, 2)
    assert torch.allclose(guided[2:], alone, atol=1e-5)
    assert torch.equal(guided[:2], unconditional)


# what a call may be given


BATCHES = {
    "another number of references": ([DOG, CAT, "the <s> toy"], [[A], [B, C, D, A], [D, B]]),
    "other subjects": ([PAIR, CAT, "a <s2> toy"], [{"<s>": A, "<s2>": [B, C]}, {"<s>": D}, {"<s2>": [A, D]}]),
    "a list and a dictionary": ([DOG, PAIR], [[A], {"<s2>": B, "<s>": C}]),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_with_references_for_each_prompt_is_its_prompts_drawn_one_by_one(pipe, case):
    """Compared are the images of a batch, from the same noises, with those of a call for each prompt."""
    prompts, references = BATCHES[case]
    seeds = tuple(range(len(prompts)))
    together = draw(pipe, prompts, seeds, subject_images=references)
    parts = [
        draw(pipe, p, (seed,), subject_images=r)
        for p, seed, r in zip(prompts, seeds, references, strict=True)
    ]
    assert apart(together, np.concatenate(parts)) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_a_batch_for_an_image_prompt_adapter_is_its_prompts_drawn_one_by_one(kind):
    pipe, references = woken("sd15", kind), [[A], [B, C, D]]
    together = draw(pipe, [DOG, CAT], (1, 2), subject_images=references)
    parts = [draw(pipe, DOG, (1,), subject_images=[A]), draw(pipe, CAT, (2,), subject_images=[B, C, D])]
    assert apart(together, np.concatenate(parts)) < 1e-5


def test_one_list_of_references_is_for_all_prompts(sd15):
    shared = draw(sd15, [DOG, CAT], (1, 2), subject_images=[A, B])
    assert np.array_equal(shared, draw(sd15, [DOG, CAT], (1, 2), subject_images=[[A, B], [A, B]]))
    assert np.array_equal(shared, draw(sd15, [DOG, CAT], (1, 2), subject_images={"<s>": [A, B]}))
    assert apart(shared, draw(sd15, [DOG, CAT], (1, 2), subject_images=[[A, B], [C]])) > 1e-3


def test_several_images_of_a_prompt(pipe):
    """Compared are two images of each of two prompts with the four drawn one by one."""
    options = {"num_images_per_prompt": 2, "negative_prompt": ["red", "blue"]}
    together = draw(pipe, [DOG, CAT], (1, 2, 3, 4), subject_images=[[A, B], [C]], **options)
    parts = [draw(pipe, DOG, (seed,), subject_images=[A, B], negative_prompt="red") for seed in (1, 2)]
    parts += [draw(pipe, CAT, (seed,), subject_images=[C], negative_prompt="blue") for seed in (3, 4)]
    assert apart(together, np.concatenate(parts)) < 1e-5


def test_several_images_with_masks_and_image_prompts():
    """Compared are two images of each of two prompts with the four drawn one by one."""
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 4, 8))
    pipe = woken("sd15", "plus")
    together = draw(
        pipe,
        [DOG, CAT],
        (1, 2, 3, 4),
        subject_images=[[A, B], [C]],
        num_images_per_prompt=2,
        subject_masks=half,
    )
    parts = [draw(pipe, DOG, (seed,), subject_images=[A, B], subject_masks=half) for seed in (1, 2)]
    parts += [draw(pipe, CAT, (seed,), subject_images=[C], subject_masks=half) for seed in (3, 4)]
    assert apart(together, np.concatenate(parts)) < 1e-5


def test_a_negative_prompt_counts_beside_subjects(sd15):
    plain, negative = (
        draw(sd15, DOG, subject_images=A, **more) for more in ({}, {"negative_prompt": "red toy"})
    )
    assert apart(plain, negative) > 1e-4


@BASES
@pytest.mark.parametrize("kind", [multimodal, "plain"])
def test_a_text_and_a_negative_text(base, kind):
    """Stock Stable Diffusion takes both as texts, or both as lists."""
    pipe = woken(base, kind)
    found = draw(pipe, DOG, negative_prompt="blurry", subject_images=[A])
    assert apart(found, draw(pipe, [DOG], negative_prompt=["blurry"], subject_images=[A])) < 1e-6


def test_without_guidance_subjects_count_too(sd15):
    first, second = (draw(sd15, DOG, subject_images=images, guidance_scale=1.0) for images in (A, C))
    assert apart(first, second) > 1e-3


def test_every_image_and_every_reference_counts(sd15):
    found = [draw(sd15, DOG, subject_images=images) for images in ([A], [B], [A, B], [A, B, C])]
    assert all(apart(one, other) > 1e-4 for i, one in enumerate(found) for other in found[:i])


def test_the_callback_is_called_after_every_step(sd15):
    seen = []

    def callback(made, step, time, given):
        seen.append((step, int(time), tuple(given["latents"].shape)))
        return given

    found = draw(sd15, DOG, subject_images=[A], callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert {shape for _, _, shape in seen} == {(1, 4, 16, 16)}
    assert np.array_equal(found, draw(sd15, DOG, subject_images=[A]))


def test_a_call_that_breaks_off_leaves_nothing_behind(sd15):
    def callback(made, step, time, given):
        raise KeyboardInterrupt

    wanted = draw(sd15, "a photo of the dog")
    with pytest.raises(KeyboardInterrupt):
        draw(sd15, DOG, subject_images=[A], callback_on_step_end=callback)
    assert not sd15.unet._forward_pre_hooks
    assert np.array_equal(draw(sd15, "a photo of the dog"), wanted)


def test_the_cache_changes_nothing(pipe):
    options = {"subject_images": {"<s>": [A, B], "<s2>": C}, "seeds": (1, 2), "num_images_per_prompt": 2}
    assert np.array_equal(draw(pipe, PAIR, **options), draw(pipe, PAIR, subject_cache=False, **options))


def test_features_stand_in_for_images(sd15):
    features = sd15.encode_references([A, B])
    assert len(features) == 2
    wanted = draw(sd15, DOG, subject_images=[A, B])
    assert np.array_equal(draw(sd15, DOG, subject_images=features), wanted)
    assert np.array_equal(draw(sd15, DOG, subject_images={"<s>": features}), wanted)


def test_each_prompt_may_have_features_of_its_own(sd15):
    features = [sd15.encode_references([A, B]), sd15.encode_references(C)]
    wanted = draw(sd15, [DOG, CAT], subject_images=[[A, B], [C]])
    entries = [{"<s>": own} for own in features]
    assert np.array_equal(draw(sd15, [DOG, CAT], subject_images=entries), wanted)
    assert np.array_equal(draw(sd15, [DOG, CAT], subject_images=features), wanted)


def test_paths_stand_in_for_images(sd15, dog, tmp_path):
    for name, image in (("a", A), ("b", B)):
        image.save(tmp_path / f"{name}.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    assert np.array_equal(draw(sd15, DOG, subject_images=paths), dog)
    assert np.array_equal(draw(sd15, DOG, subject_images=[str(paths[0]), B]), dog)
    alone = draw(sd15, DOG, subject_images=A)
    assert np.array_equal(draw(sd15, DOG, subject_images=paths[0]), alone)
    assert np.array_equal(draw(sd15, DOG, subject_images=str(paths[0])), alone)


def test_references_are_turned_upright(sd15, tmp_path):
    """As a photo of a telephone held upright, which lies on its side and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    A.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    features = sd15.encode_references(A)
    for given in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert torch.equal(sd15.encode_references(given), features)


def test_references_of_16_bits_are_those_of_8(sd15):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert deep.mode.startswith("I")
    assert torch.equal(sd15.encode_references(deep), sd15.encode_references(Image.fromarray(gray)))


def test_the_prompt_may_be_given_by_name(sd15, dog):
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np", "guidance_scale": 5.0}
    found = sd15(
        prompt=DOG, subject_images=[A, B], generator=torch.Generator().manual_seed(1), **given
    ).images
    assert np.array_equal(found, dog)


# several subjects, masks and scales


def test_each_word_has_the_images_that_are_given_for_it(pipe):
    ours = draw(pipe, PAIR, subject_images={"<s>": A, "<s2>": B})
    assert apart(ours, draw(pipe, PAIR, subject_images={"<s>": B, "<s2>": A})) > 1e-3
    assert np.array_equal(ours, draw(pipe, PAIR, subject_images={"<s2>": B, "<s>": A}))


def test_four_subjects_of_one_prompt(sd15):
    words = {"<s>": A, "<s2>": B, "<s3>": C, "<s4>": D}
    wanted = draw(sd15, "<s> <s2> <s3> <s4>", subject_images=words)
    for word in words:
        assert apart(wanted, draw(sd15, "<s> <s2> <s3> <s4>", subject_images=words | {word: image(9)})) > 1e-4


def test_a_subject_masked_out_everywhere_is_one_of_scale_zero(pipe):
    """S+ stands in the prompt in both cases."""
    plain = draw(pipe, DOG, subject_images=[A, B])
    none = draw(pipe, DOG, subject_images=[A, B], subject_scale=0.0)
    assert apart(draw(pipe, DOG, subject_images=[A, B], subject_masks=BLACK), none) < 1e-6
    assert apart(plain, none) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_a_mask_is_of_the_subject_it_names(kind):
    """Without S+ a subject that is masked out might as well not be there."""
    pipe = woken("sd15", kind)
    both, masks = {"<s>": A, "<s2>": B}, {"<s2>": BLACK}
    assert (
        apart(draw(pipe, PAIR, subject_images=both, subject_masks=masks), draw(pipe, PAIR, subject_images=A))
        < 1e-5
    )
    assert apart(draw(pipe, PAIR, subject_images=both), draw(pipe, PAIR, subject_images=A)) > 1e-3


def test_a_white_mask_changes_nothing(pipe):
    plain = draw(pipe, DOG, subject_images=[A, B])
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B], subject_masks=OPEN), plain)


def test_subjects_side_by_side_are_those_of_halves(pipe):
    """Those that a prompt has share its width, in the order of their words."""
    left, right = Image.new("L", (8, 8)), Image.new("L", (8, 8))
    left.paste(255, (0, 0, 4, 8))
    right.paste(255, (4, 0, 8, 8))
    subjects = {"<s2>": [B], "<s>": [A]}
    found = draw(pipe, PAIR, subject_images=subjects, subject_masks="side by side")
    assert np.array_equal(
        found, draw(pipe, PAIR, subject_images=subjects, subject_masks={"<s>": left, "<s2>": right})
    )
    assert apart(found, draw(pipe, PAIR, subject_images=subjects)) > 1e-4
    alone = draw(
        pipe, [PAIR, DOG], (1, 2), subject_images=[subjects, {"<s>": C}], subject_masks="side by side"
    )
    assert apart(alone, np.concatenate([found, draw(pipe, DOG, (2,), subject_images=[C])])) < 1e-5


def test_columns_are_as_wide_as_each_other():
    there = torch.tensor([[True, False, True, True], [True, False, False, False]])
    three, one = side_by_side(there, 1, 6)[:, :, 0].int().tolist()
    assert three == [[1, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert one[0] == [1] * 6


def first_output(pipe, height: int, width: int, **options) -> torch.Tensor:
    """What the first layer with subjects gives at the first step for the conditional image, (latent pixels,
    channels)."""
    kept = []
    handle = pipe.unet.get_submodule(FIRST).register_forward_hook(
        lambda layer, inputs, output: kept.append(output[-1])
    )
    draw(pipe, DOG, subject_images=[A], num_inference_steps=1, height=height, width=width, **options)
    handle.remove()
    return kept[0].unflatten(0, (height // 2, width // 2))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48), (48, 16)])
def test_a_subject_is_drawn_where_its_mask_is_white(sd15, height, width):
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height // 4))  # the upper left
    found, whole, none = (
        first_output(sd15, height, width, **options)
        for options in ({"subject_masks": {"<s>": mask}}, {}, {"subject_scale": 0.0})
    )
    rows, columns = height // 8, width // 4
    inside = torch.zeros(found.shape[:2], dtype=torch.bool)
    inside[:rows, :columns] = True
    assert torch.allclose(found[inside], whole[inside], atol=1e-6)
    assert torch.allclose(found[~inside], none[~inside], atol=1e-6)
    assert (whole - none).abs().amax(-1).min() > 1e-5  # elsewhere the subject would have counted


def test_a_mask_fits_images_of_the_models_own_size(sd15):
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    sized, unsized = (
        draw(sd15, DOG, subject_images=A, subject_masks=mask, height=side, width=side) for side in (32, None)
    )
    assert np.array_equal(sized, unsized)


def test_the_scale_weights_the_visual_branch(sd15):
    found = [draw(sd15, DOG, subject_images=A, subject_scale=scale) for scale in (0.0, 0.5, 1.0, 2.0)]
    assert np.array_equal(found[2], draw(sd15, DOG, subject_images=A))
    assert all(apart(one, other) > 1e-4 for i, one in enumerate(found) for other in found[:i])


def test_scales_by_the_beginning_of_a_layers_name(sd15):
    def scaled(scale):
        return draw(sd15, DOG, subject_images=A, subject_scale=scale)

    assert np.array_equal(scaled({"down": 0.0, "mid": 0.0, "up": 0.0}), scaled(0.0))
    assert np.array_equal(scaled({"up": 0.0, "up_blocks.1": 1.0}), scaled(1.0))  # the longer one counts
    assert np.array_equal(scaled({"up_blocks.1": 1.0, "up": 0.0}), scaled(1.0))
    assert np.array_equal(scaled({FIRST: 0.5}), scaled({"down": 0.5}))
    found = [scaled(1.0), *(scaled({part: 0.0}) for part in ("down", "mid", "up"))]
    assert all(apart(one, other) > 1e-5 for i, one in enumerate(found) for other in found[:i])


# with what else a pipeline can do


def random_lora(folder):
    """A LoRA file of random weights for the tiny Stable Diffusion, for its UNet and its text encoder."""
    pipe, layers = stock("sd15"), {}
    torch.manual_seed(5)
    for name, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if name == "unet" else ["q_proj", "v_proj"]
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        for key, parameter in module.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_composes_with_subjects_whichever_was_loaded_first(sd15, dog, tmp_path):
    lora, file = random_lora(tmp_path / "lora"), save_adapter(sd15.adapter, tmp_path)
    before, after, plain = (quiet(stock("sd15")) for _ in range(3))
    before.load_lora_weights(lora)
    before.load_subject_adapter(file, tower())
    after.load_subject_adapter(file, tower())
    after.load_lora_weights(lora)
    plain.load_lora_weights(lora)
    wanted = draw(after, DOG, subject_images=[A, B])
    assert np.array_equal(draw(before, DOG, subject_images=[A, B]), wanted)
    assert apart(wanted, dog) > 1e-3  # LoRA counts
    assert apart(wanted, draw(after, DOG, subject_images=[C])) > 1e-3  # and so does the subject
    for pipe in (before, after):
        assert np.array_equal(draw(pipe, "a photo of dog"), draw(plain, "a photo of dog"))
    off = draw(after, DOG, subject_images=[A, B], cross_attention_kwargs={"scale": 0.0})
    assert apart(off, dog) < 1e-5
    assert np.array_equal(draw(after, DOG, subject_images=[A, B]), wanted)
    after.unload_lora_weights()
    assert apart(draw(after, DOG, subject_images=[A, B]), dog) < 1e-5


def toy_vectors(base: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("clip_l", "clip_g") if base == "sdxl" else ("clip_l",)
    return {name: torch.randn(1, 16, generator=generator) for name in names}


@BASES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_learned_words_compose_with_subjects_whichever_was_loaded_first(base, tmp_path):
    prompt = "a <s> dog the <toy> on grass"
    file = save_adapter(woken(base).adapter, tmp_path)
    before, after, other, plain = (quiet(stock(base)) for _ in range(4))
    load_words(before, "<toy>", toy_vectors(base, 1))
    before.load_subject_adapter(file, tower())
    after.load_subject_adapter(file, tower())
    load_words(after, "<toy>", toy_vectors(base, 1))
    other.load_subject_adapter(file, tower())
    load_words(other, "<toy>", toy_vectors(base, 2))
    load_words(plain, "<toy>", toy_vectors(base, 1))
    wanted = draw(after, prompt, subject_images=A)
    assert apart(wanted, draw(other, prompt, subject_images=A)) > 1e-3  # the word counts
    if (
        base == "sd15"
    ):  # XL's pooled text is read at the token of the highest number, which is the word loaded last
        assert np.array_equal(draw(before, prompt, subject_images=A), wanted)
    for pipe in (before, after):
        assert (
            apart(draw(pipe, prompt, subject_images=A), draw(pipe, prompt, subject_images=C)) > 1e-3
        )  # and so the subject
        assert np.array_equal(draw(pipe, "a <toy> dog"), draw(plain, "a <toy> dog"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_learned_word_may_be_unloaded_again(sd15, dog, tmp_path):
    pipe = quiet(stock("sd15"))
    pipe.load_subject_adapter(save_adapter(sd15.adapter, tmp_path), tower())
    load_words(pipe, "<toy>", toy_vectors("sd15", 1))
    pipe.unload_textual_inversion("<toy>")
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B]), dog)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_learned_word_may_be_exchanged_for_another(sd15, tmp_path):
    prompt, file = "a <s> dog the <bear> on grass", save_adapter(sd15.adapter, tmp_path)
    pipe, other = quiet(stock("sd15")), quiet(stock("sd15"))
    for made in (pipe, other):
        made.load_subject_adapter(file, tower())
    load_words(pipe, "<toy>", toy_vectors("sd15", 1))
    draw(pipe, "a <s> dog the <toy>", subject_images=A)
    pipe.unload_textual_inversion("<toy>")
    load_words(pipe, "<bear>", toy_vectors("sd15", 2))
    load_words(other, "<bear>", toy_vectors("sd15", 2))
    assert np.array_equal(draw(pipe, prompt, subject_images=A), draw(other, prompt, subject_images=A))


def test_attention_slicing_is_refused_while_an_adapter_is_loaded(dog):
    pipe = woken("sd15")
    with pytest.warns(UserWarning, match="attention slicing is left off"):
        pipe.enable_attention_slicing()
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B]), dog)


def test_attention_slicing_is_stock_without_an_adapter():
    pipe = quiet(stock("sd15"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.enable_attention_slicing()
    assert all(isinstance(processor, SlicedAttnProcessor) for processor in pipe.unet.attn_processors.values())


def test_two_pipelines_of_one_denoiser_draw_each_its_own(sd15, dog, tmp_path):
    """The processors are those of the adapter that was loaded last, until another pipeline draws."""
    first = quiet(stock("sd15"))
    first.load_subject_adapter(save_adapter(sd15.adapter, tmp_path), tower())
    second = type(first)(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    second.load_subject_adapter(save_adapter(woken("sd15", "plus").adapter, tmp_path), tower())
    other = draw(second, DOG, subject_images=[A, B])
    assert apart(other, dog) > 1e-3
    assert np.array_equal(draw(first, DOG, subject_images=[A, B]), dog)
    assert np.array_equal(draw(second, DOG, subject_images=[A, B]), other)


def test_processors_of_others_are_refused():
    pipe = woken("sd15")
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(
        UserError, match=r"AttnProcessor2_0 instead of a subject encoder.*load the encoder again"
    ):
        draw(pipe, DOG, subject_images=[A])


def test_a_chosen_attention_backend_outlives_the_loading_of_an_adapter(tmp_path):
    pipe = woken("sd15")
    pipe.unet.set_attention_backend("native")
    pipe.load_subject_adapter(save_adapter(pipe.adapter, tmp_path), tower())
    assert {processor._attention_backend for processor in pipe.unet.attn_processors.values()} == {"native"}


def test_an_encoder_must_be_loaded_before_offloading(sd15, tmp_path):
    pipe = quiet(stock("sd15"))
    pipe.unet._hf_hook = "what accelerate puts there"
    with pytest.raises(UserError, match="before offloading"):
        pipe.load_subject_adapter(save_adapter(sd15.adapter, tmp_path), tower())


@BASES
def test_an_unloaded_adapter_leaves_the_stock_pipeline(base, tmp_path):
    pipe = quiet(stock(base))
    pipe.load_subject_adapter(save_adapter(woken(base).adapter, tmp_path), tower())
    draw(pipe, DOG, subject_images=[A])
    pipe.unload_subject_adapter()
    other = stock(base)
    assert not any(isinstance(processor, CrossAttention) for processor in pipe.unet.attn_processors.values())
    assert np.array_equal(draw(pipe, "a photo of the dog"), draw(other, "a photo of the dog"))
    assert np.array_equal(draw(pipe, DOG), draw(other, DOG))  # <s> is no word of it any more


@pytest.mark.parametrize("kind", [multimodal, "plus"])
def test_references_are_read_by_a_tower_whose_weights_come_when_it_runs(kind):
    """Sequential offloading keeps them on the meta device in between."""
    pipe = woken("sd15", kind)
    wanted = draw(pipe, DOG, subject_images=[A, B])
    for name in ("text_encoder", "image_encoder", "unet", "vae"):
        cpu_offload(getattr(pipe, name), torch.device("cpu"))
    assert pipe.image_encoder.device.type == "meta"
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B]), wanted)


@BASES
def test_the_image_encoder_is_offloaded_with_the_other_components(base):
    pipe = woken(base)
    assert pipe.components["image_encoder"] is pipe.image_encoder
    assert isinstance(pipe.image_encoder, CLIPVisionModelWithProjection)
    assert "image_encoder" in pipe.model_cpu_offload_seq.split("->")


def test_the_pipeline_may_be_moved_to_half_precision_once_all_is_loaded(sd15, dog, tmp_path):
    pipe = quiet(stock("sd15"))
    pipe.load_subject_adapter(save_adapter(sd15.adapter, tmp_path), tower())
    features = pipe.encode_references([A, B])
    pipe.to(torch.bfloat16)
    found = draw(pipe, DOG, subject_images=[A, B])
    assert apart(found, dog) < 0.1
    assert apart(found, draw(pipe, DOG, subject_images=features)) < 0.05


@BASES
@pytest.mark.parametrize("kind", [multimodal, "plain", "plus"])
def test_an_adapter_is_loaded_into_a_pipeline_of_half_precision(base, kind, tmp_path):
    whole = woken(base, kind)
    pipe = quiet(stock(base)).to(torch.bfloat16)
    pipe.load_subject_adapter(save_adapter(whole.adapter, tmp_path), tower())  # of float32
    found = draw(pipe, [DOG, CAT], subject_images=[[A, B], [C]])
    assert apart(found, draw(whole, [DOG, CAT], subject_images=[[A, B], [C]])) < 0.1


@BASES
def test_a_saved_adapter_draws_the_same_when_it_is_loaded(base, tmp_path):
    made = woken(base)
    loaded = quiet(stock(base))
    loaded.load_subject_adapter(save_adapter(made.adapter, tmp_path), tower())
    references = {"<s>": [A, B], "<s2>": C}
    assert np.array_equal(
        draw(loaded, PAIR, subject_images=references), draw(made, PAIR, subject_images=references)
    )


def test_an_adapter_takes_the_place_of_the_one_before(sd15, dog, tmp_path):
    pipe = woken("sd15", "plus")
    draw(pipe, DOG, subject_images=[A, B])
    pipe.load_subject_adapter(save_adapter(sd15.adapter, tmp_path), tower())
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B]), dog)


def test_a_pipeline_with_subjects_is_made_once_and_shares_its_components():
    plain = stock("sd15")
    pipe = with_subjects(plain)
    assert with_subjects(pipe) is pipe
    assert pipe.unet is plain.unet
    assert isinstance(with_subjects(stock("sdxl")), SubjectSDXLPipeline)


# what is refused


REFUSED = {
    "no reference": (DOG, [], "1 to 4 reference images, not 0"),
    "no subject": (DOG, {}, "subject_images is empty"),
    "no reference of a word": (DOG, {"<s>": []}, "1 to 4 reference images, not 0"),
    "five references": (DOG, [A] * 5, "1 to 4 reference images, not 5"),
    "a number among images": (DOG, [A, 5], "an image or the path of one, not int"),
    "a number": (DOG, 5, "an image or the path of one, not int"),
    "an array": (DOG, np.zeros((4, 4, 3)), "an image or the path of one, not ndarray"),
    "nothing in a list": (DOG, [None], "subject_images is empty"),
    "a missing path": (DOG, "nowhere.png", "'nowhere.png' cannot be read as an image"),
    "the word is not said": ("a dog", A, "'a dog' does not say <s>"),
    "the word is not said by one prompt": ([DOG, "a dog"], [[A], [B]], "'a dog' does not say <s>"),
    "another word is said": ("a <s2> dog", A, "does not say <s>"),
    "a word without images": (PAIR, A, "says <s2>, but there are no subject_images of it"),
    "a prompt without its subject": ([DOG, CAT], [{"<s>": A}, {}], "subject_images is empty"),
    "an unknown word": (
        "a <t> dog",
        {"<t>": A},
        "'<t>' is no subject's word; those are <s>, <s2>, <s3>, <s4>",
    ),
    "more entries than prompts": ([DOG, CAT], [[A], [B], [C]], "3 entries for 2 prompts"),
    "fewer entries than prompts": ([DOG, CAT, DOG], [{"<s>": A}, {"<s>": B}], "2 entries for 3 prompts"),
    "entries for one prompt": (DOG, [[A], [B]], "2 entries for 1 prompts"),
    "an entry that is no list": (
        [PAIR, DOG],
        [{"<s>": A, "<s2>": B}, C],
        "every entry must be a list or dictionary",
    ),
    "no prompt": ([], [A], "subject_images needs `prompt`"),
    "an image as a tensor": (
        DOG,
        torch.zeros(3, 32, 32),
        "not what encode_references makes, (1 to 4, tokens, 96)",
    ),
    "features of too many": (DOG, torch.zeros(5, 17, 96), "not what encode_references makes"),
    "a word that is not read": ("a dog " * 9 + "and a <s> dog", A, "<s> lies beyond the 16 tokens"),
    "no images at all": (DOG, None, "says <s>, but there are no subject_images of it"),
    "no images for a batch": (["a dog", CAT], None, "says <s>, but there are no subject_images of it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_references_that_do_not_fit_are_refused(sd15, case):
    prompt, images, message = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(message)):
        draw(sd15, prompt, subject_images=images)


def test_a_misspelt_word_is_corrected(sd15):
    with pytest.raises(UserError, match=r"Did you mean '<s2>'\?"):
        draw(sd15, DOG, subject_images={"<s2": A})


def test_a_file_that_is_no_image_is_refused(sd15, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # messages shorten long paths, and this one's length is the machine's
    path = Path("notes.png")
    path.write_text("no image")
    with pytest.raises(UserError, match=r"notes\.png' cannot be read as an image"):
        draw(sd15, DOG, subject_images=path)
    with pytest.raises(UserError, match="cannot be read as an image"):
        draw(sd15, DOG, subject_images=tmp_path)


def test_prompt_embeddings_are_refused(sd15):
    with pytest.raises(UserError, match="subject_images needs `prompt`"):
        sd15(prompt_embeds=torch.zeros(1, 16, 16), subject_images=A)


def test_subjects_without_an_adapter_are_refused():
    with pytest.raises(UserError, match="call load_subject_adapter first"):
        draw(quiet(stock("sd15")), DOG, subject_images=A)
    pipe = woken("sd15")
    pipe.unload_subject_adapter()
    with pytest.raises(UserError, match="call load_subject_adapter first"):
        draw(pipe, DOG, subject_images=A)


def test_references_without_an_adapter_are_refused():
    with pytest.raises(UserError, match="call load_subject_adapter first"):
        quiet(stock("sd15")).encode_references(A)


def test_a_scale_for_no_layer_is_refused_and_the_layers_named(sd15):
    with pytest.raises(UserError, match=f"subject_scale: 'left' is neither a subject's word.*{FIRST}"):
        draw(sd15, DOG, subject_images=A, subject_scale={"down": 1.0, "left": 0.5})


@pytest.mark.parametrize("scale", ["much", None, True, [0.5], {"down": "much"}])
def test_a_scale_that_is_no_number_is_refused(sd15, scale):
    with pytest.raises(UserError, match="subject_scale must be a number"):
        draw(sd15, DOG, subject_images=A, subject_scale=scale)


@BASES
def test_sizes_may_be_given_by_their_place_in_the_call(base):
    """Masks need the image's size, however it is given."""
    pipe, mask = woken(base), Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    second = () if base == "sd15" else (None,)  # XL's prompt_2
    options = {"subject_images": A, "subject_masks": mask, "num_inference_steps": 2, "output_type": "np"}
    found = [
        pipe(*given, **named, **options, generator=torch.Generator().manual_seed(0)).images
        for given, named in (((DOG, *second, 48, 32), {}), ((DOG,), {"height": 48, "width": 32}))
    ]
    assert found[0].shape == (1, 48, 32, 3)
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"<t>": OPEN}, "subject_masks: '<t>' is no subject's word"),
        (3, "a mask must be an image or the path of one, not int"),
        (np.ones((8, 8)), "not ndarray"),
        ("nowhere.png", "cannot be read"),
    ],
)
def test_masks_that_do_not_fit_are_refused(sd15, masks, message):
    with pytest.raises(UserError, match=message):
        draw(sd15, DOG, subject_images=A, subject_masks=masks)


NEGATIVE = {"negative_prompt": "a <s> cat"}


def test_only_the_prompt_names_subjects(sd15):
    for images in (A, None):
        with pytest.raises(UserError, match="'a <s> cat' says <s>, but what to avoid has no subject"):
            draw(sd15, DOG if images else "a dog", subject_images=images, **NEGATIVE)
    xl = woken("sdxl")
    with pytest.raises(UserError, match="what to avoid has no subject"):
        draw(xl, DOG, subject_images=A, negative_prompt_2="a <s> cat")
    with pytest.raises(UserError, match="'a <s2> cat' says <s2>, but there are no subject_images of it"):
        draw(xl, DOG, subject_images=A, prompt_2="a <s2> cat")


@BASES
@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_words_mean_nothing_to_an_image_prompt_wherever_they_stand(base, kind):
    pipe, second = woken(base, kind), {"prompt_2": "a <s2> cat"} if base == "sdxl" else {}
    found = draw(pipe, DOG, subject_images=A, **NEGATIVE, **second)
    plain = {
        name: text.replace("<s> ", "").replace("<s2> ", "") for name, text in (NEGATIVE | second).items()
    }
    assert np.array_equal(found, draw(pipe, "a photo of dog", subject_images=A, **plain))


@pytest.mark.parametrize("kind", [multimodal, "plain", "plus"])
def test_an_encoder_of_another_base_model_is_refused_and_nothing_changes(kind, dog, tmp_path):
    file = save_adapter(woken("sdxl", kind).adapter, tmp_path)
    pipe = woken("sd15")
    with pytest.raises(UserError, match=rf"{file.name}' was trained for another base model"):
        pipe.load_subject_adapter(file, tower())
    assert np.array_equal(draw(pipe, DOG, subject_images=[A, B]), dog)


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no subject encoder at .*nowhere"):
        quiet(stock("sd15")).load_subject_adapter(tmp_path / "nowhere", tower())


def test_an_encoder_file_without_its_image_encoder_is_refused(sd15, tmp_path):
    file = save_adapter(sd15.adapter, tmp_path)
    with pytest.raises(UserError, match="image_encoder: name the CLIP vision model"):
        quiet(stock("sd15")).load_subject_adapter(file)


def test_models_without_a_unet_are_refused():
    with pytest.raises(UserError, match="not a StableDiffusion3Pipeline"):
        with_subjects(tiny("sd3"))

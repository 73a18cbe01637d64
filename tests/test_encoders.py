"""Subject encoders: their mathematics by hand, released IP-Adapters beside stock diffusers, their files, the
image encoder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.adapters.encoders import image_encoder as tower
from customize.adapters.encoders.image_encoder import ImageEncoder, load_image_encoder
from customize.adapters.encoders.ip_adapter import ImagePrompt, Projection
from customize.adapters.encoders.multimodal import (
    Fusion,
    MultimodalConfig,
    MultimodalEncoder,
    evenly,
    fourier,
)
from customize.adapters.encoders.resampler import Resampler
from customize.adapters.subject import FILE, RELEASED, image_prompt, multimodal
from customize.adapters.subject_files import load_adapter, read_file
from customize.errors import UserError
from customize.files import header
from customize.pipelines.load import with_subjects
from tiny import random, save_adapter, tiny, woken

logging.set_verbosity_error()  # stock pipelines warn of modules that they did not expect
SIZES = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "visual_queries": 3,
    "feature_layers": 2,
    "time_bins": 4,
    "projection": 8,
}
PLUS = {
    "dim": 32,
    "depth": 4,
    "heads": 2,
    "queries": 5,
}  # diffusers expects four layers; heads are 64 wide, whatever `dim`
HALVES = (0.5, 0.5, 0.5)


def vision() -> CLIPVisionModelWithProjection:
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes)
    )


def eye() -> ImageEncoder:
    return ImageEncoder(vision(), HALVES, (0.25, 0.5, 1.0))


def noise(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """An image of coarse noise, width x height."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size)


# the resampler


def plain_resampler() -> Resampler:
    return woken(Resampler(32, 128, 16, queries=5, depth=4, heads=2), 0.1)


@torch.no_grad()
def test_the_resampler_is_diffusers_own_with_the_same_weights():
    ours = plain_resampler()
    theirs = tiny("sd15").unet._convert_ip_adapter_image_proj_to_diffusers(ours.state_dict())
    assert type(theirs).__name__ == "IPAdapterPlusImageProjection"
    features = random(3, 17, 32)
    found = ours(features)
    assert found.shape == (3, 5, 16)
    assert torch.allclose(found, theirs(features), atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


@torch.no_grad()
def test_the_resampler_does_not_read_padding():
    resampler, features = plain_resampler(), random(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:], mask[1, :2] = False, False
    found = resampler(features, mask)
    assert torch.allclose(found[:1], resampler(features[:1, :5]), atol=1e-5)
    assert torch.allclose(found[1:], resampler(features[1:, 2:]), atol=1e-5)
    assert not torch.allclose(found, resampler(features), atol=1e-3)


@torch.no_grad()
def test_queries_stand_in_for_the_learned_ones():
    resampler, features = plain_resampler(), random(2, 9, 32)
    assert torch.equal(resampler(features, queries=resampler.latents.expand(2, -1, -1)), resampler(features))
    queries = random(2, 3, 128, seed=1)  # another for each image
    found = resampler(features, queries=queries)
    for row in range(2):
        resampler.latents.data = queries[row : row + 1]
        assert torch.allclose(found[row], resampler(features[row : row + 1])[0], atol=1e-5)


# released IP-Adapters


def released(base: str, plus: bool) -> dict[str, torch.Tensor]:
    """A random adapter in the released layout: the image projection, and keys and values numbered over all
    attention layers."""
    unet = tiny(base).unet
    dim = unet.config.cross_attention_dim
    if plus:
        shapes = {"latents": (1, 5, 64), "proj_in.weight": (64, 32), "proj_in.bias": (64,)}
        shapes |= {
            "proj_out.weight": (dim, 64),
            "proj_out.bias": (dim,),
            "norm_out.weight": (dim,),
            "norm_out.bias": (dim,),
        }
        for i in range(4):
            linear = {
                "0.to_q": (64, 64),
                "0.to_kv": (128, 64),
                "0.to_out": (64, 64),
                "1.1": (256, 64),
                "1.3": (64, 256),
            }
            shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in linear.items()}
            norms = ("0.norm1", "0.norm2", "1.0")
            shapes |= {f"layers.{i}.{name}.{kind}": (64,) for name in norms for kind in ("weight", "bias")}
    else:
        shapes = {
            "proj.weight": (4 * dim, 16),
            "proj.bias": (4 * dim,),
            "norm.weight": (dim,),
            "norm.bias": (dim,),
        }
    shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    for i, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            shapes |= {f"ip_adapter.{i}.{part}.weight": (width, dim) for part in ("to_k_ip", "to_v_ip")}
    return {
        name: random(*shape, seed=i) * (0.15 if name.startswith("image_proj.layers") else 0.6)
        for i, (name, shape) in enumerate(shapes.items())
    }


def write(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".bin":
        parts: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
        for name, value in state.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = value
        torch.save(parts, path)
    else:
        save_file(state, path)
    return path


def drawn(pipe, prompt="a photo of the dog", **named) -> np.ndarray:
    named = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "output_type": "np",
    } | named
    return pipe(prompt, generator=torch.Generator().manual_seed(1), **named).images


def stock(base: str, file: Path, scale: float = 1.0):
    """diffusers' pipeline with diffusers' loader; images are prepared as the tower does."""
    pipe, own = tiny(base), eye()
    pipe.register_modules(image_encoder=own.vision, feature_extractor=own.processor)
    pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    pipe.set_ip_adapter_scale(scale)
    return pipe


def ours(base: str, file: Path):
    pipe = with_subjects(tiny(base))
    pipe.load_subject_adapter(file, eye())
    return pipe


@pytest.mark.parametrize(
    ("base", "plus", "suffix"),
    [
        ("sd15", False, ".safetensors"),
        ("sd15", True, ".bin"),
        ("sdxl", False, ".bin"),
        ("sdxl", True, ".safetensors"),
    ],
)
def test_a_released_adapter_draws_what_it_draws_in_stock_diffusers(base, plus, suffix, tmp_path):
    file = write(released(base, plus), tmp_path / f"ip-adapter{suffix}")
    theirs, own = stock(base, file), ours(base, file)
    images = [noise(0), noise(1)]
    one, two = drawn(own, subject_images=images[0]), drawn(own, subject_images=images)
    assert np.abs(one - drawn(theirs, ip_adapter_image=images[0])).max() < 1e-5
    assert np.abs(two - drawn(theirs, ip_adapter_image=[images])).max() < 1e-5
    without = drawn(tiny(base))
    assert np.abs(one - without).max() > 0.01
    assert np.abs(two - one).max() > 1e-3
    assert np.array_equal(drawn(own), without)


@pytest.mark.parametrize("plus", [False, True])
def test_scale_guidance_prompts_and_number_of_images_as_in_stock_diffusers(plus, tmp_path):
    file = write(released("sd15", plus), tmp_path / "ip-adapter.safetensors")
    theirs, own = stock("sd15", file, 0.4), ours("sd15", file)
    image, prompts = noise(0), ["a dog", "a red toy on grass"]
    for named in (
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "negative_prompt": ["a cat", "a blue cat"]},
    ):
        expected = drawn(theirs, prompts, ip_adapter_image=image, **named)
        found = drawn(own, prompts, subject_images=image, subject_scale=0.4, **named)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(("base", "plus"), [("sd15", False), ("sd15", True), ("sdxl", True)])
def test_stock_diffusers_reads_our_image_prompt_adapter(base, plus, tmp_path):
    pipe = tiny(base)
    adapter = woken(image_prompt(pipe, eye(), plus, **(PLUS if plus else {})), 0.15)
    file = save_adapter(adapter, tmp_path)
    assert file == tmp_path / RELEASED
    assert {name.split(".")[1] for name in load_file(file) if name.startswith("ip_adapter")} == {
        "1",
        "3",
        "5",
        "7",
    }
    found = drawn(ours(base, file), subject_images=[noise(0), noise(1)])
    assert np.abs(found - drawn(stock(base, file), ip_adapter_image=[[noise(0), noise(1)]])).max() < 1e-5
    assert np.abs(found - drawn(tiny(base))).max() > 1e-3


FACES = {
    "face_id": ["proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias", "norm.weight", "norm.bias"],
    "full_face": [
        "proj.0.weight",
        "proj.0.bias",
        "proj.2.weight",
        "proj.2.bias",
        "proj.3.weight",
        "proj.3.bias",
    ],
    "face_id_plus": ["proj.0.weight", "norm.weight", "perceiver_resampler.proj_in.weight"],
}


@pytest.mark.parametrize("face", FACES)
def test_face_adapters_are_refused(face, tmp_path):
    state = {f"image_proj.{name}": torch.zeros(16, 16) for name in FACES[face]} | {
        "ip_adapter.1.to_k_ip.weight": torch.ones(8, 16)
    }
    with pytest.raises(UserError, match="face"):
        load_adapter(write(state, tmp_path / "face.safetensors"), tiny("sd15"), eye())


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_padding_references_of_an_image_prompt_are_masked(plus):
    encoder = ImagePrompt(woken(Resampler(32, 64, 16, 5, 1, 1)) if plus else woken(Projection(16, 16)))
    tokens = 5 if plus else 4
    features = encoder.read(eye()(random(4, 3, 32, 32))).unflatten(0, (2, 2))
    assert features.shape == ((2, 2, 17, 32) if plus else (2, 2, 1, 16))
    found = encoder(features, torch.tensor([[True, False], [True, True]]), torch.zeros(2))
    assert found.mask.tolist() == [[True] * tokens + [False] * tokens, [True] * 2 * tokens]
    assert (
        encoder(features, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2)).mask is None
    )  # nothing is padding
    for row in range(2):  # each reference on its own, one after the other
        for i in range(2):
            alone = encoder(
                features[row : row + 1, i : i + 1], torch.ones(1, 1, dtype=torch.bool), torch.zeros(1)
            ).visual
            assert torch.allclose(found.visual[row, i * tokens : (i + 1) * tokens], alone[0], atol=1e-5)


# the multimodal encoder


def encoder_of(**options) -> MultimodalEncoder:
    sizes = {
        "image_dim": 32,
        "image_layers": 4,
        "visual_dim": 12,
        "text_dims": [16, 10],
        "text_blocks": 5,
    } | SIZES
    return MultimodalEncoder(MultimodalConfig(**(sizes | options)))


def features_of(encoder: MultimodalEncoder, rows: int, references: int) -> torch.Tensor:
    return encoder.read(eye()(random(rows * references, 3, 32, 32))).unflatten(0, (rows, references))


def everything(encoded) -> dict[str, torch.Tensor]:
    words = {f"words.{i}": words for i, words in enumerate(encoded.words)}
    return words | {
        name: getattr(encoded, name) for name in ("visual", "location_embedding", "visual_cls", "textual_cls")
    }


def alike(one: dict, other: dict) -> dict[str, bool]:
    return {name: torch.allclose(one[name], other[name], atol=1e-5) for name in one}


@torch.no_grad()
def test_shapes_of_what_is_encoded():
    encoder = encoder_of()
    features = features_of(encoder, 2, 3)
    assert features.shape == (2, 3, 17, 64)
    found = encoder(features, torch.ones(2, 3, dtype=torch.bool), torch.rand(2))
    assert found.visual.shape == (2, 3, 12)
    assert found.mask is None
    assert [words.shape for words in found.words] == [(2, 5, 16), (2, 5, 10)]
    assert found.location_embedding.shape == (2, 16)
    assert found.visual_cls.shape == found.textual_cls.shape == (2, 8)


@torch.no_grad()
def test_half_precision_throughout():
    encoder = woken(encoder_of()).to(torch.bfloat16)
    features, present, t = (
        features_of(encoder, 2, 1),
        torch.ones(2, 1, dtype=torch.bool),
        torch.full((2,), 0.3),
    )
    found, whole = (
        everything(encoder(features.bfloat16(), present, t)),
        everything(encoder.float()(features, present, t)),
    )
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    for name, value in whole.items():
        assert (found[name] - value).norm() < 0.1 * value.norm(), name


@torch.no_grad()
def test_parts_that_are_left_out():
    encoder = encoder_of(words=False, location=False)
    found = encoder(features_of(encoder, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.rand(1))
    assert (found.words, found.textual_cls, found.location_embedding, encoder.location_dim) == (
        [],
        None,
        None,
        0,
    )
    whole, plain = woken(encoder_of()), encoder_of(fusion=False)
    plain.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if not name.startswith("fusion")}
    )
    arguments = features_of(whole, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.rand(1)
    same = alike(everything(whole(*arguments)), everything(plain(*arguments)))
    assert same == dict.fromkeys(same, True) | {"visual": False}


@torch.no_grad()
def test_the_layers_read_are_those_of_the_tower():
    output = eye()(random(2, 3, 32, 32))
    features = encoder_of(feature_layers=3).read(output)
    assert torch.equal(features, torch.cat([output.hidden_states[layer] for layer in (1, 2, 3)], -1))
    assert torch.equal(features[..., -32:], output.hidden_states[-2])


@torch.no_grad()
def test_pseudo_words_read_the_last_layer_and_visual_tokens_all():
    encoder = woken(encoder_of(fusion=False))
    features = features_of(encoder, 1, 1)
    arguments = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1)
    other = features.clone()
    other[..., :32] += 1 * random(1, 1, 17, 32)
    same = alike(everything(encoder(features, *arguments)), everything(encoder(other, *arguments)))
    assert same == {name: name in ("words.0", "words.1", "textual_cls") for name in same}


@torch.no_grad()
def test_bins_of_time():
    """Times of one bin cannot be told apart, those of two can, in words and location maps."""
    encoder = woken(encoder_of())
    features, present = features_of(encoder, 1, 1), torch.ones(1, 1, dtype=torch.bool)
    first, same, other = (
        everything(encoder(features, present, torch.tensor([t]))) for t in (0.26, 0.49, 0.51)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    differing = [name for name, equal in alike(first, other).items() if not equal]
    assert differing == [
        "words.0",
        "words.1",
        "visual",
        "location_embedding",
        "textual_cls",
    ]  # visual: text-refined
    assert encoder.bin_of(torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0])).tolist() == [0, 0, 1, 3, 3]
    assert encoder.middle_of(torch.arange(4)).tolist() == [0.125, 0.375, 0.625, 0.875]


@torch.no_grad()
def test_before_training_words_are_zero_and_know_no_time():
    encoder = encoder_of()
    features, present = features_of(encoder, 2, 1), torch.ones(2, 1, dtype=torch.bool)
    found, later = (encoder(features, present, torch.full((2,), t)) for t in (0.1, 0.9))
    assert not any(words.any() for words in found.words)
    assert torch.equal(found.location_embedding, later.location_embedding)
    assert torch.equal(found.textual_cls, later.textual_cls)
    assert not torch.allclose(found.visual_cls[0], found.visual_cls[1], atol=1e-3)


@torch.no_grad()
def test_slots_have_words_of_their_own():
    encoder = woken(encoder_of())
    found = encoder(features_of(encoder, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    for words in found.words:
        distances = torch.cdist(words[0], words[0])
        assert distances[~torch.eye(5, dtype=torch.bool)].min() > 0.01


@torch.no_grad()
def test_padding_references_change_nothing_and_their_order_neither():
    encoder = woken(encoder_of())
    features, t = features_of(encoder, 1, 3), torch.zeros(1)
    pair = everything(encoder(features[:, :2], torch.ones(1, 2, dtype=torch.bool), t))
    padded = everything(encoder(features, torch.tensor([[True, True, False]]), t))
    turned = everything(encoder(features[:, [2, 1, 0]], torch.tensor([[False, True, True]]), t))
    assert all(alike(pair, padded).values())
    assert all(alike(pair, turned).values())
    assert not any(alike(pair, everything(encoder(features, torch.ones(1, 3, dtype=torch.bool), t))).values())


@torch.no_grad()
def test_fusion_by_loops():
    fusion = woken(Fusion(8, 6))
    textual, visual = random(2, 3, 8), random(2, 4, 6, seed=1)
    found = fusion(textual, visual)
    for row in range(2):
        read = [0.0] * 4  # how much each visual token is read, on average over the words
        for word in range(3):
            query = fusion.to_q.weight @ textual[row, word]
            scores = [
                math.exp(query @ (fusion.to_k.weight @ visual[row, v]) / math.sqrt(8)) for v in range(4)
            ]
            read = [read[v] + scores[v] / sum(scores) / 3 for v in range(4)]
        for v in range(4):
            assert torch.allclose(found[row, v], visual[row, v] * (1 + fusion.alpha * read[v] * 4), atol=1e-5)


@torch.no_grad()
def test_fusion_starts_as_the_visual_tokens_themselves():
    visual = random(2, 4, 6)
    assert torch.equal(Fusion(8, 6)(random(2, 3, 8), visual), visual)


def test_layers_are_evenly_spaced_and_end_with_the_last_but_one():
    assert evenly(24, 4) == [6, 12, 17, 23]
    assert evenly(12, 4) == [3, 6, 8, 11]
    assert evenly(4, 3) == [1, 2, 3]
    assert evenly(4, 1) == [3]
    assert evenly(2, 4) == evenly(1, 1) == [1]


def test_fourier_features_by_hand():
    x = torch.tensor([[0.0, 0.3], [0.5, 1.0]])
    found = fourier(x)
    assert found.shape == (2, 2, 16)
    for i in range(2):
        for j in range(2):
            angles = [math.pi * 2**octave * x[i, j].item() for octave in range(8)]
            expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert found[i, j].tolist() == pytest.approx(expected, abs=2e-4)


def adapted(base: str, **options):
    """A pipeline and a multimodal adapter of it."""
    pipe = tiny(base)
    return pipe, multimodal(pipe, eye(), "toy", **(SIZES | options))


def encoded_by(adapter, rows: int = 2, subjects: int = 2):
    features = features_of(adapter.encoder, rows * subjects, 1)
    return adapter.encoder(
        features, torch.ones(len(features), 1, dtype=torch.bool), torch.full((len(features),), 0.3)
    )


def texts(pipe, adapter, prompts: list[str], vectors) -> torch.Tensor:
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2] if hasattr(pipe, "tokenizer_2") else [pipe.tokenizer]
    encoders = (
        [pipe.text_encoder, pipe.text_encoder_2] if hasattr(pipe, "tokenizer_2") else [pipe.text_encoder]
    )
    return adapter.texts(
        lambda some: {"states": plain_text(pipe, some)}, tokenizers, encoders, prompts, vectors
    )["states"]


def plain_text(pipe, prompts: list[str]) -> torch.Tensor:
    return pipe.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@torch.no_grad()
def test_pseudo_words_start_as_the_start_word(base):
    pipe, adapter = adapted(base)
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if base == "sdxl" else [])
    toy = pipe.tokenizer.convert_tokens_to_ids("toy")
    vectors = adapter.word_vectors(encoded_by(adapter), torch.ones(2, 2))
    for own, encoder in zip(vectors, encoders, strict=True):
        assert own.shape == (4, 2, 2, 16)
        assert torch.equal(own, encoder.get_input_embeddings().weight[toy].expand_as(own))
    found = texts(pipe, adapter, ["a <s> dog on <s2> grass", "the <s> cat"], vectors)
    expected = plain_text(pipe, ["a toy dog on toy grass", "the toy cat"])
    assert found.shape == (4, *expected.shape)
    assert torch.allclose(found, expected.expand_as(found), atol=1e-6)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@torch.no_grad()
def test_every_slot_and_row_has_its_own_words_in_the_text(base):
    """By hand: one slot and row at a time, with the word's row written into the embedding tables."""
    pipe, adapter = adapted(base)
    woken(adapter)
    vectors = adapter.word_vectors(encoded_by(adapter), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    prompts = ["a <s> dog on <s2> grass", "the <s> cat"]
    found = texts(pipe, adapter, prompts, vectors)
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if base == "sdxl" else [])
    tables = [encoder.get_input_embeddings() for encoder in encoders]
    for own, start in zip(vectors, adapter.starts, strict=True):
        assert torch.equal(own[:, 0, 1], start.expand(4, -1))  # a subject that is not there
        assert torch.cdist(own[:, 1, 1], own[:, 1, 1])[~torch.eye(4, dtype=torch.bool)].min() > 0.01
    ids = pipe.tokenizer.convert_tokens_to_ids(["<s>", "<s2>"])
    assert max(ids) < len(tables[0].weight)
    for slot in range(4):
        for row in range(2):
            for own, table in zip(vectors, tables, strict=True):
                table.weight[ids] = own[slot, row]
            assert torch.allclose(found[slot, row], plain_text(pipe, [prompts[row]])[0], atol=1e-5)


def test_an_empty_start_word_is_refused():
    with pytest.raises(UserError, match="initializer_token"):
        multimodal(tiny("sd15"), eye(), "", **SIZES)


# files


def same_adapter(found, adapter) -> None:
    expected = adapter.state_dict()
    assert list(found.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("sd15", {}),
        ("sd15", {"words": False, "location": False, "time_bins": 7}),
        ("sdxl", {"text_gate": "complement"}),
    ],
)
def test_a_multimodal_adapter_comes_back_from_its_file(base, options, tmp_path):
    _, adapter = adapted(base, **options)
    woken(adapter)
    file = save_adapter(adapter, tmp_path)
    assert file == tmp_path / FILE
    pipe = tiny(base)
    found = load_adapter(file, pipe, eye())
    same_adapter(found, adapter)
    assert found.encoder.config == adapter.encoder.config
    assert found.text_gate == options.get("text_gate", "none")
    assert {p.text_gate for p in pipe.unet.attn_processors.values() if p.branch is not None} == {
        found.text_gate
    }
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("plus", [False, True])
def test_an_image_prompt_adapter_comes_back_from_its_file(plus, tmp_path):
    adapter = woken(image_prompt(tiny("sd15"), eye(), plus, **(PLUS if plus else {})))
    found = load_adapter(save_adapter(adapter, tmp_path), tiny("sd15"), eye())
    same_adapter(found, adapter)
    assert found.encoder.plus is plus


@pytest.mark.parametrize("kind", ["multimodal", "image_prompt"])
@torch.no_grad()
def test_half_precision_files(kind, tmp_path):
    pipe = tiny("sd15")
    adapter = (
        multimodal(pipe, eye(), "toy", **SIZES) if kind == "multimodal" else image_prompt(pipe, eye(), False)
    )
    file = save_adapter(woken(adapter), tmp_path, half=True)
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    found = load_adapter(file, tiny("sd15"), eye()).state_dict()
    for name, value in adapter.state_dict().items():
        assert torch.equal(found[name], value.half().float()), name


def test_what_a_file_says_of_itself(tmp_path):
    _, adapter = adapted("sd15", text_gate="same")
    about = json.loads(header(save_adapter(adapter, tmp_path))["subject"])
    assert about["config"]["time_bins"] == 4
    assert about["text_gate"] == "same"
    assert about["layers"]["1"] == ["down_blocks.0.attentions.0.transformer_blocks.0.attn2", 8]
    assert about["layers"]["7"] == ["mid_block.attentions.0.transformer_blocks.0.attn2", 16]


@pytest.mark.parametrize("kind", ["multimodal", "without_words", "plain", "plus"])
def test_another_base_model_is_refused_and_the_file_named(kind, tmp_path):
    """The tiny models' layers are alike in all but the width of their text, as those of Stable Diffusion 1.x
    and 2.x are."""
    pipe = tiny("sd15")
    if kind in ("multimodal", "without_words"):
        adapter = multimodal(pipe, eye(), "toy", words=kind == "multimodal", **SIZES)
    else:
        adapter = image_prompt(pipe, eye(), kind == "plus", **(PLUS if kind == "plus" else {}))
    file = save_adapter(adapter, tmp_path)
    with pytest.raises(UserError, match=rf"{file}.*another base model"):
        load_adapter(file, tiny("sdxl"), eye())


def test_other_layers_than_those_of_the_base_model_are_refused(tmp_path):
    state = released("sd15", False)
    fewer = {name: value for name, value in state.items() if not name.startswith("ip_adapter.3.")}
    more = state | {f"ip_adapter.9.{part}.weight": torch.ones(16, 16) for part in ("to_k_ip", "to_v_ip")}
    wider = state | {"ip_adapter.3.to_k_ip.weight": torch.ones(24, 16)}
    for i, changed in enumerate((fewer, more, wider)):
        with pytest.raises(UserError, match=f"{i}.safetensors.*another base model"):
            load_adapter(write(changed, tmp_path / f"{i}.safetensors"), tiny("sd15"), eye())


@pytest.mark.parametrize("refused", ["sdxl", "other_layers", "damaged"])
def test_a_refused_file_leaves_the_adapter_that_is_loaded_in_place(refused, tmp_path):
    pipe = ours("sd15", write(released("sd15", False), tmp_path / "good.safetensors"))
    expected = drawn(pipe, subject_images=noise(0))
    bad = tmp_path / "bad.safetensors"
    if refused == "sdxl":
        bad = save_adapter(adapted("sdxl")[1], tmp_path)
    elif refused == "other_layers":
        write({name: value for name, value in released("sd15", False).items() if ".7." not in name}, bad)
    else:
        bad.write_bytes(b"not tensors")
    with pytest.raises(UserError):
        pipe.load_subject_adapter(bad, eye())
    assert np.array_equal(drawn(pipe, subject_images=noise(0)), expected)


@pytest.mark.parametrize("kind", ["multimodal", "plain", "plus"])
def test_another_image_tower_is_refused_and_the_adapter_in_place_stays(kind, tmp_path):
    """Towers of other widths, and for ours, which reads several layers, of another depth."""
    pipe = tiny("sd15")
    if kind == "multimodal":
        file = save_adapter(multimodal(pipe, eye(), "toy", **SIZES), tmp_path)
    else:
        file = save_adapter(
            image_prompt(pipe, eye(), kind == "plus", **(PLUS if kind == "plus" else {})), tmp_path
        )
    loaded = ours("sd15", write(released("sd15", False), tmp_path / "good.safetensors"))
    expected = drawn(loaded, subject_images=noise(0))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    others = {"plain": [{"projection_dim": 24}], "plus": [{"hidden_size": 48}]}
    for other in others.get(kind, [{"hidden_size": 48}, {"num_hidden_layers": 5}]):
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**({"image_size": 32, "patch_size": 8, "projection_dim": 16} | sizes | other))
        )
        with pytest.raises(UserError, match=rf"{file}' reads another image encoder"):
            loaded.load_subject_adapter(file, ImageEncoder(vision, HALVES, HALVES))
    assert np.array_equal(drawn(loaded, subject_images=noise(0)), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_damaged_file_is_refused_and_named(suffix, tmp_path):
    file = write(released("sd15", False), tmp_path / f"adapter{suffix}")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=str(file)):
        load_adapter(file, tiny("sd15"), eye())


@pytest.mark.parametrize("wrong", ["a tensor is missing", "a later version's size"])
def test_a_file_of_ours_that_does_not_fit_is_refused_and_named(wrong, tmp_path):
    file = save_adapter(adapted("sd15")[1], tmp_path)
    state, about = read_file(file)
    if wrong == "a tensor is missing":
        state.pop(next(iter(state)))
    else:
        about["config"]["flavours"] = 3
    save_file(state, file, {"format": "pt", "subject": json.dumps(about)})
    with pytest.raises(UserError, match="damaged" if "missing" in wrong else "another version"):
        load_adapter(file, tiny("sd15"), eye())


def test_a_damaged_file_of_ours_is_refused_and_named(tmp_path):
    file = save_adapter(adapted("sd15")[1], tmp_path)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=str(file)):
        load_adapter(file, tiny("sd15"), eye())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file = tmp_path / "adapter.bin"
    torch.save({"image_proj": {"proj.weight": Code()}, "ip_adapter": {}}, file)
    with pytest.raises(UserError, match=str(file)):
        load_adapter(file, tiny("sd15"), eye())
    assert not (tmp_path / "ran").exists()


FOREIGN = {
    "lora.safetensors": {"unet.down_blocks.0.lora_A.weight": torch.zeros(2, 2)},
    "full.bin": {"image_proj_model.proj.weight": torch.zeros(2, 2)},  # a training checkpoint, not converted
    "list.bin": [torch.zeros(2, 2)],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_refused_and_named(name, tmp_path):
    file = tmp_path / name
    (torch.save if file.suffix == ".bin" else save_file)(FOREIGN[name], file)
    with pytest.raises(UserError, match=str(file)):
        load_adapter(file, tiny("sd15"), eye())


@pytest.mark.parametrize("missing", ["image_proj.norm.bias", "ip_adapter.3.to_v_ip.weight"])
def test_a_released_file_with_a_part_missing_is_refused(missing, tmp_path):
    state = released("sd15", False)
    del state[missing]
    with pytest.raises(UserError):
        load_adapter(write(state, tmp_path / "adapter.safetensors"), tiny("sd15"), eye())


# the image encoder


def test_a_tower_comes_from_a_folder(tmp_path):
    vision().save_pretrained(tmp_path / "tower")
    found = load_image_encoder(str(tmp_path / "tower"))
    assert (found.width, found.depth) == (32, 4)
    assert found.processor.image_mean == pytest.approx(tower.OPENAI["image_mean"])
    assert found.processor.image_std == pytest.approx(tower.OPENAI["image_std"])
    pixels = random(2, 3, 32, 32)
    output, expected = found(pixels), eye()(pixels)
    assert torch.equal(output.image_embeds, expected.image_embeds)
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[-2], expected.hidden_states[-2])
    assert (
        load_image_encoder(str(tmp_path / "tower"), torch.bfloat16)(pixels).image_embeds.dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("place", ["feature_extractor", "image_encoder"])
def test_pixels_are_normalised_as_the_folder_says(place, tmp_path):
    """In the tower's own folder or in the feature_extractor beside it, as pipelines are saved."""
    vision().save_pretrained(tmp_path / "image_encoder")
    eye().processor.save_pretrained(tmp_path / place)
    found = load_image_encoder(str(tmp_path / "image_encoder"))
    assert list(found.processor.image_mean) == [0.5, 0.5, 0.5]
    assert list(found.processor.image_std) == [0.25, 0.5, 1.0]


def test_a_folder_inside_a_hub_repository(monkeypatch):
    """OWNER/NAME/FOLDER: only that repository is asked."""
    asked = []

    def load(place, subfolder="", **_):
        asked.append((place, subfolder))
        return vision(), {"missing_keys": set(), "mismatched_keys": set()}

    def no_processor(place, subfolder="", **_):
        asked.append((place, subfolder))
        raise OSError("there is none")

    monkeypatch.setattr(tower.CLIPVisionModelWithProjection, "from_pretrained", load)
    monkeypatch.setattr(tower.CLIPImageProcessorPil, "from_pretrained", no_processor)
    load_image_encoder("owner/name/models/image_encoder")
    assert asked[:2] == [("owner/name", "models/image_encoder")] * 2
    assert {place for place, _ in asked} == {"owner/name"}


@pytest.mark.parametrize("name", ["missing", "missing/from/here", "owner/name", "empty"])
def test_a_tower_that_is_not_there_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (name, str(tmp_path / name)):
        with pytest.raises(UserError, match=f"image_encoder: '{place}' could not be loaded"):
            load_image_encoder(place)


def test_the_tower_stays_in_evaluation_mode_and_without_gradients():
    found = eye()
    torch.nn.ModuleList([found]).train()
    assert not any(module.training for module in found.modules())
    assert not any(p.requires_grad for p in found.parameters())
    output = found(random(1, 3, 32, 32).requires_grad_())
    assert not output.image_embeds.requires_grad
    assert not output.hidden_states[-2].requires_grad


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "palette.png", "picture.gif"])
def test_what_is_transparent_becomes_white(kind, tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    if "palette" in kind:
        image = image.quantize()
    if "." in kind:
        image.save(tmp_path / kind)
        image = Image.open(tmp_path / kind)
    elif kind == "LA":
        image = image.convert("LA")
    white = Image.new("RGB", (32, 32), "white")
    white.paste((0, 0, 0), (0, 0, 16, 32))
    found = eye().pixels([image, white])
    assert torch.equal(found[0], found[1])
    assert found[0, 0, 5, 25] > found[0, 0, 5, 5]


def test_half_transparent_pixels_are_mixed_with_white():
    found = eye().pixels([Image.new("RGBA", (32, 32), (0, 0, 0, 128))])
    assert found[0, :, 0, 0].tolist() == pytest.approx(
        [(127 / 255 - 0.5) / std for std in (0.25, 0.5, 1.0)], abs=1e-5
    )


def test_grey_images_have_three_channels():
    assert eye().pixels([Image.new("L", (32, 32), 255)])[0, :, 0, 0].tolist() == pytest.approx(
        [2.0, 1.0, 0.5]
    )


@pytest.mark.parametrize("size", [(32, 32), (96, 32), (32, 80), (20, 50)])
def test_images_of_any_shape_are_resized_whole(size):
    image = noise(3, size)
    found = eye().pixels([image])
    assert found.shape == (1, 3, 32, 32)
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = (whole - 0.5) / np.array([0.25, 0.5, 1.0], dtype=np.float32)
    assert np.abs(found[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5

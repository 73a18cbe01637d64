"""The scores by loops over rows, their directions on real images, and the encoders by hand on tiny
models."""

import math
import re
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from customize.errors import UserError
from customize.metrics import (
    ClipEncoder,
    confidence_interval,
    copy_rate,
    diversity,
    drift,
    load_clip,
    load_dino,
    load_sticker_clip,
    multi_subject_score,
    prompt_score,
    subject_only,
    subject_score,
)
from customize.metrics.encoders import cropped
from customize.metrics.scores import ceiling_score
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, caption, draw_scene
from customize.stickers.scene import draw_pose


def rows(*shape, seed=0):
    """Random features of many lengths: the scores have to normalise them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator).add(
        0.5
    ).mul(4)


def cosine(a, b) -> float:
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


# Scores by hand


def test_subject_score_is_the_mean_over_all_pairs():
    generated, references = rows(4, 5), rows(3, 5, seed=1)
    assert subject_score(generated, references) == pytest.approx(
        mean(cosine(g, r) for g in generated for r in references)
    )
    assert subject_score(
        torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 4.0], [-1.0, 0.0]])
    ) == pytest.approx(-0.2)


def test_a_image_compared_with_itself_counts():
    """Generated images that are the references keep their ones: only the ceiling leaves them out."""
    same = torch.eye(2)
    assert subject_score(same, same) == pytest.approx(0.5)
    assert ceiling_score(same) == pytest.approx(0.0)


def test_ceiling_score_leaves_each_image_itself_out():
    references = rows(4, 5)
    expected = mean(cosine(references[i], references[j]) for i in range(4) for j in range(4) if i != j)
    assert ceiling_score(references) == pytest.approx(expected)
    assert ceiling_score(references[:1]) == 1.0


def test_prompt_score_pairs_each_image_with_its_own_prompt():
    images, texts = rows(4, 5), rows(4, 5, seed=1)
    expected = mean(cosine(i, t) for i, t in zip(images, texts, strict=True))
    assert prompt_score(images, texts) == pytest.approx(expected)


def test_prompt_score_is_neither_clipped_nor_scaled():
    assert prompt_score(
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    ) == pytest.approx(-0.2)


def test_drift_goes_from_none_to_one():
    before, after = rows(4, 5), rows(4, 5, seed=1)
    expected = mean((1 - cosine(b, a)) / 2 for b, a in zip(before, after, strict=True))
    assert drift(before, after) == pytest.approx(expected)
    assert drift(before, before) == pytest.approx(0, abs=1e-6)
    assert drift(before, -3 * before) == pytest.approx(1)


def test_diversity_is_the_mean_distance_of_two_images_of_one_prompt():
    features = rows(2, 4, 5)
    expected = mean(
        1 - cosine(some[i], some[j]) for some in features for i in range(4) for j in range(4) if i != j
    )
    assert diversity(features) == pytest.approx(expected)
    assert diversity(rows(3, 1, 5).repeat(1, 4, 1)) == pytest.approx(0, abs=1e-6)
    assert diversity(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])) == pytest.approx(2)


def test_copy_rate_compares_the_nearest_training_image_with_another_view():
    generated, training, views = rows(4, 5), rows(3, 5, seed=1), rows(4, 5, seed=2)
    expected = mean(
        max(cosine(g, t) for t in training) - cosine(g, v) for g, v in zip(generated, views, strict=True)
    )
    assert copy_rate(generated, training, views) == pytest.approx(expected)


def test_multi_subject_score_counts_each_images_worst_subject():
    crops = [rows(4, 5), rows(4, 5, seed=1), rows(4, 5, seed=2)]
    references = [
        rows(3, 5, seed=3),
        rows(2, 5, seed=4),
        rows(1, 5, seed=5),
    ]  # subjects may differ in images
    worst = [
        min(mean(cosine(c[i], r) for r in rs) for c, rs in zip(crops, references, strict=True))
        for i in range(4)
    ]
    assert multi_subject_score(crops, references) == pytest.approx(mean(worst))
    assert multi_subject_score(crops[:1], references[:1]) == pytest.approx(
        subject_score(crops[0], references[0])
    )


def test_lengths_of_features_do_not_matter():
    a, b, c = rows(4, 5), rows(4, 5, seed=1), rows(4, 5, seed=2)
    lengths = torch.tensor([[0.1], [1.0], [5.0], [70.0]])
    assert subject_score(a * lengths, b) == pytest.approx(subject_score(a, b))
    assert ceiling_score(a * lengths) == pytest.approx(ceiling_score(a))
    assert prompt_score(a * lengths, b) == pytest.approx(prompt_score(a, b))
    assert drift(a, b * lengths) == pytest.approx(drift(a, b))
    assert diversity((a * lengths)[None]) == pytest.approx(diversity(a[None]))
    assert copy_rate(a, b * lengths, c * lengths) == pytest.approx(copy_rate(a, b, c))
    assert multi_subject_score([a, b * lengths], [c * lengths, c]) == pytest.approx(
        multi_subject_score([a, b], [c, c])
    )


def test_subject_only_is_white_outside_and_cropped_to_the_mask():
    pixels = np.random.default_rng(0).integers(0, 200, (6, 8, 3), dtype=np.uint8)
    mask = np.zeros((6, 8), np.uint8)
    mask[2:5, 3] = mask[3, 3:7] = 255  # an L: rows 2 to 4, columns 3 to 6
    mask[0, 0], mask[2, 5] = 100, 128  # too faint to be the subject; half of a pixel, inside the crop
    expected = np.full((3, 4, 3), 255.0)
    expected[:, 0], expected[1] = pixels[2:5, 3], pixels[3, 3:7]
    expected[0, 2] = (pixels[2, 5] * 128.0 + 255 * 127) / 255
    found = subject_only(Image.fromarray(pixels), Image.fromarray(mask))
    assert found.size == (4, 3)
    assert np.abs(np.asarray(found, float) - expected).max() <= 1


def test_subject_only_without_a_subject_gives_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 4), dtype=np.uint8))
    found = subject_only(image, Image.new("L", image.size, 90))
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(image)[..., :3])


# The interval


@pytest.mark.parametrize(("level", "errors"), [(0.95, 1.96), (0.5, 0.6745)])
def test_the_interval_of_many_values_is_the_normal_one(level, errors):
    values = np.random.default_rng(1).normal(0.7, 0.1, 50)
    low, high = confidence_interval(values, level)
    half = errors * values.std() / math.sqrt(50)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_the_interval_of_two_values():
    """Two draws of 0 and 1 have the mean 0, 1/2 or 1 with probabilities 1/4, 1/2 and 1/4."""
    assert confidence_interval([0, 1], 0.95) == (0, 1)
    assert confidence_interval([0, 1], 0.4) == (0.5, 0.5)


def test_the_interval_of_one_value_is_that_value():
    assert confidence_interval([0.37]) == (0.37, 0.37)


def test_the_interval_of_equal_values_has_no_width():
    assert confidence_interval([0.25] * 6) == (0.25, 0.25)


def test_the_interval_is_the_same_at_every_call():
    values = np.random.default_rng(2).random(7)
    assert confidence_interval(values) == confidence_interval(values)
    assert confidence_interval(values, seed=1) != confidence_interval(values, seed=2)
    assert confidence_interval(values, seed=1) == pytest.approx(confidence_interval(values, seed=2), abs=0.02)


# Directions, on real images


class Gallery:
    """Six subjects, each in five scenes to be judged and in five others as its real images, as unit
    vectors.

    `scenes[s]` holds the scenes of subject `s`, `views[s]` the same subject and background drawn in
    another pose.
    """

    def __init__(self):
        self.world, self.encoder = World(), load_sticker_clip()
        names = [
            ("cat", "flat"),
            ("robot", "3d"),
            ("heart", "cartoon"),
            ("elephant", "flat"),
            ("skull", "3d"),
            ("cow", "cartoon"),
        ]
        places = list(BACKGROUNDS)
        self.scenes, references, views = [], [], []
        for s, name in enumerate(names):
            drawing, rng = Drawing(*name), np.random.default_rng(s)
            scenes = [
                [
                    Scene(
                        drawing, places[(first + i) % 12], pose=draw_pose(rng), seed=int(rng.integers(1000))
                    )
                    for i in range(5)
                ]
                for first in (s, s + 6, s)
            ]
            self.scenes.append(scenes[0])
            references.append(self.see(scenes[1]))
            views.append(self.see(scenes[2]))
        self.images = torch.stack([self.see(scenes) for scenes in self.scenes])
        self.references, self.views = torch.stack(references), torch.stack(views)
        self.texts = self.encoder.texts([caption(scene) for scenes in self.scenes for scene in scenes])
        self.grey = self.encoder([Image.new("RGB", (64, 64), (127, 127, 127))] * 5)

    def see(self, scenes):
        return self.encoder([draw_scene(scene, self.world)[0] for scene in scenes])


@pytest.fixture(scope="module")
def gallery():
    return Gallery()


def test_a_swapped_subject_is_less_alike(gallery):
    right = mean(subject_score(gallery.images[s], gallery.references[s]) for s in range(6))
    swapped = mean(subject_score(gallery.images[s], gallery.references[s - 1]) for s in range(6))
    constant = mean(subject_score(gallery.grey, gallery.references[s]) for s in range(6))
    assert right > swapped + 0.15
    assert right > constant + 0.15


def test_shuffled_prompts_fit_less(gallery):
    """By one: other backgrounds, mostly of the same subject; by seven: other subjects too."""
    images = gallery.images.flatten(0, 1)
    right = prompt_score(images, gallery.texts)
    assert right > prompt_score(images, gallery.texts.roll(1, 0)) + 0.1
    assert right > prompt_score(images, gallery.texts.roll(7, 0)) + 0.15
    assert right > prompt_score(gallery.grey.repeat(6, 1), gallery.texts) + 0.15


def test_a_constant_image_has_no_diversity(gallery):
    assert diversity(gallery.grey[None]) == pytest.approx(0, abs=1e-5)
    assert diversity(gallery.images) > 0.15
    assert diversity(gallery.images.transpose(0, 1)) > diversity(
        gallery.images
    )  # other subjects differ more than views


def test_other_subjects_drift_further_than_other_poses(gallery):
    images, views = gallery.images.flatten(0, 1), gallery.views.flatten(0, 1)
    assert drift(images, images) == pytest.approx(0, abs=1e-6)
    assert drift(images, images.roll(5, 0)) > drift(images, views) + 0.1
    assert drift(images, gallery.grey.repeat(6, 1)) > drift(images, views) + 0.1


def test_copies_of_the_training_images_are_told_from_new_views(gallery):
    """Asked for the scenes of `views`: one model gives its training images back, the other draws the
    subject there."""
    copied = mean(copy_rate(gallery.references[s], gallery.references[s], gallery.views[s]) for s in range(6))
    drawn = mean(copy_rate(gallery.images[s], gallery.references[s], gallery.views[s]) for s in range(6))
    assert copied > 0.1
    assert copied > drawn + 0.15


def test_leaving_a_subject_out_costs_the_whole_image(gallery):
    """The second subject is missing: the first one stands in its place too, or nothing does."""
    pairs = [(s, s - 1) for s in range(6)]
    both, twice, none = (
        mean(
            multi_subject_score(
                [gallery.images[s], other(s, o)], [gallery.references[s], gallery.references[o]]
            )
            for s, o in pairs
        )
        for other in (
            lambda s, o: gallery.images[o],
            lambda s, o: gallery.images[s],
            lambda s, o: gallery.grey,
        )
    )
    assert both > twice + 0.15
    assert both > none + 0.15


# Bad input


def test_features_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"width 5 .* width 6"):
        subject_score(rows(4, 5), rows(4, 6))
    with pytest.raises(ValueError, match=r"width 5 .* width 6"):
        copy_rate(rows(4, 5), rows(4, 6), rows(4, 5))
    with pytest.raises(ValueError, match=r"one to one: \(4, 5\) is not \(1, 5\)"):
        copy_rate(rows(4, 5), rows(3, 5), rows(1, 5))
    for score in (prompt_score, drift):
        for other in (rows(3, 5), rows(1, 5), rows(4, 6)):
            with pytest.raises(ValueError, match=r"one to one: \(4, 5\) is not"):
                score(rows(4, 5), other)
    for features in (rows(4, 5), rows(4, 1, 5)):
        with pytest.raises(ValueError, match="two or more images"):
            diversity(features)
    with pytest.raises(ValueError, match="2 subjects were cropped but 1 have references"):
        multi_subject_score([rows(4, 5)] * 2, [rows(3, 5)])


def encoder_of(image_width: int, text_width: int) -> ClipEncoder:
    layer = nn.Linear(3, image_width)
    return ClipEncoder(
        layer,
        lambda batch: layer(batch.mean((2, 3))),
        lambda image: torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255,
        "two towers",
        texts=lambda prompts: torch.ones(len(prompts), text_width),
    )


def test_towers_of_different_widths_are_refused_at_once():
    assert encoder_of(4, 4).texts(["a", "b"]).shape == (2, 4)
    with pytest.raises(
        UserError, match="'two towers' gives 5 numbers an image but 4 a prompt; give a CLIP model"
    ):
        encoder_of(5, 4)


@pytest.mark.parametrize(("load", "flag"), [(load_clip, "clip"), (load_dino, "dino")])
def test_a_folder_that_is_no_model_is_refused(load, flag, tmp_path):
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    (save_clip if flag == "clip" else save_vit)(damaged)
    (damaged / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for folder in (empty, damaged, tmp_path / "missing"):
        with pytest.raises(
            UserError, match=f"--{flag}: '{folder}' could not be loaded .*; give a hub id or a local folder"
        ):
            load(str(folder))


def test_the_flag_in_the_message_is_the_callers(tmp_path):
    with pytest.raises(UserError, match=r"^--dinov2: "):
        load_dino(str(tmp_path), "dinov2")


def test_a_model_that_is_no_dino_is_refused(tmp_path):
    save_clip(tmp_path)
    with pytest.raises(
        UserError, match=r"--dino: '.*' is a 'clip' model; give a DINO .* such as facebook/dino-vits16"
    ):
        load_dino(str(tmp_path))


def test_a_model_that_is_no_clip_is_refused(tmp_path):
    """Its weights would otherwise be random, even though processor and tokenizer are there."""
    save_clip(tmp_path)
    save_vit(tmp_path)
    with pytest.raises(
        UserError, match=r"--clip: '.*' is a 'vit' model; give a CLIP one, such as openai/clip"
    ):
        load_clip(str(tmp_path))


def test_a_clip_without_its_preprocessing_is_refused(tmp_path):
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(
        UserError, match=r"--clip: .* could not be loaded .*; give a hub id or a local folder"
    ):
        load_clip(str(tmp_path))


def test_a_clip_without_its_tokenizer_is_refused(tmp_path):
    """An empty tokenizer would read all prompts of one length as the same."""
    save_clip(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"--clip: .* has no tokenizer; download its tokenizer.json"):
        load_clip(str(tmp_path))


# Encoders, on tiny models of the true layouts

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [
    *LETTERS,
    *(letter + "</w>" for letter in LETTERS),
    "do",
    "dog</w>",
    "<|startoftext|>",
    "<|endoftext|>",
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def awake(model: nn.Module, folder):
    """The model in evaluation mode with weights large enough that images differ, saved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def save_clip(folder) -> CLIPModel:
    """32 pixels in patches of 8, twelve positions for words."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    CLIPTokenizer(
        vocab=vocabulary, merges=[("d", "o"), ("do", "g</w>")], model_max_length=12
    ).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    ends = {"bos_token_id": 54, "eos_token_id": 55, "pad_token_id": 55}
    text = {**SIZES, **ends, "vocab_size": len(PIECES), "max_position_embeddings": 12}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    return awake(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), folder)


def save_vit(folder) -> ViTModel:
    return awake(ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)), folder)


def save_dinov2(folder) -> Dinov2Model:
    """Its positions are for 42 pixels, as those of facebook/dinov2-base are for 518."""
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    }
    return awake(Dinov2Model(Dinov2Config(**options)), folder)


def save_dinov2_with_registers(folder) -> Dinov2WithRegistersModel:
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    }
    return awake(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**options)), folder)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with coarse and fine detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8)).resize((width, height))
    return Image.blend(coarse, Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)), 0.4)


def pixels_by_hand(image, resized, box, statistics) -> torch.Tensor:
    """One image as (1, 3, height, width): resized, cropped to `box` (left, top, right, bottom),
    standardised."""
    left, top, right, bottom = box
    values = (
        np.asarray(image.resize(resized, Image.Resampling.BICUBIC), np.float32)[top:bottom, left:right] / 255
    )
    standard = (values - np.array(statistics[0])) / np.array(statistics[1])
    return torch.from_numpy(standard.transpose(2, 0, 1).astype(np.float32))[None]


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.square().sum(-1, keepdim=True).sqrt()


# width, height -> the size after resizing, and the crop, for a shorter side of 32 and of 37 = 32 * 256 /
# 224
# and of 256
CLIP_CROPS = {(40, 32): ((40, 32), (4, 0, 36, 32)), (50, 80): ((32, 51), (0, 9, 32, 41))}
VIT_CROPS = {(40, 32): ((46, 37), (7, 2, 39, 34)), (50, 80): ((37, 59), (2, 13, 34, 45))}
DINOV2_CROPS = {(40, 32): ((320, 256), (48, 16, 272, 240)), (50, 80): ((256, 410), (16, 93, 240, 317))}
DINOS = {
    "vit": (save_vit, VIT_CROPS),
    "dinov2": (save_dinov2, DINOV2_CROPS),
    "dinov2_with_registers": (save_dinov2_with_registers, DINOV2_CROPS),
}


@torch.no_grad()
def test_clip_images_by_hand(tmp_path):
    model, encoder = save_clip(tmp_path), load_clip(str(tmp_path))
    for size, (resized, box) in CLIP_CROPS.items():
        image = noise(*size)
        hidden = model.vision_model(pixels_by_hand(image, resized, box, CLIP_STATISTICS)).pooler_output
        assert torch.allclose(encoder([image]), unit(model.visual_projection(hidden)), atol=1e-4)


@torch.no_grad()
def test_clip_prompts_by_hand(tmp_path):
    model, encoder = save_clip(tmp_path), load_clip(str(tmp_path))
    words = {
        "a dog": [54, 26, 53, 55],
        "A  Dog": [54, 26, 53, 55],
        "do": [54, 3, 40, 55],
        "a" * 30: [54, *[0] * 10, 55],
    }
    for prompt, ids in words.items():  # the last one is cut and still ends
        hidden = model.text_model(torch.tensor([ids])).last_hidden_state[:, len(ids) - 1]
        assert torch.allclose(encoder.texts([prompt]), unit(model.text_projection(hidden)), atol=1e-4), prompt


@pytest.mark.parametrize("kind", DINOS)
@torch.no_grad()
def test_dino_gives_the_class_token_by_hand(kind, tmp_path):
    save, crops = DINOS[kind]
    model, encoder = save(tmp_path), load_dino(str(tmp_path))
    for size, (resized, box) in crops.items():
        image = noise(*size)
        states = model(pixels_by_hand(image, resized, box, IMAGENET_STATISTICS)).last_hidden_state
        assert torch.allclose(encoder([image]), unit(states[:, 0]), atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", *DINOS])
def test_batches_equal_images_one_by_one(kind, tmp_path):
    """Nine images of different sizes in batches of four: the last is not full."""
    (save_clip if kind == "clip" else DINOS[kind][0])(tmp_path)
    encoder = (load_clip if kind == "clip" else load_dino)(str(tmp_path))
    encoder.batch_size = 4
    images = [noise(30 + 7 * i, 60 - 5 * i, i) for i in range(9)]
    found = encoder(images)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    assert torch.allclose(found.norm(dim=1), torch.ones(9), atol=1e-5)
    assert torch.allclose(found, torch.cat([encoder([image]) for image in images]), atol=1e-3)
    assert (torch.cdist(found, found) + torch.eye(9)).min() > 0.01  # they differ by much more than that


def test_batches_equal_prompts_one_by_one(tmp_path):
    """Short prompts are padded beside long ones, which must not show."""
    save_clip(tmp_path)
    encoder = load_clip(str(tmp_path))
    encoder.batch_size = 2
    prompts = ["a dog", "the dog", "a", "dog dog dog dog", ""]
    found = encoder.texts(prompts)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    assert torch.allclose(found.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(found, torch.cat([encoder.texts([prompt]) for prompt in prompts]), atol=1e-3)
    assert (torch.cdist(found, found) + torch.eye(5)).min() > 0.01


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_images_of_every_mode_and_shape(kind, tmp_path):
    (save_clip if kind == "clip" else save_vit)(tmp_path)
    encoder = (load_clip if kind == "clip" else load_dino)(str(tmp_path))
    rgb = noise(40, 30)
    grey, palette = rgb.convert("L"), rgb.quantize(16)
    colours = np.array(palette.getpalette()).reshape(-1, 3).astype(np.uint8)
    opaque = rgb.copy()
    opaque.putalpha(255)
    same = [
        (opaque, rgb),
        (grey, Image.fromarray(np.stack([np.asarray(grey)] * 3, -1))),
        (palette, Image.fromarray(colours[np.asarray(palette)])),
        (
            grey.point(lambda v: 255 * (v > 99), "1"),
            Image.fromarray(np.stack([255 * np.uint8(np.asarray(grey) > 99)] * 3, -1)),
        ),
    ]
    for image, as_rgb in same:
        assert torch.equal(encoder([image]), encoder([as_rgb])), image.mode
    shapes = [noise(1, 1), noise(3, 90), noise(200, 5), noise(33, 31)]
    assert encoder(shapes).isfinite().all()


def test_the_embedded_worlds_clip_shrinks_large_images(gallery):
    """The same scene, drawn at four times the size, is nearly the same image."""
    scenes = [scenes[0] for scenes in gallery.scenes]
    large = gallery.encoder(
        [draw_scene(s, gallery.world)[0].resize((256, 256), Image.Resampling.BICUBIC) for s in scenes]
    )
    assert torch.cosine_similarity(large, gallery.images[:, 0], dim=1).mean() > 0.9


@pytest.mark.parametrize(
    ("save", "load", "says"),
    [
        (save_clip, load_clip, ["bicubic", "centre crop 32x32"]),
        (save_vit, load_dino, ["class token", "bicubic 37", "centre crop 32"]),
        (save_dinov2, load_dino, ["class token", "bicubic 256", "centre crop 224"]),
    ],
)
def test_the_stamp_names_model_and_preprocessing(save, load, says, tmp_path):
    save(tmp_path)
    stamp = load(str(tmp_path)).stamp
    assert stamp.startswith(f"{tmp_path} (weights ")
    assert all(words in stamp for words in says)


def test_the_embedded_worlds_texts_are_the_means_of_all_states(gallery):
    """Padding counts, as this text tower keeps looks there; whatever else is in the batch."""
    from customize.stickers import MODEL

    text = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    prompts = ["a flat fox on green grass", "a 3d cat"]
    for prompt, found in zip(prompts, gallery.encoder.texts(prompts), strict=True):
        ids = tokenizer(prompt, padding="max_length", max_length=56, return_tensors="pt").input_ids
        with torch.no_grad():
            states = text(ids).last_hidden_state[0]
        mean_state = sum(states) / 56
        assert torch.allclose(found, mean_state / mean_state.norm(), atol=1e-5)


def test_the_embedded_worlds_clip_is_named(gallery):
    assert re.fullmatch(r"stickers \(weights [0-9a-f]{8}\), resized 128x128", gallery.encoder.stamp)


@pytest.mark.parametrize("turned", [False, True])
def test_cropped_takes_the_middle_by_hand(turned):
    """A ramp of 20 a pixel, 12 x 6, doubled: pixel j has 10 j - 5, and the middle four columns of 24
    begin at 10."""
    ramp = np.tile(20 * np.arange(12, dtype=np.uint8), (6, 1))
    expected = np.tile([95, 105, 115, 125], (4, 1))
    found = np.asarray(cropped(Image.fromarray(ramp.T if turned else ramp), 12, 4))
    assert np.array_equal(found, expected.T if turned else expected)


def test_cropped_images_keep_their_proportions():
    """No resizing: of 9 x 5 the middle 3 x 3 begins at column 3 and row 1."""
    pixels = np.random.default_rng(0).integers(0, 255, (5, 9, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(cropped(Image.fromarray(pixels), 5, 3)), pixels[1:4, 3:6])
    assert np.array_equal(np.asarray(cropped(Image.fromarray(pixels), 5, 5)), pixels[:, 2:7])

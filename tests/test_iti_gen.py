"""ITI-GEN: its losses by loops, words that serve every base model of a text encoder, and bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

import customize
from conftest import write_noise
from customize.adapters.encoders.joint_space import load_joint_space
from customize.attributes import inclusive_prompts, read_attributes, split_prompts
from customize.backbones.families import wrap
from customize.data.concepts import Concept
from customize.data.images import find_images
from customize.errors import UserError
from customize.losses import attribute_differences, attribute_directions, semantic_consistency
from customize.trainers.methods.iti_gen import ITIGen, ITIGenConfig
from tiny import clip, draw, random, tiny, tokenizer, unet, woken_at_zero

ATTRIBUTES = "<young>+<old>+<ancient>,<dark>+<light>"
WORDS = ["<young>", "<old>", "<ancient>", "<dark>", "<light>"]


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


# losses


@pytest.mark.parametrize("count", [2, 4])
def test_alignment_by_loops(count):
    images, texts = random(count, 5).double(), random(count, 5, seed=1).double()
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    expected = [1 - cosine(images[i] - images[j], texts[i] - texts[j]) for i, j in pairs]
    assert attribute_directions(images, texts).item() == pytest.approx(sum(expected) / len(pairs))
    assert attribute_directions(images, 0.1 * images).item() == pytest.approx(0, abs=1e-6)
    expected = []
    for i, j in pairs:
        wanted, found = images[i] - images[j], texts[i] - texts[j]
        expected.append(float((wanted - found).norm() ** 2 / wanted.norm() ** 2))
    assert attribute_differences(images, texts).item() == pytest.approx(sum(expected) / len(pairs))
    assert attribute_differences(images, 0.1 * images).item() == pytest.approx(0.81)


def test_semantic_consistency_by_loops():
    texts, original = random(6, 4).double(), random(4, seed=1).double()
    expected = [max(0.0, 0.3 - cosine(text, original)) for text in texts]
    assert 0 < sum(value == 0 for value in expected) < 6
    assert semantic_consistency(texts, original, 0.3).item() == pytest.approx(sum(expected) / 6)


# prompts


def test_all_combinations_are_drawn_equally_often():
    attributes = read_attributes(" <young> + <old>, <dark>+<light>")
    assert attributes == [["<young>", "<old>"], ["<dark>", "<light>"]]
    assert inclusive_prompts("a photo of a {} dog", attributes) == {
        ("<young>", "<dark>"): "a photo of a <young> <dark> dog",
        ("<young>", "<light>"): "a photo of a <young> <light> dog",
        ("<old>", "<dark>"): "a photo of a <old> <dark> dog",
        ("<old>", "<light>"): "a photo of a <old> <light> dog",
    }


@pytest.mark.parametrize("text", ["", "<a>", "<a>+", "<a>+<a>", "<a>+<b>,<c>", "<a>+<b>,<b>+<c>"])
def test_attributes_that_are_none(text):
    with pytest.raises(UserError, match="two or more different words for each attribute"):
        read_attributes(text)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a dog <a>", "a dog"], "'a dog' must say one of the words of --attributes, not 0"),
        (["a dog <a>", "a dog <a> <b>"], "must say one of the words of --attributes, not 2"),
        (["a dog <a>", "a cat <b>"], "differ in more than the category's word"),
        (["a dog <a>", "a dog <a>"], "no concept's prompt says <b>"),
    ],
)
def test_prompts_that_do_not_fit_the_attributes(prompts, said):
    with pytest.raises(UserError, match=said):
        split_prompts(prompts, ["<a>", "<b>"])


# training


@pytest.fixture
def place(tmp_path):
    """Tiny base models, the CLIP models of their text encoders, and references of two attributes."""
    rows = []
    for i, word in enumerate(WORDS):
        folder = write_noise(tmp_path / f"references-{i}")
        Image.new("RGB", (40, 32), (50 * i, 200 - 40 * i, 90)).save(folder / "0.png")
        rows.append({"instance_data_dir": str(folder), "instance_prompt": f"a photo of a dog {word}"})
    (tmp_path / "concepts.json").write_text(json.dumps(rows))
    for base in ("sd15", "sdxl"):
        pipe = tiny(base)
        pipe.save_pretrained(tmp_path / base)
        names = ["text_encoder", "text_encoder_2"] if base == "sdxl" else ["text_encoder"]
        for name in names:
            text = getattr(pipe, name)
            vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32}
            vision |= {"num_attention_heads": 2, "patch_size": 8}
            width = {"projection_dim": 12}
            halves = {"text_config": text.config.to_dict() | width, "vision_config": vision | width}
            config = CLIPConfig(**halves, **width)
            torch.manual_seed(1)
            model = CLIPModel(config)
            model.text_model.load_state_dict(
                {
                    k.removeprefix("text_model."): v
                    for k, v in text.state_dict().items()
                    if "projection" not in k
                }
            )
            model.save_pretrained(tmp_path / f"clip-{base}-{name}")
    return tmp_path


def settings(place, base: str = "sd15", **more) -> dict:
    models = sorted(place.glob(f"clip-{base}-*"))
    found = {"concepts_list": place / "concepts.json", "attributes": ATTRIBUTES, "resolution": 32}
    found |= {"initializer_token": "toy", "max_train_steps": 3, "clip_models": models}
    return found | {"pretrained_model_name_or_path": place / base, "output_dir": place / "run"} | more


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@pytest.mark.parametrize("alignment", ["cosine", "difference"])
def test_trains_and_draws_again(base, alignment, place):
    prompt = "a photo of a dog <old>"
    run = customize.train("iti_gen", **settings(place, base, alignment=alignment, validation_prompt=[prompt]))
    info = json.loads((run / "run.json").read_text())
    assert list(info["words"]) == WORDS
    pipe = customize.load_pipeline(run)
    state = load_file(run / info["words"]["<old>"])
    parts = {"clip_l": (pipe.tokenizer, pipe.text_encoder)}
    if base == "sdxl":
        parts["clip_g"] = pipe.tokenizer_2, pipe.text_encoder_2
    for name, (words, encoder) in parts.items():
        vectors = state.get(name, state.get("<old>"))
        assert vectors.shape == (3, 16)
        start = words.convert_tokens_to_ids(["<old>", "<old>_1", "<old>_2"])
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[start], vectors)
        assert not torch.equal(table[start][:1], table[words.convert_tokens_to_ids(["toy"])])
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(draw(pipe, prompt) - draw(pipe, "a photo of a dog <light>")).max() > 0


def test_words_serve_every_base_model_of_the_text_encoder(place):
    run = customize.train("iti_gen", **settings(place))
    torch.manual_seed(7)
    other = tiny("sd15")
    other.unet = unet()
    woken_at_zero(other).save_pretrained(place / "other")
    moved = customize.load_pipeline(run, base_model=str(place / "other"))
    same = customize.load_pipeline(run)
    prompt = "a photo of a dog <ancient> <dark>"
    texts = [pipe.encode_prompt([prompt], "cpu", 1, False)[0] for pipe in (same, moved)]
    assert torch.equal(*texts)
    for pipe in (same, moved):
        pipe.set_progress_bar_config(disable=True)
    assert np.abs(draw(same, prompt) - draw(moved, prompt)).max() > 1e-3


def made(place, **more) -> ITIGen:
    own = [Concept(**row) for row in json.loads((place / "concepts.json").read_text())]
    config = ITIGenConfig(
        attributes=ATTRIBUTES,
        initializer_token="toy",
        clip_models=[str(place / "clip-sd15-text_encoder")],
        **more,
    )
    method = ITIGen(wrap(tiny("sd15")), config, own)
    images = [
        image for i, c in enumerate(own) for image in find_images(c.instance_data_dir, c.instance_prompt, i)
    ]
    method.use_images(images)
    return method


def test_the_losses_of_all_combinations_by_loops(place):
    method = made(place, consistency_weight=0.5, consistency_floor=0.99)
    for i, vectors in enumerate(method.tokens.vectors):
        vectors.data += 0.3 * random(*vectors.shape, seed=i)
    found = method({})
    [space], total, pairs = method.spaces, 0.0, []
    groups = [WORDS[:3], WORDS[3:]]
    with torch.no_grad():
        prompts = {(a, b): f"a photo of a dog {a} {b}" for a in groups[0] for b in groups[1]}
        texts = {key: space.texts([prompt])[0] for key, prompt in prompts.items()}
        original = space.texts(["a photo of a dog"])[0]
    for attribute, words in enumerate(groups):
        means = [torch.stack([t for k, t in texts.items() if k[attribute] == w]).mean(0) for w in words]
        images = method.references[0][attribute]
        own = [
            1 - cosine(images[i] - images[j], means[i] - means[j])
            for i in range(len(words))
            for j in range(i + 1, len(words))
        ]
        pairs.append(sum(own) / len(own))
    total = sum(max(0.0, 0.99 - cosine(text, original)) for text in texts.values()) / len(texts)
    assert found["alignment"].item() == pytest.approx(sum(pairs) / 2, rel=1e-4)
    assert found["consistency"].item() == pytest.approx(0.5 * total, rel=1e-4)
    assert set(method.trainable()) == {"tokens.vectors.0"}
    sum(found.values()).backward()
    assert method.tokens.vectors[0].grad.abs().sum(1).all()


def test_texts_are_clips_own_also_where_the_largest_id_is_no_end(place):
    """The configuration has eos_token_id 2, by which CLIP pools at the largest id, that of a new word."""
    pipe = tiny("sd15")
    space = load_joint_space(str(place / "clip-sd15-text_encoder"), pipe.tokenizer, pipe.text_encoder)
    whole = CLIPModel.from_pretrained(place / "clip-sd15-text_encoder").eval()
    ids = pipe.tokenizer(["a red dog"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        states = whole.text_model(ids).last_hidden_state
        expected = whole.text_projection(states[:, int((ids[0] == 2).nonzero()[0])])[0]
        assert cosine(space.texts(["a red dog"])[0], expected) == pytest.approx(1, abs=1e-5)


# bad input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"clip_models": []}, "names 0 CLIP models, and this base model has 1 text encoders"),
        ({"clip_models": ["nothing/there"]}, "could not be loaded as a CLIP"),
        ({"clip_models": ["stickers"]}, "stickers' is of another text encoder"),
        ({"attributes": "<young>"}, "two or more different words"),
        ({"attributes": ATTRIBUTES + "+<tall>"}, "no concept's prompt says <tall>"),
        ({"initializer_token": " "}, "is empty for the tokenizer"),
        ({"holdout": 1}, "holdout: this method has no diffusion loss"),
        ({"snr_gamma": 5.0}, "snr_gamma: this method has no diffusion loss"),
        ({"consistency_floor": 2.0}, "consistency_floor"),
    ],
)
def test_settings_that_cannot_be(more, said, place):
    with pytest.raises(UserError, match=said):
        customize.train("iti_gen", **settings(place, **more))
    assert not (place / "run" / "run.json").exists()


def test_a_clip_model_of_another_width(place):
    encoder = clip(dim=32)
    with pytest.raises(UserError, match=r"texts of .* are 16 wide, and those of the base .* 32"):
        load_joint_space(str(place / "clip-sd15-text_encoder"), tokenizer(), encoder)


def test_masks_are_refused(place):
    Image.new("L", (40, 32), 255).save(place / "references-0" / "0.mask.png")
    with pytest.raises(UserError, match="compares whole images; add no_masked_loss"):
        customize.train("iti_gen", **settings(place))
    customize.train("iti_gen", **settings(place, masked_loss=False))


def test_a_base_model_with_another_text_encoder_beside(place):
    tiny("sd3").save_pretrained(place / "sd3")
    with pytest.raises(UserError, match="name one for each, which must be CLIP's"):
        customize.train("iti_gen", **settings(place, pretrained_model_name_or_path=place / "sd3"))


def test_a_dry_run(place, capsys):
    customize.train("iti_gen", **settings(place, dry_run=True))
    assert "estimated peak" in capsys.readouterr().out
    assert not (place / "run").exists()

"""What is drawn at each showing: one of several captions, none, more of one concept, and the resolution."""

import io
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import customize
from customize import embedded
from customize.app.web.forms import component, value_of
from customize.app.web.teaching import expert_flags
from customize.attention_maps import AttentionRecorder
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.cache import TensorCache
from customize.config import flags_of
from customize.data.batches import BucketBatches, CaptionedBatches
from customize.data.concepts import DataConfig, read_concepts
from customize.data.crops import buckets, nearest_bucket
from customize.data.dataset import SubjectDataset
from customize.data.folders import Folders, read_folders
from customize.data.images import ImageFile, find_images
from customize.data.latents import LatentDataset, all_keys
from customize.data.references import ReferenceConfig
from customize.data.streams import Streamed
from customize.data.subject_images import SubjectData, SubjectImages
from customize.data.training_data import Preparation
from customize.errors import UserError
from customize.runs.folder import INFO, read_info
from customize.trainers.launch import run
from customize.trainers.methods.break_for_make import BreakForMake
from customize.trainers.methods.dreambooth import DreamBooth
from customize.trainers.methods.mcpl import MCPL
from tiny import random, tiny
from tiny_families import OF_TEXT, tiny_family

LORA = "pytorch_lora_weights.safetensors"
PROMPT = "a photo of sks dog"


def file_of(index, size=(64, 64), concept=0, is_prior=False, captions=("c",)) -> ImageFile:
    path = Path(f"{index}.png")
    return ImageFile(path, captions[0], None, concept, is_prior, str(index), size, tuple(captions[1:]))


def dataset_of(files, **options) -> SubjectDataset:
    return SubjectDataset(files, DataConfig(**({"resolution": 64} | options)), 8)


def take(count, batches) -> list:
    return list(itertools.islice(batches, count))


def folder_of(path, sizes=((40, 32),) * 4) -> Path:
    path.mkdir()
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for base in ("sd15", "sdxl"):
        tiny(base).save_pretrained(folder / base)
    return folder


@pytest.fixture
def train(bases, images, tmp_path):
    """Trains from Python in a few steps on a tiny base."""
    given = {
        "instance_data_dir": images,
        "instance_prompt": PROMPT,
        "output_dir": tmp_path / "run",
        "resolution": 16,
        "max_train_steps": 3,
        "learning_rate": 1e-2,
        "rank": 2,
    }

    def trained(method: str = "dreambooth", base: str = "sd15", **changes) -> Path:
        values = given | {"pretrained_model_name_or_path": bases / base} | changes
        return customize.train(method, **{name: value for name, value in values.items() if value is not None})

    return trained


@pytest.fixture
def steps(monkeypatch):
    """Every step of a run of DreamBooth."""
    seen, losses = [], DreamBooth.losses
    monkeypatch.setattr(DreamBooth, "losses", lambda self, step: seen.append(step) or losses(self, step))
    return seen


def concepts_file(folder, *rows) -> Path:
    """A list of concepts, each with its images and the keys given."""
    written = []
    for i, row in enumerate(rows):
        own = folder / f"concept{i}"
        if not own.exists():
            folder_of(own, ((40, 32), (32, 40), (24, 24)))
        written.append(
            {"instance_data_dir": str(own), "instance_prompt": f"{PROMPT} {'in red'[: 6 * i]}"} | row
        )
    path = folder / "concepts.json"
    path.write_text(json.dumps(written))
    return path


# several captions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n", ("one",)),
        ("  one line, \u2028 of \x0b one caption \n\n", ("one line, \u2028 of \x0b one caption",)),
        ("one\n\n  two \r\nthree\n", ("one", "two", "three")),
        ("one\none\n", ("one", "one")),
        ("\n \n", ("the prompt",)),
    ],
)
def test_each_line_of_a_caption_file_is_a_caption(images, text, expected):
    (images / "1.txt").write_text(text, newline="")
    found = find_images(images, "the prompt")
    assert [image.captions for image in found] == [("the prompt",), expected, *[("the prompt",)] * 2]
    assert found[1].caption == expected[0]


def test_two_caption_files_must_say_the_same_lines(images):
    (images / "1.txt").write_text("one\ntwo")
    (images / "1.caption").write_text("one\n\ntwo\n")
    assert find_images(images, "x")[1].captions == ("one", "two")
    (images / "1.caption").write_text("one")
    with pytest.raises(UserError, match="two captions that differ"):
        find_images(images, "x")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["one", " two "], ("one", "two")),
        (["one", ""], ("one",)),
        ([], ("the prompt",)),
        ("one\ntwo", ("one\ntwo",)),
    ],
)
def test_metadata_may_list_captions(images, value, expected):
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": value}))
    assert find_images(images, "the prompt")[0].captions == expected


@pytest.mark.parametrize("value", [[1], ["one", None], [["one"]], {"one": "two"}, 3])
def test_a_list_of_other_things_is_malformed(images, value):
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": value}))
    with pytest.raises(UserError, match=r"Line 1 of .*malformed; write it like"):
        find_images(images, "x")


MANY = [file_of(i, captions=[f"{i}{letter}" for letter in "abc"[: 1 + i % 3]]) for i in range(6)]


def captioned(files, size=2, seed=0, start=0, rank=0, world=1, dropout=0.0, **options):
    order = BucketBatches(dataset_of(files, **options), size, seed, start, rank, world)
    return CaptionedBatches(order, dropout)


def test_captions_are_drawn_equally_often_and_leave_the_order():
    batches = take(1500, captioned(MANY))
    order = take(1500, BucketBatches(dataset_of(MANY), 2, 0))
    assert [[key for key, _ in batch] for batch in batches] == order
    seen = Counter(caption for batch in batches for _, caption in batch)
    for i, image in enumerate(MANY):
        assert {caption for caption in seen if caption[0] == str(i)} == set(image.captions)
        for caption in image.captions:  # 500 showings of each image
            assert abs(seen[caption] - 500 / len(image.captions)) < 60


def test_captions_and_dropout_are_a_function_of_seed_and_position():
    whole = take(60, captioned(MANY, seed=4, dropout=0.3))
    assert take(60, captioned(MANY, seed=5, dropout=0.3)) != whole
    assert take(43, captioned(MANY, seed=4, start=17, dropout=0.3)) == whole[17:]
    for rank in range(2):
        mine = captioned(MANY, seed=4, start=5, rank=rank, world=2, dropout=0.3)
        assert take(20, mine) == whole[rank::2][5:25]


def test_all_captions_are_cached_trained_on_and_named_in_the_plan(train, images, steps, capsys):
    (images / "0.txt").write_text(f"{PROMPT}\n{PROMPT} on grass\na red sks dog\n")
    train(max_train_steps=24)
    seen = Counter(step.batch["prompt"][0] for step in steps)
    assert seen.keys() == {PROMPT, f"{PROMPT} on grass", "a red sks dog"}
    assert "4 images with 6 captions, 24 steps" in capsys.readouterr().out
    for step in steps:  # the text of the caption that was drawn, from the cache
        expected = wrap(tiny("sd15")).encode_prompt(step.batch["prompt"])["encoder_hidden_states"]
        assert torch.allclose(step.condition.text["encoder_hidden_states"], expected, atol=1e-5)


def test_each_caption_is_checked(train, images):
    (images / "3.txt").write_text(f"{PROMPT}\n{'red ' * 20}")
    with pytest.raises(UserError, match=r"caption of '.*3\.png' has 22 tokens, more than 16"):
        train()
    (images / "3.txt").write_text("a <toy>\na dog")
    words = {"placeholder_token": "<toy>", "initializer_token": "dog", "instance_prompt": "a <toy>"}
    with pytest.raises(UserError, match=r"the caption 'a dog' of '.*3\.png' does not contain <toy>"):
        train("textual_inversion", rank=None, **words)


def test_a_word_may_be_said_by_a_second_caption_alone(train, images):
    for i in range(4):
        (images / f"{i}.txt").write_text("a <toy>\na <pet>")
    words = {"placeholder_token": "<toy>+<pet>", "initializer_token": "dog+cat"}
    train("pivotal_tuning", **words)


def test_unknown_words_of_every_caption_are_warned_of():
    files = [file_of(0, captions=("a sks fox", "a sks fox on a zeppelin"))]
    source = SubjectImages(DataConfig(), [], files)
    assert source.captions == ["a sks fox", "a sks fox on a zeppelin"]
    with pytest.warns(UserWarning, match="zeppelin"):
        embedded.warn_of_words(source.captions)


@pytest.mark.parametrize("text", [f"{PROMPT}\na cat", f"{PROMPT} a dog", PROMPT])
def test_a_resumed_run_refuses_other_captions(train, images, text):
    (images / "0.txt").write_text(f"{PROMPT}\na dog")
    train(checkpointing_steps=3)
    (images / "0.txt").write_text(text)
    with pytest.raises(UserError, match="the captions are not those"):
        train(max_train_steps=5, resume_from_checkpoint="latest")


def test_digests_tell_several_captions_from_one_of_several_lines():
    one, several = file_of(0, captions=("a\nb",)), file_of(0, captions=("a", "b"))
    assert (
        len({one.caption_text, several.caption_text, file_of(0, captions=("a", "b", "b")).caption_text}) == 3
    )
    assert one.caption_text == "a\nb"  # as runs of before had it


def test_maps_of_mcpl_are_those_of_a_word_whichever_caption_says_it():
    words = {"placeholder_token": "<toy>+<pet>", "initializer_token": "dog+cat"}
    method = MCPL(wrap(tiny("sd15")), MCPL.Config(**words, attention_memory=0.75), [])
    prompts, found = ["a <toy>", "a <pet>", "a <toy> on <pet>"], []
    for prompt in prompts:
        with torch.no_grad(), AttentionRecorder(method.backbone.denoiser, side=16) as method.recorder:
            text = Condition(method.backbone.encode_prompt([prompt]))
            method.backbone.denoise(random(1, 4, 8, 8), torch.tensor([0.5]), text)
            method.means, before = {}, method.means
            alone = method.mean_maps(-1, prompt, (0, False))
            method.means = before
            found.append((alone, method.mean_maps(-1, prompt, (0, False))))
    (toy, toy_mean), (pet, pet_mean), (both, means) = found
    assert torch.equal(toy, toy_mean)
    assert torch.equal(pet, pet_mean)  # not mixed with the map of the other word
    assert torch.allclose(means[0], 0.75 * toy[0] + 0.25 * both[0])
    assert torch.allclose(means[1], 0.75 * pet[0] + 0.25 * both[1])


def pixels(images):
    return torch.zeros(len(images), 3, 8, 8)


def test_encoders_draw_one_of_the_captions_of_a_folder(tmp_path):
    folder_of(tmp_path / "fox")
    for i in range(4):
        (tmp_path / "fox" / f"{i}.txt").write_text("a <s> fox\na <s>\na drawn <s>")
    config = ReferenceConfig(train_data_dir=str(tmp_path), resolution=16)
    dataset = Folders(config, read_folders(config), pixels, 0)
    prompts = [dataset[i]["prompt"] for i in range(60)]
    assert set(prompts) == {"a <s> fox", "a <s>", "a drawn <s>"}
    assert prompts == [dataset[i]["prompt"] for i in range(60)]
    (tmp_path / "fox" / "2.txt").write_text("a <s> fox\na fox")
    with pytest.raises(UserError, match="'a fox' does not say <s>"):
        read_folders(config)


def test_encoders_draw_one_of_the_captions_of_a_row(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "PNG")
    image = {"bytes": content.getvalue()}
    rows = [
        {"image": image, "id": "fox", "text": text} for text in (["a <s>", "one <s>"], ["a <s>", "one <s>"])
    ]
    config = ReferenceConfig(subject_column="id", resolution=16)
    prompts = [item["prompt"] for item in take(40, iter(Streamed(config, rows, pixels, 0)))]
    assert set(prompts) == {"a <s>", "one <s>"}
    assert prompts[7:] == [
        item["prompt"] for item in take(33, iter(Streamed(config, rows, pixels, 0).after(7)))
    ]
    for row in rows:
        row["text"] = ["a <s>", 3]
    with pytest.raises(UserError, match=r"\['a <s>', 3\], which is no text"):
        next(
            iter(Streamed(ReferenceConfig(subject_column="id", resolution=16, strict=True), rows, pixels, 0))
        )


def auxiliary(folder, text="a photo of sks dog\na red dog", **row) -> Path:
    path = concepts_file(folder, {"instance_prompt": "a dog"} | row, {"instance_prompt": "a cat"})
    for i in range(3):
        (folder / "concept0" / f"{i}.txt").write_text(text)
    return path


def test_auxiliary_sets_draw_one_of_their_captions(tmp_path):
    backbone = wrap(tiny("sd15"))
    backbone.resolution = 16
    method = BreakForMake(backbone, BreakForMake.Config(rank=4, auxiliary_list=str(auxiliary(tmp_path))), [])
    method.use_images([])
    assert set(method.prompts()) == {PROMPT, "a red dog", "a cat"}
    seen, encode_prompt = [], backbone.encode_prompt
    backbone.encode_prompt = lambda prompts: seen.extend(prompts) or encode_prompt(prompts)
    for _ in range(40):
        step = SimpleNamespace(t=torch.tensor([0.5]), latents=torch.zeros(1, 4, 8, 8))
        method.noise = random(1, 4, 8, 8)
        method.auxiliary(step)
    assert set(seen) == {PROMPT, "a red dog", "a cat"}
    auxiliary(tmp_path, weight=2)
    with pytest.raises(UserError, match="--auxiliary_list: its sets are taken equally often"):
        method.use_images([])


# caption dropout


def test_captions_are_dropped_at_the_rate_asked_for_and_those_of_class_images_never():
    files = [*MANY, *(file_of(i, is_prior=True, captions=("class",)) for i in range(6, 9))]
    batches = take(1000, captioned(files, dropout=0.2))
    own = [caption for batch in batches for _, caption in batch[:2]]
    assert abs(own.count("") / len(own) - 0.2) < 0.03
    assert {caption for batch in batches for _, caption in batch[2:]} == {"class"}
    assert set(own) == {"", *(caption for image in MANY for caption in image.captions)}


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sd3"])
def test_a_dropped_caption_is_what_the_unconditional_half_of_a_drawing_gets(base):
    backbone, given = wrap(tiny(base), base), []
    handle = backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    pipe = backbone.pipe
    pipe.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": backbone.text_length} if base == "sd3" else {}
    options |= {"num_inference_steps": 1, "guidance_scale": 5.0, "output_type": "latent"}
    pipe("a red dog", height=16, width=16, **options)
    handle.remove()
    drawn = given[0] | (given[0].get("added_cond_kwargs") or {})
    for cached in (False, True):
        if cached:
            backbone.cache_prompts(["a red dog", "a toy", ""], TensorCache())
            backbone.release_text_encoders()
        text = backbone.encode_captions(["a red dog", "", "a toy"])
        plain = backbone.encode_prompt(["a red dog", "a toy"])
        for name, value in text.items():
            assert torch.allclose(value[1], drawn[name][0], atol=1e-6), name  # the first half of the two
            assert torch.allclose(value[[0, 2]], plain[name], atol=1e-6), name
        assert bool(text["encoder_hidden_states"][1].any()) == (base != "sdxl")
        assert all(
            torch.equal(value, text[name][1:2]) for name, value in backbone.encode_captions([""]).items()
        )


@pytest.mark.parametrize("family", OF_TEXT)
def test_a_dropped_caption_on_other_families(family):
    """Against the negative prompt that validation draws with, which tests/test_families.py compares."""
    backbone = wrap(tiny_family(family), family)
    with torch.no_grad():
        live = backbone.encode_captions(["a red dog", ""])
    backbone.cache_prompts(["a red dog", ""], TensorCache())
    backbone.release_text_encoders()
    found = backbone.encode_captions(["a red dog", ""])
    for name, value in found.items():
        assert torch.allclose(value.float(), live[name].float(), atol=1e-5), name
    if not backbone.takes_negative_prompt:
        negative = backbone.encode_prompt([""])
        assert all(torch.equal(own, negative[name]) for name, own in backbone.encode_captions([""]).items())
        return
    arguments = backbone.prompt_arguments("a red dog")
    own = backbone._embedded(backbone.encode_captions([""]), "negative_")
    assert own.keys() == {name for name in arguments if name.startswith("negative_")}
    for name, value in own.items():
        pairs = (
            [(value, arguments[name])] if torch.is_tensor(value) else zip(value, arguments[name], strict=True)
        )
        assert all(torch.equal(*pair) for pair in pairs), name
    noisy = random(2, *backbone.latent_shape(32)[1:])
    with torch.no_grad():  # a dropped caption beside a kept one, which may be of another length
        times = torch.full((2,), 0.5)
        both = backbone.denoise(noisy, times, Condition(found))
        alone = backbone.denoise(noisy[1:], times[1:], Condition(backbone.encode_captions([""])))
    assert torch.allclose(both[1:], alone, atol=1e-4)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@pytest.mark.parametrize("trains_text", [False, True])
def test_training_with_caption_dropout(train, steps, base, trains_text):
    run = train(
        base=base, caption_dropout=0.5, train_batch_size=2, max_train_steps=6, train_text_encoder=trains_text
    )
    prompts = [prompt for step in steps for prompt in step.batch["prompt"]]
    assert {"", PROMPT} == set(prompts)
    assert all(value.isfinite().all() for value in load_file(run / LORA).values())
    reference = wrap(tiny(base), base)
    own = reference.encode_unconditional()["encoder_hidden_states"]
    for step in steps[:1] if trains_text else steps:  # the text encoder changes
        for prompt, text in zip(
            step.batch["prompt"], step.condition.text["encoder_hidden_states"], strict=True
        ):
            kept = reference.encode_prompt([prompt])["encoder_hidden_states"][0]
            assert torch.allclose(text, kept if prompt else own[0], atol=1e-5)


def test_class_images_keep_their_captions_in_a_run(train, steps):
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    train(caption_dropout=0.9, max_train_steps=8, **prior)
    assert {step.batch["prompt"][1] for step in steps} == {"a dog"}
    assert Counter(step.batch["prompt"][0] for step in steps)[""] >= 4


def test_a_word_and_lora_are_learned_under_caption_dropout(train):
    words = {"placeholder_token": "<toy>", "initializer_token": "dog", "instance_prompt": None}
    run = train("pivotal_tuning", caption_dropout=0.6, max_train_steps=8, **words)
    assert (run / "learned_embeds.safetensors").exists()


WORDS = {"placeholder_token": "<toy>", "initializer_token": "dog"}
TWO = {"placeholder_token": "<toy>+<pet>", "initializer_token": "dog+cat"}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("textual_inversion", {"rank": None} | WORDS),
        ("core", {"rank": None} | WORDS),
        ("mcpl", {"rank": None} | TWO),
        ("single_insert", WORDS),
        ("domain_tuning", {"rank": None, "domain_encoder": "x"}),
    ],
)
def test_methods_that_learn_a_word_alone_refuse_caption_dropout(train, method, options):
    with pytest.raises(UserError, match="caption_dropout: this method learns a word"):
        train(method, caption_dropout=0.1, **options)


@pytest.mark.parametrize("method", ["ip_adapter", "custom_contrast", "in_context", "domain_encoder"])
def test_encoders_have_a_dropout_of_their_own(method):
    with pytest.raises(UserError, match=r"--caption_dropout: .* It is called --dropout_text here"):
        run([method, "--caption_dropout", "0.1"])


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_a_dropout_that_leaves_nothing_is_refused(train, value):
    with pytest.raises(UserError, match="caption_dropout must be"):
        train(caption_dropout=value)


# weights


def counts(weights, files, epochs, size=1, seed=0) -> list[Counter]:
    """How often each image is shown in each epoch, by hand from the batches of one image."""
    order = BucketBatches(dataset_of(files), size, seed, weights=weights)
    found, batches = [], iter(order)
    for epoch in range(epochs):
        shown = len(order._shown(epoch))
        found.append(Counter(batch[0][0] for batch in take(shown, batches)))
    return found


OF_TWO = [file_of(i, concept=int(i >= 4)) for i in range(7)]  # four of one concept, three of the other


@pytest.mark.parametrize("weights", [(1, 2), (0.5, 1), (10.0, 20)])
def test_images_of_twice_the_weight_are_shown_twice_as_often(weights):
    for epoch in counts(weights, OF_TWO, 5):
        assert epoch == Counter({i: 1 + (i >= 4) for i in range(7)})
    order = BucketBatches(dataset_of(OF_TWO), 4, 0, weights=weights)
    assert order.batches_in_epoch == math.ceil((4 + 2 * 3) / 4)


@pytest.mark.parametrize("weights", [(1, 1.5), (0.3, 0.1), (3, 4), (1, 1.01), (7, 0.9)])
def test_fractions_of_weights_come_out_within_one_showing(weights):
    total = Counter()
    for epoch, shown in enumerate(counts(weights, OF_TWO, 12), 1):
        assert min(shown[i] for i in range(7)) >= 1  # every image in every epoch
        total += shown
        for i in range(7):
            rate = weights[i >= 4] / min(weights)
            assert abs(total[i] - epoch * rate) < 1 + 1e-9
    assert counts(weights, OF_TWO, 3, seed=1) == counts(weights, OF_TWO, 3)


def test_weights_are_exact_decimals():
    """0.3 is not three times 0.1 in binary."""
    assert counts((0.1, 0.3), OF_TWO, 4) == [Counter({i: 1 + 2 * (i >= 4) for i in range(7)})] * 4


@pytest.mark.parametrize("weight", [1.5, 1.2])
def test_epochs_are_equally_long_within_one_showing(weight):
    shown = [sum(epoch[i] for i in range(4, 7)) for epoch in counts((1, weight), OF_TWO, 10)]
    assert all(abs(count - 3 * weight) < 1 for count in shown)
    assert sum(shown) == round(30 * weight)


def test_an_epoch_under_fractions_is_counted_in_the_mean():
    order = BucketBatches(dataset_of(OF_TWO), 2, 0, weights=(1, 1.5))
    lengths = [len(order._chunks(np.random.default_rng(0), epoch)) for epoch in range(10)]
    assert order.batches_in_epoch == pytest.approx(sum(lengths) / 10)
    assert len(set(lengths[::2])) == len(set(lengths[1::2])) == 1


def order_of_before(dataset, size, seed, flip):
    """The order as it was before weights and resolutions, written out."""
    instances = [i for i, image in enumerate(dataset.images) if not image.is_prior]
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        groups, chunks = {}, []
        for index in rng.permutation(instances).tolist():
            bucket = nearest_bucket(dataset.images[index].size, buckets(64, 8))
            groups.setdefault(bucket, []).append(index)
        for bucket, members in groups.items():
            for first in range(0, len(members), size):
                chunks.append((bucket, [members[k % len(members)] for k in range(first, first + size)]))
        for k in rng.permutation(len(chunks)):
            bucket, members = chunks[k]
            flips = rng.random(len(members)) < 0.5 if flip else [False] * len(members)
            yield [((index, bucket, bool(own)), "c") for index, own in zip(members, flips, strict=True)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (3, 3)])
def test_nothing_set_is_the_order_of_before(flip, weights):
    sizes = [(64, 64), (128, 64), (30, 40)]
    dataset = dataset_of([file_of(i, sizes[i % 3], i % 2) for i in range(11)], use_aspect_ratio_buckets=True)
    found = CaptionedBatches(BucketBatches(dataset, 2, 3, flip=flip, weights=weights))
    assert take(50, found) == take(50, order_of_before(dataset, 2, 3, flip))


def test_weighted_runs_print_and_count_true_epochs(train, tmp_path, steps, capsys):
    path = concepts_file(tmp_path, {}, {"weight": 2})
    given = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": path}
    run = train(max_train_steps=None, num_train_epochs=2, **given)  # 3 + 2 * 3 showings each
    assert read_info(run)["step"] == 18
    assert "18 steps of 1 image (2 epochs)" in capsys.readouterr().out
    assert Counter(step.batch["concept"].item() for step in steps) == {0: 6, 1: 12}


@pytest.mark.parametrize("weight", [0, -1, "2", True, None, [1], 1e400, 10**400, 1001])
def test_bad_weights(tmp_path, weight):
    path = concepts_file(tmp_path, {"weight": 1}, {"weight": weight})
    with pytest.raises(
        UserError, match=r"Concept 1 of .*weight must be a number above 0 and at most 1000, not"
    ):
        read_concepts(DataConfig(concepts_list=str(path)))


def test_weights_too_far_apart(tmp_path):
    path = concepts_file(tmp_path, {"weight": 0.1}, {"weight": 11})
    with pytest.raises(UserError, match=r"0\.1 and 11 are too far apart; make the largest at most 100 times"):
        read_concepts(DataConfig(concepts_list=str(path)))


@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 3), (2, 1)])
def test_a_resumed_run_refuses_other_weights(train, tmp_path, then, now):
    path = concepts_file(tmp_path, {}, {"weight": then})
    given = {
        "instance_data_dir": None,
        "instance_prompt": None,
        "concepts_list": path,
        "checkpointing_steps": 3,
    }
    train(**given)
    concepts_file(tmp_path, {}, {"weight": now})
    with pytest.raises(UserError, match="the weights of the concepts are not those"):
        train(resume_from_checkpoint="latest", **given | {"max_train_steps": 4})


# resolutions


def test_a_batch_is_of_one_resolution_at_random():
    files = [file_of(i, (100, 100)) for i in range(8)]
    batches = take(1200, BucketBatches(dataset_of(files, smaller_resolutions=[32, 48]), 2, 0))
    sizes = [{bucket for _, bucket, _ in batch} for batch in batches]
    assert all(len(own) == 1 for own in sizes)
    seen = Counter(bucket for own in sizes for bucket in own)
    assert seen.keys() == {(64, 64), (48, 48), (32, 32)}
    assert all(abs(count - 400) < 60 for count in seen.values())
    for e in range(0, 1200, 4):  # every image once an epoch, as without
        assert sorted(index for batch in batches[e : e + 4] for index, _, _ in batch) == list(range(8))


@pytest.mark.parametrize("shaped", [False, True])
def test_no_image_is_enlarged_where_a_smaller_resolution_will_do(shaped):
    sizes = [(100, 100), (63, 100), (50, 40), (20, 30), (64, 64), (200, 70), (128, 33)]
    files = [file_of(i, size) for i, size in enumerate(sizes)]
    dataset = dataset_of(files, smaller_resolutions=[32, 48], use_aspect_ratio_buckets=shaped)
    for i, (width, height) in enumerate(sizes):
        shape = nearest_bucket((width, height), buckets(64, 8)) if shaped else (64, 64)
        every = [
            min(
                buckets(side, 8) if shaped else [(side, side)],
                key=lambda b, shape=shape: abs(math.log(b[1] / b[0]) - math.log(shape[1] / shape[0])),
            )
            for side in (64, 48, 32)
        ]
        filled = [bucket for bucket in every if bucket[0] <= height and bucket[1] <= width]
        assert list(dataset.buckets_of(i)) == (filled or every[-1:])
        assert dataset.bucket_of(i) == (filled or every[-1:])[0]
    shown = {}
    for batch in take(600, BucketBatches(dataset, 2, 0)):
        assert len({bucket for _, bucket, _ in batch}) == 1
        for index, bucket, _ in batch:
            shown.setdefault(index, set()).add(bucket)
    assert shown == {i: set(dataset.buckets_of(i)) for i in range(len(sizes))}


def test_every_key_of_a_run_is_encoded_once(tmp_path):
    instances = find_images(folder_of(tmp_path / "own", ((40, 40), (24, 40))), PROMPT)
    priors = find_images(folder_of(tmp_path / "class"), "a dog", is_prior=True)
    config = {
        "resolution": 32,
        "smaller_resolutions": [16],
        "use_aspect_ratio_buckets": True,
        "random_flip": True,
    }
    dataset, backbone = dataset_of(instances + priors, **config), wrap(tiny("sd15"))
    latents = LatentDataset(dataset, backbone, TensorCache())
    keys = {key for batch in take(300, BucketBatches(latents, 2, 0, flip=True)) for key in batch}
    assert keys == set(all_keys(dataset))
    for key in sorted(keys)[::5]:
        index, (height, width), _ = key
        pixels = dataset[key]["pixels"]
        assert pixels.shape == (3, height, width)
        assert torch.allclose(latents[key]["mean"], backbone.moments(pixels[None])["mean"][0], atol=1e-5)
        size = dataset.images[index].size
        scale = max(height / size[1], width / size[0])
        crop = [max(round((own * scale - to) / 2), 0) for own, to in ((size[1], height), (size[0], width))]
        assert latents[key]["sizes"].tolist() == [size[1], size[0], *crop]


@pytest.mark.parametrize("cached", [False, True])
def test_sdxl_is_given_the_size_of_each_resolution(train, images, steps, monkeypatch, cached):
    sizes, denoiser = [], type(tiny("sdxl").unet)
    forward = denoiser.forward
    monkeypatch.setattr(
        denoiser,
        "forward",
        lambda self, *a, **k: sizes.append(k["added_cond_kwargs"]["time_ids"]) or forward(self, *a, **k),
    )
    train(base="sdxl", resolution=32, smaller_resolutions=[16], max_train_steps=12, cache_latents=cached)
    found = set()
    for step, ids in zip(steps, sizes, strict=True):
        side = step.latents.shape[-1] * 2
        found.add(side)
        crop = round((40 * side / 32 - side) / 2)  # of images of 40 x 32 pixels
        assert ids[0].tolist() == [32, 40, 0, crop, side, side]
    assert found == {16, 32}


def test_held_out_images_have_their_largest_resolution(tmp_path):
    files = find_images(folder_of(tmp_path / "own", ((40, 40), (20, 40))), PROMPT)
    config = DataConfig(resolution=32, smaller_resolutions=[16])
    method = DreamBooth(wrap(tiny("sd15")), DreamBooth.Config(rank=2), [])
    source = SubjectImages(config, [], files, files)
    held = source.prepare(method, Preparation(1, None, ())).held_out
    assert [batch["pixels"].shape[-2:] for batch in held] == [(32, 32), (16, 16)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([12, 9], "smaller_resolutions 9 is not a positive multiple of 2; the nearest valid is 8 or 10"),
        ([16], "smaller_resolutions 16 is not below .*resolution 16"),
        ([8, 12, 8], "smaller_resolutions names 8 twice"),
        ([0], "smaller_resolutions must be at least 1"),
        (["8"], "smaller_resolutions must be a list of whole number"),
    ],
)
def test_bad_resolutions(train, values, said):
    with pytest.raises(UserError, match=said):
        train(smaller_resolutions=values)


def test_a_schedule_that_goes_by_one_resolution_is_refused():
    pipe = tiny("flux")
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    backbone, source = wrap(pipe), SubjectImages(DataConfig(resolution=64, smaller_resolutions=[32]), [], [])
    backbone.configure(timestep_sampling="shifted")
    with pytest.raises(UserError, match=r"shifted goes by --resolution alone.*--timestep_shift"):
        source.check(backbone)
    backbone.configure(timestep_sampling="shifted", timestep_shift=3.0)
    source.check(backbone)
    backbone.configure(timestep_sampling="logit_normal")
    source.check(backbone)


def test_auxiliary_sets_refuse_several_resolutions(train, tmp_path):
    with pytest.raises(UserError, match="auxiliary_list needs one size of crops"):
        train("break_for_make", auxiliary_list=auxiliary(tmp_path), smaller_resolutions=[8])


def test_the_page_offers_resolutions():
    [flag] = [flag for flag in expert_flags("dreambooth") if flag.name == "smaller_resolutions"]
    assert component(flag).value == ""
    assert value_of(flag, "512\n768") == [512, 768]
    with pytest.raises(UserError, match="'Smaller resolutions' expects a list of whole number"):
        value_of(flag, "many")
    assert "smaller_resolutions" not in {flag.name for flag in expert_flags("dreambooth", owner=False)}
    assert {"caption_dropout", "smaller_resolutions"} <= {flag.name for flag in flags_of(DataConfig)}


# all of it


def everything(tmp_path) -> dict:
    path = concepts_file(tmp_path, {"class_prompt": "a dog"}, {"weight": 1.5, "class_prompt": "a cat"})
    for i in range(2):
        (tmp_path / f"concept{i}" / "0.txt").write_text(f"{PROMPT}\n{PROMPT} on grass\n")
    given = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": path}
    given |= {"resolution": 32, "smaller_resolutions": [16, 24], "caption_dropout": 0.3, "random_flip": True}
    given |= {"use_aspect_ratio_buckets": True, "train_batch_size": 2, "checkpointing_steps": 4}
    return given


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_latents": False, "dataloader_num_workers": 1},
        {"base": "sdxl", "train_text_encoder": True},
        {"with_prior_preservation": True, "num_class_images": 2},
    ],
)
def test_a_run_with_all_four_resumes_to_the_same_bits(train, tmp_path, steps, options):
    given = everything(tmp_path) | options
    whole = train(max_train_steps=10, output_dir=tmp_path / "whole", **given)
    first = steps[:]
    assert len({step.latents.shape[-2:] for step in first}) > 1
    assert {"", f"{PROMPT} on grass"} <= {prompt for step in first for prompt in step.batch["prompt"]}
    del steps[:]
    train(max_train_steps=4, output_dir=tmp_path / "parts", **given)
    parts = train(max_train_steps=10, output_dir=tmp_path / "parts", resume_from_checkpoint="latest", **given)
    assert [step.batch["prompt"] for step in steps] == [step.batch["prompt"] for step in first]
    expected, found = load_file(whole / LORA), load_file(parts / LORA)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("method", "prompt", "options"),
    [
        ("textual_inversion", "a <toy>", WORDS | {"rank": None}),
        ("pivotal_tuning", "a <toy>", WORDS | {"caption_dropout": 0.4}),
        ("core", "a <toy>", WORDS | {"rank": None}),
        ("mcpl", "a <toy> on <pet>", TWO | {"rank": None}),
        ("single_insert", "a <toy>", WORDS | {"encoder_dim": 64, "encoder_depth": 1}),
        ("break_for_make", PROMPT, {"caption_dropout": 0.4}),
    ],
)
@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_every_method_trains_with_what_it_does_not_refuse(train, tmp_path, base, method, prompt, options):
    path = concepts_file(tmp_path, {"instance_prompt": prompt}, {"instance_prompt": prompt, "weight": 1.5})
    for i, image in itertools.product(range(2), range(3)):
        folder = tmp_path / f"concept{i}"
        (folder / f"{image}.txt").write_text(f"{prompt}\n{prompt} in red\n")
        Image.open(folder / f"{image}.png").convert("L").save(folder / f"{image}.mask.png")
    given = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": path, "max_train_steps": 6}
    given |= {"resolution": 32, "smaller_resolutions": [16], "checkpointing_steps": 3, "train_batch_size": 2}
    whole = train(method, base, **given | options)
    assert read_info(whole)["concept_weights"] == [1, 1.5]
    shutil.copytree(whole / "checkpoint-3", tmp_path / "before" / "checkpoint-3")
    resumed = {
        "resume_from_checkpoint": tmp_path / "before" / "checkpoint-3",
        "output_dir": tmp_path / "again",
    }
    again = train(method, base, **given | options | resumed)
    for file in whole.glob("*.safetensors"):
        expected, found = load_file(file), load_file(again / file.name)
        if method != "mcpl":  # its maps start anew when a run is resumed
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_ziplora_trains_with_all_four(train, tmp_path):
    loras = [train(output_dir=tmp_path / name) for name in "ab"]
    run = train("ziplora", loras=loras, rank=None, **everything(tmp_path))
    assert all(value.isfinite().all() for value in load_file(run / LORA).values())


@pytest.mark.parametrize(
    ("name", "value"), [("caption_dropout", 0.2), ("smaller_resolutions", [8]), ("smaller_resolutions", [])]
)
def test_a_resumed_run_refuses_what_changes_the_order(train, name, value):
    start = {"smaller_resolutions": [12]} if value == [] else {}
    train(checkpointing_steps=3, **start)
    with pytest.raises(UserError, match=f"{name} .*which a resumed run cannot change"):
        train(max_train_steps=5, resume_from_checkpoint="latest", **{name: value})


def test_a_run_of_before_resumes_to_the_same_bits(train, tmp_path):
    """Its run.json knows none of these settings."""
    whole = train(max_train_steps=6)
    parts = train(max_train_steps=3, checkpointing_steps=3, output_dir=tmp_path / "parts")
    for path in (parts / INFO, parts / "checkpoint-3" / INFO):
        info = json.loads(path.read_text())
        for name in ("caption_dropout", "smaller_resolutions"):
            assert info["config"].pop(name) in (0.0, [])
        assert "concept_weights" not in info
        path.write_text(json.dumps(info))
    train(max_train_steps=6, output_dir=parts, resume_from_checkpoint="latest")
    expected, found = load_file(whole / LORA), load_file(parts / LORA)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_batches_of_a_run_carry_what_was_drawn(tmp_path):
    """By hand from the order and the captions."""
    files = find_images(folder_of(tmp_path / "own", ((40, 40),) * 3), PROMPT)
    files = [ImageFile(**vars(file) | {"more_captions": ("a dog",)}) for file in files]
    config = DataConfig(resolution=32, smaller_resolutions=[16], caption_dropout=0.4, random_flip=True)
    data = SubjectData(SubjectDataset(files, config, 8), (1,))
    order = CaptionedBatches(BucketBatches(data.dataset, 2, 7, start=3, flip=True), 0.4)
    for batch, showings in zip(take(8, data.batches(3, 2, 7)), order, strict=False):
        assert batch["prompt"] == [caption for _, caption in showings]
        for pixels, (key, _) in zip(batch["pixels"], showings, strict=True):
            assert torch.equal(pixels, data.dataset[key]["pixels"])


@pytest.mark.parametrize("name", ["caption_dropout_rate", "proportion_empty_prompts"])
def test_names_of_other_tools_are_answered(name):
    with pytest.raises(UserError, match=f"--{name}: .* It is called --caption_dropout here"):
        run(["dreambooth", f"--{name}", "0.1"])
    with pytest.raises(UserError, match="or give a concept of --concepts_list a weight"):
        run(["dreambooth", "--num_repeats", "10"])

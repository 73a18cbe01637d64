"""Bad input ends in one sentence that names its remedy: it never blocks, fills the memory, fetches anything
or is ignored."""

import io
import itertools
import json
import os
import socket
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from customize.config import check_ranges, expected, flags_of, help_line, parse
from customize.data.concepts import DataConfig, read_concepts
from customize.data.dataset import SubjectDataset
from customize.data.folders import read_folders
from customize.data.images import find_images
from customize.data.references import ReferenceConfig, View, item, moved, named
from customize.data.streams import Streamed, Unreadable, decoded
from customize.errors import UserError, shortened
from customize.imaging import to_tensor
from customize.pipelines.inputs import opened
from customize.trainers.methods.custom_contrast import CustomContrastConfig
from customize.trainers.methods.dreambooth import DreamBoothConfig
from customize.trainers.methods.ip_adapter import IPAdapterConfig
from customize.trainers.methods.pivotal_tuning import PivotalTuningConfig
from customize.trainers.methods.textual_inversion import TextualInversionConfig, new_words
from customize.trainers.settings import TrainConfig

torch.set_num_threads(1)

CONFIGS = (
    TrainConfig,
    DataConfig,
    ReferenceConfig,
    CustomContrastConfig,
    IPAdapterConfig,
    PivotalTuningConfig,
)
NUMBERS = [(cls, flag) for cls in CONFIGS for flag in flags_of(cls) if flag.type in (int, float)]
NUMBER = pytest.mark.parametrize(("cls", "flag"), NUMBERS, ids=lambda value: getattr(value, "name", None))


def refused(call, *args, **options) -> str:
    """The one sentence in which the call ends."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


# numbers


@NUMBER
def test_every_number_of_a_run_has_a_range(cls, flag):
    assert any(end is not None for end in flag.range)
    assert flag.range.holds(flag.default)
    assert str(flag.range) in help_line(flag)


@NUMBER
@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "-1", "1e999", "-1e-30", "1" + "0" * 30])
def test_numbers_that_cannot_be_are_refused(cls, flag, word):
    whole = word.lstrip("-").isdigit()
    if flag.type is int and not whole:
        assert "a whole number" in refused(parse, [cls], [f"--{flag.name}", word])
    elif flag.type is int or word != "1" + "0" * 30 or flag.range.most or flag.range.below:
        assert f"--{flag.name} must be " in refused(parse, [cls], [f"--{flag.name}", word])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(ema_decay=float("nan")), "--ema_decay must be between 0 and 1, not nan."),
        (TrainConfig(ema_decay=1.01), "--ema_decay must be between 0 and 1, not 1.01."),
        (TrainConfig(learning_rate=-1.0), "--learning_rate must be above 0, not -1.0."),
        (TrainConfig(learning_rate=0.0), "--learning_rate must be above 0, not 0.0."),
        (TrainConfig(learning_rate=float("inf")), "--learning_rate must be finite and above 0, not inf."),
        (TrainConfig(seed=-1), "--seed must be between 0 and 4000000000, not -1."),
        (TrainConfig(seed=2**32), "--seed must be between 0 and 4000000000, not 4294967296."),
        (TrainConfig(adam_beta1=1.5), "--adam_beta1 must be at least 0 and below 1, not 1.5."),
        (TrainConfig(adam_beta2=1.0), "--adam_beta2 must be at least 0 and below 1, not 1.0."),
        (
            TrainConfig(max_train_steps=10**30),
            "--max_train_steps must be a number of at most 18 digits, not 1000",
        ),
        (TrainConfig(checkpoints_total_limit=-1), "--checkpoints_total_limit must be at least 0, not -1."),
        (DreamBoothConfig(rank=0), "--rank must be at least 1, not 0."),
        (DreamBoothConfig(lora_dropout=1.0), "--lora_dropout must be at least 0 and below 1, not 1.0."),
        (DreamBoothConfig(sample_batch_size=0), "--sample_batch_size must be at least 1, not 0."),
        (
            DataConfig(dataloader_num_workers=-1),
            "--dataloader_num_workers must be between 0 and 1024, not -1.",
        ),
        (DataConfig(unmasked_weight=1.5), "--unmasked_weight must be between 0 and 1, not 1.5."),
        (CustomContrastConfig(macl_temperature=0.0), "--macl_temperature must be above 0, not 0.0."),
        (TextualInversionConfig(num_vectors=0), "--num_vectors must be at least 1, not 0."),
    ],
)
def test_configurations_made_in_python_are_checked_too(config, message):
    assert refused(check_ranges, config).startswith(message)


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_and_zeros_that_mean_something_stay(cls):
    check_ranges(cls())
    zeros = {
        "resolution",
        "holdout",
        "checkpoints_total_limit",
        "lora_alpha",
        "snr_gamma",
        "text_encoder_lr",
        "cscl_weight",
    }
    check_ranges(cls(**{f.name: 0 for f in fields(cls) if f.name in zeros}))


def test_what_is_no_number_is_left_alone():
    check_ranges(DataConfig(random_flip=True, instance_prompt="nan"))
    assert all(expected(flag.type) and flag.default is not MISSING for _, flag in NUMBERS)


def test_files_are_checked_as_words_are(tmp_path):
    (tmp_path / "run.yaml").write_text("ema_decay: .nan\n")
    assert "expects a number" in refused(parse, [TrainConfig], [str(tmp_path / "run.yaml")])
    (tmp_path / "run.yaml").write_text("ema_decay: nan\n")
    assert "--ema_decay must be" in refused(parse, [TrainConfig], [str(tmp_path / "run.yaml")])


# text files

READERS = {
    "yaml": ("run.yaml", lambda path: parse([TrainConfig], [str(path)])),
    "concepts": ("concepts.json", lambda path: read_concepts(DataConfig(concepts_list=str(path)))),
    "metadata": ("metadata.jsonl", lambda path: find_images(path.parent, "a dog")),
}
READER = pytest.mark.parametrize("reader", READERS)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's address must be short
        made.bind(path.name)
        os.chdir(here)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


ODD = pytest.mark.parametrize("odd", [pipe, folder, loop, device, listener, dangling])


@READER
@ODD
def test_text_files_that_are_none_are_refused(tmp_path, reader, odd):
    name, read = READERS[reader]
    odd(tmp_path / name)
    assert name in refused(read, tmp_path / name)


@READER
@pytest.mark.parametrize(
    "text", [b"\xff\xfe\xfa", b"[" * 10_000, b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000]
)
def test_text_that_is_none_is_refused(tmp_path, reader, text):
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(text)
    assert name in refused(read, tmp_path / name)


def bomb() -> str:
    return "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "'seed' is given twice, keep one of the two"),
        ("seed: 1\nseed: 1", "'seed' is given twice"),
        ("seed: 1\n'seed': 2", "'seed' is given twice"),
        ("{seed: 1, seed: 2}", "'seed' is given twice"),
        ("validation-prompt: [a]\nvalidation_prompt: [b]", "twice"),
        ("seed: &s 1\nmax_train_steps: *s", "write the value itself"),
        ("seed: *s", "write the value itself"),
        ("a: &a [*a]", "write the value itself"),
        ("validation_prompt: &p [a]\n<<: *p", "write the value itself"),
        (bomb(), "write the value itself"),
        ("? [seed]\n: 1", "not valid YAML"),
        ("seed: 1\n---\nseed: 2", "not valid YAML"),
        ("seed: \0", "not valid YAML"),
        ("x" * 900 + ": 1", "unknown key 'xxx"),
        ("seed: " + "x" * 5000, "not 'xxx"),
        ("mixed_precision: [" + "fp16, " * 5000 + "]", "expects one of"),
    ],
)
def test_what_a_file_of_settings_may_not_say(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    message = refused(parse, [TrainConfig], [str(tmp_path / "run.yaml")])
    assert "run.yaml" in message
    assert said in message


@pytest.mark.parametrize(
    "row", ['{"instance_data_dir": "a", "instance_data_dir": "b", "instance_prompt": "c"}', '["\\ud800"]']
)
def test_concepts_that_say_two_things_or_no_text(tmp_path, row):
    (tmp_path / "concepts.json").write_text(f"[{row}]")
    assert "not valid JSON" in refused(
        read_concepts, DataConfig(concepts_list=str(tmp_path / "concepts.json"))
    )


# image files


def write(path: Path, size=(8, 8), color=(10, 20, 30), mode="RGB") -> Path:
    Image.new(mode, size, color).save(path)
    return path


@ODD
@pytest.mark.parametrize("name", ["b.png", "a.mask.png", "a.txt"])
def test_images_masks_and_captions_that_are_no_files_are_skipped_or_refused(tmp_path, name, odd):
    write(tmp_path / "a.png")
    write(tmp_path / "c.png")
    odd(tmp_path / name)
    with pytest.warns(UserWarning, match=rf"{name.replace('.', '[.]')}.* It is skipped"):
        found = find_images(tmp_path, "x")
    assert [image.path.name for image in found] == (["a.png", "c.png"] if name == "b.png" else ["c.png"])
    assert name in refused(find_images, tmp_path, "x", strict=True)


def metadata(folder: Path, *names: str) -> Path:
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names)
    )
    return folder


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "./../secret.png", "{}/secret.png", "../toy/a.png"]
)
def test_metadata_may_not_leave_its_folder_unless_allowed(tmp_path, name):
    write(tmp_path / "secret.png")
    (tmp_path / "toy" / "sub").mkdir(parents=True)
    write(tmp_path / "toy" / "a.png")
    toy = metadata(tmp_path / "toy", name.format(tmp_path))
    message = refused(find_images, toy, "y")
    assert (
        "names a file outside its folder; move it inside, or allow it with --allow_outside_files" in message
    )
    found = find_images(toy, "y", allow_outside_files=True)
    assert {image.path.resolve().name for image in found} >= {Path(name).name}
    config = ReferenceConfig(train_data_dir=str(tmp_path), instance_prompt="<s>")
    assert "--allow_outside_files" in refused(read_folders, config)


def test_links_inside_the_folder_are_read(tmp_path):
    """Snapshots of the hub consist of them."""
    write(tmp_path / "blob.png")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a.png").symlink_to(tmp_path / "blob.png")
    assert len(find_images(metadata(tmp_path / "toy", "a.png"), "x")) == 1


def test_one_image_is_not_listed_under_two_names(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.png")
    [found] = find_images(metadata(tmp_path, "sub/../a.png"), "y")
    assert found.caption == "x"
    assert "lists" in refused(find_images, metadata(tmp_path, "a.png", "./a.png"), "y")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.png", "gone.png", "", "."])
def test_names_in_metadata_that_are_no_images(tmp_path, name):
    write(tmp_path / "a.png")
    refused(find_images, metadata(tmp_path, name), "y", strict=True)


def test_folders_that_no_file_system_has():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="There is no folder"):
            find_images(name, "x")
        with pytest.raises(UserError, match="There is no folder"):
            read_folders(ReferenceConfig(train_data_dir=name))


# masks of which nothing counts


@pytest.mark.parametrize("kind", ["file", "alpha"])
def test_a_black_mask_is_refused_where_only_masks_count(tmp_path, kind):
    (tmp_path / "toy").mkdir()
    write(
        tmp_path / "toy" / "a.png",
        mode="RGB" if kind == "file" else "RGBA",
        color=(1, 2, 3, 0)[: 3 + (kind == "alpha")],
    )
    write(tmp_path / "toy" / "b.png")
    if kind == "file":
        write(tmp_path / "toy" / "a.mask.png", color=0, mode="L")
    config = ReferenceConfig(train_data_dir=str(tmp_path), unmasked_weight=0.0, instance_prompt="a <s>")
    assert "a.png is black" in refused(read_folders, config)
    config.unmasked_weight = 0.1
    [(_, found)] = read_folders(config)
    key = (0, (8, 8), False)
    for weight, masked in ((0.0, False), (0.1, True)):
        config = DataConfig(resolution=8, unmasked_weight=weight, masked_loss=masked)
        assert SubjectDataset(found, config, 8)[key]["mask"].any()
    dataset = SubjectDataset(found, DataConfig(resolution=8, unmasked_weight=0.0), 8)
    assert "a.png, as it is cropped, is black" in refused(dataset.__getitem__, key)


def test_a_mask_that_the_crop_leaves_black_is_refused():
    mask = Image.new("L", (32, 8))
    mask.paste(255, (0, 0, 4, 8))
    view = View(Image.new("RGB", (32, 8)), mask)
    config = ReferenceConfig(resolution=8, unmasked_weight=0.0)
    give = {
        "rng": np.random.default_rng(0),
        "config": config,
        "pixels": lambda images: torch.zeros(len(images), 3, 8, 8),
    }
    assert "--unmasked_weight" in refused(item, view, [[view, view]], "a <s>", 0, **give)


# rows of datasets


def png(size=(8, 8), color=(1, 2, 3), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def offline(monkeypatch):
    """Whatever asks for an address fails the test, even where its error would be caught."""
    asked = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *args: asked.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args) or [])
    yield
    assert not asked


ADDRESSES = [
    "http://localhost/a.png",
    "https://x.org/a.png",
    "file:///etc/hosts",
    "s3://a/b.png",
    "hf://datasets/a/b/c.png",
]
ADDRESSES += ["zip://a.png::/tmp/a.zip", "simplecache::http://x.org/a.png", "ftp://x.org/a.png", "://a"]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_in_rows_are_never_fetched(offline, address, allowed):
    config = ReferenceConfig(dataset_name="parquet", data_files="/", allow_outside_files=allowed)
    assert "is never fetched" in refused(decoded, {"bytes": None, "path": address}, "7", config)


NO_IMAGES = [
    *(None, 5, "a.png", "http://localhost/a.png", [], b"", {}, {"a": 1}, {"bytes": None, "path": None}),
    *(
        {"bytes": 3, "path": 3},
        {"bytes": b"", "path": None},
        {"bytes": b"none", "path": "http://localhost/a.png"},
    ),
    *({"bytes": "text", "path": None}, {"path": "\0"}, {"path": "x" * 5000}, {"path": "/dev/zero"}),
    {"bytes": png((256, 256))[:60]},
]


@pytest.mark.parametrize("image", NO_IMAGES, ids=str)
def test_rows_that_hold_no_image(offline, image):
    with pytest.raises(Unreadable):
        decoded(image, "7", ReferenceConfig(dataset_name="parquet", allow_outside_files=True))
    refused(decoded, image, "7", ReferenceConfig(dataset_name="parquet"))


def test_local_paths_are_read_from_the_datasets_own_folder_alone(tmp_path, monkeypatch):
    own = tmp_path / "own"
    (own / "sub").mkdir(parents=True)
    for place in (own / "sub" / "a.png", tmp_path / "secret.png", tmp_path / "own2.png"):
        write(place)
    (tmp_path / "link").symlink_to(own)

    def read(path: object, **options) -> Image.Image:
        return decoded({"bytes": None, "path": str(path)}, "7", ReferenceConfig(**options))

    places = [{"dataset_name": str(own)}, {"dataset_name": f"{tmp_path}/link"}]
    places += [
        {"dataset_name": "imagefolder", "data_files": f"{own}/{files}"}
        for files in ("**", "*.png", "x.parquet", "[ab]/*")
    ]
    for options in places:
        assert read(own / "sub" / "a.png", **options).size == (8, 8)
        for outside in ("secret.png", "own/../secret.png", "own2.png", "own/sub/../../secret.png"):
            assert "--allow_outside_files" in refused(read, tmp_path / outside, **options)
            assert read(tmp_path / outside, **options, allow_outside_files=True).size == (8, 8)
    monkeypatch.chdir(own)
    assert read("sub/a.png", dataset_name="imagefolder", data_files="sub/*").size == (8, 8)
    hub = {"dataset_name": "a/b", "data_files": "sub/*"}  # a folder of the hub's, not of this machine
    assert "--allow_outside_files" in refused(read, "sub/a.png", **hub)


@ODD
def test_paths_in_rows_that_are_no_files(tmp_path, odd):
    odd(tmp_path / "a.png")
    config = ReferenceConfig(dataset_name=str(tmp_path))
    assert "cannot be read" in refused(decoded, {"bytes": None, "path": str(tmp_path / "a.png")}, "7", config)


def huge() -> bytes:
    """The header of an image of 50,000 x 50,000 pixels, with hardly anything after it."""
    file = io.BytesIO()
    Image.new("1", (50_000, 8)).save(file, "BMP")
    content = bytearray(file.getvalue())
    content[22:26] = (50_000).to_bytes(4, "little")
    return bytes(content)


def test_large_images_of_rows_are_refused_by_their_header(monkeypatch):
    image = {"bytes": huge()}
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    assert "more pixels than --max_pixels" in refused(decoded, image, "7", ReferenceConfig())


def test_images_of_rows_keep_transparency_and_stand_upright():
    shown = decoded(
        {"bytes": png(color=(1, 2, 3, 0), mode="RGBA"), "path": "http://localhost"}, "7", ReferenceConfig()
    )
    assert shown.mode == "RGBA"
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, "PNG", exif=exif)
    assert decoded({"bytes": file.getvalue()}, "7", ReferenceConfig()).size == (4, 8)


def streamed(rows, **options) -> Streamed:
    config = ReferenceConfig(
        **{"resolution": 8, "shuffle_buffer": 0, "dataset_name": "a/b", "mask_column": "mask"} | options
    )
    return Streamed(config, rows, lambda images: torch.stack([to_tensor(image) for image in images]), 0)


def row(**more) -> dict:
    return {"image": [{"bytes": png()}] * 3, "text": "a <s>"} | more


BAD_ROWS = [
    *({"mask": {"bytes": png(mode="L", color=1)}}, {"mask": 5}, {"mask": "text"}, {"mask": [5, 5, 5]}),
    *({"text": 5}, {"text": "x" * 5000}, {"image": [None] * 3}, {"image": ["http://localhost/a.png"] * 3}),
    *({"image": 5}, {"image": "a.png"}, {"image": {"bytes": png(), "path": None}}),
    {"mask": [{"bytes": png(mode="L", color=0)}] * 3},  # black
]


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_that_cannot_be_used_are_skipped_or_refused(offline, bad):
    with pytest.warns(UserWarning, match="It is skipped") as warned:
        [entry] = itertools.islice(streamed([row(**bad), row()], unmasked_weight=0.0), 1)
    assert entry["prompt"] == "a <s>"
    assert all(len(str(warning.message)) < 500 for warning in warned)
    refused(next, iter(streamed([row(**bad), row()], unmasked_weight=0.0, strict=True)))


def test_a_dataset_that_breaks_off_is_named():
    def rows():
        yield row()
        raise OSError("gone\nand more")

    entries = iter(streamed(rows()))
    next(entries)
    assert "--dataset_name 'a/b' could not be read (gone)" in refused(next, entries)


# references of pipelines


@ODD
def test_references_that_are_no_files(tmp_path, odd):
    odd(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert "cannot be read as an image" in refused(opened, given)


@pytest.mark.parametrize("address", ADDRESSES)
def test_references_are_never_fetched(offline, address):
    assert "is an address: download the image" in refused(opened, address)
    refused(opened, Path(address))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.png", "", ".", "data:image/png;base64,AAAA"])
def test_references_that_no_file_can_be(name):
    refused(opened, name)


def test_large_references_are_refused_by_their_header(tmp_path, monkeypatch):
    (tmp_path / "a.bmp").write_bytes(huge())
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for given in (tmp_path / "a.bmp", str(tmp_path / "a.bmp"), Image.open(tmp_path / "a.bmp")):
        assert "50000x50000 pixels: shrink it" in refused(opened, given)


def test_images_that_hold_nothing_or_are_broken(tmp_path):
    assert "no pixels" in refused(opened, Image.new("RGB", (0, 4)))
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as lazy:
        refused(opened, lazy)
    refused(opened, lazy)  # closed by now
    refused(opened, path)


def test_a_panorama_is_moved_within_the_memory():
    assert moved(Image.new("RGB", (100_000, 200)), np.random.default_rng(0)).size == (4096, 4096)


# words and texts


@pytest.mark.parametrize("word", ["", " ", "+", "<a>+", "<a>+ ", " +<a>", "\t", "<a>+<a>", "<a>+<b>+"])
def test_blank_words_are_refused(word):
    config = TextualInversionConfig(
        placeholder_token=word, initializer_token="+".join(["dog"] * (word.count("+") + 1))
    )
    assert "--placeholder_token" in refused(new_words, None, config)


@pytest.mark.parametrize("start", ["", " ", "dog+ "])
def test_blank_starting_words_are_refused(start):
    config = TextualInversionConfig(
        placeholder_token="<a>" + "+<b>" * start.count("+"), initializer_token=start
    )
    assert "--initializer_token" in refused(new_words, None, config)


def test_long_texts_are_shortened_in_messages():
    assert shortened("a\n dog") == "a dog"
    assert shortened("x" * 80) == "x" * 80
    for text in ("x" * 81, "x" * 10**6, " " * 10**6):
        assert shortened(text).endswith("...")
        assert len(shortened(text)) <= 80
    assert "xxx..." in refused(named, "x" * 10**5)

"""Captions of other tools, files that are not used, and colours: nothing is dropped without a word."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from customize.data import images as image_files
from customize.data.batches import BucketBatches
from customize.data.concepts import DataConfig
from customize.data.dataset import SubjectDataset, collate
from customize.data.images import find_images, read_image_file
from customize.data.subject_images import loader
from customize.errors import UserError
from customize.pipelines.inputs import opened


def write(path, colour=(200, 80, 60), **options):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path, **options)
    return path


def captions(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {image.path.name: image.caption for image in find_images(folder, "the prompt")}


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.png.caption", "a.PNG.txt"]
)
def test_captions_of_other_tools(tmp_path, name):
    image = "a.PNG" if "PNG" in name else "a.png"
    write(tmp_path / image)
    write(tmp_path / "b.png")
    (tmp_path / name).write_text("a red toy\n")
    assert captions(tmp_path) == {image: "a red toy", "b.png": "the prompt"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-marked"])
def test_encodings_of_captions(tmp_path, encoding):
    write(tmp_path / "a.png")
    text = "ein Bär, 犬"
    content = b"\xfe\xff" + text.encode("utf-16-be") if "marked" in encoding else text.encode(encoding)
    (tmp_path / "a.txt").write_bytes(content)
    assert captions(tmp_path) == {"a.png": text}


def test_two_captions_of_one_image(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.caption").write_text("one\n")
    assert captions(tmp_path) == {"a.png": "one"}
    (tmp_path / "a.caption").write_text("two")
    with pytest.raises(UserError, match=r"a\.png has two captions that differ, a\.caption and a\.txt"):
        find_images(tmp_path, "x")


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_other_tools(tmp_path, kind, key):
    write(tmp_path / "a.png")
    row = (
        f'{{"file_name": "a.png", "{key}": "a, b"}}' if kind == "jsonl" else f'file_name,{key}\na.png,"a, b"'
    )
    (tmp_path / f"metadata.{kind}").write_text(row + "\n")
    assert captions(tmp_path) == {"a.png": "a, b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,text\ngone.png,x\n", r"Line 2 of .*gone\.png, which does not exist"),
        ("file_name,title\na.png,x\n", "Line 2 .*malformed; write it like file_name,text"),
        ("file_name,text\na.png,x\na.png,y\n", r"Line 3 .* lists a\.png again"),
        ("file_name,text\n../b.png,x\n", "Line 2 .*outside its folder"),
        ("file_name,text\na.png\n", "Line 2 .*malformed"),
    ],
)
def test_bad_csv(tmp_path, text, said):
    write(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        find_images(tmp_path, "x")


def test_both_kinds_of_metadata(tmp_path):
    write(tmp_path / "a.png")
    for kind in ("jsonl", "csv"):
        (tmp_path / f"metadata.{kind}").write_text("")
    with pytest.raises(UserError, match=r"metadata\.jsonl and metadata\.csv; remove one"):
        find_images(tmp_path, "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("b.heic", r"b\.heic: this format cannot be read; convert to PNG or JPEG"),
        ("b.dng", "convert to PNG or JPEG"),
        ("lonely.txt", r"lonely\.txt: no image, nor the caption or mask of one"),
        ("b.mask.png", r"b\.mask\.png: no image"),
        ("notes.md", r"notes\.md"),
        ("sub/c.jpg", "sub: images in subfolders are not used"),
    ],
)
def test_files_that_are_not_used_are_named(tmp_path, name, said):
    write(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=said):
        assert len(find_images(tmp_path, "x")) == 1


def test_an_image_that_cannot_be_read_ends_a_strict_run(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"x")
    with pytest.raises(UserError, match=r"b\.HEIC"):
        find_images(tmp_path, "x", strict=True)


def test_many_files_are_named_in_one_line(tmp_path):
    write(tmp_path / "a.png")
    for i in range(9):
        (tmp_path / f"{i}.md").write_text("")
    with pytest.warns(UserWarning, match=r"4\.md and 4 more: no image") as found:
        find_images(tmp_path, "x")
    assert len(found) == 1


def test_what_is_used_or_hidden_is_not_named(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "a.mask.png", (255, 255, 255))
    write(tmp_path / "sub" / "b.png")
    (tmp_path / "a.txt").write_text("a toy")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/b.png", "text": "b"}')
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    assert captions(tmp_path) == {"a.png": "a toy", "b.png": "b"}


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_files.Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"--instance_data_dir.*Permission denied"):
        find_images(tmp_path, "x")


def test_the_ending_of_a_name_may_lie(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(content, "PNG")
    (tmp_path / "a.jpg").write_bytes(content.getvalue())
    (tmp_path / "b.avif").write_bytes(content.getvalue())
    found = find_images(tmp_path, "x")
    assert [read_image_file(image)[0].getpixel((0, 0)) for image in found] == [(1, 2, 3)] * 2


def wide_profile():
    """A colour profile whose red, green and blue are those of sRGB in another order."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(content[o : o + 4]): o
        for o in range(132, 132 + 12 * int.from_bytes(content[128:132], "big"), 12)
    }
    red, green = (slice(tags[name] + 4, tags[name] + 12) for name in (b"rXYZ", b"gXYZ"))
    content[red], content[green] = content[green], content[red]
    return bytes(content).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_that_viewers_show(tmp_path, mode):
    image = Image.new("RGB", (4, 4), (200, 80, 60))
    image = image.quantize() if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(255)
        image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png", icc_profile=wide_profile())
    [found] = find_images(tmp_path, "x")
    read, mask = read_image_file(found)
    np.testing.assert_allclose(read.getpixel((3, 3)), (80, 200, 60), atol=2)
    assert (mask is not None) == (mode == "RGBA")
    if mask is not None:
        assert (mask.getpixel((0, 0)), read.getpixel((0, 0))) == (0, (255, 255, 255))
    reference = opened(tmp_path / "a.png").convert("RGB").getpixel((3, 3))
    np.testing.assert_allclose(reference, (80, 200, 60), atol=2)
    with Image.open(tmp_path / "a.png") as image:  # an image that is handed over is converted once
        again = opened(opened(image)).convert("RGB").getpixel((3, 3))
    np.testing.assert_allclose(again, (80, 200, 60), atol=2)


def test_an_srgb_profile_changes_no_bit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=profile)
    [found] = find_images(tmp_path, "x")
    np.testing.assert_array_equal(np.asarray(read_image_file(found)[0]), noise)


def test_a_profile_that_does_not_fit_is_said(tmp_path):
    write(tmp_path / "a.png", icc_profile=b"nonsense")
    with pytest.warns(UserWarning, match="colour profile cannot be used"):
        [found] = find_images(tmp_path, "x")
    with pytest.warns(UserWarning, match="taken as sRGB"):
        assert read_image_file(found)[0].getpixel((0, 0)) == (200, 80, 60)


def test_an_error_in_a_loading_process_is_one_sentence(tmp_path):
    write(tmp_path / "a.png")
    found = find_images(tmp_path, "x")
    dataset = SubjectDataset(found, DataConfig(resolution=16), 8)
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    batches = loader(dataset, 1, 0, batch_sampler=BucketBatches(dataset, 1, 0), collate_fn=collate)
    with pytest.raises(UserError) as caught:
        next(iter(batches))
    assert str(caught.value).endswith("changed its size during the run; start again.")
    assert len(str(caught.value).splitlines()) == 1
    assert torch.utils.data.get_worker_info() is None

import itertools
import json
import warnings
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from customize.data.batches import BucketBatches
from customize.data.concepts import Concept, DataConfig, read_concepts
from customize.data.crops import buckets, check_resolution, fit, nearest_bucket
from customize.data.dataset import SubjectDataset, collate, split_holdout
from customize.data.images import ImageFile, find_images, read_image_file
from customize.errors import UserError

torch.set_num_threads(1)
rng = np.random.default_rng(0)


def noise(width, height, channels=3):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write(path, width=8, height=8, color=(10, 20, 30)):
    Image.new("RGB", (width, height), color).save(path)
    return path


def only(folder, **options):
    [image] = find_images(folder, "a dog", **options)
    return image


def image(index, size=(64, 64), concept=0, is_prior=False):
    return ImageFile(f"{index}.png", f"caption {index}", None, concept, is_prior, str(index), size)


# What a viewer does for each EXIF orientation, written with array operations on (H, W, C).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    array, exif = noise(6, 4), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", exif=exif)
    expected = UPRIGHT[orientation](array)
    found = only(tmp_path)
    assert found.size == (expected.shape[1], expected.shape[0])
    np.testing.assert_array_equal(np.array(read_image_file(found)[0]), expected)


def test_a_mask_file_is_upright_already(tmp_path):
    array, mask, exif = noise(6, 4), noise(4, 6, 1)[..., 0], Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(mask).save(tmp_path / "a.mask.png", exif=exif)
    np.testing.assert_array_equal(np.array(read_image_file(only(tmp_path))[1]), mask)


@pytest.mark.parametrize(
    ("mode", "suffix", "color", "rgb"),
    [
        ("1", "png", 1, (255, 255, 255)),
        ("L", "png", 77, (77, 77, 77)),
        ("I;16", "png", 257 * 100, (100, 100, 100)),
        ("I", "tiff", 257 * 100, (100, 100, 100)),
        ("F", "tiff", 0.2, (51, 51, 51)),
        ("RGB", "bmp", (10, 20, 30), (10, 20, 30)),
        ("CMYK", "tiff", (255, 0, 0, 0), (0, 255, 255)),
        ("RGBA", "png", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", "png", (77, 255), (77, 77, 77)),
        ("RGBA", "png", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", "png", (77, 0), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, color, rgb):
    Image.new(mode, (3, 2), color).save(tmp_path / f"a.{suffix}")
    image, mask = read_image_file(only(tmp_path))
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert set(image.get_flattened_data()) == {rgb}
    assert (mask is None) == (rgb != (255, 255, 255) or mode == "1")


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    image, mask = read_image_file(only(tmp_path))
    assert list(image.get_flattened_data()) == [(10, 20, 30), (255, 255, 255)]
    assert list(mask.get_flattened_data()) == [255, 0]


def test_half_transparent_is_composited_on_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "a.png")
    image, mask = read_image_file(only(tmp_path))
    assert (image.getpixel((0, 0)), mask.getpixel((0, 0))) == ((204, 204, 204), 51)


def test_a_mask_file_wins_over_alpha(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (1, 1), (255, 255, 255, 90)).save(tmp_path / "a.mask.png")
    image, mask = read_image_file(only(tmp_path))
    assert (image.getpixel((0, 0)), mask.getpixel((0, 0))) == ((255, 255, 255), 90)


def test_sidecar_wins_over_metadata_over_prompt(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("sidecar of a <sks>\n")
    rows = [{"file_name": f"{name}.png", "text": f"metadata of {name}"} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = find_images(tmp_path, "prompt {}", concept=3, is_prior=True)
    assert [p.caption for p in found] == ["sidecar of a <sks>", "metadata of b", "prompt {}"]
    assert {(p.concept, p.is_prior, p.mask) for p in found} == {(3, True, None)}


def test_metadata_may_list_subfolders(tmp_path):
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/a.png", "text": "x"}')
    assert only(tmp_path).path == path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "gone.png", "text": "x"}', "Line 2 .*gone.png"),
        ("{nonsense", "Line 2"),
        ('{"file_name": "a.png"}', "Line 2"),
        ('{"file_name": "a.png", "text": 3}', "Line 2"),
        ("[]", "Line 2"),
    ],
)
def test_bad_metadata(tmp_path, line, said):
    write(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(UserError, match=said):
        find_images(tmp_path, "x")


@pytest.mark.parametrize(("is_prior", "flag"), [(False, "--instance_prompt"), (True, "--class_prompt")])
def test_no_caption_at_all(tmp_path, is_prior, flag):
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=flag):
        find_images(tmp_path, "", is_prior=is_prior)


def test_a_sidecar_must_be_text(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"a\.txt.*UTF-8"):
        find_images(tmp_path, "x")


def test_sorted_and_only_images(tmp_path):
    names = ["b.jpg", "a.PNG", "e.jpeg", "c.webp", "d.bmp", "f.gif", "g.tiff"]
    for name in names:
        write(tmp_path / name)
    write(tmp_path / "a.mask.png")
    write(tmp_path / "._a.png")
    (tmp_path / "notes.md").write_text("no image")
    found = find_images(tmp_path, "x")
    assert [p.path.name for p in found] == sorted(names)
    assert found[0].mask == tmp_path / "a.mask.png"
    assert (
        found[0].digest == sha256((tmp_path / "a.PNG").read_bytes() + found[0].mask.read_bytes()).hexdigest()
    )
    assert found[1].digest == sha256((tmp_path / "b.jpg").read_bytes()).hexdigest()


def truncated(path):
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_a_image(path):
    path.write_text("<html>404</html>")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("spoil", [truncated, not_a_image, empty])
def test_unreadable_images_are_skipped_or_refused(tmp_path, suffix, spoil):
    bad = tmp_path / f"bad.{suffix}"
    spoil(bad)
    with pytest.warns(UserWarning, match=bad.name), pytest.raises(UserError, match="no readable image"):
        find_images(tmp_path, "x")
    write(tmp_path / "good.png")
    with pytest.warns(UserWarning, match=bad.name):
        assert only(tmp_path).path.name == "good.png"
    with pytest.raises(UserError, match=bad.name):
        find_images(tmp_path, "x", strict=True)


def test_an_unreadable_mask_is_named(tmp_path):
    write(tmp_path / "a.png")
    truncated(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match=r"a\.mask\.png"):
        find_images(tmp_path, "x", strict=True)


def test_images_over_the_limit(tmp_path):
    write(tmp_path / "a.png", 8, 5)
    assert only(tmp_path, max_pixels=40).size == (8, 5)
    with pytest.raises(UserError, match=r"a\.png.*--max_pixels"):
        only(tmp_path, max_pixels=39)


def test_pils_own_limit_is_set_aside_and_restored(tmp_path, monkeypatch):
    write(tmp_path / "a.png", 8, 5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image_file(only(tmp_path))
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_mask_of_another_size(tmp_path):
    write(tmp_path / "a.png", 8, 5)
    write(tmp_path / "a.mask.png", 5, 8)
    with pytest.raises(UserError, match=r"a\.mask\.png.*\(5, 8\).*\(8, 5\)"):
        find_images(tmp_path, "x")


def test_a_image_that_changed_or_vanished(tmp_path):
    path = write(tmp_path / "a.png", 8, 5)
    found = only(tmp_path)
    write(path, 5, 8)
    with pytest.raises(UserError, match="changed"):
        read_image_file(found)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png"):
        read_image_file(found)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*--instance_data_dir"):
        find_images(tmp_path / "nowhere", "x")
    with pytest.raises(UserError, match="--class_data_dir"):
        find_images("", "x", is_prior=True)
    with pytest.raises(UserError, match="no readable image"):
        find_images(tmp_path, "x")


def test_concepts_of_the_single_flags():
    config = DataConfig(instance_data_dir="d", instance_prompt="p", class_prompt="c", class_data_dir="e")
    assert read_concepts(config) == [Concept("d", "p", "c", "e")]


def test_concepts_of_a_list(tmp_path):
    rows = [
        {"instance_prompt": "p", "class_prompt": "c", "instance_data_dir": "d", "class_data_dir": "e"},
        {"instance_prompt": "q", "instance_data_dir": "f"},
    ]
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(rows))
    assert read_concepts(DataConfig(concepts_list=str(path))) == [
        Concept("d", "p", "c", "e"),
        Concept("f", "q"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "not valid JSON"),
        ("", "not valid JSON"),
        ("{}", "a JSON list"),
        ("[]", "a JSON list"),
        ('["dog"]', "an object"),
        ('[{"instance_dir": "d", "instance_prompt": "p"}]', "instance_dir.*Did you mean 'instance_data_dir'"),
        ('[{"instance_prompt": "p"}]', "lacks the key 'instance_data_dir'"),
        ('[{"instance_data_dir": "d"}]', "lacks the key 'instance_prompt'"),
        ('[{"instance_data_dir": "d", "instance_prompt": 3}]', "with text"),
    ],
)
def test_malformed_concepts_lists(tmp_path, text, said):
    path = tmp_path / "concepts.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"concepts\.json.*{said}"):
        read_concepts(DataConfig(concepts_list=str(path)))


def test_concepts_missing_neither_or_both(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json"):
        read_concepts(DataConfig(concepts_list=str(tmp_path / "gone.json")))
    for config in (DataConfig(), DataConfig(concepts_list="a.json", instance_data_dir="d")):
        with pytest.raises(UserError, match=r"--instance_data_dir.*--concepts_list"):
            read_concepts(config)


@pytest.mark.parametrize(
    ("resolution", "factor"), [(512, 8), (1024, 16), (1024, 64), (64, 8), (64, 64), (768, 32)]
)
def test_buckets(resolution, factor):
    found = buckets(resolution, factor)
    assert (resolution, resolution) in found
    assert len(found) == len(set(found))
    for height, width in found:
        assert height % factor == width % factor == 0
        assert 0.5 <= height / width <= 2
        assert (width, height) in found
        assert abs(height * width / resolution**2 - 1) <= factor / min(height, width)
    assert nearest_bucket((777, 777), found) == (resolution, resolution)


def test_nearest_bucket_is_symmetric_in_the_logarithm():
    assert nearest_bucket((200, 100), [(100, 100), (100, 180), (180, 100)]) == (100, 180)
    assert nearest_bucket((100, 200), [(100, 100), (100, 180), (180, 100)]) == (180, 100)
    # 1.45 lies nearer to 2 in the logarithm (0.321 against 0.372) though not in the difference (0.55 against
    # 0.45)
    assert nearest_bucket((145, 100), [(100, 100), (100, 200)]) == (100, 200)


@pytest.mark.parametrize(
    ("resolution", "said"), [(500, "496 or 504"), (0, "is 8"), (-16, "is 8"), (3, "is 8")]
)
def test_check_resolution(resolution, said):
    check_resolution(512, 8)
    with pytest.raises(UserError, match=f"--resolution {resolution} .*{said}"):
        check_resolution(resolution, 8)


@pytest.mark.parametrize(
    ("size", "target"), [((300, 100), (64, 64)), ((100, 300), (64, 96)), ((90, 120), (96, 64))]
)
def test_fit_neither_distorts_nor_shifts(size, target):
    """A centred square stays a centred square, scaled by the larger of the two ratios."""
    width, height = size
    image = Image.new("L", size, 0)
    image.paste(255, (width // 2 - 20, height // 2 - 20, width // 2 + 20, height // 2 + 20))
    inside = np.array(fit(image, *target, Image.Resampling.BILINEAR)) > 127
    assert inside.shape == target
    side = 40 * max(target[0] / height, target[1] / width)
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    assert len(rows) == pytest.approx(side, abs=1)
    assert len(columns) == pytest.approx(side, abs=1)
    assert rows.mean() == pytest.approx((target[0] - 1) / 2, abs=0.6)
    assert columns.mean() == pytest.approx((target[1] - 1) / 2, abs=0.6)


def test_fit_of_the_same_shape_changes_nothing():
    array = noise(24, 16)
    np.testing.assert_array_equal(np.array(fit(Image.fromarray(array), 16, 24)), array)


@pytest.mark.parametrize("source", ["file", "alpha"])
@pytest.mark.parametrize("flip", [False, True])
def test_items_and_the_flip_of_mask_and_image(tmp_path, source, flip):
    array, mask = noise(16, 16), noise(16, 16, 1)
    if source == "file":
        Image.fromarray(array).save(tmp_path / "a.png")
        Image.fromarray(mask[..., 0]).save(tmp_path / "a.mask.png")
        expected = array
    else:
        Image.fromarray(np.concatenate([array, mask], 2)).save(tmp_path / "a.png")
        expected = array * (mask / 255) + 255 * (1 - mask / 255)
    dataset = SubjectDataset(
        find_images(tmp_path, "a dog", concept=2), DataConfig(resolution=16, unmasked_weight=0.25), 8
    )
    assert (len(dataset), dataset.bucket_of(0)) == (1, (16, 16))
    item = dataset[0, (16, 16), flip]
    weight = 0.25 + 0.75 * mask / 255
    if flip:
        expected, weight = expected[:, ::-1], weight[:, ::-1]
    assert item["pixels"].dtype == item["mask"].dtype == torch.float32
    np.testing.assert_allclose(item["pixels"].permute(1, 2, 0), expected / 127.5 - 1, atol=0.009)
    np.testing.assert_allclose(item["mask"].permute(1, 2, 0), weight, atol=1e-6)
    assert (item["prompt"], item["index"], item["concept"], item["is_prior"]) == ("a dog", 0, 2, False)


def test_the_loss_weight_is_one_without_masks(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    write(tmp_path / "b.mask.png", color=0)
    images = find_images(tmp_path, "x")
    masked = SubjectDataset(images, DataConfig(resolution=8, unmasked_weight=0.1), 8)
    plain = SubjectDataset(images, DataConfig(resolution=8, masked_loss=False), 8)
    assert torch.equal(masked[0, (8, 8), False]["mask"], torch.ones(1, 8, 8))
    torch.testing.assert_close(masked[1, (8, 8), False]["mask"], torch.full((1, 8, 8), 0.1))
    assert torch.equal(plain[1, (8, 8), False]["mask"], torch.ones(1, 8, 8))


def test_dataset_refuses_a_resolution_that_the_model_cannot_take():
    with pytest.raises(UserError, match="--resolution"):
        SubjectDataset([], DataConfig(resolution=100), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_collates_batches_of_one_bucket(tmp_path, workers):
    for index, size in enumerate([(64, 64), (128, 64), (64, 128)]):
        write(tmp_path / f"{index}.png", *size)
    (tmp_path / "class").mkdir()
    write(tmp_path / "class" / "p.png", 40, 30)
    images = find_images(tmp_path, "a sks dog") + find_images(tmp_path / "class", "a dog", is_prior=True)
    dataset = SubjectDataset(images, DataConfig(resolution=64, use_aspect_ratio_buckets=True), 8)
    loader = DataLoader(
        dataset, batch_sampler=BucketBatches(dataset, 2, 0), collate_fn=collate, num_workers=workers
    )
    for batch in itertools.islice(loader, 3):
        height, width = dataset.bucket_of(int(batch["index"][0]))
        assert batch["pixels"].shape == (4, 3, height, width)
        assert batch["mask"].shape == (4, 1, height, width)
        assert torch.equal(batch["is_prior"], torch.tensor([False, False, True, True]))
        assert torch.equal(batch["concept"], torch.zeros(4, dtype=torch.long))
        assert batch["prompt"] == ["a sks dog"] * 2 + ["a dog"] * 2


def dataset_of(images, **options):
    return SubjectDataset(images, DataConfig(resolution=64, **options), 8)


def take(count, *args, **options):
    return list(itertools.islice(BucketBatches(*args, **options), count))


SIZES = [(64, 64), (128, 64), (64, 128)]
MIXED = [image(i, SIZES[i % 3]) for i in range(12)]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_image_is_seen_once_an_epoch(batch_size):
    dataset = dataset_of(MIXED, use_aspect_ratio_buckets=True)
    per_epoch = 12 // batch_size
    batches = take(3 * per_epoch, dataset, batch_size, seed=5)
    epochs = [batches[e * per_epoch : (e + 1) * per_epoch] for e in range(3)]
    orders = [[index for batch in epoch for index, _, _ in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert all(bucket == dataset.bucket_of(index) for batch in batches for index, bucket, _ in batch)
    assert all(len({bucket for _, bucket, _ in batch}) == 1 for batch in batches)


def test_without_buckets_all_crops_are_square():
    assert {bucket for batch in take(3, dataset_of(MIXED), 4, seed=0) for _, bucket, _ in batch} == {(64, 64)}


def test_a_short_batch_is_filled_from_its_bucket():
    dataset = dataset_of([image(i, SIZES[i > 4]) for i in range(6)], use_aspect_ratio_buckets=True)
    for batch in take(30, dataset, 4, seed=0):
        indices = [index for index, _, _ in batch]
        assert len(indices) == 4
        assert set(indices) == {5} or (5 not in indices and len(set(indices)) == 4)
    seen = Counter(index for batch in take(3, dataset, 4, seed=0) for index, _, _ in batch)
    assert set(seen) == set(range(6))


WITH_PRIORS = [image(i, concept=i % 2) for i in range(6)] + [
    image(i, concept=i % 2, is_prior=True) for i in range(6, 16)
]


def test_resuming_gives_exactly_the_tail():
    dataset = dataset_of(WITH_PRIORS)
    whole = take(40, dataset, 2, seed=1, flip=True)
    for start in (0, 1, 3, 17):
        assert take(40 - start, dataset, 2, seed=1, start=start, flip=True) == whole[start:]
    assert take(40, dataset, 2, seed=2, flip=True) != whole


@pytest.mark.parametrize("start", [0, 5])
def test_ranks_partition_the_sequence(start):
    dataset = dataset_of(WITH_PRIORS)
    whole = take(40, dataset, 2, seed=1, flip=True)
    for rank in range(2):
        mine = take(20 - start, dataset, 2, seed=1, start=start, rank=rank, world=2, flip=True)
        assert mine == whole[rank::2][start:]


def test_priors_pair_with_their_concept_and_cycle():
    drawn = {0: [], 1: []}
    for batch in take(60, dataset_of(WITH_PRIORS), 3, seed=0):
        assert [WITH_PRIORS[index].is_prior for index, _, _ in batch] == [False] * 3 + [True] * 3
        for (instance, _, _), (prior, _, _) in zip(batch[:3], batch[3:], strict=True):
            assert WITH_PRIORS[instance].concept == WITH_PRIORS[prior].concept
            drawn[WITH_PRIORS[prior].concept].append(prior)
    for concept, sequence in drawn.items():
        members = [i for i in range(6, 16) if i % 2 == concept]
        rounds = [sequence[k : k + 5] for k in range(0, len(sequence) - 4, 5)]
        assert all(sorted(one) == members for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1


def test_the_order_of_priors_depends_on_the_seed():
    def order(seed):
        return [
            index for batch in take(20, dataset_of(WITH_PRIORS), 1, seed=seed) for index, _, _ in batch[1:]
        ]

    assert order(0) == order(0)
    assert set(order(0)) == set(order(1))
    by_concept = [[[i for i in order(seed) if i % 2 == concept] for seed in (0, 1)] for concept in (0, 1)]
    assert all(one[: len(other)] != other[: len(one)] for one, other in by_concept)


def test_priors_are_cropped_to_the_bucket_of_the_batch():
    images = [image(0, (128, 64)), image(1, (64, 128), is_prior=True)]
    dataset = dataset_of(images, use_aspect_ratio_buckets=True)
    [[(_, first, _), (_, second, _)]] = take(1, dataset, 1, seed=0)
    assert first == second == dataset.bucket_of(0)


def test_flips_are_drawn_for_each_key_and_leave_the_order():
    dataset = dataset_of(WITH_PRIORS)
    plain, flipped = take(100, dataset, 2, seed=3), take(100, dataset, 2, seed=3, flip=True)
    assert not any(flip for batch in plain for *_, flip in batch)
    assert 120 < sum(flip for batch in flipped for *_, flip in batch) < 280
    assert any(len({flip for *_, flip in batch}) == 2 for batch in flipped)
    assert [[key[:2] for key in batch] for batch in plain] == [
        [key[:2] for key in batch] for batch in flipped
    ]


def test_batches_refuse_what_would_never_end():
    with pytest.raises(UserError, match="class_data_dir"):
        BucketBatches(dataset_of([image(0), image(1, concept=1), image(2, is_prior=True)]), 1, 0)
    with pytest.raises(UserError, match="instance images"):
        BucketBatches(dataset_of([image(0, is_prior=True)]), 1, 0)
    with pytest.raises(UserError, match="--train_batch_size"):
        BucketBatches(dataset_of([image(0)]), 0, 0)


def test_split_holdout():
    for count in range(5):
        train, held = split_holdout(WITH_PRIORS, count, seed=7)
        assert len(held) == count
        assert not any(p.is_prior for p in held)
        assert [p for p in WITH_PRIORS if p not in held] == train
        assert {p.concept for p in train if not p.is_prior} == {0, 1}
        assert split_holdout(WITH_PRIORS, count, seed=7) == (train, held)
    assert len({split_holdout(WITH_PRIORS, 1, seed)[1][0].path for seed in range(30)}) == 6


@pytest.mark.parametrize("count", [-1, 5, 100])
def test_split_holdout_refuses(count):
    with pytest.raises(UserError, match=f"--holdout {count} .*0 to 4"):
        split_holdout(WITH_PRIORS, count, seed=0)

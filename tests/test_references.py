"""What encoders learn from: rendered scenes, folders of subjects and streamed rows, each as two
references and a target."""

import io
import itertools
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from customize.data import rendered as sources
from customize.data import streams
from customize.data.batches import IndexBatches
from customize.data.folders import Folders, read_folders
from customize.data.references import ReferenceConfig, View, collate_references, drawn, item, moved, named
from customize.data.rendered import Rendered
from customize.data.sources import ReferenceSource, StreamedData
from customize.data.streams import Streamed, read_rows, shuffled, split_rows
from customize.data.training_data import Preparation
from customize.errors import UserError
from customize.imaging import flatten, to_tensor
from customize.stickers import Drawing, Scene, World
from customize.stickers.bench import bench_subjects
from customize.stickers.restyle import Restyled

WHITE = (255, 255, 255)


def pixels(images) -> torch.Tensor:
    """What the image encoder would be given, here in [0, 1] and as large as the images are."""
    return torch.stack([to_tensor(flatten(image)) for image in images])


def flat(subject: int, view: int = 0, size=(8, 8)) -> Image.Image:
    """An image that says of which subject it is, and which of its views."""
    return Image.new("RGB", size, (subject, view, 0))


def said(tensor: torch.Tensor) -> tuple[int, int]:
    """Subject and view of a flat image in [0, 1]."""
    subject, view = (tensor[:2, 0, 0] * 255).round().int().tolist()
    return subject, view


def target_of(entry: dict) -> tuple[int, int]:
    return said((entry["pixels"] + 1) / 2)


def take(count: int, entries) -> list[dict]:
    return list(itertools.islice(iter(entries), count))


def same(first: dict, second: dict) -> bool:
    tensors = all(torch.equal(first[name], second[name]) for name in ("pixels", "mask", "references"))
    return tensors and (first["prompt"], first["identity"]) == (second["prompt"], second["identity"])


# one item


def disc(size: int = 32) -> View:
    """A red disc on blue, with its mask."""
    image, mask = Image.new("RGB", (size, size), "blue"), Image.new("L", (size, size))
    for canvas, fill in ((image, "red"), (mask, 255)):
        ImageDraw.Draw(canvas).ellipse(
            (size // 8, size // 8, size - size // 8 - 1, size - size // 8 - 1), fill=fill
        )
    return View(image, mask, "a <s> disc")


def of_disc(**options) -> dict:
    config = ReferenceConfig(**{"resolution": 16} | options)
    return item(disc(), [[disc(), disc()]], "a <s> disc", 7, np.random.default_rng(0), config, pixels)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_first_reference_is_cut_out_at_the_rate_asked_for_and_the_second_always(rate):
    first, second = of_disc(segment_rate=rate)["references"][0]
    inside = to_tensor(disc().mask)[0] > 0
    whole = to_tensor(disc().image)
    for reference, cut_out in ((first, bool(rate)), (second, True)):
        assert torch.equal(reference[:, inside], whole[:, inside])
        assert torch.equal(
            reference[:, ~inside], torch.ones_like(whole)[:, ~inside] if cut_out else whole[:, ~inside]
        )


def test_half_of_the_first_references_are_cut_out():
    config, rng = ReferenceConfig(resolution=4), np.random.default_rng(0)
    corners = [
        item(disc(8), [[disc(8), disc(8)]], "", 0, rng, config, pixels)["references"][0, 0, :, 0, 0].sum()
        for _ in range(200)
    ]
    assert 70 < sum(corner == 3 for corner in corners) < 130


def test_the_loss_weight_is_full_on_the_subject_and_less_outside():
    weight = of_disc(unmasked_weight=0.25)["mask"]
    assert weight.shape == (1, 16, 16)
    assert weight[0, 8, 8] == 1
    assert weight[0, 0, 0] == 0.25
    unmasked = item(
        View(flat(1)),
        [[disc(), disc()]],
        "",
        0,
        np.random.default_rng(0),
        ReferenceConfig(resolution=16),
        pixels,
    )["mask"]
    assert torch.equal(unmasked, torch.ones(1, 16, 16))


def test_the_target_lies_between_minus_one_and_one():
    found = of_disc()["pixels"]
    assert found.shape == (3, 16, 16)
    assert (found.min(), found.max()) == (-1, 1)
    assert torch.equal(found[:, 0, 0], torch.tensor([-1.0, -1, 1]))


def test_references_are_moved_only_if_asked_for():
    plain, augmented = of_disc(segment_rate=1.0), of_disc(segment_rate=1.0, augment=True)
    assert torch.equal(plain["references"][0, 1], to_tensor(flatten(disc().cut_out)))
    assert not torch.equal(augmented["references"][0, 1], plain["references"][0, 1])
    assert torch.equal(augmented["pixels"], plain["pixels"])


def test_what_is_transparent_is_white_without_a_mask():
    assert View(Image.new("RGBA", (4, 4), (9, 9, 9, 0))).cut_out.getpixel((0, 0)) == WHITE


def test_moved_keeps_the_size_and_is_white_outside():
    black = Image.new("RGB", (40, 40), "black")
    found = [np.asarray(moved(black, np.random.default_rng(seed))) for seed in range(30)]
    assert all(array.shape == (40, 40, 3) for array in found)
    shares = [(array < 128).mean() for array in found]
    assert min(shares) > 0.65**2  # scaled to 0.7 at least, and shifted by a tenth at most
    assert len({array.tobytes() for array in found}) == 30
    for array in found:
        values, counts = np.unique(array, return_counts=True)
        assert (
            counts[np.isin(values, (0, 255))].sum() > 0.85 * array.size
        )  # black, white and an edge between them
    assert sum((array[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() for array in found) > 15


def test_moved_shows_the_whole_of_a_image_that_is_not_square():
    wide = Image.new("RGB", (40, 10), "black")
    array = np.asarray(moved(wide, np.random.default_rng(0)))
    assert array.shape == (40, 40, 3)
    assert 0.5 * 400 < (array < 128).all(-1).sum() < 1.3 * 400


def test_moved_turns_shifts_scales_and_mirrors_within_bounds():
    image = Image.new("RGB", (60, 60), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 39, 39), fill="black")
    ImageDraw.Draw(image).rectangle((20, 20, 25, 39), fill="red")  # on its left
    centres, areas, mirrored = [], [], []
    for seed in range(60):
        array = np.asarray(moved(image, np.random.default_rng(seed))).astype(int)
        dark, red = array[..., 1] < 128, (array[..., 1] < 128) & (array[..., 0] > 128)
        centres.append(np.argwhere(dark).mean(0) - 29.5)
        areas.append(dark.sum() / 400)
        mirrored.append(np.argwhere(red)[:, 1].mean() > np.argwhere(dark)[:, 1].mean())
    assert np.abs(centres).max() <= 6.5
    assert np.abs(centres).max(0).min() > 4
    assert 0.45 < min(areas) < 0.6
    assert 1.05 < max(areas) < 1.25
    assert 15 < sum(mirrored) < 45


def test_the_same_numbers_move_a_image_in_the_same_way():
    image = disc().image
    assert moved(image, np.random.default_rng(3)) == moved(image, np.random.default_rng(3))


def test_a_caption_must_say_the_subjects_word():
    assert named("a <s> dog") == "a <s> dog"
    with pytest.raises(UserError, match=r"'a dog' does not say <s>"):
        named("a dog")


def test_a_batch_is_stacked():
    config, rng = ReferenceConfig(resolution=16), np.random.default_rng(0)
    items = [
        item(disc(), [[disc(8), disc(8)]], f"{i} <s>", i, rng, config, pixels) for i in (5, 2**32 - 1, 9)
    ]
    batch = collate_references(items)
    assert batch["pixels"].shape == (3, 3, 16, 16)
    assert batch["mask"].shape == (3, 1, 16, 16)
    assert batch["references"].shape == (3, 1, 2, 3, 8, 8)
    assert batch["identity"].tolist() == [5, 2**32 - 1, 9]
    assert batch["prompt"] == ["5 <s>", f"{2**32 - 1} <s>", "9 <s>"]
    assert torch.equal(batch["references"][1], items[1]["references"])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_target_is_none_of_its_references_as_far_as_there_are_images(count):
    orders = [drawn(np.random.default_rng(seed), count) for seed in range(100)]
    assert all(len(set(order)) == min(count, 3) for order in orders)
    assert all(order[0] != order[1] != order[2] for order in orders)
    assert {order[0] for order in orders} == set(range(count))


# rendered scenes


@pytest.fixture
def scenes(monkeypatch):
    """The scenes that are drawn, in their order; they are drawn as tiny blank images."""
    found = []

    def draw(scene, world, mask_companion=False):
        found.append(scene)
        return Image.new("RGB", (4, 4)), Image.new("L", (4, 4))

    monkeypatch.setattr(sources, "draw_scene", draw)
    return found


def rendered(seed: int = 0, validation: bool = False, **options) -> Rendered:
    return Rendered(ReferenceConfig(**{"resolution": 128} | options), pixels, seed, validation)


def test_a_rendered_item_depends_on_seed_and_position_alone():
    first, second = rendered(), rendered()
    wanted = first[17]
    for position in (3, 500):
        assert not same(second[position], wanted)
    assert same(second[17], wanted)
    assert not same(rendered(seed=1)[17], wanted)
    assert not same(rendered(validation=True)[17], wanted)


def test_shapes_of_a_rendered_item():
    entry = rendered(resolution=32)[0]
    assert entry["pixels"].shape == (3, 32, 32)
    assert entry["mask"].shape == (1, 32, 32)
    assert entry["references"].shape == (1, 2, 3, 128, 128)


def test_the_second_rendered_reference_is_on_white_and_the_first_as_it_was_drawn(monkeypatch):
    found = []
    draw = sources.draw_scene
    monkeypatch.setattr(sources, "draw_scene", lambda *scene, **_: found.append(draw(*scene)) or found[-1])
    for position in range(3):
        found.clear()
        entry = rendered(segment_rate=0.0)[position]
        outside = [to_tensor(mask)[0] == 0 for _, mask in found]
        first, second, target = (to_tensor(image) for image, _ in found)
        assert torch.equal(entry["references"][0, 0], first)
        assert (entry["references"][0, 1][:, outside[1]] == 1).all()
        inside = to_tensor(found[1][1])[0] == 1
        assert torch.equal(entry["references"][0, 1][:, inside], second[:, inside])
        assert torch.equal(entry["pixels"], target * 2 - 1)
        assert torch.equal(entry["mask"][0] == 0.5, outside[2])


def test_a_rendered_prompt_names_the_subject_before_its_class(scenes):
    dataset = rendered(resolution=4, noun_dropout=0.0)
    for position in range(60):
        entry = dataset[position]
        drawing = dataset.pool[entry["identity"]]
        assert f"<s> {drawing.word}" in entry["prompt"]
        assert entry["prompt"].count("<s>") == 1
        assert drawing.studio not in entry["prompt"].replace(str(scenes[-1].companion), "")


def test_some_rendered_prompts_do_not_say_what_the_subject_is(scenes):
    dataset, unnamed = rendered(resolution=4), 0
    for position in range(60):
        entry = dataset[position]
        word = dataset.pool[entry["identity"]].word
        assert ("<s> sticker" in entry["prompt"]) != (f"<s> {word}" in entry["prompt"])
        unnamed += "<s> sticker" in entry["prompt"]
    assert 18 < unnamed < 42
    for position in range(20):
        assert "<s> sticker" in rendered(resolution=4, noun_dropout=1.0)[position]["prompt"]


def test_references_and_target_show_the_same_drawing_in_poses_of_their_own(scenes):
    dataset = rendered(resolution=4)
    for position in range(30):
        scenes.clear()
        entry = dataset[position]
        assert {scene.subject for scene in scenes} == {dataset.pool[entry["identity"]]}
        assert len({scene.pose for scene in scenes}) == 3


def test_no_held_out_drawing_is_ever_trained_on(scenes):
    dataset, world = rendered(resolution=4), World()
    for position in range(300):
        dataset[position]
    held_out = set(world.drawings(held_out=True))
    shown = {scene.subject for scene in scenes} | {scene.companion for scene in scenes} - {None}
    assert any(scene.companion for scene in scenes)
    assert not shown & held_out
    assert len({scene.subject for scene in scenes}) > 150


def test_validation_draws_held_out_drawings_that_no_benchmark_uses(scenes):
    dataset, world = rendered(resolution=4, validation=True), World()
    for position in range(150):
        dataset[position]
    shown = {scene.subject for scene in scenes} | {scene.companion for scene in scenes} - {None}
    assert any(scene.companion for scene in scenes)
    assert shown <= set(world.drawings(held_out=True))
    assert not shown & set(bench_subjects())
    assert len(shown) > 40


def test_a_second_subject_has_its_word_and_references_of_its_own(scenes):
    dataset = rendered(
        resolution=4, second_subject_rate=1.0, region_rate=0.0, segment_rate=1.0, noun_dropout=0.0
    )
    for position in range(20):
        scenes.clear()
        entry = dataset[position]
        *views, target = scenes
        assert entry["references"].shape[:2] == (2, 2)
        assert [scene.subject for scene in views] == [target.subject] * 2 + [target.companion] * 2
        assert f"<s> {target.subject.word}" in entry["prompt"]
        assert f"next to a <s2> {target.companion.word}" in entry["prompt"]
        assert target.count == 1
        assert entry["identity"] == dataset.number[target.subject]


def test_halves_are_those_in_which_the_subjects_stand(monkeypatch):
    """The region of the first subject holds most of its own mask, and the second's the rest of the
    image."""
    masks, draw = [], sources.draw_scene

    def remembered(*scene, **options):
        masks.append(draw(*scene)[1])
        return draw(*scene, **options)

    monkeypatch.setattr(sources, "draw_scene", remembered)
    dataset = rendered(resolution=128, second_subject_rate=1.0, region_rate=1.0)
    sides = set()
    for position in range(12):
        entry = dataset[position]
        first, second = entry["regions"]
        assert entry["regions"].shape == (2, 128, 128)
        assert torch.equal(first + second, torch.ones(128, 128))
        mask = to_tensor(masks[-1])[0]  # the target is drawn last
        assert (mask * first).sum() > (mask * second).sum()
        sides.add(float(first[0, 0]))
    assert sides == {0.0, 1.0}


def test_both_subjects_count_as_much():
    """The loss weight of a scene of two subjects is that of its whole where either is, and less
    elsewhere."""
    entry = rendered(resolution=128, second_subject_rate=1.0, region_rate=1.0, unmasked_weight=0.25)[0]
    for half in entry["regions"]:
        inside = entry["mask"][0][half == 1]
        assert 0.05 < (inside == 1).float().mean() < 0.9
        assert inside.min() == 0.25


def test_regions_are_told_at_the_rate_asked_for():
    dataset = rendered(resolution=4, second_subject_rate=0.6, region_rate=0.5)
    entries = [dataset[position] for position in range(200)]
    assert all((entry["regions"] == 1).all() for entry in entries if len(entry["references"]) == 1)
    told = [not (entry["regions"] == 1).all() for entry in entries if len(entry["references"]) == 2]
    assert 0.35 < np.mean(told) < 0.65


def test_second_subjects_come_at_the_rate_asked_for():
    dataset = rendered(resolution=4, second_subject_rate=0.3)
    entries = [dataset[position] for position in range(200)]
    second = [len(entry["references"]) == 2 for entry in entries]
    assert 0.2 < np.mean(second) < 0.4
    assert all(("<s2>" in entry["prompt"]) == two for entry, two in zip(entries, second, strict=True))


def test_fewer_subjects_are_padded_in_a_batch():
    dataset = rendered(resolution=4, second_subject_rate=0.5)
    items = [dataset[position] for position in range(12)]
    batch = collate_references(items)
    assert batch["references"].shape[:3] == (12, 2, 2)
    for i, entry in enumerate(items):
        count = len(entry["references"])
        assert batch["present"][i].tolist() == [True, count == 2]
        assert torch.equal(batch["references"][i, :count], entry["references"])
        assert not batch["references"][i, count:].any()
    assert {len(entry["references"]) for entry in items} == {1, 2}


def test_a_subject_is_never_its_own_companion(scenes, monkeypatch):
    dataset = rendered(resolution=4)
    dataset.pool = dataset.core = dataset.pool[:2]
    monkeypatch.setattr(
        sources, "draw_factors", lambda rng, world, subjects, **_: Scene(subjects[0], companion=subjects[0])
    )
    for position in range(20):
        dataset[position]
    together = [scene for scene in scenes if scene.companion]
    assert len(together) == 20
    assert all(scene.companion != scene.subject for scene in together)


# folders


def write_subject(
    root, name: str, subject: int, count: int = 4, caption: str | None = "a <s> toy", mask: bool = False
):
    folder = root / name
    folder.mkdir(parents=True)
    for view in range(count):
        flat(subject, view).save(folder / f"{view}.png")
        if caption is not None:
            (folder / f"{view}.txt").write_text(caption)
        if mask:
            half = Image.new("L", (8, 8))
            half.paste(255, (4, 0, 8, 8))
            half.save(folder / f"{view}.mask.png")


def subjects_in(root, count: int = 5, **options) -> ReferenceConfig:
    for i in range(count):
        write_subject(root, f"toy{i}", 10 * i, caption=f"a <s> toy{i}")
    return ReferenceConfig(train_data_dir=str(root), resolution=8, **options)


def folders(config: ReferenceConfig, seed: int = 0) -> Folders:
    return Folders(config, read_folders(config), pixels, seed)


def test_an_epoch_shows_every_subject_once_in_an_order_of_its_own(tmp_path):
    dataset = folders(subjects_in(tmp_path))
    epochs = [[dataset[5 * epoch + place] for place in range(5)] for epoch in range(4)]
    orders = [[entry["identity"] for entry in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    for entry in itertools.chain(*epochs):
        assert target_of(entry)[0] == 10 * entry["identity"]
        assert {said(reference)[0] for reference in entry["references"][0]} == {10 * entry["identity"]}
        assert entry["prompt"] == f"a <s> toy{entry['identity']}"


def test_an_item_of_folders_depends_on_seed_and_position_alone(tmp_path):
    config = subjects_in(tmp_path)
    first, second, other = folders(config), folders(config), folders(config, seed=1)
    second[3]
    assert same(first[11], second[11])
    assert not all(same(first[i], other[i]) for i in range(5))


def test_the_target_is_none_of_the_references(tmp_path):
    dataset = folders(subjects_in(tmp_path))
    targets = set()
    for position in range(40):
        entry = dataset[position]
        views = [said(reference)[1] for reference in entry["references"][0]]
        target = target_of(entry)[1]
        targets.add(target)
        assert len({target, *views}) == 3
    assert targets == {0, 1, 2, 3}


def test_two_images_are_enough(tmp_path):
    write_subject(tmp_path, "toy", 10, count=2)
    dataset = folders(ReferenceConfig(train_data_dir=str(tmp_path), resolution=8))
    entry = dataset[0]
    views = [said(reference)[1] for reference in entry["references"][0]]
    assert target_of(entry)[1] not in views[:1]


@pytest.mark.parametrize(("count", "twice"), [(2, True), (3, False)])
def test_of_two_images_the_second_reference_is_the_target(count, twice, tmp_path):
    write_subject(tmp_path, "toy", 10, count=count)
    dataset = folders(ReferenceConfig(train_data_dir=str(tmp_path), resolution=8))
    batch = collate_references([dataset[i] for i in range(3)])
    assert batch["shows_target"].tolist() == [twice] * 3
    for i in range(3):
        assert (target_of(dataset[i]) == said(dataset[i]["references"][0, 1])) == twice


def test_references_of_folders_are_cut_out_on_white_by_their_masks(tmp_path):
    write_subject(tmp_path, "toy", 10, mask=True)
    config = ReferenceConfig(
        train_data_dir=str(tmp_path), resolution=8, segment_rate=0.0, unmasked_weight=0.25
    )
    entry = folders(config)[0]
    first, second = entry["references"][0]
    assert said(first)[0] == said(second[:, :, 4:])[0] == 10
    assert (second[:, :, :4] == 1).all()
    assert torch.equal(entry["mask"][0, 0], torch.tensor([0.25] * 4 + [1.0] * 4))


def test_the_name_of_a_folder_stands_in_the_prompt(tmp_path):
    write_subject(tmp_path, "red fox", 10, caption=None)
    config = ReferenceConfig(train_data_dir=str(tmp_path), resolution=8, instance_prompt="a photo of <s> {}")
    assert folders(config)[0]["prompt"] == "a photo of <s> red fox"


def test_a_folder_caption_without_the_subjects_word_is_refused(tmp_path):
    write_subject(tmp_path, "toy", 10, caption="a toy")
    with pytest.raises(UserError, match=r"'a toy' does not say <s>"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path)))


def test_a_prompt_without_the_subjects_word_is_refused(tmp_path):
    write_subject(tmp_path, "toy", 10, caption=None)
    with pytest.raises(UserError, match=r"'a photo' does not say <s>"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path), instance_prompt="a photo"))


def test_one_image_of_a_subject_is_refused(tmp_path):
    write_subject(tmp_path, "many", 10)
    write_subject(tmp_path, "lone", 20, count=1)
    with pytest.raises(UserError, match=r"lone.*one image"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path)))


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder.*nowhere.*--train_data_dir"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"--train_data_dir.*a folder of images for each subject"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path)))
    flat(1).save(tmp_path / "loose.png")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(UserError, match=r"--train_data_dir.*a folder of images for each subject"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path)))
    (tmp_path / "toy").mkdir()
    with pytest.raises(UserError, match=r"toy.*no readable image"):
        read_folders(ReferenceConfig(train_data_dir=str(tmp_path)))


def test_an_unreadable_image_is_skipped_or_refused(tmp_path):
    write_subject(tmp_path, "toy", 10)
    (tmp_path / "toy" / "bad.png").write_text("no image")
    config = ReferenceConfig(train_data_dir=str(tmp_path))
    with pytest.warns(UserWarning, match=r"bad\.png"):
        [(name, images)] = read_folders(config)
    assert (name, len(images)) == ("toy", 4)
    config.strict = True
    with pytest.raises(UserError, match=r"bad\.png"):
        read_folders(config)


# the source that is named


def read(
    config: ReferenceConfig,
    base: str = "a/b",
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    made=pixels,
    size: int = 8,
):
    """The training set and the held-out batches of the source that the settings name."""
    method = SimpleNamespace(reference_pixels=made, backbone=SimpleNamespace(device=torch.device("cpu")))
    data = ReferenceSource.read(config, base, seed).prepare(method, Preparation(size, None, [], rank, world))
    return data.dataset, data.held_out


def test_held_out_folders_are_not_trained_on(tmp_path):
    dataset, [batch] = read(subjects_in(tmp_path, holdout=2))
    held = set(batch["prompt"])
    trained = {dataset[i]["prompt"] for i in range(9)}
    assert len(batch["pixels"]) == len(held) == len(set(batch["identity"].tolist())) == 2
    assert len(trained) == 3
    assert held | trained == {f"a <s> toy{i}" for i in range(5)}


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(3, 8, [3]), (7, 3, [3, 2, 2]), (4, 1, [2, 2]), (0, 4, [])]
)
def test_held_out_subjects_come_in_batches_that_fit(count, size, sizes):
    """As large as those of training, but of two or more, as subjects are compared."""
    _, held_out = read(ReferenceConfig(resolution=8, holdout=count), base="stickers", size=size)
    assert [len(batch["prompt"]) for batch in held_out] == sizes
    prompts = [prompt for batch in held_out for prompt in batch["prompt"]]
    assert prompts == [rendered(validation=True, resolution=8)[i]["prompt"] for i in range(count)]


def test_the_seed_says_which_folders_are_held_out(tmp_path):
    config = subjects_in(tmp_path, holdout=2)
    assert len({tuple(sorted(read(config, seed=seed)[1][0]["prompt"])) for seed in range(6)}) > 1
    assert read(config)[1][0]["prompt"] == read(config)[1][0]["prompt"]


def test_nothing_is_held_out_unless_asked_for(tmp_path):
    dataset, held = read(subjects_in(tmp_path))
    assert held == []
    assert len(dataset.subjects) == 5


@pytest.mark.parametrize("holdout", [5, 6])
def test_a_holdout_that_leaves_nothing_is_refused(tmp_path, holdout):
    with pytest.raises(UserError, match=f"--holdout {holdout} .*there are 5"):
        read(subjects_in(tmp_path, holdout=holdout))


def test_one_held_out_subject_is_refused():
    with pytest.raises(UserError, match="--holdout 1 leaves nothing to compare"):
        read(ReferenceConfig(holdout=1), base="stickers")


def test_two_sources_or_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--train_data_dir or with --dataset_name, not with both"):
        read(ReferenceConfig(train_data_dir=str(tmp_path), dataset_name="parquet"), base="stickers")
    with pytest.raises(UserError, match=r"--train_data_dir.*or --dataset_name"):
        read(ReferenceConfig())


def test_stickers_need_no_source_and_hold_out_other_drawings():
    dataset, [batch] = read(ReferenceConfig(resolution=128, holdout=3), base="stickers")
    assert isinstance(dataset, Rendered)
    assert dataset.pool == World().drawings()
    assert len(batch["prompt"]) == 3
    assert same({name: value[1] for name, value in batch.items()}, rendered(validation=True)[1])


# positions


def batches(count: int, *args, **options) -> list[list[int]]:
    return list(itertools.islice(IndexBatches(*args, **options), count))


def test_positions_of_two_processes_are_those_of_one_with_double_batches():
    first, second = (batches(6, 3, rank=rank, world=2) for rank in range(2))
    assert not set(itertools.chain(*first)) & set(itertools.chain(*second))
    assert [one + other for one, other in zip(first, second, strict=True)] == batches(6, 6)
    assert list(itertools.chain(*batches(6, 6))) == list(range(36))


@pytest.mark.parametrize("world", [1, 2])
def test_positions_go_on_where_a_run_stopped(world):
    for rank in range(world):
        whole = batches(9, 2, rank=rank, world=world)
        assert batches(5, 2, start=4, rank=rank, world=world) == whole[4:]


# rows


def test_shuffling_keeps_every_subject_and_drops_those_with_one_view():
    subjects = [(str(i), ["view"] * (1 if i % 5 == 0 else 2)) for i in range(40)]
    for size in (0, 1, 7, 100):
        names = [name for name, _ in shuffled(subjects, size, np.random.default_rng(0))]
        assert sorted(names, key=int) == [str(i) for i in range(40) if i % 5]
        assert (names == sorted(names, key=int)) == (size == 0)


def test_a_stream_is_shuffled_no_further_than_the_buffer_reaches():
    subjects = [(str(i), ["view"] * 2) for i in range(60)]
    names = [int(name) for name, _ in shuffled(subjects, 4, np.random.default_rng(0))]
    assert all(name <= place + 4 for place, name in enumerate(names))


def test_the_first_subjects_rows_are_held_out():
    class Rows(list):
        def skip(self, count):
            return Rows(self[count:])

    rows = Rows({"who": who, "n": n} for n, who in enumerate("aabbbcd"))
    taken, rest = split_rows(rows, "who", 2)
    assert [row["who"] for row in taken] == list("aabbb")
    assert [row["who"] for row in rest] == list("cd")
    taken, rest = split_rows(rows, "", 3)
    assert [row["n"] for row in taken] == [0, 1, 2]
    assert [row["n"] for row in rest] == [3, 4, 5, 6]
    taken, rest = split_rows(rows, "who", 0)
    assert taken == []
    assert rest is rows


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """The datasets library, its cache in a folder of this test."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def write_rows(hf, folder, subjects: int = 8, files: int = 2, lists: bool = True, views: int = 4):
    """Parquet files of subjects: a list of views in each row, or a row for each view."""
    folder.mkdir()
    image, text = hf.Image(), hf.Value("string")
    for k in range(files):
        mine = range(k * subjects // files, (k + 1) * subjects // files)
        if lists:
            rows = {
                "image": [[flat(i, j) for j in range(views)] for i in mine],
                "text": [f"a <s> toy {i}" for i in mine],
            }
            features = {"image": hf.Sequence(image), "text": text}
        else:
            pairs = [(i, j) for i in mine for j in range(views)]
            rows = {"image": [flat(i, j) for i, j in pairs], "who": [f"toy{i}" for i, _ in pairs]}
            rows["text"] = [f"a <s> toy {i}" for i, _ in pairs]
            features = {"image": image, "who": text, "text": text}
        hf.Dataset.from_dict(rows, features=hf.Features(features)).to_parquet(str(folder / f"{k}.parquet"))
    return folder


def parquet(folder, lists: bool = True, **options) -> ReferenceConfig:
    column = {} if lists else {"subject_column": "who"}
    files = {"dataset_name": "parquet", "data_files": str(folder / "*.parquet")}
    return ReferenceConfig(**{"resolution": 8, "shuffle_buffer": 0} | files | column | options)


def streamed(config: ReferenceConfig, rank: int = 0, world: int = 1, seed: int = 0) -> Streamed:
    return Streamed(config, read_rows(config), pixels, seed, rank, world)


def shown(entries) -> list[int]:
    return [target_of(entry)[0] for entry in entries]


STREAMING = pytest.mark.parametrize("streaming", [True, False])
LISTS = pytest.mark.parametrize("lists", [True, False], ids=["lists", "rows"])


@LISTS
@STREAMING
def test_rows_become_items_of_one_subject_each(hf, tmp_path, lists, streaming):
    entries = take(
        16, streamed(parquet(write_rows(hf, tmp_path / "rows", lists=lists), lists, streaming=streaming))
    )
    assert shown(entries) == [*range(8), *range(8)]
    for entry in entries:
        subject, target = target_of(entry)
        found = [said(reference) for reference in entry["references"][0]]
        assert {who for who, _ in found} == {subject}
        assert len({target, *(view for _, view in found)}) == 3
        assert entry["prompt"] == f"a <s> toy {subject}"
    assert [e["identity"] for e in entries[:8]] == [e["identity"] for e in entries[8:]]
    assert len({e["identity"] for e in entries}) == 8
    assert any(not same(first, second) for first, second in zip(entries[:8], entries[8:], strict=True))


@STREAMING
def test_each_view_of_a_list_may_have_a_caption_of_its_own(hf, tmp_path, streaming):
    rows = {"image": [[flat(3, j) for j in range(3)]], "says": [[f"view {j} of <s>" for j in range(3)]]}
    features = hf.Features({"image": hf.Sequence(hf.Image()), "says": hf.Sequence(hf.Value("string"))})
    (tmp_path / "rows").mkdir()
    hf.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows" / "0.parquet"))
    config = parquet(tmp_path / "rows", caption_column="says", streaming=streaming)
    for entry in take(6, streamed(config)):
        assert entry["prompt"] == f"view {target_of(entry)[1]} of <s>"


@LISTS
@STREAMING
def test_masks_of_rows_cut_the_references_out(hf, tmp_path, lists, streaming):
    """The right half of every image is the subject's; the second row's masks are missing."""
    half = Image.fromarray(np.array([[0] * 4 + [255] * 4] * 8, np.uint8))
    views, masks = [flat(3, j) for j in range(3)], [half] * 3
    image = hf.Sequence(hf.Image()) if lists else hf.Image()
    rows = (
        {"image": [views, views], "cut": [masks, None]}
        if lists
        else {"image": views * 2, "cut": [*masks, *[None] * 3]}
    )
    features = {"image": image, "cut": image}
    if not lists:
        rows["who"], features["who"] = ["a"] * 3 + ["b"] * 3, hf.Value("string")
    (tmp_path / "rows").mkdir()
    hf.Dataset.from_dict(rows, features=hf.Features(features)).to_parquet(
        str(tmp_path / "rows" / "0.parquet")
    )
    config = parquet(
        tmp_path / "rows",
        lists,
        mask_column="cut",
        segment_rate=1.0,
        unmasked_weight=0.25,
        streaming=streaming,
    )
    masked, whole = take(2, streamed(config))
    assert (masked["references"][0, :, :, :, :4] == 1).all()
    assert (masked["references"][0, :, :, :, 4:] != 1).any()
    assert torch.equal(masked["mask"][0, 0], torch.tensor([0.25] * 4 + [1.0] * 4))
    assert (whole["mask"] == 1).all()
    assert not (whole["references"][0, :, :, :, :4] == 1).all()


def spoilt(hf, folder):
    """Eight subjects, of which the third has an image that is none, and the fifth a large one."""
    folder.mkdir()
    images = [[{"bytes": encoded(flat(i, j)), "path": None} for j in range(3)] for i in range(8)]
    images[2] = [{"bytes": b"nothing", "path": None}] * 3
    images[4] = [{"bytes": encoded(flat(4, j, (40, 40))), "path": None} for j in range(3)]
    features = hf.Features({"image": hf.Sequence(hf.Image())})
    hf.Dataset.from_dict({"image": images}, features=features).to_parquet(str(folder / "0.parquet"))
    return folder


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@STREAMING
def test_images_of_rows_that_cannot_be_read_are_skipped_or_refused(hf, tmp_path, streaming):
    folder = spoilt(hf, tmp_path / "rows")
    with pytest.warns(
        UserWarning, match=r"an image of subject '(2' cannot be read|4' has more pixels).*It is skipped"
    ):
        entries = take(6, streamed(parquet(folder, max_pixels=1000, streaming=streaming)))
    assert shown(entries) == [0, 1, 3, 5, 6, 7]
    with pytest.raises(UserError, match="an image of subject '2' cannot be read"):
        take(6, streamed(parquet(folder, max_pixels=1000, strict=True, streaming=streaming)))


def test_a_dataset_of_unreadable_images_ends(hf, tmp_path):
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(UserError, match="has more pixels than --max_pixels 10"),
    ):
        take(1, streamed(parquet(write_rows(hf, tmp_path / "rows"), max_pixels=10)))


def test_only_what_is_shown_is_decoded(hf, tmp_path, monkeypatch):
    """Of five items after the first hundred: their targets and references, not what came before, nor
    other processes'."""
    decode, seen = streams.decoded, []
    monkeypatch.setattr(streams, "decoded", lambda *given: seen.append(given[1]) or decode(*given))
    config = parquet(write_rows(hf, tmp_path / "rows", views=6), shuffle_buffer=4)
    take(5, streamed(config, rank=1, world=2).after(100))
    assert len(seen) == 15
    assert len(set(seen)) >= 4


def test_rows_without_captions_get_the_prompt_with_their_subjects_name(hf, tmp_path):
    config = parquet(write_rows(hf, tmp_path / "rows", lists=False), False, caption_column="")
    config.instance_prompt = "a <s> called {}"
    assert [entry["prompt"] for entry in take(2, streamed(config))] == [
        "a <s> called toy0",
        "a <s> called toy1",
    ]


def test_a_row_caption_without_the_subjects_word_is_refused(hf, tmp_path):
    config = parquet(write_rows(hf, tmp_path / "rows"), caption_column="")
    config.instance_prompt = "a photo"
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(UserError, match=r"'a photo' does not say <s>"),
    ):
        take(1, streamed(config))


def uneven(hf, folder):
    """Seven subjects: the second has a mask too few, the third no images, the fourth a caption without
    its word, the fifth one that is none."""
    folder.mkdir()
    half = Image.new("L", (8, 8), 255)
    rows = {
        "image": [[flat(i, j) for j in range(3)] for i in range(7)],
        "cut": [[half] * 3 for _ in range(7)],
    }
    rows["text"] = [f"a <s> toy {i}" for i in range(7)]
    rows["cut"][1], rows["image"][2], rows["text"][3], rows["text"][4] = [half] * 2, None, "a toy", None
    image = hf.Sequence(hf.Image())
    features = hf.Features({"image": image, "cut": image, "text": hf.Value("string")})
    hf.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "0.parquet"))
    return folder


@STREAMING
def test_rows_that_do_not_fit_together_are_skipped_or_refused(hf, tmp_path, streaming):
    config = parquet(
        uneven(hf, tmp_path / "rows"), mask_column="cut", instance_prompt="a <s> {}", streaming=streaming
    )
    with pytest.warns(UserWarning, match="skipped") as warned:
        entries = take(4, streamed(config))
    assert shown(entries) == [0, 4, 5, 6]
    assert entries[1]["prompt"] == "a <s> 4"
    said = [str(warning.message) for warning in warned]
    assert any("subject '1' has 3 images, 2 masks and 3 captions. It is skipped" in text for text in said)
    assert any("subject '3', the caption 'a toy' does not say <s>" in text for text in said)
    config.strict = True
    with pytest.raises(UserError, match="subject '1' has 3 images"):
        take(4, streamed(config))


def test_captions_that_are_no_text_are_skipped(hf, tmp_path):
    rows = {"image": [[flat(0), flat(0, 1)]], "text": [7]}
    (tmp_path / "rows").mkdir()
    features = hf.Features({"image": hf.Sequence(hf.Image()), "text": hf.Value("int64")})
    hf.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows" / "0.parquet"))
    told = "--caption_column: subject '0' has 7, which is no text"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match=told):
        take(1, streamed(parquet(tmp_path / "rows")))


def test_images_of_16_bits_are_not_clipped(hf, tmp_path):
    """Gray at half of the range stays gray."""
    gray = [{"bytes": encoded(Image.fromarray(np.full((8, 8), 32768, np.uint16))), "path": None}] * 2
    (tmp_path / "rows").mkdir()
    features = hf.Features({"image": hf.Sequence(hf.Image())})
    hf.Dataset.from_dict({"image": [gray]}, features=features).to_parquet(
        str(tmp_path / "rows" / "0.parquet")
    )
    [entry] = take(1, streamed(parquet(tmp_path / "rows")))
    assert entry["pixels"].abs().max() < 0.01


def test_a_misspelt_caption_column_is_refused(hf, tmp_path):
    with pytest.raises(UserError, match="--caption_column: the dataset has no column 'captoin'"):
        streamed(parquet(write_rows(hf, tmp_path / "rows"), caption_column="captoin"))


def test_no_subject_is_held_out_twice(hf, tmp_path):
    """Of the first three subjects one has a single view and cannot be compared."""
    rows = {"image": [[flat(i, j) for j in range(1 if i == 1 else 2)] for i in range(6)]}
    (tmp_path / "rows").mkdir()
    features = hf.Features({"image": hf.Sequence(hf.Image())})
    hf.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows" / "0.parquet"))
    _, [batch] = read(parquet(tmp_path / "rows", holdout=3))
    assert subjects_of(batch) == [0, 2]
    with pytest.raises(UserError, match="--holdout 2: fewer than two"):
        read(parquet(tmp_path / "rows", holdout=2))


def test_a_stream_is_shuffled_anew_in_every_epoch_and_repeats_with_its_seed(hf, tmp_path):
    config = parquet(write_rows(hf, tmp_path / "rows"), shuffle_buffer=100)
    found = shown(take(24, streamed(config)))
    epochs = [tuple(found[i : i + 8]) for i in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert shown(take(24, streamed(config))) == found
    assert shown(take(24, streamed(config, seed=1))) != found


@LISTS
@STREAMING
def test_two_processes_see_different_subjects_and_all_of_them(hf, tmp_path, lists, streaming):
    config = parquet(write_rows(hf, tmp_path / "rows", lists=lists), lists, streaming=streaming)
    entries = [take(4, streamed(config, rank, 2)) for rank in range(2)]
    first, second = (set(shown(part)) for part in entries)
    assert not first & second
    assert first | second == set(range(8))
    assert not {e["identity"] for e in entries[0]} & {e["identity"] for e in entries[1]}


@LISTS
@STREAMING
def test_two_processes_share_one_file_without_sharing_a_subject(hf, tmp_path, lists, streaming):
    config = parquet(write_rows(hf, tmp_path / "rows", 7, files=1, lists=lists), lists, streaming=streaming)
    entries = [take(8, streamed(config, rank, 2)) for rank in range(2)]
    first, second = (set(shown(part)) for part in entries)
    assert not first & second
    assert first | second == set(range(7))
    views = {said(r) for part in entries for entry in part for r in entry["references"][0]}
    assert len({view for _, view in views}) == 4  # no row is lost to the other process


@LISTS
def test_a_resumed_stream_is_the_one_that_was_never_interrupted(hf, tmp_path, lists):
    config = parquet(write_rows(hf, tmp_path / "rows", lists=lists), lists, shuffle_buffer=5)
    whole = take(20, streamed(config))
    for start in (0, 3, 11):
        rest = take(20 - start, streamed(config).after(start))
        assert all(same(one, other) for one, other in zip(rest, whole[start:], strict=True))


def subjects_of(batch: dict) -> list[int]:
    return [said((target + 1) / 2)[0] for target in batch["pixels"]]


def test_a_stream_is_loaded_by_one_process_at_most_and_resumed_there(hf, tmp_path):
    """Several would each begin at its beginning."""
    config = parquet(write_rows(hf, tmp_path / "rows"), dataloader_num_workers=4, shuffle_buffer=3)
    loaders = [StreamedData(streamed(config)).batches(start, 2, 0) for start in (0, 2)]
    assert [loader.num_workers for loader in loaders] == [1, 1]
    whole, rest = (
        [subjects_of(batch) for batch in take(count, loader)]
        for count, loader in zip((5, 3), loaders, strict=True)
    )
    assert rest == whole[2:]


@LISTS
@STREAMING
@pytest.mark.parametrize("files", [1, 2])
def test_held_out_rows_are_not_trained_on_by_any_process(hf, tmp_path, lists, streaming, files):
    folder = write_rows(hf, tmp_path / "rows", lists=lists, files=files)
    trained = set()
    for rank in range(2):
        config = parquet(folder, lists, streaming=streaming, holdout=3)
        dataset, [batch] = read(config, rank=rank, world=2)
        assert sorted(subjects_of(batch)) == [0, 1, 2]
        trained |= set(shown(take(10, dataset)))
    assert trained == {3, 4, 5, 6, 7}


def test_a_subject_with_one_view_is_passed_over(hf, tmp_path):
    rows = {"image": [[flat(0), flat(0, 1)], [flat(1)], [flat(2), flat(2, 1)]]}
    (tmp_path / "rows").mkdir()
    path = str(tmp_path / "rows" / "0.parquet")
    hf.Dataset.from_dict(rows, features=hf.Features({"image": hf.Sequence(hf.Image())})).to_parquet(path)
    assert shown(take(4, streamed(parquet(tmp_path / "rows")))) == [0, 2, 0, 2]


def test_rows_without_a_subject_of_two_views_are_refused(hf, tmp_path):
    config = parquet(write_rows(hf, tmp_path / "rows", views=1))
    with pytest.raises(UserError, match=r"--dataset_name: no subject with two or more views"):
        take(1, streamed(config))


@STREAMING
def test_a_wrong_column_is_named_with_those_there_are(hf, tmp_path, streaming):
    folder = write_rows(hf, tmp_path / "rows", lists=False)
    for column in ("image_column", "subject_column"):
        config = parquet(folder, False, streaming=streaming, **{column: "picture"})
        with pytest.raises(UserError, match=f"--{column}: .*no column 'picture', only image, who, text"):
            read_rows(config)


@STREAMING
def test_single_images_need_a_subject_column(hf, tmp_path, streaming):
    with pytest.raises(UserError, match=r"--subject_column: name the column"):
        read_rows(parquet(write_rows(hf, tmp_path / "rows", lists=False), streaming=streaming))


@STREAMING
def test_a_dataset_that_is_not_there_or_empty_is_refused(hf, tmp_path, streaming):
    with pytest.raises(UserError, match=r"--dataset_name 'parquet' could not be read"):
        read_rows(parquet(tmp_path / "nowhere", streaming=streaming))
    (tmp_path / "rows").mkdir()
    empty = hf.Dataset.from_dict({"image": []}, features=hf.Features({"image": hf.Sequence(hf.Image())}))
    empty.to_parquet(str(tmp_path / "rows" / "0.parquet"))
    with pytest.raises(UserError, match=r"--dataset_name"):
        read_rows(parquet(tmp_path / "rows", streaming=streaming))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'customize\[datasets\]'"):
        read_rows(ReferenceConfig(dataset_name="parquet"))


def imagefolder(root, **options) -> ReferenceConfig:
    for i, name in enumerate(("bear", "fox", "owl")):
        write_subject(root, name, 10 * i, count=3, caption=None)
    source = {"dataset_name": "imagefolder", "data_files": str(root / "**"), "subject_column": "label"}
    return ReferenceConfig(**{"resolution": 8, "shuffle_buffer": 0} | source | options)


@STREAMING
def test_an_imagefolder_has_a_folder_for_each_subject(hf, tmp_path, streaming):
    entries = take(6, streamed(imagefolder(tmp_path / "root", streaming=streaming)))
    assert shown(entries) == [0, 10, 20] * 2
    for entry in entries:
        assert {said(reference)[0] for reference in entry["references"][0]} == {target_of(entry)[0]}
        assert entry["prompt"] == "a photo of <s>"


@STREAMING
def test_the_names_of_an_imagefolders_folders_stand_in_the_prompts(hf, tmp_path, streaming):
    config = imagefolder(tmp_path / "root", streaming=streaming, instance_prompt="a <s> {}")
    assert [entry["prompt"] for entry in take(3, streamed(config))] == [
        "a <s> bear",
        "a <s> fox",
        "a <s> owl",
    ]


@STREAMING
def test_held_out_folders_of_an_imagefolder_keep_their_names(hf, tmp_path, streaming):
    dataset, [batch] = read(
        imagefolder(tmp_path / "root", streaming=streaming, instance_prompt="a <s> {}", holdout=2)
    )
    assert batch["prompt"] == ["a <s> bear", "a <s> fox"]
    assert [entry["prompt"] for entry in take(2, dataset)] == ["a <s> owl"] * 2


@STREAMING
def test_a_webdataset_is_read_from_its_tar_file(hf, tmp_path, streaming):
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        for i, j in itertools.product(range(3), range(3)):
            encoded = io.BytesIO()
            flat(i, j).save(encoded, "PNG")
            for suffix, data in (
                ("png", encoded.getvalue()),
                ("cls", str(i).encode()),
                ("txt", f"a <s> {i}".encode()),
            ):
                entry = tarfile.TarInfo(f"{i}-{j}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    columns = {
        "image_column": "png",
        "caption_column": "txt",
        "subject_column": "cls",
        "streaming": streaming,
    }
    source = {"dataset_name": "webdataset", "data_files": str(tmp_path / "rows.tar")}
    entries = take(6, streamed(ReferenceConfig(**{"resolution": 8, "shuffle_buffer": 0} | source | columns)))
    assert shown(entries) == [0, 1, 2] * 2
    assert [entry["prompt"] for entry in entries[:3]] == ["a <s> 0", "a <s> 1", "a <s> 2"]


def test_a_restyled_drawing_is_a_subject_of_its_own(monkeypatch):
    """The same in every view, unlike its original and any held-out drawing; the rest of the world stays."""
    from customize.stickers import restyle

    world = World()
    pool = frozenset(world.drawings())
    drawing = next(d for d in sorted(pool, key=str) if world.classes[d.word]["held_out"])
    joins = []
    join = restyle.joined
    monkeypatch.setattr(
        restyle, "joined", lambda own, other, rng: joins.append(other) or join(own, other, rng)
    )
    sprites = [Restyled(world, drawing, pool, seed).sprite(drawing) for seed in range(40)]
    again = Restyled(world, drawing, pool, 3)
    assert np.array_equal(again.sprite(drawing), sprites[3])
    assert len({sprite.tobytes() for sprite in sprites}) > 35
    held_out = [world.sprite(Drawing(drawing.word, s)) for s in world.classes[drawing.word]["held_out"]]
    assert joins
    assert not any(np.array_equal(other, own) for other in joins for own in held_out)
    other = next(d for d in pool if d != drawing)
    assert np.array_equal(again.sprite(other), world.sprite(other))
    assert all(sprite.shape == (world.size, world.size, 4) and sprite.dtype == np.uint8 for sprite in sprites)


def test_restyled_scenes_are_no_positives_of_others():
    config = ReferenceConfig(resolution=32, restyle_rate=1.0)
    data = Rendered(config, lambda images: torch.zeros(len(images), 3, 8, 8), 0)
    items = [data[i] for i in range(6)]
    assert len({item["identity"] for item in items}) == 6
    assert min(item["identity"] for item in items) >= len(data.pool)
    plain = Rendered(ReferenceConfig(resolution=32), lambda images: torch.zeros(len(images), 3, 8, 8), 0)
    assert all(plain[i]["identity"] < len(data.pool) for i in range(6))

"""The benchmarks: their data, what they refuse, going on where they stopped, and numbers that move the right
way."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from customize.app.bench import stickers
from customize.app.bench.bench import ImagesToScore, Subject
from customize.app.bench.drawing import ImageRequest, Sampling, draw_missing, same_protocol
from customize.app.bench.dreambench import DreamBench, read_dreambench
from customize.app.bench.sticker_scores import score, score_unknown
from customize.app.bench.stickers import RECIPES, StickerBench
from customize.app.cli import main
from customize.data.concepts import Concept
from customize.embedded import subject_score
from customize.errors import UserError
from customize.metrics import load_sticker_clip
from customize.prompts import class_word, subject_words
from customize.stickers import Drawing, Scene, World, caption, draw_scene
from customize.stickers.bench import (
    PHRASES,
    SEEN,
    bench_prompts,
    bench_subjects,
    parse_prompt,
    reference_scenes,
    true_scene,
    write_references,
)
from customize.stickers.measure import best_fit
from customize.trainers.scorers import encoder_scorer
from tiny import tiny

FOX = Drawing("fox", "flat")
QUICK = Sampling(num_inference_steps=2, guidance_scale=4.0, batch_size=2)


@pytest.fixture(scope="module")
def clip():
    return load_sticker_clip()


# what the benchmark consists of


def test_subjects_are_held_out_and_the_quick_ones_come_first():
    world, subjects = World(), bench_subjects()
    assert len(set(subjects)) == 30
    assert set(subjects) <= set(world.drawings(held_out=True))
    assert sum(world.is_unknown(s.word) for s in subjects) == 10
    assert bench_subjects(quick=True) == subjects[:6]
    assert bench_prompts(quick=True) == bench_prompts()[:8]
    assert len(bench_prompts()) == 25
    assert all(prompt.count("{}") == 1 for prompt in bench_prompts())


@pytest.mark.parametrize(
    ("field", "phrase", "value"), [(f, p, v) for f, phrases in PHRASES.items() for p, v in phrases.items()]
)
def test_a_prompt_says_what_its_scene_shows(field, phrase, value):
    scene = Scene(Drawing("cat", "3d"), **{"background": "bricks", field: value})
    assert parse_prompt(caption(scene)) == {"background": "bricks"} | {field: value}


def test_a_prompt_may_say_nothing_and_names_its_companion():
    assert parse_prompt("a sks fox") == {}
    assert parse_prompt("a fox next to a pumpkin in the snow") == {
        "companion": "pumpkin",
        "background": "snow",
    }


def test_every_prompt_speaks_of_a_background_and_the_true_scene_obeys():
    for i, prompt in enumerate(bench_prompts()):
        assert "background" in parse_prompt(prompt)
        first, again = (np.asarray(true_scene(FOX, prompt, i)) for _ in range(2))
        assert (first == again).all()
    words = [
        np.asarray(true_scene(FOX, p, 3))
        for p in ("a {} on the beach", "a red {} on the beach", "a {} at sunset")
    ]
    assert not (words[0] == words[1]).all()
    assert not (words[0] == words[2]).all()


def test_reference_images_differ_in_pose_and_background(tmp_path):
    scenes = reference_scenes(FOX)
    assert [s.background for s in scenes] == list(SEEN)
    assert len({s.pose for s in scenes}) == 4
    images = write_references(tmp_path / "new" / "folder", FOX, "sks fox")
    assert (tmp_path / "new" / "folder" / "1.txt").read_text() == "a sks fox on green grass"
    assert (np.asarray(Image.open(tmp_path / "new" / "folder" / "1.png")) == np.asarray(images[1])).all()


def test_the_best_fit_covers_the_drawing():
    world = World()
    for scene in reference_scenes(Drawing("apple", "cartoon")):
        image, mask = draw_scene(scene, world)
        sprite = world.sprite(scene.subject)
        found = np.asarray(best_fit(image, sprite).mask(sprite, image.width)) > 127
        true = np.asarray(mask) > 127
        assert (found & true).sum() / (found | true).sum() > 0.6


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of a sks dog", "sks dog"),
        ("A picture of the <toy>", "<toy>"),
        ("a <s> fox on grass", "<s> fox on grass"),
        ("photo of sks", "sks"),
        ("another one", "another one"),
    ],
)
def test_words_of_the_subject(prompt, words):
    assert subject_words(prompt) == words


def test_the_class_word():
    assert class_word("a photo of sks dog") == "dog"
    with pytest.raises(UserError, match="train with --class_prompt"):
        class_word("a photo of sks")
    with pytest.raises(UserError, match="train with --class_prompt"):
        class_word("")
    assert class_word("a photo of <toy>", "", "bear") == "bear"
    assert class_word("a photo of <toy>", "a photo of a stuffed animal", "bear") == "stuffed animal"


# images are made once


class Painter:
    """Stands in for a pipeline: the image is a colour that prompt and seed decide."""

    def __init__(self, fail_at: int | None = None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, prompt, generator, **options):
        self.calls.append((prompt, options))
        if self.fail_at == len(self.calls):
            raise KeyboardInterrupt
        colours = [
            (len(p), *torch.randint(255, (2,), generator=g).tolist())
            for p, g in zip(prompt, generator, strict=True)
        ]
        return type("Output", (), {"images": [Image.new("RGB", (8, 8), colour) for colour in colours]})


SHOTS = [ImageRequest(f"{i}", "a" * (i + 1), i) for i in range(5)]


def pixels(images):
    return [image.getpixel((0, 0)) for image in images]


def test_an_interrupted_drawing_goes_on_and_changes_nothing(tmp_path):
    whole = pixels(draw_missing(Painter, SHOTS, tmp_path / "whole", QUICK))
    assert [p[0] for p in whole] == [1, 2, 3, 4, 5]
    with pytest.raises(KeyboardInterrupt):
        draw_missing(lambda: Painter(fail_at=2), SHOTS, tmp_path / "half", QUICK)
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == ["0.png", "1.png", "drawing.json"]
    painter = Painter()
    assert pixels(draw_missing(lambda: painter, SHOTS, tmp_path / "half", QUICK)) == whole
    assert [prompts for prompts, _ in painter.calls] == [["aaa", "aaaa"], ["aaaaa"]]
    assert painter.calls[0][1] == {"num_inference_steps": 2, "guidance_scale": 4.0}
    (tmp_path / "half" / "3.png").unlink()
    assert pixels(draw_missing(Painter, SHOTS, tmp_path / "half", QUICK)) == whole


def test_nothing_is_loaded_where_nothing_is_missing(tmp_path):
    draw_missing(Painter, SHOTS, tmp_path, QUICK)
    assert len(draw_missing(lambda: pytest.fail("loaded"), SHOTS, tmp_path, QUICK)) == 5


def test_another_protocol_is_refused(tmp_path):
    same_protocol(tmp_path, {"steps": "25", "seed": "0"})
    same_protocol(tmp_path, {"steps": "25", "seed": "0"})
    with pytest.raises(UserError, match=r"steps: 25, now 50.*choose another --output"):
        same_protocol(tmp_path, {"steps": "50", "seed": "0"})


# StickerBench


def taken(images, prompts, subject=FOX, references=None, prior=(), before=()):
    references = references or [draw_scene(scene, World())[0] for scene in reference_scenes(subject)]
    return ImagesToScore(
        Subject("flat-fox", subject.word, "", tuple(prompts), subject),
        images,
        references,
        list(prior),
        list(before),
        1,
    )


def test_scores_move_the_right_way(clip):
    prompts = bench_prompts()[:12]
    true = [true_scene(FOX, prompt, 50 + i) for i, prompt in enumerate(prompts)]
    right, factors, each = score(taken(true, prompts), clip)
    assert right["correlation"] > 0.75
    assert right["prompt_fidelity"] > 0.9
    assert right["background_leak"] < 0.15
    assert factors["background"] > 0.9
    assert len(each) == 12

    other = [true_scene(Drawing("bus", "cartoon"), prompt, 50 + i) for i, prompt in enumerate(prompts)]
    swapped, _, _ = score(taken(other, prompts), clip)
    assert swapped["correlation"] < right["correlation"] - 0.2
    assert swapped["clip_i"] < right["clip_i"]
    assert swapped["class"] < 0.2 < right["class"]

    shuffled, _, _ = score(taken(true[3:] + true[:3], prompts), clip)
    assert shuffled["prompt_fidelity"] < right["prompt_fidelity"] - 0.4
    assert shuffled["clip_t"] < right["clip_t"]

    copied = [draw_scene(reference_scenes(FOX)[i % 4], World())[0] for i in range(12)]
    copies, _, _ = score(taken(copied, prompts), clip)
    assert copies["copy"] > right["copy"]
    assert copies["background_leak"] > 0.9
    assert copies["pose_leak"] == 1.0
    assert copies["clip_i"] > right["clip_i"]

    flat = [Image.new("RGB", (64, 64), "gray")] * 12
    constant, _, _ = score(taken(flat, prompts), clip)
    assert constant["correlation"] < 0.3
    assert constant["class"] < 0.2


def test_drift_is_nothing_where_nothing_moved(clip):
    prompts = bench_prompts()[:4]
    true = [true_scene(FOX, prompt, i) for i, prompt in enumerate(prompts)]
    moved = [true_scene(Drawing("bus", "cartoon"), prompt, i) for i, prompt in enumerate(prompts)]
    still, _, _ = score(taken(true, prompts, prior=true, before=true), clip)
    gone, _, _ = score(taken(true, prompts, prior=moved, before=true), clip)
    assert abs(still["drift"]) < 1e-5 < gone["drift"]
    assert score(taken(true, prompts), clip)[0]["drift"] is None


@pytest.fixture
def small(monkeypatch):
    """StickerBench of one subject and two prompts."""
    monkeypatch.setattr(stickers, "bench_subjects", lambda quick: [FOX])
    monkeypatch.setattr(
        stickers, "bench_prompts", lambda quick: ["a {} on the beach", "a red {} in the snow"]
    )


def test_a_method_is_taught_drawn_scored_and_resumed(tmp_path, small, monkeypatch):
    def bench():
        methods = ["base", "real", "dreambooth-no-prior"]
        return StickerBench(folder=tmp_path, methods=methods, sampling=QUICK, quick=True, repeats=2, steps=2)

    results = bench().run()
    assert [m["kind"] for m in results["methods"]] == ["base", "real", "method"]
    row = results["methods"][2]["subjects"][0]
    assert row["scores"]["diversity"] > 0
    assert row["scores"]["drift"] >= -1e-6
    assert row["cost"]["training seconds"] > 0
    assert row["cost"]["file MB"] > 0.1
    assert row["cost"]["seconds an image"] > 0
    assert row["images"][2]["prompt"] == "a red sks fox in the snow"
    assert all((tmp_path / image["file"]).exists() for image in row["images"])
    assert all((tmp_path / file).exists() for file in row["references"])
    real = results["methods"][1]["subjects"][0]
    assert real["scores"]["correlation"] > 0.7
    assert real["scores"]["drift"] is None
    json.dumps(results)

    monkeypatch.setattr("customize.app.bench.bench.load_base", lambda *_: pytest.fail("drew again"))
    monkeypatch.setattr("customize.app.bench.bench.run", lambda *_: pytest.fail("trained again"))
    again = bench().run()
    assert again["methods"][2]["subjects"][0]["scores"] == row["scores"]


def test_recipes_are_flags_that_exist():
    from customize.config import parse
    from customize.trainers.launch import configs
    from customize.trainers.registry import find_method

    bench = StickerBench(folder=Path(), methods=["base"])
    for name, recipe in RECIPES.items():
        if recipe.method:
            method, *flags = bench.training(name, bench.subjects[0])
            _, _, settings, _ = parse(configs(find_method(method)), flags)
            assert (settings.max_train_steps, settings.train_batch_size) == (200, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a RUN, or a benchmark: --bench stickers"),
        (["--quick"], "9,000 images and 60 trainings"),
        (["--bench", "sticker"], "there is no 'sticker'; choose stickers or dreambench"),
        (["--bench"], "there is no 'nothing'"),
        (
            ["--bench", "stickers", "--methods", "dreamboth"],
            "no recipe 'dreamboth'.*Did you mean.*dreambooth",
        ),
        (["--bench", "dreambench", "--limit_prompts", "0"], "--limit_prompts must be at least 1"),
        (["--bench", "dreambench", "--resolution", "100"], "--resolution must be a multiple of 8"),
        (["--bench=stickers", "--seed", "-1"], "--seed must be between 0"),
        (
            ["--bench", "stickers", "--guidance_scale", "3"],
            "--guidance_scale has no effect on --bench stickers",
        ),
        (["--bench", "dreambench", "--quick"], "--quick has no effect on --bench dreambench"),
        (["--bench", "stickers", "--output", "file"], "--output: cannot write into"),
        (["--bench", "stickers", "--methods", "base", "base"], "names a method twice"),
        (["--bench", "dreambench"], "needs --data_dir"),
        (["--bench", "dreambench", "--data_dir", "x"], "needs --pretrained_model_name_or_path"),
        (["nowhere"], "There is no run 'nowhere'"),
        (["folder"], "'folder' is not a run folder"),
        (["folder", "--bench", "stickers"], "name a RUN, or a benchmark"),
    ],
)
def test_what_cannot_be_evaluated(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


# DreamBench

FILE = """Classes

subject_name,class
rex,dog
mug,coffee mug

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    for name, colour in (("rex", (150, 100, 50)), ("mug", (40, 90, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng(i).integers(-30, 30, (40, 60, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{i:02d}.jpg"
            )
    (folder / "prompts_and_classes.txt").write_text(FILE)
    return folder


def test_reading_the_dataset(dataset):
    mug, rex = read_dreambench(dataset)
    assert (mug.name, mug.word, mug.group, mug.prompts) == (
        "mug",
        "coffee mug",
        "object",
        ("a {} in the jungle", "a red {}"),
    )
    assert (rex.group, rex.prompts[1]) == ("live", "a {} wearing a red hat")


def rewrite(dataset, old, new):
    (dataset / "prompts_and_classes.txt").write_text(FILE.replace(old, new))


def test_what_is_wrong_with_a_dataset_is_told_before_anything_is_drawn(dataset, tmp_path):
    with pytest.raises(UserError, match=r"has no prompts_and_classes.txt"):
        read_dreambench(tmp_path)
    rewrite(dataset, "mug,coffee mug\n", "")
    with pytest.raises(UserError, match=r"no class for the folder 'mug'; add the line"):
        read_dreambench(dataset)
    rewrite(dataset, "'a red {0} {1}'.format(unique_token, class_token)\n", "")
    with pytest.raises(UserError, match="has 1 prompts for objects but 2 for live"):
        read_dreambench(dataset)
    rewrite(dataset, "prompt_list", "list")
    with pytest.raises(UserError, match="malformed"):
        read_dreambench(dataset)
    rewrite(dataset, "mug,coffee mug", "mug,coffee mug\ncan,can")
    with pytest.warns(UserWarning, match="1 subjects of .* have no folder: can"):
        read_dreambench(dataset)
    rewrite(dataset, "", "")
    for path in (dataset / "mug").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds no readable image"):
        read_dreambench(dataset)


def settings_file(folder, text) -> Path:
    path = folder / "train.yaml"
    path.write_text(text)
    return path


def test_a_wrong_training_flag_is_told_before_anything_is_trained(dataset, clip, tmp_path):
    with pytest.raises(UserError, match="unknown key 'max_train_step'"):
        DreamBench(
            folder=tmp_path / "out",
            methods=["dreambooth"],
            sampling=QUICK,
            data=dataset,
            encoders={"clip": clip},
            train=settings_file(tmp_path, "max_train_step: 1"),
        )
    assert not (tmp_path / "out").exists()


def dreambench(dataset, folder, clip, **changes):
    tiny_base = folder.parent / "base"
    if not tiny_base.exists():
        tiny("sd15").save_pretrained(tiny_base)
    options = {"methods": ["base", "real", "dreambooth"], "repeats": 2, "base": str(tiny_base)}
    options |= {"sampling": Sampling(2, 4.0, 2, 16, 16), "encoders": {"clip": clip}}
    if "train" not in changes:
        changes["train"] = settings_file(folder.parent, "max_train_steps: 2\nresolution: 16\nrank: 2\n")
    return DreamBench(folder=folder, data=dataset, **options | changes)


def test_the_protocol_by_loops(dataset, clip, tmp_path):
    results = dreambench(dataset, tmp_path / "out", clip).run()
    mug = results["methods"][2]["subjects"][0]
    drawn = [Image.open(tmp_path / "out" / entry["file"]) for entry in mug["images"]]
    real = [Image.open(path).convert("RGB") for path in sorted((dataset / "mug").iterdir())]
    assert len(drawn) == 4
    a, b = clip(drawn).double(), clip(real).double()
    assert mug["scores"]["clip_i"] == pytest.approx(np.mean([float(x @ y) for x in a for y in b]), abs=1e-5)
    texts = clip.texts(["a coffee mug in the jungle"] * 2 + ["a red coffee mug"] * 2).double()
    assert mug["scores"]["clip_t"] == pytest.approx(
        np.mean([float(x @ t) for x, t in zip(a, texts, strict=True)]), abs=1e-5
    )
    assert mug["scores"]["nearest"] == pytest.approx(
        np.mean([max(float(x @ y) for y in b) for x in a]), abs=1e-5
    )
    apart = np.mean([1 - float(a[0] @ a[1]), 1 - float(a[2] @ a[3])])
    assert mug["scores"]["diversity"] == pytest.approx(apart, abs=1e-5)
    ceiling = np.mean([float(b[i] @ b[j]) for i in range(3) for j in range(3) if i != j])
    assert results["methods"][1]["subjects"][0]["scores"]["clip_i"] == pytest.approx(ceiling, abs=1e-5)
    assert mug["images"][0]["prompt"] == "a sks coffee mug in the jungle"
    assert results["published"]
    assert results["protocol"]["references"] == "all images of the subject"
    assert results["protocol"]["method dreambooth"].startswith(
        "max_train_steps 2, rank 2, resolution 16; 6 images"
    )
    (
        dataset / "mug" / "02.jpg"
    ).unlink()  # the number of images differs from that of the evaluation in the folder
    with pytest.raises(UserError, match=r"another protocol.*choose another --output"):
        dreambench(dataset, tmp_path / "out", clip).run()


def test_the_benchmark_decides_some_settings_itself(dataset, clip, tmp_path):
    with pytest.raises(UserError, match="the benchmark decides 'holdout' itself"):
        dreambench(dataset, tmp_path / "out", clip, train=settings_file(tmp_path, "holdout: 1"))
    (tmp_path / "each").mkdir()
    (tmp_path / "each" / "dreambooth.yaml").write_text("rank: 3")
    assert dreambench(dataset, tmp_path / "out", clip, train=tmp_path / "each").settings("dreambooth") == {
        "rank": 3
    }
    with pytest.raises(UserError, match=r"each/textual_inversion.yaml"):
        dreambench(dataset, tmp_path / "out", clip, train=tmp_path / "each", methods=["textual_inversion"])


def test_real_images_alone(dataset, clip, tmp_path):
    results = dreambench(dataset, tmp_path / "out", clip, methods=["real"]).run()
    assert "drift" not in results["metrics"]
    assert set(results["axes"]) <= results["metrics"].keys()


def test_the_one_reference_variant(dataset, clip, tmp_path):
    results = dreambench(
        dataset, tmp_path / "out", clip, references="one", methods=["real", "dreambooth"], limits=(1, 1)
    ).run()
    real, taught = (method["subjects"] for method in results["methods"])
    assert len(taught) == 1
    assert (len(real[0]["references"]), len(taught[0]["references"])) == (3, 1)
    assert len(taught[0]["images"]) == 2
    info = json.loads((tmp_path / "out" / "dreambooth" / "mug" / "run" / "run.json").read_text())
    assert len(info["dataset"]) == 1


# one finished run


def test_a_run_on_stickers_beside_its_base_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("customize.app.bench.finished.bench_prompts", lambda quick: ["a {} on the beach"])
    write_references(tmp_path / "images", FOX, "sks fox")
    train = [
        "train",
        "dreambooth",
        "--instance_data_dir",
        str(tmp_path / "images"),
        "--instance_prompt",
        "a sks fox",
    ]
    assert main([*train, "--max_train_steps", "2", "--rank", "2", "--output_dir", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--subject", "flat wolpertinger", "--quick"]) == 2
    assert "no drawing 'flat wolpertinger'" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--quick"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation-quick" / "results.json").read_text())
    assert [m["name"] for m in found["methods"]] == ["base", "run", "real"]
    assert found["methods"][1]["subjects"][0]["name"] == "flat-fox"  # the drawing that fits its images
    assert found["title"] == "run"
    page = (tmp_path / "run" / "evaluation-quick" / "report.html").read_text()
    assert "interval" not in page.split("<section")[0]  # over one subject there is none
    assert re.search(r"StickerBench: 2 images, about 1 min to draw|images, about", capsys.readouterr().out)
    assert found["methods"][1]["subjects"][0]["images"][0]["prompt"] == "a sks fox on the beach"

    write_references(
        tmp_path / "images", Drawing("apple", "cartoon"), "sks fox"
    )  # the same folder, other images
    assert main(["evaluate", str(tmp_path / "run"), "--quick"]) == 2
    assert "another protocol" in capsys.readouterr().err


def test_a_run_from_a_users_own_images(tmp_path, monkeypatch):
    """Any number, size and shape: the masks of the benchmark's images do not fit them."""
    monkeypatch.setattr("customize.app.bench.finished.bench_prompts", lambda quick: ["a {} on the beach"])
    for i, size in enumerate([(100, 80), (64, 64), (30, 40)]):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        true_scene(FOX, "a fox on green grass", i).resize(size).save(path)
    train = [
        "train",
        "dreambooth",
        "--instance_data_dir",
        str(tmp_path / "images"),
        "--instance_prompt",
        "a sks fox",
    ]
    assert main([*train, "--max_train_steps", "1", "--rank", "2", "--output_dir", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--quick", "--subject", "flat fox"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation-quick" / "results.json").read_text())
    assert len(found["methods"][1]["subjects"][0]["references"]) == 3


def stranger(i: int) -> Image.Image:
    """Something that no studio of the world has drawn: three discs on a stripe."""
    image = Image.new("RGB", (128, 128), (240, 240, 230))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 50 + i, 128, 70 + i), (20, 160, 90))
    for k in range(3):
        pen.ellipse(
            (10 + 38 * k, 30 + 5 * i, 44 + 38 * k, 95 - 4 * i), (200 - 60 * k, 40 + 70 * k, 30 + 90 * k)
        )
    return image


def test_a_run_of_what_is_no_drawing_of_the_world(tmp_path, monkeypatch, capsys):
    """It is compared with its own images, and nothing that needs the true drawing is reported."""
    monkeypatch.setattr("customize.app.bench.finished.bench_prompts", lambda quick: ["a {} on the beach"])
    (tmp_path / "images").mkdir()
    for i in range(3):
        stranger(i).save(tmp_path / "images" / f"{i}.png")
    train = ["train", "dreambooth", "--instance_data_dir", str(tmp_path / "images")]
    train += ["--instance_prompt", "a sks toy", "--max_train_steps", "1", "--rank", "2"]
    assert main([*train, "--output_dir", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--quick"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation-quick" / "results.json").read_text())
    assert not {"subject_fidelity", "correlation", "class", "taken"} & found["metrics"].keys()
    assert found["axes"] == ["prompt_fidelity", "clip_i"]
    assert "its own images are the truth" in found["protocol"]["subjects"]
    base, run, real = (method["subjects"][0] for method in found["methods"])
    assert run["images"][0]["prompt"] == "a sks toy on the beach"
    assert base["images"][0]["prompt"] == "a toy on the beach"
    assert 0 < real["scores"]["clip_i"] <= 1
    assert real["images"] == []


def test_the_scores_of_an_unknown_subject_by_loops(clip):
    images, prompts = [stranger(i) for i in range(4)], ["a {} on the beach", "a {} at sunset"]
    subject = Subject("toy", "toy", "", tuple(prompts), None)
    taken = ImagesToScore(subject, images, images[:2], images[2:], images[:2], 2)
    scores, factors, each = score_unknown(taken, clip)
    a, b = clip(images).double(), clip(images[:2]).double()
    assert scores["clip_i"] == pytest.approx(np.mean([float(x @ y) for x in a for y in b]), abs=1e-5)
    assert scores["diversity"] == pytest.approx(
        np.mean([1 - float(a[0] @ a[1]), 1 - float(a[2] @ a[3])]), abs=1e-5
    )
    moved = np.mean([(1 - float(a[i] @ a[2 + i])) / 2 for i in range(2)])
    assert scores["drift"] == pytest.approx(moved, abs=1e-5)
    assert scores["prompt_fidelity"] == pytest.approx(np.mean([entry["prompt_fidelity"] for entry in each]))
    assert list(factors) == ["background"]
    alone, _, nothing = score_unknown(ImagesToScore(subject, [], images[:2], [], [], 2), clip)
    assert alone["clip_i"] == pytest.approx(float(a[0] @ a[1]), abs=1e-5)
    assert nothing == []


def test_the_scorer_of_stickers_prefers_the_subject_and_the_prompt():
    rate = subject_score([draw_scene(scene, World())[0] for scene in reference_scenes(FOX)])
    prompts = [f"a sks fox {phrase}" for phrase in ("on the beach", "under a night sky", "at sunset")]
    right = [(p, true_scene(FOX, p, i)) for i, p in enumerate(prompts)]
    other = [(p, true_scene(Drawing("bus", "cartoon"), p, i)) for i, p in enumerate(prompts)]
    shuffled = [(p, image) for p, (_, image) in zip(prompts, right[1:] + right[:1], strict=True)]
    assert rate(right)["subject_fidelity"] > rate(other)["subject_fidelity"] + 0.3
    assert rate(right)["prompt_fidelity"] > rate(shuffled)["prompt_fidelity"] + 0.5
    assert rate(other)["prompt_fidelity"] > 0.6


def test_the_scorer_of_other_models_by_loops(clip):
    references = [draw_scene(scene, World())[0] for scene in reference_scenes(FOX)]
    rate = encoder_scorer(references, Concept("", "a photo of a sks fox", "a fox"), "", clip, clip)
    drawn = [("a sks fox on the beach", references[0]), ("a sks fox at sunset", references[1])]
    a, b = clip([image for _, image in drawn]), clip(references)
    texts = clip.texts(["a fox on the beach", "a fox at sunset"])
    found = rate(drawn)
    assert found["subject_fidelity"] == pytest.approx(np.mean([float(x @ y) for x in a for y in b]), abs=1e-5)
    assert found["prompt_fidelity"] == pytest.approx(float((a * texts).sum(1).mean()), abs=1e-5)

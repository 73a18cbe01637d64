"""`customize compare`: what stands where in the grid, the same images as `customize generate`, the judge's
scores, and what is refused."""

import gc
import json
import re
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import customize
from customize.adapters.lora import Lora, LoraFields
from customize.app import compare as comparing
from customize.app.cli import main
from customize.app.compare import (
    TEXT,
    Column,
    CompareConfig,
    check_columns,
    columns_of,
    draw_columns,
    grid,
    layout,
    scores_of,
    seed_labels,
    wrapped,
)
from customize.backbones.families import wrap
from customize.embedded import subject_score
from customize.errors import UserError
from customize.runs import checkpoint
from customize.runs.output import is_own_image, own_text, save_image
from customize.stickers import Drawing
from customize.stickers.bench import write_references
from tiny import tiny

PROMPTS = ["a sks dog", "a cat on grass"]
FAST = ["--num_inference_steps", "2", "--num_seeds", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny base model, `a` and `b`, runs of LoRA on it, and `word`, which has none."""
    root = tmp_path_factory.mktemp("runs")
    tiny("sd15").save_pretrained(root / "base")
    for seed, name in enumerate(("a", "b")):
        backbone = wrap(tiny("sd15"), str(root / "base"))
        adapter = Lora(backbone, LoraFields(rank=2))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in backbone.denoiser.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.5, generator=generator)
        info = {"base_model": str(root / "base"), "method": "none", "config": {"instance_prompt": "a dog"}}
        checkpoint.save(root / name, [adapter], info)
    checkpoint.save(root / "word", [], {"base_model": str(root / "base"), "method": "none", "config": {}})
    return root


@pytest.fixture(scope="module")
def fox(tmp_path_factory):
    """A short run on the embedded base model, beside the images that it learned from."""
    folder = tmp_path_factory.mktemp("fox")
    write_references(folder / "images", Drawing("fox", "flat"), "sks fox")
    options = {"instance_prompt": "a sks fox", "max_train_steps": 1, "rank": 2, "train_batch_size": 1}
    return customize.train(
        "dreambooth", instance_data_dir=folder / "images", output_dir=folder / "run", **options
    )


# columns


def test_columns_are_every_run_strength_and_number_of_steps(runs):
    config = CompareConfig(lora_scale=[0.5, 1.0], num_inference_steps=[1, 2])
    found = columns_of(["stickers", str(runs / "a")], config)
    assert [column[1:] for column in found] == [
        *[("stickers", 1.0, steps) for steps in (1, 2)],
        *[(str(runs / "a"), scale, steps) for scale in (0.5, 1.0) for steps in (1, 2)],
    ]
    assert [found[0].label, found[2].label] == ["stickers, 1 steps", "a, strength 0.5, 1 steps"]


def test_labels_tell_runs_apart(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    shutil.copytree(runs / "a", tmp_path / "c" / "checkpoint-3")
    names = [str(runs / "a"), str(tmp_path / "a"), str(tmp_path / "c" / "checkpoint-3"), str(runs / "b")]
    labels = [column.label for column in columns_of(names, CompareConfig())]
    assert labels == [*names[:2], "c/checkpoint-3", "b"]


# drawing


def test_each_image_is_what_generate_draws(runs, tmp_path):
    config = CompareConfig(num_seeds=2, seed=3, num_inference_steps=[2], lora_scale=[0.5, 1.0])
    columns = columns_of([str(runs / name) for name in ("base", "a", "b")], config)
    drawn = draw_columns([columns[i] for i in (1, 3, 0, 2, 4)], PROMPTS, config)  # in any order
    for column, images in zip([columns[i] for i in (1, 3, 0, 2, 4)], drawn, strict=True):
        folder = tmp_path / column.label
        words = ["generate", column.run, *PROMPTS, "--num_inference_steps", "2", "--output", str(folder)]
        words += ["--lora_scale", str(column.lora_scale)] if column.lora_scale != 1 else []
        for i in range(2):
            assert main([*words, "--seed", str(3 + i)]) == 0
            for row, name in zip(images, ("a-sks-dog", "a-cat-on-grass"), strict=True):
                with Image.open(folder / f"{name}-{3 + i}.png") as expected:
                    assert (np.asarray(row[i]) == np.asarray(expected)).all(), (column, name)
    different = {image.tobytes() for images in drawn for row in images for image in row}
    assert len(different) == 5 * 2 * 2


def test_the_embedded_base_is_drawn_with_its_own_guidance():
    column = Column("", "stickers", 1.0, 7)
    assert comparing.settings_of(column, CompareConfig()).guidance_scale == 4.0
    settings = comparing.settings_of(column, CompareConfig(guidance_scale=2.0))
    assert (settings.guidance_scale, settings.num_inference_steps) == (2.0, 7)


def test_each_pipeline_is_loaded_once_and_freed_before_the_next(runs, monkeypatch):
    alive, loaded, seen = [], [], []

    def load(run, config):
        gc.collect()
        assert all(pipe() is None for pipe in alive), "two pipelines are in memory"
        loaded.append(run)
        pipe = stock(run, config)
        alive.append(weakref.ref(pipe.unet))
        return pipe

    stock = comparing.load
    monkeypatch.setattr(comparing, "load", load)
    config = CompareConfig(num_seeds=2, num_inference_steps=[1], lora_scale=[0.5, 2.0])
    columns = columns_of([str(runs / name) for name in ("a", "b")], config)
    draw_columns(
        [columns[i] for i in (0, 2, 1, 3)], ["a dog"], config, lambda done, total: seen.append((done, total))
    )
    assert loaded == [str(runs / "a"), str(runs / "b")]
    assert seen == [(i, 8) for i in range(1, 9)]


# scores


def test_scores_are_those_of_the_judge(fox):
    references = [Image.open(path) for path in sorted((fox.parent / "images").glob("*.png"))]
    prompts = ["a sks fox on the beach", "a sks fox on grass", "a cat under a night sky"]
    images = [references[:2], references[2:], references[:2]]
    found = scores_of(Column("run", str(fox), 1.0, 2), prompts, images)
    pairs = [(prompt, image) for prompt, row in zip(prompts, images, strict=True) for image in row]
    own = subject_score(references)(pairs[:4])  # the third prompt does not speak of the subject
    assert found["subject fidelity"] == pytest.approx(own["subject_fidelity"], abs=1e-4)
    assert found["subject fidelity"] > 0.9
    assert found["prompt fidelity"] == pytest.approx(subject_score(references)(pairs)["prompt_fidelity"])
    assert found["prompt fidelity"] < 0.5  # the references show grass, and neither beach nor night


def test_what_cannot_be_measured_has_no_score(fox, runs, tmp_path):
    images = [[Image.new("RGB", (128, 128), "red")]]

    def names(run, prompt):
        return list(scores_of(Column("", str(run), 1.0, 2), [prompt], images))

    assert names(fox, "a sks fox on the beach") == ["subject fidelity", "prompt fidelity"]
    assert names(fox, "a sks fox") == ["subject fidelity"]  # of which nothing else is asked
    assert names(fox, "a cat on the beach") == ["prompt fidelity"]
    assert names("stickers", "a sks fox on the beach") == ["prompt fidelity"]
    assert names(runs / "a", "a sks fox on the beach") == []
    shutil.copytree(fox, tmp_path / "moved")
    info = json.loads((fox / "run.json").read_text())
    info["config"]["instance_data_dir"] = str(tmp_path / "gone")
    (tmp_path / "moved" / "run.json").write_text(json.dumps(info))
    assert names(tmp_path / "moved", "a sks fox on the beach") == ["prompt fidelity"]


def test_images_of_no_drawing_of_the_world_give_no_subject_fidelity(fox, tmp_path):
    shutil.copytree(fox, tmp_path / "other")
    (tmp_path / "noise").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise" / "0.png")
    info = json.loads((fox / "run.json").read_text())
    info["config"]["instance_data_dir"] = str(tmp_path / "noise")
    (tmp_path / "other" / "run.json").write_text(json.dumps(info))
    images = [[Image.new("RGB", (128, 128), "red")]]
    found = scores_of(Column("", str(tmp_path / "other"), 1.0, 2), ["a sks fox on the beach"], images)
    assert list(found) == ["prompt fidelity"]


# the grid


def coloured(columns: int, prompts: int, seeds: int, sizes):
    """Images of one colour each, none of which text or rules have."""
    return [
        [
            [Image.new("RGB", sizes[c], (250, 10 + 9 * c, 100 * p + s)) for s in range(seeds)]
            for p in range(prompts)
        ]
        for c in range(columns)
    ]


@pytest.mark.parametrize("first_seed", [None, 4_000_000_000])
@pytest.mark.parametrize("words", ["a fox", "many words " * 60, "x" * 900])
def test_each_image_lies_whole_in_its_cell_and_texts_keep_off(words, first_seed):
    sizes = [(128, 128), (40, 64), (256, 128)]
    images = coloured(3, 2, 2, sizes)
    columns = [Column(f"{words} {i}", f"run{i}", 1.0, 25) for i in range(3)]
    scores = [{"subject fidelity": 0.5, "prompt fidelity": 1.0}, {}, {"prompt fidelity": 0.25}]
    prompts = [words, f"{words} too"]
    place = layout(columns, prompts, sizes, seed_labels(first_seed, 2), scores)
    page = np.asarray(grid(columns, prompts, images, scores, first_seed)).astype(int)
    covered = np.zeros(page.shape[:2], bool)
    for c, column in enumerate(images):
        for p, row in enumerate(column):
            for s, image in enumerate(row):
                x, y = place.lefts[c] + s * place.pitches[c], place.tops[p]
                is_here = (page == image.getpixel((0, 0))).all(-1)
                assert is_here.sum() == image.width * image.height  # nothing is written over it
                assert is_here[y : y + image.height, x : x + image.width].all()
                covered |= is_here
    assert covered.sum() == 4 * sum(width * height for width, height in sizes)
    page[covered] = 255
    assert (page[0] == 255).all()
    assert (page[-1] == 255).all()
    assert (page[:, 0] == 255).all()
    assert (page[:, -1] == 255).all()


def ink(page: Image.Image, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return np.asarray(page.convert("L").crop((left, top, right, bottom))) < 128


def test_labels_prompts_and_scores_stand_at_their_images():
    images = coloured(2, 2, 1, [(128, 128)] * 2)
    columns = [Column("one", "one", 1.0, 25), Column("two", "two", 1.0, 25)]
    scores = [{}, {"prompt fidelity": 0.5}]
    place = layout(columns, ["a", "b"], [(128, 128)] * 2, [""], scores)
    page = grid(columns, ["a", "b"], images, scores)
    for i in range(2):
        right = place.lefts[i] + place.widths[i]
        assert ink(page, place.lefts[i], 0, right, place.tops[0]).any()
        assert ink(page, place.lefts[i], place.tops[2], right, page.height).any() == (i == 1)
        assert ink(page, 0, place.tops[i], place.lefts[0] - 1, place.tops[i] + 40).any()
    bare = grid(columns, ["a", "b"], images, [{}, {}])
    assert bare.height < page.height
    seeded = grid(columns, ["a", "b"], images, [{}, {}], first_seed=7)
    assert seeded.height > bare.height


@pytest.mark.parametrize("width", [20, 80, 300])
@pytest.mark.parametrize("text", ["a fox", "runs/fox-with-prior_2", "wörter " * 30, "x" * 200, ""])
def test_lines_fit_and_lose_nothing(text, width):
    font = comparing._font(15)
    lines = wrapped(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace("ö", "o").replace(" ", "")


def test_text_grows_with_the_images():
    columns = [Column("one", "one", 1.0, 25)]
    small, large = (layout(columns, ["a"], [(side, side)], [""], [{}]).unit for side in (128, 1024))
    assert large > 2 * small


# the command


def test_the_help_and_first_mistakes_come_without_torch():
    for words, code in ((["--help"], 0), (["runs/none", "--prompt", "a fox"], 2)):
        program = "import sys; from customize.app.cli import main; code = main(sys.argv[1:])"
        program += f"; assert code == {code} and 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", program, "compare", *words], check=True)


def test_the_command_writes_the_grid_into_a_new_folder_and_replaces_only_a_grid(runs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("# scenes\n\na dog\n a cat\n")
    output = tmp_path / "new" / "grid.png"
    words = ["compare", str(runs / "base"), str(runs / "a"), "--prompt", "a toy", "--output", str(output)]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--seed", "5", *FAST]
    for _ in range(2):  # the second replaces the first
        assert main(words) == 0
    assert str(output) in capsys.readouterr().out
    said = json.loads(own_text(output, TEXT))
    assert said["prompt"] == ["a toy", "a dog", "a cat"]
    assert [column["run"] for column in said["columns"]] == ["base", "a"]
    config = CompareConfig(seed=5, num_seeds=1, num_inference_steps=[2])
    columns = columns_of([str(runs / "base"), str(runs / "a")], config)
    images = draw_columns(columns, said["prompt"], config)
    with Image.open(output) as page:
        assert (np.asarray(page) == np.asarray(grid(columns, said["prompt"], images, [{}, {}], 5))).all()
    save_image(Image.new("RGB", (8, 8)), output)  # an image of another command
    before = output.read_bytes()
    assert main(words) == 2
    assert "was not written by customize compare" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert is_own_image(output)


def test_scores_are_printed_and_left_out_where_they_are_not_wanted(fox, tmp_path, capsys):
    words = ["compare", str(fox), "--prompt", "a sks fox on the beach", "--num_inference_steps", "1"]
    words += ["--num_seeds", "1", "--output", str(tmp_path / "grid.png")]
    assert main(words) == 0
    assert re.search(r"^run: subject fidelity \d+%, prompt fidelity \d+%$", capsys.readouterr().out, re.M)
    with Image.open(tmp_path / "grid.png") as page:
        measured = page.height
    assert main([*words, "--no_measure"]) == 0
    assert "fidelity" not in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as page:
        assert page.height < measured


MISTAKES = {
    "no prompt": (["stickers"], "There is no prompt: give --prompts FILE"),
    "no prompts file": (["stickers", "--prompts", "none.txt"], "none.txt cannot be read .* correct its path"),
    "no prompt in it": (["stickers", "--prompts", "empty.txt"], "'empty.txt' holds no prompt; write one"),
    "empty prompt": (["stickers", "--prompt", "a fox", " "], "--prompt is empty"),
    "run after the flags": (["stickers", "--prompt", "a fox", "a"], "'a' is a folder; name all runs before"),
    "no run": (["--prompt", "a fox"], "Write RUN"),
    "unknown run": (["stickers", "runs/none", "--prompt", "a fox"], "There is no run 'runs/none'"),
    "no run folder": (["stickers", "folder.png", "--prompt", "a fox"], "is not a run folder"),
    "twice": (["stickers", "stickers", "--prompt", "a fox"], "RUN: 'stickers' is given twice"),
    "steps twice": (
        ["a", "--prompt", "a fox", "--num_inference_steps", "2", "2"],
        "num_inference_steps: '2' is",
    ),
    "damaged run": (["stickers", "damaged", "--prompt", "a fox"], "is not the file that the run wrote"),
    "no base model": (["stickers", "orphan", "--prompt", "a fox"], "base model '/gone', which is gone"),
    "encoder": (["stickers", "encoder", "--prompt", "a fox"], "'encoder' is a subject encoder"),
    "scale of no LoRA": (
        ["a", "word", "--prompt", "a fox", "--lora_scale", "0.5"],
        "'word' has no LoRA; leave",
    ),
    "scale of a base": (["stickers", "--prompt", "a fox", "--lora_scale", "0.5"], "a base model has no LoRA"),
    "scale below 0": (
        ["a", "--prompt", "a fox", "--lora_scale", "1", "-1"],
        "--lora_scale must be at least 0",
    ),
    "no steps": (["a", "--prompt", "a fox", "--num_inference_steps", "0"], "--num_inference_steps must be"),
    "no seeds": (["a", "--prompt", "a fox", "--num_seeds", "0"], "--num_seeds must be at least 1"),
    "jpeg": (["a", "--prompt", "a fox", "--output", "x.jpg"], "must be a PNG; choose a name such as 'x.png'"),
    "a folder": (["a", "--prompt", "a fox", "--output", "folder.png"], "'folder.png' is a folder; choose"),
    "someone's": (["a", "--prompt", "a fox", "--output", "mine.png"], "'mine.png' is there already and was"),
    "no folder": (["a", "--prompt", "a fox", "--output", "mine.png/x.png"], "cannot write into 'mine.png'"),
    "long name": (["a", "--prompt", "a fox", "--output", "x" * 300 + ".png"], "choose a shorter one"),
    "too large": (["a", "--prompt", "a fox", "--num_seeds", "999999999"], "too large for one image"),
    "large by labels": (
        ["stickers", "--prompt", *["fox"] * 4300, "--num_seeds", "1"],
        "too large for one image",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_a_model_is_loaded(name, runs, tmp_path, capsys, monkeypatch):
    words, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing, "load", lambda *_: pytest.fail("it loaded a model"))
    for own in ("a", "word", "damaged", "orphan", "encoder"):
        shutil.copytree(runs / (own if own == "word" else "a"), own)
    (tmp_path / "damaged" / "pytorch_lora_weights.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "encoder" / "subject.safetensors").write_bytes(b"")
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "orphan" / "run.json").write_text(json.dumps(info | {"base_model": "/gone"}))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    Image.new("RGB", (8, 8)).save("mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(said, error), error
    assert "\n" not in error
    assert (tmp_path / "mine.png").read_bytes() == before
    assert not (tmp_path / "compare.png").exists()


def test_a_page_may_check_columns_alone(runs):
    config, columns = CompareConfig(), [Column("a", str(runs / "a"), 1.0, 25)]
    check_columns(columns, ["a dog"], config)
    for wrong in ([], [""]):
        with pytest.raises(UserError, match="prompt"):
            check_columns(columns, wrong, config)
    with pytest.raises(UserError, match="nothing to compare"):
        check_columns([], ["a dog"], config)


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sd3"])
def test_the_side_of_images_is_known_before_they_are_drawn(base, tmp_path):
    pipe = tiny(base)
    pipe.save_pretrained(tmp_path / base)
    assert comparing.side_of(str(tmp_path / base)) == wrap(pipe, "").native_resolution
    assert comparing.side_of("stickers") == 128
    assert comparing.side_of("someone/something") == 1024

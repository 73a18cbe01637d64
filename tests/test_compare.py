"""Runs side by side: the images of each cell, scores, and what is refused."""

import re

import numpy as np
import pytest
from PIL import Image

import customize
from customize.app.cli import main
from customize.app.compare import Column, CompareConfig, columns_of, draw_columns, grid, scores_of
from customize.embedded import subject_score
from customize.runs.output import is_own_image
from customize.stickers import Drawing
from customize.stickers.bench import write_references


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    write_references(folder / "images", Drawing("fox", "flat"), "sks fox")
    options = {"instance_prompt": "a sks fox", "max_train_steps": 2, "rank": 2, "train_batch_size": 1}
    return customize.train(
        "dreambooth", instance_data_dir=folder / "images", output_dir=folder / "run", **options
    )


def test_columns_are_runs_strengths_and_steps(run):
    config = CompareConfig(lora_scale=[0.5, 1.0], num_inference_steps=[1, 2])
    found = columns_of(["stickers", str(run)], config)
    assert [(own.run, own.lora_scale, own.steps) for own in found] == [
        ("stickers", 1.0, 1),
        ("stickers", 1.0, 2),
        (str(run), 0.5, 1),
        (str(run), 0.5, 2),
        (str(run), 1.0, 1),
        (str(run), 1.0, 2),
    ]
    assert found[2].label == "run, strength 0.5, 1 steps"


def test_a_cell_is_what_generate_draws_and_stands_in_its_place(run, tmp_path):
    config = CompareConfig(num_seeds=2, seed=3, num_inference_steps=[2])
    columns, prompts = (
        columns_of(["stickers", str(run)], config),
        ["a sks fox on the beach", "a bus on grass"],
    )
    seen = []
    images = draw_columns(columns, prompts, config, lambda *numbers: seen.append(numbers))
    assert seen == [(i, 8) for i in range(1, 9)]
    words = ["generate", str(run), *prompts, "--seed", "3", "--num_images_per_prompt", "2"]
    assert main([*words, "--num_inference_steps", "2", "--output", str(tmp_path)]) == 0
    for row, name in enumerate(("a-sks-fox-on-the-beach", "a-bus-on-grass")):
        for i in range(2):
            with Image.open(tmp_path / f"{name}-{3 + i}.png") as expected:
                found = np.asarray(images[1][row][i], int)
                assert np.abs(found - np.asarray(expected, int)).max() <= 1
    page = np.asarray(grid(columns, prompts, images, [{}, {}]))
    for column in images:
        for cell in column:
            for image in cell:
                own = np.asarray(image)
                places = np.argwhere((page[..., :] == own[0, 0]).all(-1))
                assert any((page[y : y + 128, x : x + 128] == own).all() for y, x in places)
    rows, width = len(prompts), page.shape[1]
    assert width > 2 * 2 * 128
    assert page.shape[0] > rows * 128


def test_colours_of_the_grid_stand_in_the_order_of_columns_and_prompts():
    colours = [["red", "green"], ["blue", "black"]]
    images = [[[Image.new("RGB", (128, 128), colour)] for colour in own] for own in colours]
    page = grid(
        [Column("a", "a", 1, 1), Column("b", "b", 1, 1)], ["x", "y"], images, [{"prompt fidelity": 0.5}, {}]
    )
    pixels, means = np.asarray(page), {}
    for colour in ("red", "green", "blue"):
        wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        means[colour] = np.argwhere((pixels == wanted).all(-1)).mean(0)
    assert means["red"][0] < means["green"][0]
    assert means["red"][1] == means["green"][1]
    assert means["red"][1] < means["blue"][1]
    assert means["red"][0] == means["blue"][0]
    long = "a prompt of very many words that goes on and on " * 5
    assert grid([Column("n" * 300, "a", 1, 1)], [long], [images[0][:1]], [{}]).width < 400


def test_scores_are_those_of_the_judge(run):
    drawn = [Image.open(path).convert("RGB") for path in sorted((run.parent / "images").glob("*.png"))]
    prompts = ["a fox on the beach"] * len(drawn)
    rows = [[image] for image in drawn]
    found = scores_of(Column("run", str(run), 1.0, 2), prompts, rows)
    expected = subject_score(drawn)(list(zip(prompts, drawn, strict=True)))
    assert found["subject fidelity"] == pytest.approx(expected["subject_fidelity"], abs=1e-4)
    assert found["prompt fidelity"] == pytest.approx(expected["prompt_fidelity"])
    base = scores_of(Column("stickers", "stickers", 1.0, 2), prompts, rows)
    assert list(base) == ["prompt fidelity"]


def test_the_command_writes_one_image_and_replaces_its_own(run, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("# places\na sks fox on the beach\n")
    words = ["compare", "stickers", str(run), "--prompts", str(file), "--prompt", "a bus"]
    words += [
        "--num_inference_steps",
        "1",
        "--num_seeds",
        "1",
        "--output",
        str(tmp_path / "new" / "grid.png"),
    ]
    for _ in range(2):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "4 of 4 images" in shown
        assert re.search(r"run: subject fidelity \d+%, prompt fidelity \d+%", shown)
    assert is_own_image(tmp_path / "new" / "grid.png")


MISTAKES = {
    "no prompt": (["stickers"], "There is no prompt"),
    "no file": (["stickers", "--prompts", "nowhere.txt"], "nowhere.txt"),
    "empty": (["stickers", "--prompt", " "], "empty"),
    "no run": (["runs/nobody", "--prompt", "a fox"], "There is no run"),
    "no runs": (["--prompt", "a fox"], "Write RUN"),
    "jpeg": (["stickers", "--prompt", "a fox", "--output", "x.jpg"], "must be a PNG"),
    "a folder": (["stickers", "--prompt", "a fox", "--output", "folder.png"], "choose another"),
    "another's": (["stickers", "--prompt", "a fox", "--output", "mine.png"], "was not written by customize"),
    "too many": (["stickers", "--prompt", "a fox", "--num_seeds", "100000"], "too large for one image"),
    "steps": (["stickers", "--prompt", "a fox", "--num_inference_steps", "0"], "num_inference_steps"),
    "scale": (["stickers", "--prompt", "a fox", "--lora_scale", "-1"], "lora_scale"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_a_model_is_loaded(name, tmp_path, capsys, monkeypatch):
    words, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    monkeypatch.setattr("customize.app.compare.load", lambda *_: pytest.fail("it loaded a model"))
    assert main(["compare", *words]) == 2
    assert said in capsys.readouterr().err

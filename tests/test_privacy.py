"""What is handed out names no place on the user's machine."""

import json

import pytest

from customize.runs.privacy import is_place, names_place, without_paths, without_places

PATHS = {
    "/home/john/photos/dog": "dog",
    "/home/john doe/models/x.png": "x.png",
    "/Users/Jane Roe/x.png": "x.png",
    r"C:\Users\John Doe\pics\x.png": "x.png",
    r"D:\data\dogs\x.png": "x.png",
    r"\\server\john\x": "x",
    "file:///home/john/x/y": "y",
    "~/photos/dog": "dog",
    "~john/dog": "dog",
    "$HOME/john/x": "x",
    "/mnt/data/john/run": "run",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_cut_to_its_last_name_whole_and_within_a_sentence(path):
    assert without_places(path) == PATHS[path]
    assert without_places({"a": [path]}) == {"a": [PATHS[path]]}
    assert without_paths(f"see {path}, or not") == f"see {PATHS[path]}, or not"
    assert without_paths(f"cat:{path}") == f"cat:{PATHS[path]}"
    assert names_place({"x": path})
    assert names_place({"x": json.dumps({"y": [path]})})


@pytest.mark.parametrize("home", ["/home/john", "/Users/Jane Roe", "/home/john/", r"C:\Users\John Doe"])
def test_of_a_persons_own_folder_nothing_is_left(home):
    assert without_places(home) == ""


@pytest.mark.parametrize(
    "text",
    [
        "a photo of sks dog",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "https://huggingface.co/me/dog/resolve/main/x.png",
        "a dog and/or a cat",
        "and / or",
        "50 km/h, 3/4 of it",
        "<s> fox </s>",
        "cosine",
        "",
        "a red/green/blue toy",
    ],
)
def test_what_is_no_path_stays(text):
    assert without_places(text, "instance_prompt") == text
    assert not names_place(text)


def test_settings_that_are_always_files_are_cut_even_where_they_are_relative():
    config = {
        "instance_data_dir": "clients/john/dog",
        "validation_images": ["john/a.png"],
        "rank": 8,
        "plus": True,
    }
    assert without_places(config) == {
        "instance_data_dir": "dog",
        "validation_images": ["a.png"],
        "rank": 8,
        "plus": True,
    }


def test_a_relative_model_is_cut_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert without_places("clients/john/sd15", "base_model") == "sd15"
    assert without_places(r"models\john\sd15", "base_model") == "sd15"
    (tmp_path / "john" / "sd15").mkdir(parents=True)
    assert without_places("john/sd15", "base_model") == "sd15"
    assert without_places("openai/clip", "validation_clip") == "openai/clip"
    assert (
        without_places("h94/IP-Adapter/models/image_encoder", "image_encoder")
        == "h94/IP-Adapter/models/image_encoder"
    )
    assert not is_place("x" * 5000)

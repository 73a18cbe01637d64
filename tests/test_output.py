"""Nothing of the user's is lost: what a run may replace and remove in its output folder, and what keeps
two runs apart."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from customize import files
from customize.adapters.lora_files import LORA
from customize.app import cli, demo
from customize.app import generate as generating
from customize.app.bench import earlier
from customize.errors import UserError
from customize.pipelines import load_pipeline
from customize.runs import folder as run_folder
from customize.runs import output
from customize.runs.folder import RESUME, check_free, foreign, read_info
from customize.runs.output import locked, make_folder, save_image
from customize.trainers import prepare as setup
from customize.trainers.claim import drop_old_checkpoints
from customize.trainers.launch import run
from tiny import tiny

LINES = "progress.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    tiny("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def train(base, images, tmp_path):
    """Trains one step into a folder; `None` leaves a flag out, `True` gives it alone."""
    flags = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "instance_prompt": "a photo of sks dog",
    }
    flags |= {
        "resolution": 16,
        "max_train_steps": 1,
        "rank": 2,
        "learning_rate": 1e-2,
        "output_dir": tmp_path / "out",
    }

    def trained(method: str = "dreambooth", **changes) -> Path:
        words = [method]
        for name, value in (flags | changes).items():
            words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return run(words)

    return trained


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# what is not a run's

FOREIGN = [
    "checkpoint-500/optimizer.bin",
    "checkpoint-500/" + RESUME,
    "best/m.txt",
    "best/run.json",
    LORA,
    "lora_kohya.safetensors",
    "learned_embeds.safetensors",
    "learned_embeds-0_dog_.safetensors",
    "subject.safetensors",
    "ip_adapter.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "samples/step-000100.png",
    "validation.jsonl",
    "README.md",
    "run.json",
]


@pytest.mark.parametrize("flag", [None, "overwrite_output_dir", "resume_from_checkpoint"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_refuses_what_no_run_wrote(name, flag, train, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("the user's own")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=f"(?s)out' holds '{name.split('/')[0]}'.*move it away"):
        train(**({} if flag is None else {flag: "latest" if "resume" in flag else True}))
    assert contents(tmp_path / "out") == before


def test_the_folder_that_diffusers_own_script_leaves(train, tmp_path):
    for name in ("checkpoint-500/optimizer.bin", "checkpoint-500/random_states_0.pkl", LORA):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"weeks of work")
    before = contents(tmp_path / "out")
    for changes in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(UserError, match="checkpoint-500"):
            train(**changes)
    assert contents(tmp_path / "out") == before


def test_other_files_in_the_folder_do_not_matter_and_stay(train, tmp_path):
    for name in (
        "notes.txt",
        "photos/1.png",
        "checkpoint-old/x.bin",
        "checkpoint-²/x.bin",
        "unet.txt",
        "samples/mother.jpg",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"mine")
    before = contents(tmp_path / "out")
    train(checkpointing_steps=1)
    train(checkpointing_steps=1, max_train_steps=2, overwrite_output_dir=True)
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert read_info(tmp_path / "out")["step"] == 2


@pytest.mark.parametrize("name", [LORA, "README.md"])
def test_a_file_that_was_changed_since_is_the_users(name, train, tmp_path):
    train()
    (tmp_path / "out" / name).write_bytes(b"merged by hand")
    for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(UserError, match=f"'{name}'.*changed since"):
            train(**changes)
    assert (tmp_path / "out" / name).read_bytes() == b"merged by hand"


def test_overwriting_replaces_what_the_earlier_run_left(train, tmp_path):
    words = {
        "placeholder_token": "<toy>",
        "initializer_token": "dog",
        "instance_prompt": "a photo of <toy>",
        "rank": None,
    }
    options = {"holdout": 1, "validation_steps": 1, "validation_prompt": "a dog"}
    train(checkpointing_steps=1, max_train_steps=3, **options)
    assert {"best", "checkpoint-2", "checkpoint-3", "samples", "validation.jsonl", LORA} <= names(
        tmp_path / "out"
    )
    train("textual_inversion", overwrite_output_dir=True, **words)
    assert names(tmp_path / "out") == {
        "README.md",
        "run.json",
        "learned_embeds.safetensors",
        "samples",
        LINES,
    }
    assert names(tmp_path / "out" / "samples") == set()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_earlier_run_needs_the_flag(train, tmp_path):
    folder = train(checkpointing_steps=1)
    before = contents(folder)
    with pytest.raises(
        UserError, match=r"earlier run.*--resume_from_checkpoint latest.*--overwrite_output_dir"
    ):
        train()
    assert contents(folder) == before


def test_a_mistake_in_the_new_run_leaves_the_earlier_one(train, tmp_path, images):
    folder = train(checkpointing_steps=1)
    before = contents(folder)
    for changes in (
        {"instance_data_dir": tmp_path / "nowhere"},
        {"resolution": 17},
        {"lora_layers": "nothing"},
    ):
        with pytest.raises(UserError):
            train(overwrite_output_dir=True, **changes)
    assert contents(folder) == before


def test_overwriting_does_not_remove_what_the_run_reads(train, tmp_path):
    folder = train(checkpointing_steps=1)
    before = contents(folder)
    for place in ("checkpoint-1", "."):
        with pytest.raises(UserError, match=r"--cache_dir.*lies in what"):
            train(overwrite_output_dir=True, cache_dir=folder / place)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "place", ["best/generated/x.png", "checkpoint-1/notes.txt", "checkpoint-2/generated/x.png"]
)
def test_what_somebody_put_into_a_step_of_a_run_stays(place, train, tmp_path):
    options = {"checkpointing_steps": 1, "holdout": 1, "validation_steps": 1}
    folder = train(max_train_steps=2, **options)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("mine")
    before = contents(folder)
    for changes in (
        {"overwrite_output_dir": True},
        {"resume_from_checkpoint": "latest", "max_train_steps": 4},
    ):
        with pytest.raises(UserError, match=f"'{place.split('/')[0]}'.*move it away"):
            train(**options, **changes)
    assert contents(folder) == before


def test_a_checkpoint_that_got_something_meanwhile_is_not_dropped(train, tmp_path):
    folder = train(checkpointing_steps=1, max_train_steps=2)
    (folder / "checkpoint-1" / "notes.txt").write_text("mine")
    drop_old_checkpoints(folder, 1)
    assert (folder / "checkpoint-1" / "notes.txt").exists()


def test_images_of_a_step_go_to_the_run(tmp_path):
    for name in ("best", "checkpoint-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
        assert generating.output_folder(str(tmp_path / name), None) == tmp_path / "generated"


def test_a_later_versions_run_is_called_so(train):
    folder = train()
    (folder / "run.json").write_text(json.dumps(read_info(folder) | {"format": 9}))
    with pytest.raises(UserError, match="later version"):
        train(overwrite_output_dir=True)


def hostile(folder: Path, listed: str) -> Path:
    """A downloaded run that wants something outside it to be removed."""
    (folder / run_folder.STAGED).mkdir(parents=True)
    about = {"format": 1, "base_model": "stickers"}
    (folder / run_folder.STAGED / "run.json").write_text(json.dumps(about | {"files": {}}))
    (folder / "run.json").write_text(json.dumps(about | {"files": {listed: ""}}))
    return folder


@pytest.mark.parametrize(
    "listed", ["../precious.txt", "..", "../", "/", "ABSOLUTE", "a/../../precious.txt", "precious.txt"]
)
def test_loading_a_run_removes_nothing_but_a_runs_files(listed, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    folder = hostile(tmp_path / "run", str(tmp_path / "precious.txt") if listed == "ABSOLUTE" else listed)
    (folder / "precious.txt").write_text("mine")
    run_folder.put_in_place(folder)
    assert (tmp_path / "precious.txt").exists()
    assert (folder / "precious.txt").exists()


@pytest.mark.parametrize(
    "text",
    ["", '{"step": 1, "validation_loss": 0.5}\n', '{"step": 1}\n{"st', '{"step": 1}\n{"step": 2, "val'],
)
def test_a_log_that_a_kill_cut_short_is_still_the_runs(text, tmp_path):
    (tmp_path / "validation.jsonl").write_text(text)
    assert foreign(tmp_path) == []


@pytest.mark.parametrize("text", ["x\n", '{"loss": 1}\n', '{"step": 1}\nmine\n'])
def test_other_logs_are_the_users(text, tmp_path):
    (tmp_path / "validation.jsonl").write_text(text)
    assert foreign(tmp_path) == [tmp_path / "validation.jsonl"]


# base models


@pytest.mark.parametrize(
    "options", [{}, {"overwrite_output_dir": True}, {"full_finetune": True, "rank": None}]
)
@pytest.mark.parametrize("place", [".", "unet", "new/run"])
def test_a_base_models_folder_is_no_output_folder(place, options, train, base):
    before = contents(base)
    with pytest.raises(UserError, match="model"):
        train(output_dir=base / place, **options)
    assert contents(base) == before


def test_a_link_to_the_base_models_folder(train, base, tmp_path):
    (tmp_path / "link").symlink_to(base)
    before = contents(base)
    with pytest.raises(UserError, match="model"):
        train(output_dir=tmp_path / "link" / "run")
    assert contents(base) == before


def test_any_pipelines_folder_is_refused(train, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    before = contents(other)
    for words in (["generate", str(base), "a dog", "--output", str(other)], ["demo", "--output", str(other)]):
        assert cli.main(words) == 2
    with pytest.raises(UserError, match=r"model_index\.json"):
        train(output_dir=other)
    assert contents(other) == before


def test_images_of_a_base_model_go_elsewhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            ["generate", str(base), "a dog", "--num_inference_steps", "1", "--height", "16", "--width", "16"]
        )
        == 0
    )
    assert [path.name for path in (tmp_path / "generated").iterdir()] == ["a-dog-0.png"]
    assert not (base / "generated").exists()


# folders that cannot be written


def unusable(kind: str, place: Path) -> Path:
    if kind == "file":
        place.write_text("x")
    if kind == "below a file":
        place.write_text("x")
        return place / "run"
    if kind == "dangling link":
        place.symlink_to(place / "nowhere" / "at" / "all")
    if kind == "long name":
        return place.with_name("n" * 300)
    if kind == "no disk":
        return Path("/proc/nowhere/run")
    return place


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "long name", "no disk"])
def test_an_output_folder_that_cannot_be_written_is_told_at_once(
    kind, train, base, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(generating, "load", lambda *_: pytest.fail("a model was loaded"))
    place = unusable(kind, tmp_path / "place")
    with pytest.raises(UserError, match="--output_dir: cannot write"):
        train(output_dir=place)
    commands = (["generate", str(base), "a dog"], ["demo"], ["evaluate", "--bench", "stickers"])
    for words in commands:
        assert cli.main([*words, "--output", str(place)]) == 2
        assert "--output: cannot write" in capsys.readouterr().err


def test_a_folder_that_can_be_entered_but_not_written(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "replace", refused)
    with pytest.raises(UserError, match=r"--output_dir: cannot write.*Read-only file system"):
        make_folder(tmp_path / "out", "--output_dir")


@pytest.mark.parametrize("word", ["<" + "d" * 250 + ">", "<狗" + "狗" * 100 + ">"])
def test_a_long_placeholder_still_makes_a_file(word, train, tmp_path):
    words = {
        "placeholder_token": f"{word}+<b>",
        "initializer_token": "dog+dog",
        "instance_prompt": f"a photo of {word} <b>",
    }
    folder = train("textual_inversion", rank=None, **words)
    assert all((folder / name).is_file() for name in read_info(folder)["words"].values())
    load_pipeline(folder)


# two programs

HOLD = """
import sys, time
from pathlib import Path
from customize.runs.output import locked
with locked(Path(sys.argv[1]), "--output_dir"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes into the folder."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_another_program_writes_into(holder, train, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "WAIT", 0.1)
    with pytest.raises(
        UserError, match=rf"--output_dir.*being written by process {holder.pid} on .*choose another"
    ):
        train()
    assert names(tmp_path / "out") == {output.LOCK}


def test_a_lock_that_was_left_behind_keeps_nobody_out(holder, train, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert names(tmp_path / "out") == {output.LOCK}
    train()
    assert names(tmp_path / "out") == {"README.md", "run.json", LORA, LINES}


def test_many_may_try_a_folder_at_once(tmp_path):
    failed = []

    def trial():
        for _ in range(20):
            try:
                make_folder(tmp_path, "--output")
            except UserError as error:
                failed.append(error)

    threads = [threading.Thread(target=trial) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == set()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(output.FileLock, "acquire", refused)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path, "--output_dir"):
        pass


def test_of_many_threads_one_at_a_time_holds_the_folder(tmp_path):
    inside, most = [], []

    def enter():
        with locked(tmp_path, "--output_dir"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    assert names(tmp_path) == set()


def test_two_runs_started_together(base, images, tmp_path):
    """One of them trains, the other says why it does not; the folder holds one whole run."""
    words = [
        "--pretrained_model_name_or_path",
        base,
        "--instance_data_dir",
        images,
        "--instance_prompt",
        "a photo of sks dog",
    ]
    words += ["--resolution", 16, "--rank", 2, "--max_train_steps", 3, "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-m", "customize.trainers", "dreambooth", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = said[[process.returncode for process in both].index(2)]
    assert "holds an earlier run" in loser or "being written by process" in loser
    assert foreign(tmp_path / "out") == []
    load_pipeline(tmp_path / "out")


def test_images_of_two_programs_do_not_replace_each_other(tmp_path):
    config, image = generating.GenerateConfig(), Image.new("RGB", (8, 8))
    (tmp_path / "a-dog-0.png").write_bytes(b"another's")
    threads = [
        threading.Thread(target=generating.save, args=(image, tmp_path, "run", "a dog", 0, config))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == {"a-dog-0.png", *(f"a-dog-0-{n}.png" for n in range(2, 8))}
    assert (tmp_path / "a-dog-0.png").read_bytes() == b"another's"


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_meanwhile_is_not_replaced(links, tmp_path, monkeypatch):
    """Also on file systems that know no links."""
    if not links:
        monkeypatch.setattr(
            files.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))
        )
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", exclusive=True)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError):
        save_image(Image.new("RGB", (9, 9)), tmp_path / "a.png", exclusive=True)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_half_image(tmp_path, monkeypatch):
    def full(self, path, **_):
        Path(path).write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        generating.save(Image.new("RGB", (8, 8)), tmp_path, "run", "a dog", 0, generating.GenerateConfig())
    assert names(tmp_path) == set()


@pytest.mark.parametrize("prompt", ["狗" * 80, "ß" * 60, "a" * 300, "!!!"])
def test_images_of_any_prompt_have_names(prompt, tmp_path):
    path = generating.save(Image.new("RGB", (8, 8)), tmp_path, "run", prompt, 0, generating.GenerateConfig())
    with Image.open(path) as image:
        assert json.loads(image.info["parameters"])["prompt"] == prompt


def test_images_do_not_say_where_things_are(tmp_path):
    config = generating.GenerateConfig(
        subject_images=[str(tmp_path / "photos" / "mum.png")], subject_adapter=str(tmp_path / "enc")
    )
    path = generating.save(
        Image.new("RGB", (8, 8)), tmp_path, str(tmp_path / "runs" / "mum"), "a dog", 0, config
    )
    with Image.open(path) as image:
        found = json.loads(image.info["parameters"])
    assert (found["run"], found["subject_images"], found["subject_adapter"]) == ("mum", ["mum.png"], "enc")
    assert str(tmp_path) not in json.dumps(found)


# a kill while a run takes its place


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(7))
def test_a_kill_on_the_way_into_place_is_made_good(moment, train, tmp_path, monkeypatch):
    """At whichever of its moves the writing stops, the folder is then the earlier run or the new one,
    whole."""
    folder = train(train_text_encoder=True, full_finetune=True, rank=None)
    replace, calls = os.replace, []

    def dying(source, target):
        if Path(target).parent == folder or Path(source).parent == folder:
            calls.append(target)
            if len(calls) > moment + 1:  # the first is the trial file
                raise Killed
        return replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **options: None if calls[moment + 1 :] else rmtree(path, **options)
    )
    with pytest.raises(Killed):
        train(
            train_text_encoder=True,
            full_finetune=True,
            rank=None,
            overwrite_output_dir=True,
            max_train_steps=2,
        )
    monkeypatch.undo()
    load_pipeline(folder)  # puts in place what was on its way
    check_free(folder, overwrite=True, resumed=False)
    assert read_info(folder)["step"] in (1, 2)
    train(
        train_text_encoder=True, full_finetune=True, rank=None, overwrite_output_dir=True, max_train_steps=3
    )
    assert names(folder) == {"README.md", "run.json", "unet", "text_encoder", LINES}
    assert read_info(folder)["step"] == 3


def test_what_an_unfinished_replacement_left_is_put_back(tmp_path):
    left = {"old-12ab-best": "earlier", "new-best": "half", "old-34cd-checkpoint-3": "x", "new-1234": "half"}
    for name, text in left.items():
        (tmp_path / f".customize-{name}").mkdir()
        (tmp_path / f".customize-{name}" / "a").write_text(text)
    (tmp_path / "checkpoint-3").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f".customize-part-{ended.pid}-ab").write_text("half an image of a program that was killed")
    (tmp_path / f".customize-part-{os.getppid()}-ab").write_text(
        "half an image of a program that is drawing it"
    )
    files.recover(tmp_path)
    assert names(tmp_path) == {"best", "checkpoint-3", f".customize-part-{os.getppid()}-ab"}
    assert (tmp_path / "best" / "a").read_text() == "earlier"
    assert names(tmp_path / "checkpoint-3") == set()


def test_a_kill_while_something_is_removed_leaves_nothing_half(train, tmp_path, monkeypatch):
    folder = train(checkpointing_steps=1, holdout=1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed))
    for name in ("checkpoint-1", "best"):
        with pytest.raises(Killed):
            files.remove([folder / name])
    monkeypatch.undo()
    assert foreign(folder) == []
    files.recover(folder)
    assert names(folder) == {"README.md", "run.json", LORA, "validation.jsonl", LINES}


# resuming keeps what is there


def test_resuming_to_fewer_steps_keeps_the_finished_run(train, tmp_path):
    folder = train(max_train_steps=6, checkpointing_steps=4)
    before = contents(folder)
    with pytest.raises(UserError, match="trained for 6 steps, more than --max_train_steps 3"):
        train(max_train_steps=3, resume_from_checkpoint="latest")
    assert contents(folder) == before


def test_resuming_an_earlier_checkpoint_keeps_the_later_ones(train, tmp_path):
    folder = train(max_train_steps=4, checkpointing_steps=2)
    before = contents(folder)
    with pytest.raises(UserError, match="holds checkpoint-4, which is later"):
        train(max_train_steps=5, resume_from_checkpoint=folder / "checkpoint-2")
    assert contents(folder) == before
    train(
        max_train_steps=5, resume_from_checkpoint=folder / "checkpoint-2", output_dir=tmp_path / "elsewhere"
    )
    assert contents(folder) == before
    again = {"overwrite_output_dir": True, "checkpointing_steps": 500}
    train(max_train_steps=5, resume_from_checkpoint=folder / "checkpoint-2", **again)
    assert not (folder / "checkpoint-4").exists()


def test_resuming_over_later_steps_leaves_none_of_what_was_seen_of_them(train):
    options = {"checkpointing_steps": 2, "validation_steps": 1, "holdout": 1, "validation_prompt": "a dog"}
    folder = train(max_train_steps=4, **options)
    options["validation_steps"] = 3
    train(
        max_train_steps=3,
        resume_from_checkpoint=folder / "checkpoint-2",
        overwrite_output_dir=True,
        **options,
    )
    assert names(folder / "samples") == {f"step-{n:06d}.png" for n in (1, 2, 3)}
    assert [json.loads(line)["step"] for line in (folder / "validation.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    assert not (folder / "best").exists() or read_info(folder / "best")["step"] <= 3


def test_resuming_from_another_run_over_this_one_leaves_nothing_of_it(train, tmp_path):
    first = train(checkpointing_steps=1)
    second = train(output_dir=tmp_path / "second", checkpointing_steps=1, max_train_steps=3, holdout=1)
    changes = {
        "resume_from_checkpoint": first / "checkpoint-1",
        "checkpointing_steps": 9,
        "max_train_steps": 2,
    }
    train(output_dir=second, overwrite_output_dir=True, **changes)
    assert names(second) == {"README.md", "run.json", LORA, LINES}


def test_resuming_into_another_finished_run(train, tmp_path):
    first, second = train(checkpointing_steps=1), train(output_dir=tmp_path / "second")
    before = contents(second)
    with pytest.raises(UserError, match="holds an earlier run"):
        train(max_train_steps=2, resume_from_checkpoint=first / "checkpoint-1", output_dir=second)
    assert contents(second) == before


# runs of earlier versions


def test_a_run_of_before_files_were_listed(train, tmp_path):
    folder = train(validation_prompt="a dog")
    info = read_info(folder)
    del info["files"]
    (folder / "run.json").write_text(json.dumps(info))
    Image.new("RGB", (8, 8)).save(folder / "samples" / "step-000001.png")  # without our mark
    load_pipeline(folder)
    assert foreign(folder) == []
    train(overwrite_output_dir=True)
    assert "files" in read_info(folder)


# the demo


@pytest.fixture
def quick_demo(monkeypatch):
    """A demo without training: it writes what it would write."""

    def trained(name, output_dir, overwrite_output_dir, **_):
        folder = Path(output_dir)
        check_free(folder, overwrite_output_dir, False)
        with run_folder.staged(
            folder, {"format": 1, "base_model": "stickers", "method": name, "config": {}}
        ) as (new, _):
            (new / LORA).write_text("weights")
        return folder

    drawn = [Image.fromarray(np.zeros((64, 64, 3), np.uint8))] * len(demo.UNSEEN)
    monkeypatch.setattr(demo, "train_method", trained)
    monkeypatch.setattr(demo, "load_base", lambda *_: None)
    monkeypatch.setattr(demo, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(demo, "load_subject_pipeline", lambda *_: None)
    monkeypatch.setattr(demo, "draw", lambda *_, **__: drawn)


def test_the_demo_replaces_nothing_unasked(quick_demo, train, tmp_path, capsys):
    folder = train()
    before = contents(folder)
    assert cli.main(["demo", "--output", str(folder)]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert contents(folder) == before
    assert cli.main(["demo", "--output", str(folder), "--overwrite_output_dir"]) == 0
    assert {"demo.png", "images", "run.json"} <= names(folder)
    assert cli.main(["demo", "--output", str(folder)]) == 2
    assert cli.main(["demo", "--output", str(folder), "--overwrite_output_dir"]) == 0


@pytest.mark.parametrize(
    "name", ["demo.png", "images/0.png", "images/0.txt", "images/0.jpg", "images/mother.jpg", LORA]
)
def test_the_demo_refuses_what_no_demo_wrote(name, quick_demo, tmp_path):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    for flag in ([], ["--overwrite_output_dir"]):
        assert cli.main(["demo", "--output", str(tmp_path / "out"), *flag]) == 2
    assert contents(tmp_path / "out") == {name: b"mine"}


# evaluations


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["results.json", "results.csv", "report.html", "protocol.json", "base/0.png", "real/x.txt"]
)
def test_an_evaluation_refuses_what_none_wrote(name, overwrite, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[1]")
    with pytest.raises(UserError, match=rf"--output.*holds '{name.split('/')[0]}.*no evaluation wrote"):
        earlier.check_folder(tmp_path, ["base", "real"], overwrite)
    assert contents(tmp_path) == {name: b"[1]"}


@pytest.fixture
def evaluated(train, tmp_path):
    """The folder that an evaluation leaves."""
    folder = tmp_path / "evaluation"
    train(output_dir=folder / "dreambooth" / "fox" / "run")
    (folder / "protocol.json").write_text('{"bench": "StickerBench"}')
    (folder / "dreambooth" / "protocol.json").write_text('{"method": "dreambooth, 200 steps"}')
    for name in ("00-0.png", "images/0.png", "class/00-0.png"):
        path = folder / "dreambooth" / "fox" / name
        path.parent.mkdir(exist_ok=True)
        save_image(Image.new("RGB", (8, 8)), path)
    (folder / "dreambooth" / "fox" / "images" / "0.txt").write_text("a fox")
    for path in (folder / "report.html", folder / "dreambooth" / "fox" / "training.json"):
        path.write_text("{}")
    (folder / "notes.md").write_text("mine")
    return folder


@pytest.mark.parametrize(
    "left", [".customize-lock", ".customize-part-1-ab", "validation.jsonl", "no run.json"]
)
def test_what_a_killed_evaluation_left_is_its_own(left, evaluated):
    run = evaluated / "dreambooth" / "fox" / "run"
    if left == "no run.json":
        shutil.rmtree(run)
        run.mkdir()
    else:
        (run / left).write_text('{"step": 1}\n')
    earlier.check_folder(evaluated, ["dreambooth"], overwrite=True)
    assert contents(evaluated) == {"notes.md": b"mine"}


def test_an_evaluation_goes_on_with_its_own(evaluated):
    before = contents(evaluated)
    earlier.check_folder(evaluated, ["dreambooth", "base"], overwrite=False)
    assert contents(evaluated) == before


def test_an_evaluation_that_is_replaced_takes_its_own_alone(evaluated):
    earlier.check_folder(evaluated, ["dreambooth", "base"], overwrite=True)
    assert contents(evaluated) == {"notes.md": b"mine"}


@pytest.mark.parametrize(
    "name", ["fox/mine.png", "fox/run/" + LORA, "fox/images/mother.jpg", "notes.txt", "fox/images/1.txt"]
)
def test_an_evaluation_with_something_of_the_users_in_it_is_not_removed(name, evaluated):
    (evaluated / "dreambooth" / name).write_text("mine")
    before = contents(evaluated)
    with pytest.raises(UserError, match="no evaluation wrote"):
        earlier.check_folder(evaluated, ["dreambooth"], overwrite=True)
    assert contents(evaluated) == before

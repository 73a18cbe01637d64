"""The loop: accumulation, resuming, stopping, averages, and what stays on disk when something goes wrong."""

import copy
import errno
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conftest import write_noise
from customize.adapters import words as learned_words
from customize.backbones.families import wrap
from customize.data.batches import BucketBatches
from customize.data.concepts import Concept, DataConfig
from customize.data.dataset import SubjectDataset
from customize.data.images import find_images
from customize.data.subject_images import SubjectData, held_out_batches
from customize.errors import UserError
from customize.runs.folder import RESUME, latest_checkpoint
from customize.trainers import interruption as interrupting
from customize.trainers import loop, resume, session, validation
from customize.trainers.interruption import interruption
from customize.trainers.launch import run
from customize.trainers.loop import accumulate_gradients, train
from customize.trainers.methods.dreambooth import DreamBooth
from customize.trainers.methods.textual_inversion import TextualInversion
from customize.trainers.optimizers import make_optimizer
from customize.trainers.session import Session
from customize.trainers.settings import TrainConfig, make_accelerator
from customize.trainers.validation import sample, validation_loss
from tiny import BASES, tiny

CASES = {
    "dreambooth": (DreamBooth, {"rank": 2, "lora_dropout": 0.3, "train_text_encoder": True}),
    "textual_inversion": (
        TextualInversion,
        {"placeholder_token": "<toy>", "initializer_token": "dog", "num_vectors": 2},
    ),
}
FILES = {"dreambooth": "pytorch_lora_weights.safetensors", "textual_inversion": "learned_embeds.safetensors"}


def build(images, case="dreambooth", base="sd15", dtype=torch.float32, **data):
    """A method and its images; the same weights at every call."""
    method_class, options = CASES[case]
    prompt = "a photo of <toy>" if case == "textual_inversion" else "a photo of sks dog"
    backbone = wrap(tiny(base).to(dtype=dtype), base)
    backbone.vae.float()
    backbone.resolution = 16
    torch.manual_seed(11)
    method = method_class(backbone, method_class.Config(**options), [Concept(str(images), prompt, "a dog")])
    return method, SubjectDataset(
        find_images(images, prompt), DataConfig(resolution=16, **data), backbone.factor
    )


def settings(folder, **changes) -> TrainConfig:
    return TrainConfig(
        **(
            {
                "output_dir": str(folder),
                "max_train_steps": 5,
                "learning_rate": 1e-2,
                "checkpointing_steps": 99,
            }
            | changes
        )
    )


def go(
    images,
    folder,
    case="dreambooth",
    data=None,
    held_out=None,
    base="sd15",
    dtype=torch.float32,
    scorer=None,
    **changes,
):
    """Trains from the start; returns the method and the last step."""
    method, dataset = build(images, case, base, dtype, **(data or {}))
    config = settings(folder, **changes)
    batches = held_out_batches(dataset, torch.device("cpu")) if held_out else []
    info = {"base_model": base, "method": case, "config": {}}
    step = train(
        method, SubjectData(dataset, held_out=batches), config, make_accelerator(config), info, scorer
    )
    return method, step


@pytest.fixture
def quick_images(monkeypatch):
    """Validation images in two steps."""
    monkeypatch.setattr(
        validation, "sample", lambda *arguments, **options: sample(*arguments, **options | {"steps": 2})
    )


def same_tensors(first, second) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(folder) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def step_of(folder) -> int:
    return json.loads((folder / "run.json").read_text())["step"]


# accumulation


class Toy(torch.nn.Module):
    """Two terms whose gradients are known: of w, mean(x) and 2 w."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, batch):
        return {"linear": (self.w * batch["x"]).sum(1).mean(), "square": self.w.square().sum()}


def toy_step(batches, accumulation, max_norm):
    config = TrainConfig(gradient_accumulation_steps=accumulation, max_grad_norm=max_norm)
    accelerator, toy = make_accelerator(config), Toy()
    wrapped, optimizer = accelerator.prepare(toy, torch.optim.SGD(toy.parameters(), 1.0))
    session = Session(
        toy, config, accelerator, {}, [], None, {"w": toy.w}, wrapped, {"optimizer": optimizer}, []
    )
    sums = accumulate_gradients(session, iter(batches))
    return toy.w.detach(), sums


def test_accumulated_batches_give_their_mean_gradient():
    x = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    w, sums = toy_step([{"x": x[:1]}, {"x": x[1:]}, {"x": x * 1000}], 2, 1e9)
    gradient = torch.tensor([(1.0 + 3.0) / 2 + 2 * 1.0, (4.0 + 0.0) / 2 + 2 * -2.0])
    assert torch.allclose(w, torch.tensor([1.0, -2.0]) - gradient)
    assert sums == pytest.approx({"linear": ((1 - 8) + (3 - 0)) / 2, "square": 5.0})
    whole, whole_sums = toy_step([{"x": x}], 1, 1e9)
    assert torch.allclose(w, whole)
    assert sums == pytest.approx(whole_sums)


def test_the_accumulated_gradient_is_clipped_once():
    x = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    w, _ = toy_step([{"x": x[:1]}, {"x": x[1:]}], 2, 0.5)
    gradient = torch.tensor([4.0, -2.0])
    assert torch.allclose(w, torch.tensor([1.0, -2.0]) - gradient / gradient.norm() * 0.5, atol=1e-5)


def test_each_step_uses_its_batches_in_order(images, tmp_path):
    """Three steps of two batches of one image are the first six batches of the data's order."""
    method, dataset = build(images)
    config, seen, forward = (
        settings(tmp_path, max_train_steps=3, gradient_accumulation_steps=2),
        [],
        method.forward,
    )
    method.forward = lambda batch: seen.extend(batch["index"].tolist()) or forward(batch)
    train(method, SubjectData(dataset), config, make_accelerator(config))
    order = BucketBatches(dataset, 1, config.seed)
    assert seen == [key[0][0] for key, _ in zip(order, range(6), strict=False)]


# resuming

RESUMED = {
    "plain": {},
    "ema": {"use_ema": True},
    "flip": {"data": {"random_flip": True}, "train_batch_size": 2, "gradient_accumulation_steps": 2},
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_bits(case, kind, images, tmp_path):
    options, file = RESUMED[kind], FILES[case]
    go(images, tmp_path / "whole", case, checkpointing_steps=2, checkpoints_total_limit=0, **options)
    torch.manual_seed(123)  # what the process did before does not matter
    _, step = go(
        images,
        tmp_path / "rest",
        case,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
        **options,
    )
    assert step == 5
    assert same_tensors(tmp_path / "whole" / file, tmp_path / "rest" / file)
    assert not same_tensors(tmp_path / "whole" / file, tmp_path / "whole" / "checkpoint-2" / file)
    assert step_of(tmp_path / "rest") == 5
    assert step_of(tmp_path / "whole" / "checkpoint-2") == 2


def test_latest_is_the_highest_number_that_is_complete(images, tmp_path):
    go(images, tmp_path, checkpointing_steps=1, max_train_steps=10, checkpoints_total_limit=0)
    (tmp_path / "checkpoint-10" / RESUME).unlink()
    (tmp_path / "checkpoint-11.partial").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-9"
    _, step = go(images, tmp_path, max_train_steps=10, resume_from_checkpoint="latest")
    assert step == 10


@pytest.fixture
def stopped(images, tmp_path):
    """A run that has a checkpoint at step 2."""
    go(images, tmp_path / "run", checkpointing_steps=2, max_train_steps=2)
    return tmp_path / "run" / "checkpoint-2"


def test_a_resumed_run_lists_every_validation_once(images, tmp_path):
    """Also where a kill cut the last line short."""
    options = {
        "held_out": True,
        "validation_steps": 1,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 0,
    }
    go(images, tmp_path, max_train_steps=3, **options)
    log = tmp_path / "validation.jsonl"
    before = log.read_text()
    log.write_text(before + '{"step": 4, "valid')
    go(
        images,
        tmp_path,
        max_train_steps=4,
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
        **options,
    )
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert log.read_text().startswith(before)


def test_resuming_from_nothing(images, tmp_path):
    for given in ("latest", str(tmp_path / "checkpoint-7")):
        with pytest.raises(UserError, match="resume_from_checkpoint"):
            go(images, tmp_path, resume_from_checkpoint=given)


def test_resuming_another_method(images, tmp_path, stopped):
    with pytest.raises(UserError, match="other settings"):
        go(images, tmp_path, "textual_inversion", resume_from_checkpoint=str(stopped))


def test_resuming_with_another_rank(images, tmp_path, stopped, monkeypatch):
    monkeypatch.setitem(CASES, "dreambooth", (DreamBooth, {"rank": 3, "train_text_encoder": True}))
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        go(images, tmp_path, resume_from_checkpoint=str(stopped))


def test_resuming_with_an_average_that_was_not_kept(images, tmp_path, stopped):
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        go(images, tmp_path, use_ema=True, resume_from_checkpoint=str(stopped))


def test_resuming_from_a_damaged_file(images, tmp_path, stopped):
    file = stopped / RESUME
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged"):
        go(images, tmp_path, resume_from_checkpoint=str(stopped))


# a process that dies

AT_STEP = """
import importlib, os, signal, sys
from customize.app.cli import main
module, _, function = sys.argv[1].partition(".")
owner = importlib.import_module(f"customize.trainers.{module}")
original, number = getattr(owner, function), [0]
def counted(*arguments, **options):
    number[0] += 1
    if number[0] == int(sys.argv[2]):
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return original(*arguments, **options)
setattr(owner, function, counted)
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    tiny("sd15").save_pretrained(folder)
    return str(folder)


def settings_of(base_folder, images) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": base_folder,
        "instance_data_dir": images,
        "instance_prompt": "a photo of sks dog",
    }
    flags |= {
        "resolution": 16,
        "max_train_steps": 8,
        "checkpointing_steps": 3,
        "rank": 2,
        "learning_rate": 1e-2,
        "lora_dropout": 0.3,
    }
    return ["dreambooth", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def words(base_folder, images):
    return settings_of(base_folder, images)


@pytest.fixture(scope="module")
def whole(base_folder, tmp_path_factory):
    """The run of `words` that nobody interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    words = settings_of(base_folder, write_noise(folder / "images"))
    return run([*words, "--output_dir", str(folder / "whole")])


def die(function, call, with_signal, words, folder):
    """Runs the command line in a process that gets the signal at the given call of a trainer's function."""
    command = [
        sys.executable,
        "-c",
        AT_STEP,
        function,
        str(call),
        with_signal,
        "train",
        *words,
        "--output_dir",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("function", "call", "kept"),
    [("loop.accumulate_gradients", 8, "checkpoint-6"), ("session.save_state", 2, "checkpoint-3")],
)
def test_a_killed_process_is_resumed_to_the_same_bits(function, call, kept, words, whole, tmp_path):
    """Killed within a step, and while it writes its second checkpoint."""
    process = die(function, call, "SIGKILL", words, tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert latest_checkpoint(tmp_path / "killed").name == kept
    assert not (tmp_path / "killed" / FILES["dreambooth"]).exists()
    run([*words, "--output_dir", str(tmp_path / "killed"), "--resume_from_checkpoint", "latest"])
    assert same_tensors(tmp_path / "killed" / FILES["dreambooth"], whole / FILES["dreambooth"])
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {p.name for p in whole.iterdir()}


STOPPING = ["SIGINT", "SIGTERM", "SIGHUP"]


MOMENTS = [
    *((number, "loop.accumulate_gradients", 5, 5) for number in STOPPING),
    ("SIGTERM", "session.save_state", 1, 4),
    ("SIGHUP", "loop.validate", 2, 2),
]


@pytest.mark.parametrize(("number", "function", "call", "step"), MOMENTS)
def test_a_signal_saves_and_says_how_to_go_on(number, function, call, step, words, whole, tmp_path):
    """In a step, while a checkpoint is saved, and in a validation."""
    validating = ["--holdout", "1", "--validation_steps", "1"] if function == "loop.validate" else []
    words = [*words, *validating]
    process = die(function, call, number, words, tmp_path / "stopped")
    assert process.returncode == 2, process.stderr
    [said] = [
        line for line in process.stderr.splitlines() if line.startswith("error: ")
    ]  # on a line of its own
    assert f"--resume_from_checkpoint latest --output_dir {tmp_path / 'stopped'}" in said
    assert f"stopped at step {step}" in said
    assert "Traceback" not in process.stderr
    assert latest_checkpoint(tmp_path / "stopped").name == f"checkpoint-{step}"
    run([*words, "--output_dir", str(tmp_path / "stopped"), "--resume_from_checkpoint", "latest"])
    if validating:  # on one image less
        whole = run([*words, "--output_dir", str(tmp_path / "whole")])
    assert same_tensors(tmp_path / "stopped" / FILES["dreambooth"], whole / FILES["dreambooth"])


@pytest.mark.parametrize("function", ["loop.validate", "launch.write_card"])
def test_a_signal_after_the_last_step_does_not_undo_the_run(function, words, tmp_path):
    words = [*words, "--holdout", "1", "--validation_steps", "8"]
    process = die(function, 1, "SIGTERM", words, tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert step_of(tmp_path / "run") == 8
    assert (tmp_path / "run" / "README.md").exists()


def test_a_run_under_nohup_outlives_its_terminal(words, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does; the process inherits it
    try:
        process = die("loop.accumulate_gradients", 5, "SIGHUP", words, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.returncode == 0, process.stderr
    assert step_of(tmp_path / "run") == 8


def test_ctrl_c_that_also_ends_who_listens(words, tmp_path):
    """As in `customize train ... 2>&1 | tee train.log`: the words then go nowhere, and the step is saved."""
    command = [sys.executable, "-m", "customize.trainers", *words, "--output_dir", str(tmp_path / "run")]
    command += ["--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    while b"denoise=" not in said:
        said += process.stdout.read1()
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 2
    assert step_of(latest_checkpoint(tmp_path / "run")) > 0


def test_a_terminal_that_closes(words, tmp_path):
    """The words of the run then go nowhere, instead of ending it with an error."""
    pid, terminal = pty.fork()
    if pid == 0:
        changed = [
            "--max_train_steps",
            "100000",
            "--checkpointing_steps",
            "100000",
            "--output_dir",
            str(tmp_path / "run"),
        ]
        os.environ["OMP_NUM_THREADS"] = "1"
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # bars need a width
        os.execv(sys.executable, [sys.executable, "-m", "customize.trainers", *words, *changed])
    said = b""
    while b"denoise=" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    kept = latest_checkpoint(tmp_path / "run")
    assert kept is not None
    assert (kept / RESUME).is_file()
    assert step_of(kept) == int(kept.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize("late", [1, 2, 3, 4])
def test_wherever_ctrl_c_comes_the_step_is_saved(late, images, tmp_path, monkeypatch):
    """The question whether it was pressed is answered with yes from the given time on."""
    asked = []

    @contextmanager
    def pressed():
        yield lambda: asked.append(None) or len(asked) >= late

    monkeypatch.setattr(loop, "interruption", pressed)
    with pytest.raises(UserError, match="stopped at step") as error:
        go(images, tmp_path)
    assert f"stopped at step {step_of(latest_checkpoint(tmp_path) or tmp_path / 'none')};" in str(error.value)


@pytest.mark.parametrize("second", STOPPING)
@pytest.mark.parametrize("first", STOPPING)
def test_a_second_signal_is_immediate_and_the_handlers_are_put_back(first, second):
    before = {name: signal.getsignal(getattr(signal, name)) for name in STOPPING}
    with interruption() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), getattr(signal, first))
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), getattr(signal, second))
    assert {name: signal.getsignal(getattr(signal, name)) for name in STOPPING} == before


def test_signals_of_a_launcher_count_as_one(monkeypatch):
    """A terminal sends Ctrl-C to the launcher and to its processes, and the launcher sends it on."""
    now = [100.0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(interrupting.time, "time", lambda: now[0])
    with interruption() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted()
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# losses that are no number, or not finite; full disks


@pytest.mark.parametrize(("bad", "found"), [(torch.ones(2, 3), r"\(2, 3\)"), (0.5, "float")])
def test_a_loss_that_is_not_one_number_is_named(bad, found, images, tmp_path):
    method, dataset = build(images)
    method.losses = lambda step: {"denoise": step.prediction.square().mean(), "penalty": bad}
    config = settings(tmp_path / "run")
    with pytest.raises(UserError, match=rf"loss 'penalty' .* not {found}: end it with .mean\(\)"):
        train(method, SubjectData(dataset), config, make_accelerator(config))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(bad, images, tmp_path):
    method, dataset = build(images)
    config, losses, calls = settings(tmp_path, checkpointing_steps=2), method.losses, []

    def spoilt(step):
        calls.append(None)
        return {name: value * (bad if len(calls) == 4 else 1) for name, value in losses(step).items()}

    method.losses = spoilt
    with pytest.raises(UserError, match=r"not finite.*checkpoint.*learning_rate"):
        train(
            method,
            SubjectData(dataset),
            config,
            make_accelerator(config),
            info={"base_model": "sd15", "method": "x", "config": {}},
        )
    assert checkpoints(tmp_path) == {"checkpoint-2"}
    assert all(
        torch.isfinite(value).all()
        for value in load_file(tmp_path / "checkpoint-2" / FILES["dreambooth"]).values()
    )
    assert not (tmp_path / FILES["dreambooth"]).exists()
    _, step = go(images, tmp_path, resume_from_checkpoint="latest")
    assert step == 5


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["os", "safetensors"])
@pytest.mark.parametrize("module", [resume, learned_words], ids=["state", "adapter"])
def test_a_full_disk_leaves_the_older_checkpoint(module, error, images, tmp_path, monkeypatch):
    original, calls = module.save_file, []

    def save_file(tensors, path, *arguments):
        calls.append(None)
        original(tensors, path, *arguments)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:10])
            raise error

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(UserError, match="disk is full"):
        go(images, tmp_path, "textual_inversion", checkpointing_steps=1)
    assert {path.name for path in tmp_path.iterdir()} - {"images", "progress.jsonl"} == {"checkpoint-1"}
    monkeypatch.undo()
    _, step = go(images, tmp_path, "textual_inversion", resume_from_checkpoint="latest")
    assert step == 5


def test_a_full_disk_at_the_end_leaves_the_earlier_result(images, tmp_path, monkeypatch):
    go(images, tmp_path, "textual_inversion", max_train_steps=1)

    def files() -> dict:
        own = [path for path in tmp_path.iterdir() if path.is_file() and path.name != "progress.jsonl"]
        return {path: path.read_bytes() for path in own}

    before = files()

    def save_file(*arguments):
        raise FULL[0]

    monkeypatch.setattr(learned_words, "save_file", save_file)
    with pytest.raises(UserError, match="disk is full"):
        go(images, tmp_path, "textual_inversion", max_train_steps=2)
    assert len(before) >= 2
    assert files() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["images"]


@pytest.mark.parametrize(("limit", "kept"), [(2, {3, 4}), (1, {4}), (0, {1, 2, 3, 4})])
def test_checkpoints_total_limit(limit, kept, images, tmp_path):
    go(images, tmp_path, checkpointing_steps=1, max_train_steps=4, checkpoints_total_limit=limit)
    assert checkpoints(tmp_path) == {f"checkpoint-{n}" for n in kept}


def test_the_limit_counts_numbers_not_letters(images, tmp_path):
    go(images, tmp_path, checkpointing_steps=1, max_train_steps=11, checkpoints_total_limit=3)
    assert checkpoints(tmp_path) == {"checkpoint-9", "checkpoint-10", "checkpoint-11"}


# validation


def test_early_stopping_and_the_best(images, tmp_path, monkeypatch):
    """Losses 3, 2, 2.5, 2.6 at steps 2, 4, 6, 8: step 4 is the best, and two validations later it is over."""
    losses = iter([3.0, 2.0, 2.5, 2.6, 0.0])
    monkeypatch.setattr(validation, "validation_loss", lambda *arguments, **options: next(losses))
    limits = {
        "validation_steps": 2,
        "early_stopping_patience": 2,
        "checkpointing_steps": 4,
        "max_train_steps": 20,
    }
    _, step = go(images, tmp_path / "run", held_out=True, checkpoints_total_limit=0, **limits)
    best, file = tmp_path / "run" / "best", FILES["dreambooth"]
    assert step == 8
    assert step_of(best) == 4
    assert step_of(tmp_path / "run") == 8
    assert same_tensors(best / file, tmp_path / "run" / "checkpoint-4" / file)
    assert not same_tensors(best / file, tmp_path / "run" / file)

    losses = iter([2.5, 2.6, 0.0])  # the best loss and the count go on in a resumed run
    shutil.rmtree(best)
    _, step = go(
        images,
        tmp_path / "run",
        held_out=True,
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"),
        **limits,
    )
    assert step == 8
    assert not best.exists()


def test_the_best_by_score(images, tmp_path, quick_images):
    """Subject fidelity times prompt fidelity of .1, .3, .2, .25 at steps 2, 4, 6, 8, whatever the loss says;
    all is written down."""
    identities, seen = iter([0.2, 0.6, 0.4, 0.5]), []

    def scorer(drawn):
        seen.append([prompt for prompt, _ in drawn])
        assert all(image.size == (16, 16) for _, image in drawn)
        return {"subject_fidelity": next(identities), "prompt_fidelity": 0.5}

    limits = {
        "validation_steps": 2,
        "early_stopping_patience": 2,
        "max_train_steps": 20,
        "validation_metric": "score",
    }
    prompts = ["a red dog", "a dog on grass"]
    _, step = go(images, tmp_path, held_out=True, scorer=scorer, validation_prompt=prompts, **limits)
    assert step == 8
    assert step_of(tmp_path / "best") == 4
    assert seen == [prompts] * 4
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["score"] for row in rows] == pytest.approx([0.1, 0.3, 0.2, 0.25])
    assert all(row["validation_loss"] > 0 for row in rows)


def test_the_best_of_an_averaged_run_is_the_average(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        validation,
        "validation_loss",
        lambda method, *a, **o: seen.append(method.tokens.vectors[0].detach().clone()) or 1.0,
    )
    method, _ = go(images, tmp_path, "textual_inversion", held_out=True, use_ema=True, max_train_steps=3)
    saved = load_file(tmp_path / "best" / "learned_embeds.safetensors")["<toy>"]
    assert torch.equal(saved, seen[0])
    assert torch.equal(saved, load_file(tmp_path / "learned_embeds.safetensors")["<toy>"])
    assert not torch.equal(saved, method.tokens.vectors[0].detach())


@pytest.mark.parametrize("case", CASES)
def test_validation_does_not_disturb_training(case, images, tmp_path, quick_images):
    go(images, tmp_path / "blind", case)
    prompt = ["a red <toy>" if case == "textual_inversion" else "a red dog"]
    go(images, tmp_path / "seen", case, held_out=True, validation_steps=2, validation_prompt=prompt)
    assert same_tensors(tmp_path / "blind" / FILES[case], tmp_path / "seen" / FILES[case])
    assert {p.name for p in (tmp_path / "seen" / "samples").iterdir()} == {
        f"step-{n:06d}.png" for n in (2, 4, 5)
    }


def test_the_validation_loss_by_hand(images):
    """Eight draws of time and noise for each held-out image, from one seed."""
    method, dataset = build(images, "textual_inversion")
    batches, backbone, errors = held_out_batches(dataset, torch.device("cpu"))[:2], method.backbone, []
    torch.manual_seed(4)
    with torch.no_grad():
        for batch in batches:
            for _ in range(8):
                latents = backbone.encode_image(batch["pixels"])
                t = torch.randint(1000, (1,)) / 1000
                noise = torch.randn_like(latents)
                alpha = backbone.noise.alphas_cumprod[backbone.index_of(t)]
                noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
                text = backbone.pipe.encode_prompt("a photo of <toy>", "cpu", 1, False)[0]
                errors.append(
                    (backbone.denoiser(noisy, backbone.index_of(t), text).sample - noise)
                    .square()
                    .mean()
                    .item()
                )
    torch.manual_seed(77)
    assert validation_loss(method, batches, seed=4) == pytest.approx(sum(errors) / 16, rel=1e-5)
    after = torch.rand(1)
    torch.manual_seed(77)
    assert torch.equal(torch.rand(1), after)


def test_the_validation_loss_is_without_dropout(images):
    method, dataset = build(images)
    with torch.no_grad():
        for name, p in method.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    batches = held_out_batches(dataset, torch.device("cpu"))[:1]
    method.train()
    training = validation_loss(method, batches)
    assert any(
        m.training for n, m in method.named_modules() if "lora_dropout" in n
    )  # and it goes on as it was
    method.eval()
    assert training == validation_loss(method, batches)


# averages


@pytest.mark.parametrize("decay", [0.999, 0.1])
def test_the_average_by_hand(decay, images, tmp_path):
    """diffusers' warm-up: the decay at step n is n / (n + 9), at most `ema_decay`, and 0 at the first."""
    method, dataset = build(images, "textual_inversion")
    config, seen = settings(tmp_path, max_train_steps=3, use_ema=True, ema_decay=decay), []
    method.on_step = lambda step, steps: seen.append(method.tokens.vectors[0].detach().clone())
    train(
        method,
        SubjectData(dataset),
        config,
        make_accelerator(config),
        info={"base_model": "sd15", "method": "x", "config": {}},
    )
    values = [*seen[1:], method.tokens.vectors[0].detach()]
    average = values[0]
    for n, value in enumerate(values[1:], 2):
        d = min(n / (n + 9), decay)
        average = d * average + (1 - d) * value
    saved = load_file(tmp_path / "learned_embeds.safetensors")["<toy>"]
    assert torch.allclose(saved, average, atol=1e-7)
    assert (saved - values[-1]).abs().max() > 1e-5


# memory and precision


@pytest.mark.parametrize("base", BASES)
def test_gradient_checkpointing_gives_the_same_gradients(base, images, tmp_path, monkeypatch):
    """With plain gradient descent at rate 1, what moves is the gradient."""
    monkeypatch.setattr(
        session, "make_optimizer", lambda method, *_: torch.optim.SGD(method.parameter_groups(1.0))
    )
    found, forwards = [], []
    for on in (False, True):
        method, dataset = build(images, base=base)
        before = {name: p.detach().clone() for name, p in method.trainable().items()}
        block = next(
            m for n, m in method.backbone.denoiser.named_modules() if n.endswith("transformer_blocks.0")
        )
        calls = []
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        config = settings(tmp_path / str(on), max_train_steps=1, gradient_checkpointing=on, max_grad_norm=1e9)
        train(
            method,
            SubjectData(dataset),
            config,
            make_accelerator(config),
            info={"base_model": base, "method": "x", "config": {}},
        )
        found.append({name: p.detach() - before[name] for name, p in method.trainable().items()})
        forwards.append(len(calls))
    assert forwards == [1, 2]  # the second is the one within backward
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
    assert max(value.abs().max() for value in found[0].values()) > 1e-4


@pytest.mark.parametrize(
    ("case", "base"), [*(("dreambooth", base) for base in BASES), ("textual_inversion", "sd3")]
)
def test_bf16_keeps_what_is_trained_in_float32(case, base, images, tmp_path, quick_images):
    options = {
        "mixed_precision": "bf16",
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "use_ema": True,
        "held_out": True,
    }
    prompt = ["a red <toy>" if case == "textual_inversion" else "a red dog"]
    method, step = go(
        images, tmp_path, case, base=base, dtype=torch.bfloat16, validation_prompt=prompt, **options
    )
    trained = method.trainable()
    assert step == 2
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {
        p.dtype
        for n, p in method.backbone.denoiser.named_parameters()
        if f"backbone.denoiser.{n}" not in trained
    } == {torch.bfloat16}
    saved = load_file(tmp_path / FILES[case])
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in saved.values())
    start, _ = build(images, case, base, torch.bfloat16)
    assert any(not torch.equal(p, trained[name]) for name, p in start.trainable().items())
    assert (tmp_path / "samples" / "step-000002.png").exists()
    again = copy.deepcopy(saved)
    go(
        images,
        tmp_path,
        case,
        base=base,
        dtype=torch.bfloat16,
        resume_from_checkpoint=str(tmp_path / "checkpoint-1"),
        **options,
    )
    assert all(torch.equal(again[name], value) for name, value in load_file(tmp_path / FILES[case]).items())


def test_two_runs_of_one_process_may_differ_in_precision(tmp_path):
    """As on the web page, which trains in its own process."""
    for precision in ("no", "bf16", "no"):
        assert make_accelerator(settings(tmp_path, mixed_precision=precision)).mixed_precision == precision


# settings


def test_scale_lr_multiplies(images, tmp_path):
    method, _ = build(images)
    config = settings(
        tmp_path, learning_rate=1e-3, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=4
    )
    assert [group["lr"] for group in make_optimizer(method, config, 2).param_groups] == pytest.approx(
        [24e-3] * 2
    )


def test_an_unknown_schedule_is_a_user_error():
    with pytest.raises(UserError, match="lr_scheduler"):
        run(["dreambooth", "--lr_scheduler", "cosin"])


def test_eight_bit_adam_names_what_to_install(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        go(images, tmp_path, use_8bit_adam=True)


def test_a_constant_rate_warms_up_if_that_is_asked_for(images, tmp_path):
    method, _ = build(images)
    config = settings(tmp_path, lr_warmup_steps=4, learning_rate=0.4)
    run = session.begin(method, config, make_accelerator(config), [], None, {})
    rates = []
    for _ in range(6):
        rates.append(run.train_state["schedule"].get_last_lr()[0])
        run.train_state["optimizer"].step()
        run.train_state["schedule"].step()
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])

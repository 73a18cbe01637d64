import errno
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from customize.adapters.subject import FILE, RELEASED
from customize.app import generate as generating
from customize.app.cli import main
from customize.errors import UserError
from customize.trainers import launch
from customize.trainers.registry import METHODS, find_method


def shell(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "customize.app.cli", *words], capture_output=True, text=True)


def fake_module(monkeypatch, name: str, **attributes) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class FakePipe:
    """Draws one grey image a generator, its shade taken from the generator's noise."""

    def __init__(self):
        self.calls = []

    def to(self, device):
        self.device = device
        return self

    def set_progress_bar_config(self, desc):
        self.shown = desc

    def __call__(self, prompt, generator, **settings):
        self.calls.append({"prompt": prompt, "seeds": [g.initial_seed() for g in generator], **settings})
        shades = [int(torch.randint(256, (), generator=g)) for g in generator]
        return SimpleNamespace(images=[Image.new("L", (8, 8), shade) for shade in shades])


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipe = FakePipe()

    def load_pipeline(run, dtype, **options):
        pipe.run, pipe.dtype = run, dtype
        return pipe

    def load_subject_pipeline(run, adapter, image_encoder, dtype, **options):
        pipe.adapter, pipe.loaded = SimpleNamespace(has_words=True), (adapter, image_encoder)
        return load_pipeline(run, dtype)

    both = {"load_pipeline": load_pipeline, "load_subject_pipeline": load_subject_pipeline}
    fake_module(monkeypatch, "customize.pipelines", **both)
    return pipe


@pytest.mark.parametrize(
    "words", [["--help"], ["methods"], ["generate", "--help"], ["demo", "--help"], ["push", "-h"]]
)
def test_light_commands_leave_torch_alone(words):
    code = f"import sys; from customize.app.cli import main; assert main({words}) == 0"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert all(f"customize {name}" in out for name in ("train", "generate", "demo", "methods", "push"))


def test_methods_lists_the_registry_a_line_each(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(entry.summary in line for line, entry in zip(lines, METHODS.values(), strict=True))


def test_find_method_imports_the_class(monkeypatch):
    fake_module(monkeypatch, "customize.trainers.methods.dreambooth", DreamBooth=FakePipe)
    assert find_method("dreambooth") is FakePipe
    with pytest.raises(UserError, match=r"`customize methods` lists them\. Did you mean 'dreambooth'\?"):
        find_method("dreamboth")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["generat"], ["'generat'", "customize --help", "Did you mean 'generate'?"]),
        (["train", "dreamboth"], ["'dreamboth'", "customize methods", "Did you mean 'dreambooth'?"]),
    ],
)
def test_unknown_names_end_with_one_line_and_code_2(words, parts):
    done = shell(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in parts)
    assert done.stdout == ""


def test_train_hands_all_words_to_the_trainer(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(launch, "run", lambda words: seen.append(words) or "runs/out")
    assert main(["train", "dreambooth", "cat.yaml", "--lr", "1e-4"]) == 0
    assert seen == [["dreambooth", "cat.yaml", "--lr", "1e-4"]]
    assert capsys.readouterr().out.endswith("the run is in runs/out\n")
    assert main(["train", "dreambooth", "--help"]) == 0
    assert "customize train dreambooth" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "METHOD" in capsys.readouterr().out
    assert len(seen) == 1


def test_demo_passes_its_flags(monkeypatch):
    seen = []
    fake_module(monkeypatch, "customize.app.demo", demo=lambda *given: seen.append(given))
    assert main(["demo"]) == main(["demo", "--output", "x", "--quick", "--overwrite_output_dir"]) == 0
    assert seen == [("runs/demo", False, False), ("x", True, True)]


def test_push_prints_the_url(monkeypatch, tmp_path, capsys):
    fake_module(monkeypatch, "customize.runs.hub", push=lambda run, *given: f"https://hub/{given}")
    assert main(["push", str(tmp_path), "me/cat"]) == 0
    assert main(["push", str(tmp_path), "me/cat", "--no_private", "--samples", "a.png", "--dry_run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "https://hub/('me/cat', True, [], False)",
        "https://hub/('me/cat', False, ['a.png'], True)",
    ]


def test_generate_seeds_every_image_alone_and_names_it(pipe, capsys):
    assert (
        main(
            [
                "generate",
                "stickers",
                "A <cat>, sitting!",
                "dog",
                "--num_images_per_prompt",
                "2",
                "--seed",
                "5",
            ]
        )
        == 0
    )
    names = ["a-cat-sitting-5.png", "a-cat-sitting-6.png", "dog-5.png", "dog-6.png"]
    assert capsys.readouterr().out.split() == [f"generated/{name}" for name in names]
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 25, "seeds": [5, 6], "guidance_scale": 4.0}
    assert pipe.calls == [{"prompt": prompt, **settings} for prompt in ("A <cat>, sitting!", "dog")]
    assert (pipe.run, pipe.dtype) == ("stickers", torch.float32)


def test_a_image_of_a_batch_can_be_made_again_alone(pipe):
    main(["generate", "stickers", "cat", "--num_images_per_prompt", "3", "--output", "all"])
    main(["generate", "stickers", "cat", "--seed", "2", "--output", "one"])
    assert Image.open("all/cat-2.png").tobytes() == Image.open("one/cat-2.png").tobytes()
    assert Image.open("all/cat-2.png").tobytes() != Image.open("all/cat-1.png").tobytes()


def test_generate_hands_on_only_what_was_given(pipe):
    flags = [
        "--guidance_scale",
        "3",
        "--height",
        "64",
        "--width=128",
        "--negative_prompt",
        "blurry",
        "--num_inference_steps",
        "4",
    ]
    assert main(["generate", "stickers", "cat", *flags, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    expected = {
        "guidance_scale": 3.0,
        "height": 64,
        "width": 128,
        "negative_prompt": "blurry",
        "num_inference_steps": 4,
    }
    assert pipe.calls == [{"prompt": "cat", "seeds": [0], "num_images_per_prompt": 1, **expected}]
    assert (pipe.dtype, pipe.device) == (torch.bfloat16, "cpu")


def test_generate_writes_into_the_run_and_never_over_an_image(pipe, tmp_path):
    (tmp_path / "runs/cat").mkdir(parents=True)
    (tmp_path / "runs/cat/run.json").write_text('{"format": 1, "base_model": "b", "method": "m"}')
    for seed in ("0", "1", "0"):
        main(["generate", "runs/cat", "cat", "--seed", seed])
    first = (tmp_path / "runs/cat/generated/cat-0.png").read_bytes()
    main(["generate", "runs/cat", "cat", "--num_inference_steps", "3"])
    names = sorted(path.name for path in (tmp_path / "runs/cat/generated").iterdir())
    assert names == ["cat-0-2.png", "cat-0-3.png", "cat-0.png", "cat-1.png"]
    assert (tmp_path / "runs/cat/generated/cat-0.png").read_bytes() == first


def test_the_image_carries_what_makes_it_again(pipe):
    main(
        [
            "generate",
            "stickers",
            "chat à la plage",
            "--seed",
            "7",
            "--num_inference_steps",
            "3",
            "--guidance_scale",
            "2.5",
        ]
    )
    parameters = json.loads(Image.open("generated/chat-à-la-plage-7.png").text["parameters"])
    expected = {
        "prompt": "chat à la plage",
        "seed": 7,
        "steps": 3,
        "scale": 2.5,
        "negative_prompt": "",
        "run": "stickers",
    }
    expected |= {"dtype": "float32", "width": 8, "height": 8}
    assert parameters == expected


def test_long_and_empty_slugs():
    assert generating.slug("cat " * 100) == ("cat-" * 100)[:50].strip("-")
    assert generating.slug("?!") == "image"


@pytest.mark.parametrize("file", [FILE, RELEASED])
def test_an_encoder_is_not_drawn_with_without_images(file, pipe, tmp_path, capsys):
    (tmp_path / file).touch()
    assert main(["generate", str(tmp_path), "a <s> fox"]) == 2
    assert "is a subject encoder" in capsys.readouterr().err


def test_subject_images_go_to_the_words_they_name(pipe, tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    files = ["--subject_images", "a.png", "<s2>=c.png", "b.png"]
    prompt, own = "a <s> fox next to a <s2> cat", ["--subject_scale", "0.7", "--subject_adapter", "runs/e"]
    assert main(["generate", "stickers", prompt, *files, *own]) == 0
    call = pipe.calls[0]
    assert call["subject_images"] == {"<s>": ["a.png", "b.png"], "<s2>": ["c.png"]}
    assert (call["subject_scale"], pipe.loaded) == (0.7, ("runs/e", ""))
    assert "subject_masks" not in call
    [written] = (tmp_path / "generated").iterdir()
    parameters = json.loads(Image.open(written).text["parameters"])
    assert (parameters["subject_adapter"], parameters["subject_images"]) == ("runs/e", files[1:])
    assert main(["generate", "stickers", prompt, *files, "--side_by_side"]) == 0
    assert pipe.calls[1]["subject_masks"] == "side by side"


def test_all_prompts_are_checked_before_the_first_is_drawn(pipe, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["generate", "stickers", "a <s> fox", "a fox", "--subject_images", "a.png"]) == 2
    assert "'a fox' does not say <s>" in capsys.readouterr().err
    assert pipe.calls == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["generate", "stickers", "a <s> cat", "--subject_images", "no.png"],
            ["--subject_images", "'no.png'"],
        ),
        (
            ["generate", "stickers", "a <s> cat", "--subject_adapter", "runs/e"],
            ["--subject_adapter", "--subject_images"],
        ),
        (
            ["generate", "stickers", "a <s> cat", "--image_encoder", "a/b"],
            ["--image_encoder", "--subject_images"],
        ),
        (["generate", "stickers", "a cat", "--side_by_side"], ["--side_by_side", "--subject_images"]),
        (
            ["generate", "stickers", "a cat", "--subject_scale", "0.5"],
            ["--subject_scale", "--subject_images"],
        ),
        (["generate"], ["RUN", "not ''"]),
        (["generate", "stickers"], ['"PROMPT" after RUN']),
        (["generate", "stickers", " "], ['"PROMPT" is empty']),
        (["generate", "stickers", "cat", "--seed", "1", "dog"], ["--seed"]),
        (["generate", "stickers", "cat", "--sead", "1"], ["--sead", "Did you mean '--seed'?"]),
        (
            ["generate", "stickers", "cat", "--num_images_per_prompt", "0"],
            ["--num_images_per_prompt", "at least 1"],
        ),
        (
            ["generate", "stickers", "cat", "--num_inference_steps", "-3"],
            ["--num_inference_steps", "at least 1"],
        ),
        (["generate", "stickers", "cat", "--height", "0"], ["--height", "at least 8"]),
        (["generate", "stickers", "cat", "--width", "100"], ["--width", "multiple of 8"]),
        (["generate", "stickers", "cat", "--seed", "1" + "0" * 30], ["--seed"]),
        (["generate", "stickers", "cat", "--guidance_scale", "nan"], ["--guidance_scale"]),
        (
            ["generate", "stickers", b"caf\xe9".decode(errors="surrogateescape")],
            ["UTF-8", "type the words anew"],
        ),
        (["generate", "stickers", "cat", "--seed", "-1"], ["--seed"]),
        (["generate", "stickers", "cat", "--dtype", "int8"], ["--dtype", "float32, bfloat16, float16"]),
        (["generate", "stickers", "cat", "--output", "file"], ["file", "--output"]),
        (["generate", "nowhere", "cat"], ["'nowhere'", "RUN"]),
        (["generate", "runs/dog", "cat"], ["'runs/dog'"]),
        (["generate", "trained/caat", "cat"], ["'trained/caat'", "Did you mean 'trained/cat'?"]),
        (["push", "nowhere", "me/cat"], ["nowhere"]),
        (["push", "trained", "me/cat", "more"], ["RUN REPO_ID", "more"]),
        (["push", "trained"], ["RUN REPO_ID", "'trained'"]),
        (["demo", "extra"], ["'extra'"]),
        (["demo", "--quik"], ["Did you mean '--quick'?"]),
        (["train"], ["METHOD", "customize methods"]),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(pipe, tmp_path, capsys, words, parts):
    (tmp_path / "file").touch()
    (tmp_path / "trained/cat").mkdir(parents=True)
    (tmp_path / "trained/cat/run.json").touch()
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message
    assert pipe.calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_before_loading(pipe, capsys):
    assert main(["generate", "stickers", "cat", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not hasattr(pipe, "run")


def test_a_hub_id_is_left_to_the_pipeline(pipe):
    assert main(["generate", "someone/stable-thing.v1", "cat"]) == 0
    assert pipe.run == "someone/stable-thing.v1"


def fail_training(monkeypatch, error: BaseException) -> int:
    def run(words):
        raise error

    monkeypatch.setattr(launch, "run", run)
    return main(["train", "dreambooth"])


ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA"), RuntimeError(ALLOCATOR)]
)
def test_out_of_memory_names_the_flags_that_help(monkeypatch, capsys, error):
    assert fail_training(monkeypatch, error) == 2
    message = capsys.readouterr().err
    flags = (
        "--gradient_checkpointing",
        "--train_batch_size 1",
        "--gradient_accumulation_steps",
        "--resolution",
    )
    assert all(flag in message for flag in (*flags, "--mixed_precision bf16"))


def test_out_of_memory_while_drawing_names_the_flags_of_generate(pipe, monkeypatch, capsys):
    monkeypatch.setattr(FakePipe, "__call__", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert main(["generate", "stickers", "cat"]) == 2
    assert "--num_images_per_prompt 1" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    assert fail_training(monkeypatch, OSError(errno.ENOSPC, "No space left on device")) == 2
    assert "disk is full" in capsys.readouterr().err


def test_ctrl_c_is_130_and_one_line(monkeypatch, capsys):
    assert fail_training(monkeypatch, KeyboardInterrupt()) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        fail_training(monkeypatch, ZeroDivisionError())

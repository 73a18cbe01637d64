from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from customize.config import help_text, parse
from customize.errors import UserError


@dataclass
class Train:
    learning_rate: float = field(default=1e-3, metadata={"help": "step size", "alias": "lr"})
    max_train_steps: int = 100
    use_ema: bool = False
    cache_latents: bool = True
    placeholder_token: str = "<cat>"
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


@dataclass
class Data:
    instance_prompt: str | None = None
    resolution: int | None = 512
    validation_prompts: list[str] = field(default_factory=lambda: ["a cat"])
    rank: Literal[4, 8] = 4


@dataclass
class Required:
    instance_data: str


def train(*words: str) -> Train:
    return parse([Train], words)[0]


def data(*words: str) -> Data:
    return parse([Data], words)[0]


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_no_words_give_the_defaults():
    assert parse([Train, Data], []) == [Train(), Data()]


def test_values_by_hand():
    assert train("--learning_rate", "1e-4", "--max_train_steps=7") == Train(
        learning_rate=1e-4, max_train_steps=7
    )
    assert train("--placeholder-token", "-1") == Train(placeholder_token="-1")
    assert train("--placeholder_token=--x=y") == Train(placeholder_token="--x=y")
    assert data("--instance_prompt", "", "--rank", "8") == Data(instance_prompt="", rank=8)
    assert data("--instance_prompt", "a cat", "--resolution", "none") == Data(
        instance_prompt="a cat", resolution=None
    )


def test_words_are_shared_out_among_the_dataclasses():
    assert parse([Train, Data], ["--rank", "8", "--lr", "2"]) == [Train(learning_rate=2.0), Data(rank=8)]


def test_types_are_exact():
    assert type(train("--learning_rate", "1").learning_rate) is float
    assert type(data("--rank", "8").rank) is int


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--use_ema"], True),
        (["--use-ema"], True),
        (["--use_ema", "true"], True),
        (["--use_ema=True"], True),
        (["--use_ema", "false"], False),
        (["--no_use_ema"], False),
        (["--no-use-ema"], False),
        (["--use_ema", "--max_train_steps", "1"], True),
    ],
)
def test_bool_flags(words, value):
    assert train(*words).use_ema is value


def test_no_switches_off_what_is_on_by_default():
    assert train("--no_cache_latents").cache_latents is False


def test_a_list_takes_all_the_words_up_to_the_next_flag():
    assert data("--validation_prompts", "a b", "c", "--rank", "8") == Data(
        validation_prompts=["a b", "c"], rank=8
    )
    assert data("--validation_prompts", "one").validation_prompts == ["one"]
    assert data("--validation_prompts=one").validation_prompts == ["one"]


def test_default_lists_are_not_shared():
    data().validation_prompts.append("a dog")
    assert data().validation_prompts == ["a cat"]


def test_flag_beats_file_beats_default(tmp_path):
    path = write(tmp_path, "max_train_steps: 5\nlr: 1e-4\n")
    assert train(path, "--max_train_steps", "9") == Train(max_train_steps=9, learning_rate=1e-4)
    assert train(path, "--lr", "3").learning_rate == 3.0


def test_the_last_of_two_equal_flags_wins():
    assert train("--lr", "1", "--learning_rate", "2").learning_rate == 2.0


def test_file_values_by_hand(tmp_path):
    text = "learning-rate: 1e-4\nuse_ema: yes\nmixed_precision: no\nplaceholder_token: 12\n"
    assert train(write(tmp_path, text)) == Train(
        learning_rate=1e-4, use_ema=True, mixed_precision="no", placeholder_token="12"
    )
    text = "resolution: null\ninstance_prompt:\nvalidation_prompts: [a, 'b c']\nrank: 8\n"
    assert data(write(tmp_path, text)) == Data(resolution=None, validation_prompts=["a", "b c"], rank=8)
    assert data(write(tmp_path, "instance_prompt: ''\nvalidation_prompts: one")) == Data(
        "", validation_prompts=["one"]
    )


def test_an_empty_file_changes_nothing(tmp_path):
    assert train(write(tmp_path, "# nothing\n")) == Train()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "Did you mean '--learning_rate'?"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["--no_max_train_steps"], ["--no_max_train_steps"]),
        (["max_train_steps", "3"], ["'max_train_steps'", "no flag"]),
        (["--max_train_steps", "3", "4"], ["--max_train_steps", "a whole number", "'4'"]),
        (["--max_train_steps", "1.5"], ["--max_train_steps", "a whole number", "'1.5'"]),
        (["--learning_rate=fast"], ["--learning_rate", "a number", "'fast'"]),
        (["--lr", "fast"], ["--lr", "a number"]),
        (["--use_ema", "maybe"], ["--use_ema", "true or false", "'maybe'"]),
        (["--no_use_ema=true"], ["--no_use_ema", "true or false"]),
        (["--max_train_steps"], ["--max_train_steps", "needs a value", "a whole number"]),
        (["--max_train_steps", "--use_ema"], ["--max_train_steps", "needs a value"]),
        (["--max_train_steps="], ["--max_train_steps", "a whole number"]),
        (["--max_train_steps", "none"], ["--max_train_steps", "a whole number"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "one of no, fp16, bf16", "'fp8'"]),
        (["--"], ["Unknown flag --"]),
    ],
)
def test_mistakes_on_the_command_line(words, parts):
    with pytest.raises(UserError) as caught:
        train(*words)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_mistakes_in_unions_lists_and_integer_choices():
    with pytest.raises(UserError, match="--resolution expects a whole number or none, not 'big'"):
        data("--resolution", "big")
    with pytest.raises(UserError, match="--validation_prompts needs a value"):
        data("--validation_prompts", "--rank", "4")
    with pytest.raises(UserError, match="--rank expects one of 4, 8, not '5'"):
        data("--rank", "5")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rats: 1", ["run.yaml", "'learning_rats'", "Did you mean 'learning_rate'?"]),
        ("learning_rate: fast", ["run.yaml", "'learning_rate'", "a number", "'fast'"]),
        ("max_train_steps: 1.0", ["'max_train_steps'", "a whole number"]),
        ("max_train_steps:", ["'max_train_steps'", "not nothing"]),
        ("max_train_steps: [1, 2]", ["'max_train_steps'", "a whole number"]),
        ("placeholder_token: {a: b}", ["'placeholder_token'", "text"]),
        ("mixed_precision: fp8", ["'mixed_precision'", "one of no, fp16, bf16"]),
        ("lr: 1\nlearning_rate: 2", ["run.yaml", "'learning_rate'", "twice"]),
        ("- a\n- b", ["run.yaml", "name: value"]),
        ("a: [1, 2", ["run.yaml", "not valid YAML", "line 1"]),
        ("just words", ["run.yaml", "name: value"]),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, parts):
    with pytest.raises(UserError) as caught:
        train(write(tmp_path, text))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_list_fields_refuse_mappings_and_null(tmp_path):
    for value in ("{a: b}", ""):
        with pytest.raises(UserError, match=r"'validation_prompts' in .* expects a list of text"):
            data(write(tmp_path, f"validation_prompts: {value}"))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.yaml"):
        train("missing.yaml")
    (tmp_path / "folder.yml").mkdir()
    with pytest.raises(UserError, match=r"folder\.yml"):
        train(str(tmp_path / "folder.yml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"bytes\.yaml"):
        train(str(tmp_path / "bytes.yaml"))


def test_a_field_without_default_must_be_given(tmp_path):
    with pytest.raises(UserError, match="--instance_data is missing"):
        parse([Required], [])
    assert parse([Required], ["--instance-data", "cats"]) == [Required("cats")]
    assert parse([Required], [write(tmp_path, "instance_data: cats")]) == [Required("cats")]


def test_a_name_may_occur_only_once():
    @dataclass
    class Other:
        lr: float = 0.0

    with pytest.raises(AssertionError, match="lr"):
        parse([Train, Other], [])


def test_help_has_one_line_a_flag_under_its_dataclass():
    lines = help_text([Train, Data, Required]).splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == ["Train:", "Data:", "Required:"]
    assert sum(line.startswith("  --") for line in lines) == 6 + 4 + 1
    rate = next(line for line in lines if "--learning_rate" in line)
    assert "step size" in rate
    assert "0.001" in rate
    assert "--lr" in rate
    assert "required" in lines[-1]


def test_importing_config_leaves_torch_alone():
    code = "import sys, customize.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

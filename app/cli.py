"""The command `customize`. Heavy libraries are imported by the command that needs them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from customize.app.app import AppConfig, app, runs
from customize.app.compare import CompareConfig, compare
from customize.app.evaluate import KINDS, read_evaluation
from customize.app.generate import GenerateConfig, generate
from customize.app.merge import MergeConfig, merge
from customize.app.shared import check_run, split
from customize.config import help_text, option
from customize.errors import OUT_OF_MEMORY, UserError, nearest, run_safely
from customize.quiet import quiet_libraries
from customize.trainers.registry import find_entry, general_usage, methods_listed

DRAWING_MEMORY = (
    "Out of memory: try --dtype bfloat16, and for generate --num_images_per_prompt 1 or a smaller --height "
    "and --width."
)


HELP = {"--help", "-h"}


@dataclass
class DemoConfig:
    output: str = option("runs/demo", "folder of the demo's run")
    overwrite_output_dir: bool = option(False, "replace an earlier demo or run in that folder")
    quick: bool = option(False, "fewer steps, to see that everything works")


@dataclass
class PushConfig:
    private: bool = option(True, "upload to a private repository; --no_private makes a new one public")
    samples: list[str] = option([], "images to upload with the run, beside the last validation's")
    dry_run: bool = option(False, "only list what would be uploaded")


def train(words: list[str]) -> None:
    if words and words[0] in HELP:
        return print(general_usage())
    if words:
        find_entry(words[0])  # before the seconds that importing torch takes
    from customize.trainers.launch import train_command

    train_command(words)


def demo(words: list[str]) -> None:
    _, config = split(words, DemoConfig, [])
    from customize.app.demo import demo

    quiet_libraries()
    demo(config.output, config.quick, config.overwrite_output_dir)


def evaluate(words: list[str]) -> None:
    if words and not words[0].startswith("--"):
        check_run(words[0])
    run, config = read_evaluation(words)
    from customize.app.evaluate import evaluate

    quiet_libraries()
    print(f"the report is {evaluate(run, config)}")


def methods(words: list[str]) -> None:
    print(methods_listed())


def push(words: list[str]) -> None:
    (run, repo_id), config = split(words, PushConfig, ["RUN", "REPO_ID"])
    if not Path(run).is_dir():
        raise UserError(f"There is no run folder {run}: check its path.")
    from customize.runs.hub import push

    print(push(run, repo_id, config.private, config.samples, config.dry_run))


# What runs, how it is called, and the dataclass of its flags if the command line knows it.
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str, list[type]]] = {
    "train": (
        train,
        " METHOD [FILE.yaml] [--flag value ...]: teach a model your subject (flags: METHOD --help)",
        [],
    ),
    "generate": (
        generate,
        ' RUN "PROMPT" ... [--flag value ...]: draw with a run or a base model',
        [GenerateConfig],
    ),
    "demo": (demo, " [--flag value ...]: train and draw in the embedded sticker world", [DemoConfig]),
    "evaluate": (
        evaluate,
        " RUN | --bench stickers | --bench dreambench [--flag value ...]: measure a run, or methods",
        list(KINDS),
    ),
    "merge": (
        merge,
        " A B ... --output_dir RUN [--flag value ...]: join LoRAs (runs or files) into one, without training",
        [MergeConfig],
    ),
    "compare": (
        compare,
        " RUN ... --prompts FILE --output grid.png [--flag value ...]: draw runs side by side",
        [CompareConfig],
    ),
    "app": (app, " [--flag value ...]: open the web page", [AppConfig]),
    "runs": (runs, " [FOLDER]: list the runs of a folder and what they do", []),
    "methods": (methods, ": list the methods", []),
    "push": (push, " RUN REPO_ID [--flag value ...]: upload a run to the Hugging Face Hub", [PushConfig]),
}


def run_command(words: list[str]) -> None:
    if not words or words[0] in HELP:
        lines = (f"  customize {name}{usage}" for name, (_, usage, _) in COMMANDS.items())
        return print("Teach a text-to-image model your subject.", *lines, sep="\n")
    if words == ["--version"]:
        return print(f"customize {version('customize')}")
    if words[0] not in COMMANDS:
        raise UserError(
            f"There is no command '{words[0]}': `customize --help` lists them.{nearest(words[0], COMMANDS)}"
        )
    if not all(_is_text(word) for word in words):
        raise UserError("The command line holds bytes that are no UTF-8 text: type the words anew.")
    command, usage, configs = COMMANDS[words[0]]
    if command is train or not HELP & set(words):  # a method prints its own help
        return command(words[1:])
    print(f"customize {words[0]}{usage}\n{help_text(configs)}")


def _is_text(word: str) -> bool:
    """Whether a word is valid Unicode: Python reads other bytes as lone surrogates, which no library
    takes."""
    return not any("\ud800" <= sign <= "\udfff" for sign in word)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    advice = DRAWING_MEMORY if words[:1] in (["generate"], ["compare"]) else OUT_OF_MEMORY
    return run_safely(run_command, words, advice)


if __name__ == "__main__":
    raise SystemExit(main())

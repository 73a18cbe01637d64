"""The command `customize`. Whatever is heavy is imported by the command that needs it."""

import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any, Literal

from customize.app.evaluate import EvaluateConfig
from customize.config import help_text, option, parse
from customize.errors import UserError, nearest
from customize.privacy import without_places
from customize.trainers.registry import METHODS, find_entry

TRAINING_MEMORY = (
    "Out of memory: try --gradient_checkpointing, --train_batch_size 1 with a larger --gradient_accumulation_steps, "
    "a smaller --resolution, or --mixed_precision bf16."
)
DRAWING_MEMORY = "Out of memory: try --num_images_per_prompt 1, --dtype bfloat16, or a smaller --height and --width."
HELP = {"--help", "-h"}


@dataclass
class GenerateConfig:
    """How `customize generate` draws."""

    num_images_per_prompt: int = option(1, "pictures of each prompt; picture i is drawn with seed + i", least=1)
    seed: int = option(0, "seed of the first picture", least=0, most=4_000_000_000)
    guidance_scale: float | None = option(None, "how strongly the prompt steers; none leaves it to the pipeline", least=0)
    num_inference_steps: int = option(25, "denoising steps", least=1)
    negative_prompt: str = option("", "what should not be in the picture")
    height: int | None = option(None, "in pixels, a multiple of 8; none leaves it to the pipeline", least=8)
    width: int | None = option(None, "in pixels, a multiple of 8; none leaves it to the pipeline", least=8)
    subject_images: list[str] = field(
        default_factory=list,
        metadata={
            "help": "up to four pictures of what the prompt calls <s>, for a subject encoder; '<s2>=FILE' for a second subject"
        },
    )
    subject_scale: float = option(1.0, "how strongly the subjects' pictures count, 0 to 1 and beyond", least=0)
    side_by_side: bool = option(False, "several subjects stand side by side, from left to right in the order <s>, <s2>, ...")
    subject_adapter: str = option(
        "", "the subject encoder: a run, a file, a released IP-Adapter; empty: RUN's own, or stickers'"
    )
    image_encoder: str = option("", "the CLIP vision model of that encoder; empty: the one that it was trained with")
    output: str | None = option(None, "folder of the pictures; none means RUN/generated, or ./generated if RUN is no folder")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the weights")
    device: Literal["cpu", "cuda"] | None = option(None, "none means the GPU if there is one")


@dataclass
class DemoConfig:
    output: str = option("runs/demo", "folder of the demo's run")
    overwrite_output_dir: bool = option(False, "replace an earlier demo or run in that folder")
    quick: bool = option(False, "fewer steps, to see that everything works")


@dataclass
class PushConfig:
    private: bool = option(True, "upload to a private repository; --no_private makes a new one public")
    samples: list[str] = field(
        default_factory=list, metadata={"help": "images to upload with the run, beside the last validation's"}
    )
    dry_run: bool = option(False, "only list what would be uploaded")


def train(words: list[str]) -> None:
    if not words:
        raise UserError("customize train needs a METHOD: `customize methods` lists them.")
    # Before the seconds that importing torch takes.
    find_entry(words[0])
    from customize.trainers.__main__ import run, usage

    if HELP & set(words):
        return print(usage(words[0]))
    quiet_libraries()
    print(f"the run is in {run(words)}")


def generate(words: list[str]) -> None:
    from customize.output import make_folder

    (run, *prompts), config = split(words, GenerateConfig, ["RUN", '"PROMPT"'], more=True)
    check_run(run)
    check_request(prompts, config)
    subjects = subject_files(config.subject_images)
    check_subjects(run, config)
    folder, pipe = make_folder(output_folder(run, config.output), "--output"), load(run, config)
    if subjects:  # of all prompts, before the first is drawn
        from customize.subject import check_words

        for prompt in prompts:
            check_words(prompt, subjects, pipe.adapter.has_words)
    for prompt in prompts:
        seeds = range(config.seed, config.seed + config.num_images_per_prompt)
        for seed, image in zip(seeds, draw(pipe, prompt, seeds, config, subjects), strict=True):
            print(save(image, folder, run, prompt, seed, config))


def demo(words: list[str]) -> None:
    _, config = split(words, DemoConfig, [])
    from customize.app.demo import demo

    quiet_libraries()
    demo(config.output, config.quick, config.overwrite_output_dir)


def evaluate(words: list[str]) -> None:
    run = words.pop(0) if words and not words[0].startswith("--") else ""
    (config,) = parse([EvaluateConfig], words)
    if run:
        check_run(run)
    from customize.app.evaluate import evaluate

    quiet_libraries()
    print(f"the report is {evaluate(run, config)}")


def methods(words: list[str]) -> None:
    print("\n".join(f"{name:<18} {entry.summary}" for name, entry in METHODS.items()))


def push(words: list[str]) -> None:
    (run, repo_id), config = split(words, PushConfig, ["RUN", "REPO_ID"])
    if not Path(run).is_dir():
        raise UserError(f"There is no run folder {run}: check its path.")
    from customize.hub import push

    print(push(run, repo_id, config.private, config.samples, config.dry_run))


# What runs, how it is called, and the dataclass of its flags if the command line knows it.
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str, list[type]]] = {
    "train": (train, " METHOD [FILE.yaml] [--flag value ...]: teach a model your subject (flags: METHOD --help)", []),
    "generate": (generate, ' RUN "PROMPT" ... [--flag value ...]: draw with a run or a base model', [GenerateConfig]),
    "demo": (demo, " [--flag value ...]: train and draw in the embedded sticker world", [DemoConfig]),
    "evaluate": (evaluate, " [RUN] [--flag value ...]: measure methods on a benchmark, or one run", [EvaluateConfig]),
    "methods": (methods, ": list the methods", []),
    "push": (push, " RUN REPO_ID [--flag value ...]: upload a run to the Hugging Face Hub", [PushConfig]),
}


def split(words: list[str], config: type, names: list[str], more: bool = False) -> tuple[list[str], Any]:
    """The words before the first flag, one a name (`more`: or more), and the flags as an instance of `config`."""
    first = list(takewhile(lambda word: not word.startswith("--"), words))
    if len(first) < len(names) or (len(first) > len(names) and not more):
        raise UserError(f"Write {' '.join(names) or 'nothing'} before the flags, not '{' '.join(first)}'.")
    return first, parse([config], words[len(first) :])[0]


def check_run(run: str) -> None:
    """Raises where `run` is neither a folder, nor `stickers`, nor something that could be on the hub."""
    if Path(run).is_dir() or run == "stickers":
        return
    beside = [str(path.parent) for path in Path(run).parent.glob("*/run.json")]
    # runs/cat has the shape of a hub id; the hub should not be asked for a misspelt run.
    if beside or run.startswith("runs/") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", run):
        raise UserError(f"There is no run '{run}': give a folder, a hub id or `stickers` as RUN.{nearest(run, beside)}")


def check_request(prompts: list[str], config: GenerateConfig) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise UserError('"PROMPT" is empty: describe the picture.')
    for name in ("height", "width"):
        if (getattr(config, name) or 0) % 8:
            raise UserError(f"--{name} must be a multiple of 8, not {getattr(config, name)}.")


def output_folder(run: str, output: str | None) -> Path:
    """Where pictures go: a base model's folder is left alone, and so are those of steps, which a run replaces and removes."""
    folder = Path(run)
    if re.fullmatch(r"best|checkpoint-\d+", folder.name) and folder.parent.is_dir():
        folder = folder.parent
    return Path(output or (folder / "generated" if Path(run, "run.json").exists() else "generated"))


def load(run: str, config: GenerateConfig) -> Any:
    import torch

    from customize.pipelines import load_pipeline

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu.")
    quiet_libraries()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    if config.subject_images:
        from customize.pipelines import load_subject_pipeline

        return load_subject_pipeline(run, config.subject_adapter, config.image_encoder, dtype).to(device)
    return load_pipeline(run, dtype=dtype).to(device)


def subject_files(words: Sequence[str]) -> dict[str, list[str]]:
    """The pictures of each subject: FILE is of `<s>`, '<s2>=FILE' of `<s2>`."""
    found: dict[str, list[str]] = {}
    for word in words:
        named, file = (word.split("=", 1) if re.match(r"<\w+>=", word) else ("<s>", word))[:2]
        if not Path(file).is_file():
            raise UserError(f"--subject_images: there is no file '{file}'.")
        found.setdefault(named, []).append(file)
    return found


def check_subjects(run: str, config: GenerateConfig) -> None:
    """UserError where a subject encoder is to draw, but no subject is shown."""
    if config.subject_images:
        return
    for flag in ("subject_adapter", "image_encoder", "side_by_side", "subject_scale"):
        if getattr(config, flag) != getattr(GenerateConfig, flag):
            raise UserError(f"--{flag} needs --subject_images, pictures of what the prompt calls <s>.")
    from customize.subject import ADAPTER_FILES

    if any(Path(run, name).is_file() for name in ADAPTER_FILES):
        raise UserError(f"'{run}' is a subject encoder: name pictures of what the prompt calls <s> with --subject_images.")


def draw(pipe: Any, prompt: str, seeds: Sequence[int], config: GenerateConfig, subjects: dict | None = None) -> list[Any]:
    import torch

    given = {"subject_images": subjects, "subject_scale": config.subject_scale} if subjects else {}
    if subjects and config.side_by_side:
        given["subject_masks"] = "side by side"
    optional = {name: getattr(config, name) for name in ("guidance_scale", "negative_prompt", "height", "width")}
    return pipe(
        prompt,
        num_images_per_prompt=len(seeds),
        num_inference_steps=config.num_inference_steps,
        # On the CPU, so that a seed gives the same noise on every device, and one a picture, so that each can be re-made alone.
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **{name: value for name, value in optional.items() if value not in (None, "")},
        **given,
    ).images


def save(image: Any, folder: Path, run: str, prompt: str, seed: int, config: GenerateConfig) -> Path:
    """Writes the picture with what re-makes it, under a name that is still free."""
    from customize.output import save_image

    parameters = {"run": run, "prompt": prompt, "negative_prompt": config.negative_prompt, "seed": seed}
    parameters |= {"steps": config.num_inference_steps, "scale": config.guidance_scale, "dtype": config.dtype}
    parameters |= {"width": image.width, "height": image.height}
    if config.subject_images:
        names = ("subject_images", "subject_scale", "side_by_side", "subject_adapter", "image_encoder")
        parameters |= {name: getattr(config, name) for name in names}
    stem, text = f"{slug(prompt)}-{seed}", json.dumps(without_places(parameters))
    for path in (folder / f"{stem}{ending}.png" for ending in chain([""], (f"-{number}" for number in count(2)))):
        if not path.exists():
            with suppress(FileExistsError):  # another program draws into the folder too
                save_image(image, path, exclusive=True, parameters=text)
                break
    return path


def slug(prompt: str) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.lower())[:50].strip("-")
    return words.encode()[:150].decode(errors="ignore") or "image"  # names of files have at most 255 bytes


def run_command(words: list[str]) -> None:
    if not words or words[0] in HELP:
        lines = (f"  customize {name}{usage}" for name, (_, usage, _) in COMMANDS.items())
        return print("Teach a text-to-image model your subject.", *lines, sep="\n")
    if words[0] not in COMMANDS:
        raise UserError(f"There is no command '{words[0]}': `customize --help` lists them.{nearest(words[0], COMMANDS)}")
    if not all(_is_text(word) for word in words):
        raise UserError("The command line holds bytes that are no UTF-8 text: type the words anew.")
    command, usage, configs = COMMANDS[words[0]]
    # A method prints its own help.
    if not HELP & set(words[1:2] if command is train else words):
        return command(words[1:])
    print(f"customize {words[0]}{usage}\n{help_text(configs)}")


def _is_text(word: str) -> bool:
    """Python reads bytes that are no UTF-8 as half characters, which nothing else takes."""
    return not any("\ud800" <= sign <= "\udfff" for sign in word)


def remedy(error: Exception, command: str) -> str | None:
    """One sentence for an error that the user can mend, or None."""
    if isinstance(error, UserError):
        return str(error)
    # By name, because importing torch for its OutOfMemoryError would cost seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return DRAWING_MEMORY if command == "generate" else TRAINING_MEMORY
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return "The disk is full: free some space, or write elsewhere with --output (generate, demo) or --output_dir (train)."
    return None


def end_bars() -> None:
    """Ends the lines of progress bars that an error left open."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def quiet_libraries() -> None:
    """Leaves the screen to our own messages; downloads keep their progress bars."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    # transformers speaks at import already
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        run_command(words)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if not (message := remedy(error, words[0])):
            raise
        with suppress(OSError):  # nobody may listen any more
            end_bars()
            print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`customize evaluate`: measures methods on a benchmark, or one finished run, and writes a report."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from customize.config import check_config, option, parse, table
from customize.embedded import is_embedded
from customize.errors import UserError


@dataclass
class EvaluateConfig:
    """Flags of every evaluation."""

    output: str = option(
        "", "folder of images and report; empty: runs/BENCH for a benchmark, RUN/evaluation for a run"
    )
    overwrite_output_dir: bool = option(
        False, "replace an earlier evaluation in the output folder instead of going on with it"
    )
    seed: int = option(0, "seed of training and of the first image", least=0, most=4_000_000_000)


@dataclass
class Photographs:
    """How images of a real model are drawn and measured."""

    clip: str = option(
        "openai/clip-vit-base-patch32", "CLIP for CLIP-I and CLIP-T: hub id, folder, or stickers"
    )
    dino: str = option("facebook/dino-vits16", "DINO for subject fidelity: hub id, folder, or none")
    dinov2: str = option("facebook/dinov2-base", "DINOv2 for subject fidelity: hub id, folder, or none")
    num_images_per_prompt: int = option(4, "images of each prompt", least=1)
    num_inference_steps: int = option(50, "denoising steps", least=1)
    guidance_scale: float = option(7.5, "how strongly prompts steer the images", least=0)
    resolution: int | None = option(
        None, "side of the images in pixels; none leaves it to the pipeline", least=8
    )
    batch_size: int = option(4, "images drawn at once", least=1)


METHODS = ["base", "real", "textual_inversion", "dreambooth"]
COMPARED = "what is compared: methods, base (the untouched model), real (images), or folders of encoder runs"


@dataclass
class StickerBenchConfig(EvaluateConfig):
    """customize evaluate --bench stickers"""

    methods: list[str] = option(METHODS, COMPARED)
    quick: bool = option(False, "6 subjects, 8 prompts, 1 image each instead of 30, 25 and 4")
    max_train_steps: int = option(200, "training steps of every method", least=1)
    group: Literal["all", "known", "unknown"] = option(
        "all",
        "known: subjects of whose class the base model knows other drawings; unknown: of classes that it has "
        "never seen; all: both",
    )


@dataclass
class DreamBenchConfig(Photographs, EvaluateConfig):
    """customize evaluate --bench dreambench"""

    methods: list[str] = option(METHODS, COMPARED)
    data_dir: str = option("", "folder of the DreamBooth dataset, with prompts_and_classes.txt")
    pretrained_model_name_or_path: str = option("", "base model, a diffusers folder, a hub id or a file")
    single_file_config: str = option(
        "", "diffusers folder or hub id that says how a base model in one file is built"
    )
    revision: str = option("", "revision of the base model on the hub")
    variant: str = option("", "variant of the base model's weight files, such as fp16")
    train_file: str = option(
        "", "YAML file of training settings, or a folder with one METHOD.yaml for each method"
    )
    references: Literal["all", "one"] = option(
        "all", "teach and compare with all images of a subject, or with its first one"
    )
    limit_subjects: int | None = option(None, "only the first subjects of the dataset; none: all", least=1)
    limit_prompts: int | None = option(None, "only the first prompts of the dataset; none: all", least=1)


@dataclass
class StickerRunConfig(EvaluateConfig):
    """customize evaluate RUN, of a run on the embedded base model"""

    quick: bool = option(False, "8 prompts and 1 image each instead of 25 and 4")
    subject: str = option(
        "",
        "the drawing of the sticker world that the run learned, such as 'flat fox'; empty: the one that fits "
        "its images, if any does",
    )


@dataclass
class PhotographRunConfig(Photographs, EvaluateConfig):
    """customize evaluate RUN, of a run on another base model"""


BENCHES: dict[str, type[EvaluateConfig]] = {"stickers": StickerBenchConfig, "dreambench": DreamBenchConfig}
KINDS = (*BENCHES.values(), StickerRunConfig, PhotographRunConfig)
CHOOSE = (
    "name a RUN, or a benchmark: --bench stickers (4 methods, 30 subjects, 25 prompts, 4 images: 9,000 "
    "images and 60 trainings, about two hours on two CPU cores; with --quick 144 images and 12 trainings, "
    "about ten minutes), or --bench dreambench (needs --data_dir, a base model and a GPU)."
)


def read_evaluation(words: Sequence[str]) -> tuple[str, EvaluateConfig]:
    """The run, empty for a benchmark, and the flags of `[RUN] [--bench NAME] [--flag value ...]`.

    UserError if both or neither are named, and for a flag of another kind of evaluation.
    """
    rest = list(words)
    run = rest.pop(0) if rest and not rest[0].startswith("--") else ""
    bench, rest = _bench(rest)
    if bool(run) == bool(bench):
        raise UserError(f"customize evaluate: {CHOOSE}")
    if bench and bench not in BENCHES:
        raise UserError(f"--bench: there is no '{bench}'; choose {' or '.join(BENCHES)}.")
    kind = BENCHES[bench] if bench else run_config(run)
    own, others = table([kind]), {name for other in KINDS for name in table([other])}
    for word in rest:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in others and name not in own:
            what = f"--bench {bench}" if bench else "this run"
            raise UserError(f"--{name} has no effect on {what}: leave it out.")
    (config,) = parse([kind], rest)
    return run, config


def _bench(words: list[str]) -> tuple[str, list[str]]:
    """The value of --bench, and the other words."""
    for i, word in enumerate(words):
        if word.startswith("--bench="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
        if word == "--bench":
            return (words[i + 1 : i + 2] or ["nothing"])[0], words[:i] + words[i + 2 :]
    return "", words


def run_config(run: str) -> type[EvaluateConfig]:
    """The kind of evaluation of a finished run; UserError if it is none."""
    from customize.runs.folder import read_info

    on_stickers = is_embedded(read_info(Path(run))["base_model"])
    return StickerRunConfig if on_stickers else PhotographRunConfig


def evaluate(run: str, config: EvaluateConfig) -> Path:
    """Measures the run, or the benchmark if `run` is empty; prints the table and returns the path of the
    report."""
    try:
        import matplotlib  # noqa: F401  needed at the very end

        from customize.app.bench.earlier import check_folder
        from customize.app.bench.report import write_report
        from customize.app.bench.summary import summary
    except ModuleNotFoundError as error:
        raise UserError(f"Evaluation needs {error.name}: pip install 'customize[evaluate]'.") from error
    from customize.runs.output import locked

    bench = make_bench(run, config)
    with locked(bench.folder, "--output"):
        check_folder(bench.folder, bench.methods, config.overwrite_output_dir)
        print(bench.plan())
        results = bench.run()
        print(summary(results))
        return write_report(results, bench.folder)


def make_bench(run: str, config: Any) -> Any:
    """The benchmark of a configuration, one of `KINDS`; UserError for numbers that cannot be, and for a
    folder that cannot be made."""
    check_config(config)
    methods = getattr(config, "methods", [])
    if len(set(methods)) != len(methods):
        raise UserError("--methods names a method twice: keep one of the two.")
    if (getattr(config, "resolution", None) or 0) % 8:
        raise UserError(f"--resolution must be a multiple of 8, not {config.resolution}.")
    if isinstance(config, StickerBenchConfig):
        return make_sticker_bench(config)
    if isinstance(config, DreamBenchConfig):
        return make_dreambench(config)
    if isinstance(config, StickerRunConfig):
        return make_sticker_run(run, config)
    assert isinstance(config, PhotographRunConfig)
    return make_photograph_run(run, config)


def output(config: EvaluateConfig, otherwise: str) -> Path:
    from customize.runs.output import make_folder

    return make_folder(Path(config.output or otherwise), "--output")


def make_sticker_bench(config: StickerBenchConfig) -> Any:
    from customize.app.bench.stickers import StickerBench

    return StickerBench(
        folder=output(config, f"runs/stickers{'-quick' if config.quick else ''}"),
        methods=config.methods,
        seed=config.seed,
        repeats=1 if config.quick else 4,
        quick=config.quick,
        steps=config.max_train_steps,
        group=config.group,
    )


def make_dreambench(config: DreamBenchConfig) -> Any:
    from customize.app.bench.dreambench import DreamBench

    if not config.data_dir:
        raise UserError("--bench dreambench needs --data_dir, the folder of the DreamBooth dataset.")
    if not config.pretrained_model_name_or_path:
        raise UserError("--bench dreambench needs --pretrained_model_name_or_path, the base model.")
    if config.train_file and not Path(config.train_file).exists():
        raise UserError(
            f"--train_file: there is no '{config.train_file}'; give a YAML file, or a folder of "
            "METHOD.yaml files."
        )
    from customize.runs.folder import base_settings

    return DreamBench(
        folder=output(config, "runs/dreambench"),
        methods=config.methods,
        seed=config.seed,
        data=Path(config.data_dir),
        encoders=encoders(config),
        sampling=sampling(config),
        base=config.pretrained_model_name_or_path,
        repeats=config.num_images_per_prompt,
        base_settings=base_settings(vars(config)),
        train=Path(config.train_file) if config.train_file else None,
        references=config.references,
        limits=(config.limit_subjects, config.limit_prompts),
    )


def run_output(run: str, config: EvaluateConfig, quick: bool = False) -> Path:
    """The output folder for the evaluation of a run; not in the folders of steps, which a later run
    replaces."""
    place = Path(run)
    if re.fullmatch(r"best|checkpoint-\d+", place.name):
        place = place.with_name(f"evaluation-of-{place.name}")
    else:
        place /= "evaluation"
    return output(config, f"{place}{'-quick' if quick else ''}")


def make_sticker_run(run: str, config: StickerRunConfig) -> Any:
    """A run on the embedded model: StickerBench's prompts, its judge, and the run's own images."""
    from customize.app.bench.finished import StickerRun

    return StickerRun(
        folder=run_output(run, config, config.quick),
        run_path=Path(run),
        seed=config.seed,
        quick=config.quick,
        repeats=1 if config.quick else 4,
        drawing_name=config.subject,
    )


def make_photograph_run(run: str, config: PhotographRunConfig) -> Any:
    """A run on any other model: eight of DreamBench's prompts."""
    from customize.app.bench.finished import PhotographRun
    from customize.runs.folder import base_settings, read_info

    info = read_info(Path(run))
    return PhotographRun(
        folder=run_output(run, config),
        run_path=Path(run),
        seed=config.seed,
        base=info["base_model"],
        base_settings=base_settings(info["config"]),
        encoders=encoders(config),
        sampling=sampling(config),
        repeats=config.num_images_per_prompt,
    )


def encoders(config: Photographs) -> dict[str, Any]:
    """Loaded before anything is trained or drawn, so that a wrong name is told at once."""
    from customize.metrics import load_clip, load_dino, load_sticker_clip

    clip: Any = load_sticker_clip() if is_embedded(config.clip) else load_clip(config.clip)
    names = {flag: getattr(config, flag) for flag in ("dino", "dinov2")}
    return {"clip": clip} | {flag: load_dino(name, flag) for flag, name in names.items() if name != "none"}


def sampling(config: Photographs) -> Any:
    from customize.app.bench.drawing import Sampling

    return Sampling(
        config.num_inference_steps,
        config.guidance_scale,
        config.batch_size,
        config.resolution,
        config.resolution,
    )

"""`customize evaluate`: measures methods on a benchmark, or one finished run, and writes a report."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from customize.config import check_ranges, default, option
from customize.errors import UserError

ENCODERS = {"clip", "dino", "dinov2"}
SAMPLING = {"num_images_per_prompt", "num_inference_steps", "guidance_scale", "resolution", "batch_size"}
DATASET = {
    "methods",
    "data_dir",
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "train_file",
    "references",
}
USED = {  # the flags that count for each kind of evaluation
    "--bench stickers": {"methods", "quick", "max_train_steps", "group"},
    "--bench dreambench": ENCODERS | SAMPLING | DATASET | {"limit_subjects", "limit_prompts"},
    "a run on stickers": {"quick", "subject"},
    "a run on this base model": ENCODERS | SAMPLING,
}


@dataclass
class EvaluateConfig:
    """What is evaluated, and how."""

    bench: Literal["stickers", "dreambench"] = option("stickers", "which benchmark")
    methods: list[str] = option(
        ["base", "real", "textual_inversion", "dreambooth"],
        "what is compared: methods, base (the untouched model), real (images), or folders of encoder runs",
    )
    quick: bool = option(False, "stickers: 6 subjects, 8 prompts, 1 image instead of 30, 25 and 4")
    max_train_steps: int = option(200, "stickers: training steps of every method", least=1)
    group: Literal["all", "known", "unknown"] = option(
        "all",
        "stickers: subjects whose class the base model knows by other drawings, or does not know, or both",
    )
    output: str = option("", "folder of images and report; empty: runs/BENCH, or RUN/evaluation")
    overwrite_output_dir: bool = option(
        False, "replace an earlier evaluation in the output folder instead of going on with it"
    )
    seed: int = option(0, "seed of training and of the first image", least=0, most=4_000_000_000)
    data_dir: str = option("", "dreambench: the dataset's folder, with prompts_and_classes.txt")
    pretrained_model_name_or_path: str = option("", "dreambench: base model, a diffusers folder or a hub id")
    revision: str = option("", "dreambench: revision of the model on the hub")
    variant: str = option("", "dreambench: variant of the weight files, such as fp16")
    train_file: str = option(
        "", "dreambench: YAML file of training settings, or a folder with one METHOD.yaml for each method"
    )
    clip: str = option(
        "openai/clip-vit-base-patch32", "CLIP for CLIP-I and CLIP-T: hub id, folder, or stickers"
    )
    dino: str = option("facebook/dino-vits16", "DINO: hub id, folder, or none")
    dinov2: str = option("facebook/dinov2-base", "DINOv2: hub id, folder, or none")
    references: Literal["all", "one"] = option(
        "all", "dreambench: teach and compare with all images of a subject, or the first"
    )
    num_images_per_prompt: int = option(4, "dreambench: images of each prompt", least=1)
    num_inference_steps: int = option(50, "dreambench: denoising steps", least=1)
    guidance_scale: float = option(7.5, "dreambench: how strongly prompts steer", least=0)
    resolution: int | None = option(
        None, "dreambench: side of the images in pixels; none leaves it to the pipeline", least=8
    )
    batch_size: int = option(4, "dreambench: images drawn at once", least=1)
    limit_subjects: int | None = option(None, "dreambench: only the first subjects", least=1)
    limit_prompts: int | None = option(None, "dreambench: only the first prompts", least=1)
    subject: str = option(
        "", "a run on stickers: the drawing it learned, such as 'flat fox'; empty: what its images show"
    )


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

    bench = make_run_bench(run, config) if run else make_bench(config)
    with locked(bench.folder, "--output"):
        check_folder(bench.folder, bench.methods, config.overwrite_output_dir)
        results = bench.run()
        print(summary(results))
        return write_report(results, bench.folder)


def check(config: EvaluateConfig, kind: str) -> None:
    """UserError for numbers that cannot be, for flags that `kind` has no use for, and for a folder that
    cannot be made."""
    check_ranges(config)
    if config.resolution is not None and config.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8, not {config.resolution}.")
    if len(set(config.methods)) != len(config.methods):
        raise UserError("--methods names a method twice: keep one of the two.")
    used = USED[kind] | {"bench", "output", "overwrite_output_dir", "seed"}
    for flag in fields(config):
        if flag.name not in used and getattr(config, flag.name) != default(flag):
            raise UserError(f"--{flag.name} has no effect on {kind}: leave it out.")


def output(config: EvaluateConfig, otherwise: str) -> Path:
    from customize.runs.output import make_folder

    return make_folder(Path(config.output or otherwise), "--output")


def make_bench(config: EvaluateConfig) -> Any:
    from customize.app.bench.dreambench import DreamBench
    from customize.app.bench.stickers import StickerBench

    check(config, f"--bench {config.bench}")
    folder = output(config, f"runs/{config.bench}{'-quick' if config.quick else ''}")
    common: dict[str, Any] = {"folder": folder, "methods": config.methods, "seed": config.seed}
    if config.bench == "stickers":
        repeats = 1 if config.quick else 4
        return StickerBench(
            **common, repeats=repeats, quick=config.quick, steps=config.max_train_steps, group=config.group
        )
    if not config.data_dir:
        raise UserError("--bench dreambench needs --data_dir, the folder of the DreamBooth dataset.")
    if not config.pretrained_model_name_or_path:
        raise UserError("--bench dreambench needs --pretrained_model_name_or_path, the base model.")
    if config.train_file and not Path(config.train_file).exists():
        raise UserError(
            f"--train_file: there is no '{config.train_file}'; give a YAML file, or a folder of "
            "METHOD.yaml files."
        )
    return DreamBench(
        **common,
        data=Path(config.data_dir),
        encoders=encoders(config),
        sampling=sampling(config),
        base=config.pretrained_model_name_or_path,
        repeats=config.num_images_per_prompt,
        base_options={name: value for name in ("revision", "variant") if (value := getattr(config, name))},
        train=Path(config.train_file) if config.train_file else None,
        references=config.references,
        limits=(config.limit_subjects, config.limit_prompts),
    )


def make_run_bench(run: str, config: EvaluateConfig) -> Any:
    """The benchmark of one finished run: StickerBench's prompts and judge on the embedded model, DreamBench's
    on others."""
    from customize.app.bench.finished import PhotographRun, StickerRun
    from customize.runs.folder import read_info

    info = read_info(Path(run))
    on_stickers = info["base_model"] == "stickers"
    check(config, "a run on stickers" if on_stickers else "a run on this base model")
    place = Path(run)
    if re.fullmatch(r"best|checkpoint-\d+", place.name):  # which a run replaces and removes
        place = place.with_name(f"evaluation-of-{place.name}")
    else:
        place /= "evaluation"
    folder = output(config, f"{place}{'-quick' if config.quick else ''}")
    common: dict[str, Any] = {
        "folder": folder,
        "run_path": Path(run),
        "seed": config.seed,
        "base": info["base_model"],
    }
    if on_stickers:
        return StickerRun(
            **common, quick=config.quick, repeats=1 if config.quick else 4, drawing_name=config.subject
        )
    common["base_options"] = {
        name: value for name in ("revision", "variant") if (value := info["config"].get(name))
    }
    return PhotographRun(
        **common, encoders=encoders(config), sampling=sampling(config), repeats=config.num_images_per_prompt
    )


def encoders(config: EvaluateConfig) -> dict:
    """Loaded before anything is trained or drawn, so that a wrong name is told at once."""
    from customize.metrics import load_clip, load_dino, load_sticker_clip

    found: dict[str, Any] = {
        "clip": load_sticker_clip() if config.clip == "stickers" else load_clip(config.clip)
    }
    return found | {
        flag: load_dino(name, flag)
        for flag in ("dino", "dinov2")
        if (name := getattr(config, flag)) != "none"
    }


def sampling(config: EvaluateConfig):
    from customize.app.bench.drawing import Sampling

    return Sampling(
        config.num_inference_steps,
        config.guidance_scale,
        config.batch_size,
        config.resolution,
        config.resolution,
    )

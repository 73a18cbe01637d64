"""`customize generate`: draws with a run or a base model."""

import json
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, cast

from customize.app.shared import check_run, split
from customize.config import option
from customize.embedded import GUIDANCE, is_embedded, not_understood, warn_of_photographs
from customize.errors import UserError, nearest, shortened
from customize.prompts import without_words
from customize.quiet import quiet_libraries
from customize.reading import read_text
from customize.runs.privacy import without_places

MOST_PIXELS = 10**8  # of --init_image


@dataclass
class GenerateConfig:
    """How `customize generate` draws."""

    num_images_per_prompt: int = option(1, "images of each prompt; image i is drawn with seed + i", least=1)
    seed: int = option(0, "seed of the first image", least=0, most=4_000_000_000)
    prompts_file: str = option(
        "", "text file with one more prompt on each line; lines that begin with # are left out"
    )
    scheduler: str = option(
        "", "sampler: euler, euler_a, dpm++, ddim, unipc, heun, or a diffusers scheduler class"
    )
    lora_scale: float = option(
        1.0, "strength of the run's LoRA: 0 is the base model, 1 is as trained", least=0
    )
    lora: list[str] = option(
        [], "more LoRAs to draw with, runs or files, each with a weight if wanted: FILE or FILE:0.8"
    )
    base_model: str = option(
        "", "base model to use instead of the one that the run names, as when its folder has moved"
    )
    single_file_config: str = option(
        "", "diffusers folder or hub id that says how a base model in one .safetensors file is built"
    )
    init_image: str = option("", "image to start from (image-to-image); empty: start from noise alone")
    strength: float = option(
        0.8, "share of --init_image that is drawn anew, above 0 and up to 1", above=0, most=1
    )
    guidance_scale: float | None = option(
        None, "how strongly the prompt steers; none leaves it to the pipeline", least=0
    )
    num_inference_steps: int = option(25, "denoising steps", least=1)
    negative_prompt: str = option("", "what should not be in the image")
    height: int | None = option(None, "in pixels, a multiple of 8; none leaves it to the pipeline", least=8)
    width: int | None = option(None, "in pixels, a multiple of 8; none leaves it to the pipeline", least=8)
    subject_images: list[str] = option(
        [],
        (
            "up to four images of what the prompt calls <s>, for a subject encoder; '<s2>=FILE' "
            "for a second subject"
        ),
    )
    subject_scale: float = option(1.0, "how strongly the subjects' images count, 0 to 1 and beyond", least=0)
    side_by_side: bool = option(
        False, "several subjects stand side by side, from left to right in the order <s>, <s2>, ..."
    )
    subject_adapter: str = option(
        "", "the subject encoder: a run, a file, a released IP-Adapter; empty: RUN's own, or stickers'"
    )
    image_encoder: str = option(
        "", "the CLIP vision model of that encoder; empty: the one that it was trained with"
    )
    attention_maps: list[str] = option(
        [], "words of the prompt whose attention maps are saved beside each image: where the model sees them"
    )
    attention_guidance: Literal["none", "conform", "attend_and_excite"] = option(
        "none",
        "hold things of the prompt apart while drawing (SD 1.x, 2.x, XL); needs --attention_groups",
    )
    attention_groups: list[str] = option(
        [], 'for --attention_guidance: phrases of the prompt to hold apart, such as "red fox" "blue bus"'
    )
    attention_strength: float = option(
        0.01,
        "for --attention_guidance: share of the latents' norm by which each step moves them",
        above=0,
        most=1,
    )
    context_steps: int = option(
        0,
        "steps in which the run's learned words are tuned for each prompt before it is drawn, so that the "
        "rest of the prompt counts (CoRe); 10 is usual, 0 is off",
        least=0,
    )
    direction: list[str] = option(
        [],
        "directions that noiseclr has found, to draw along beside the prompt, each as RUN:NUMBER=STRENGTH, "
        "such as runs/directions:3=1.5; a negative strength goes the other way",
    )
    output: str | None = option(
        None, "folder of the images; none means RUN/generated, or ./generated if RUN is no folder"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the weights")
    device: Literal["cpu", "cuda"] | None = option(None, "none means the GPU if there is one")


def generate(words: list[str]) -> None:
    from customize.runs.output import make_folder

    (run, *prompts), config = split(words, GenerateConfig, ["RUN"], more=True)
    check_run(run)
    prompts += prompts_in(config.prompts_file) if config.prompts_file else []
    if not prompts and replaces_prompt(config.subject_adapter or run):
        prompts = [""]
    check_request(run, prompts, config)
    check_context(run, prompts, config)
    subjects = subject_files(config.subject_images)
    check_subjects(run, config)
    folder, pipe = make_folder(output_folder(run, config.output), "--output"), load(run, config)
    if subjects:  # of all prompts, before the first is drawn
        from customize.prompts import check_words

        for prompt in prompts:
            if hasattr(pipe, "adapter"):  # a model that is shown the images needs no word
                check_words(prompt, subjects, pipe.adapter.has_words)
    if config.guidance_scale is None and is_embedded(base_of(run)):
        config.guidance_scale = GUIDANCE
    if subjects and is_embedded(base_of(run)):
        from PIL import Image

        warn_of_photographs([Image.open(file) for files in subjects.values() for file in files])
    for warning in (text for prompt in prompts for text in doubts(pipe, run, prompt)):
        warnings.warn(warning, stacklevel=1)
    for number, prompt in enumerate(prompts, 1):
        if len(prompts) > 1:
            pipe.set_progress_bar_config(desc=f"prompt {number} of {len(prompts)}")
        seeds = range(config.seed, config.seed + config.num_images_per_prompt)
        with context_of(pipe, run, prompt, config):
            images, maps = draw_with_maps(pipe, prompt, seeds, config, subjects)
        for i, (seed, image) in enumerate(zip(seeds, images, strict=True)):
            path = save(image, folder, run, prompt, seed, config)
            print(path)
            for word, own in maps.items():
                print(save_map(own[i], path, word))


def prompts_in(path: str) -> list[str]:
    """The prompts of a text file, one a line."""
    lines = [line.strip() for line in read_text(Path(path)).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_info(run: str) -> dict[str, Any]:
    """`run.json` of a run; what stands for it where `run` is a base model."""
    from customize.runs.folder import info_of

    return info_of(run)


def base_of(run: str) -> str:
    """The name of the base model that a run, or `run` itself, draws with."""
    return run_info(run)["base_model"]


def doubts(pipe: Any, run: str, prompt: str) -> list[str]:
    """Warnings about a prompt: words beyond the text encoders' limit, none of the run's learned words, or
    words that the embedded base model does not know."""
    from customize.backbones.text import lost_words

    info = run_info(run)
    words = list(info["words"])
    found = []
    if is_embedded(base_of(run)):
        own = " ".join([*words, info["config"].get("instance_prompt", "")])
        if unknown := not_understood(without_words(prompt), own):
            found.append(unknown)
    if lost := lost_words(pipe, prompt):
        found.append(
            f"the text encoder does not read the end of '{shortened(prompt)}': '{shortened(lost)}' is lost."
        )
    if words and not any(word in prompt for word in words):
        found.append(
            f"the prompt '{shortened(prompt)}' has none of the run's learned words ({', '.join(words)})."
        )
    return found


def example_prompt(run: str) -> str:
    """A prompt that suits a run, for messages."""
    return run_info(run)["config"].get("instance_prompt") or "a photo of a dog"


def check_request(run: str, prompts: list[str], config: GenerateConfig) -> None:
    """UserError for what cannot be drawn, before a model is loaded."""
    if not prompts:
        raise UserError(f'write "PROMPT" after RUN: customize generate {run} "{example_prompt(run)}".')
    for prompt in prompts:
        if prompt and Path(prompt[:200]).is_dir():
            raise UserError(
                f"'{prompt}' is a folder, not a prompt: give one RUN, and describe the image in words."
            )
    lora_weights(config.lora)
    if config.direction:
        directions_of(config)
    if config.strength != GenerateConfig.strength and not config.init_image:
        raise UserError("--strength needs --init_image, the image to start from.")
    if (config.attention_guidance == "none") != (not config.attention_groups):
        raise UserError("--attention_guidance and --attention_groups belong together: give both or none.")
    if config.attention_groups and config.num_images_per_prompt > 1 and config.init_image:
        raise UserError("--attention_guidance does not go with --init_image; leave one of the two out.")
    if "dual_path" in run_info(run) and (config.init_image or config.subject_images):
        flag = "--init_image" if config.init_image else "--subject_images"
        raise UserError(
            f"{flag}: '{run}' draws with a hard path, which goes with prompts alone; leave it out."
        )
    if config.init_image and (config.height or config.width):
        raise UserError("--height and --width are those of --init_image; leave them out.")
    if config.init_image and not Path(config.init_image).is_file():
        raise UserError(f"--init_image: there is no file '{config.init_image}'.")
    instead = replaces_prompt(config.subject_adapter or run)
    if instead and any(prompt.strip() for prompt in prompts):
        raise UserError(
            f"'{config.subject_adapter or run}' draws from an image in the place of the prompt: leave the "
            "prompt out."
        )
    if not instead and not all(prompt.strip() for prompt in prompts):
        raise UserError('"PROMPT" is empty: describe the image.')
    for name in ("height", "width"):
        if (getattr(config, name) or 0) % 8:
            raise UserError(f"--{name} must be a multiple of 8, not {getattr(config, name)}.")


def output_folder(run: str, output: str | None) -> Path:
    """The output folder for images: never in a base model's folder or in the folders of steps, which a
    run replaces."""
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
    names = ("base_model", "single_file_config")
    base = {name: value for name in names if (value := getattr(config, name))}
    if config.subject_images:
        from customize.pipelines import load_subject_pipeline

        task = {"task": "image-to-image"} if config.init_image else {}
        named = config.subject_adapter, config.image_encoder
        pipe = load_subject_pipeline(run, *named, dtype, **task, **base)
    else:
        pipe = load_pipeline(run, dtype=dtype, **base)
    add_loras(pipe, config.lora)
    return set_up(pipe, config).to(device)


def lora_weights(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """The files and weights of --lora; UserError for a file that does not exist and a weight that is no
    number."""
    found = []
    for text in texts:
        name, weight = text, 1.0
        if not Path(text).exists() and ":" in text:
            name, _, number = text.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                raise UserError(f"--lora: the weight of '{text}' is no number; write FILE:0.8.") from None
        if not Path(name).exists():
            raise UserError(f"--lora: there is no '{name}'; give a run or a LoRA file.")
        if not abs(weight) < 100:
            raise UserError(
                f"--lora: the weight of '{name}' must be a number between -100 and 100, not {weight}."
            )
        found.append((Path(name), weight))
    return found


def add_loras(pipe: Any, texts: Sequence[str]) -> None:
    """Loads the LoRAs of --lora beside that of the run, with their learned words, each at its weight."""
    if not texts:
        return
    from customize.adapters.lora_reading import load_lora
    from customize.runs.checkpoint import load, open_run
    from customize.runs.folder import INFO

    weights = dict.fromkeys(pipe.get_active_adapters(), 1.0)
    for path, weight in lora_weights(texts):
        before = {name for names in pipe.get_list_adapters().values() for name in names}
        if (path / INFO).exists():
            load(path, pipe, open_run(path))
        else:
            load_lora(path, pipe)
        added = {name for names in pipe.get_list_adapters().values() for name in names} - before
        if not added:
            raise UserError(f"--lora: '{path}' has no LoRA; it cannot be added to another run.")
        weights |= dict.fromkeys(added, weight)
    pipe.set_adapters(list(weights), list(weights.values()))


SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
}


def set_up(pipe: Any, config: GenerateConfig) -> Any:
    """The pipeline with the scheduler, the LoRA's strength and the task that are asked for."""
    if config.scheduler:
        pipe.scheduler = make_scheduler(config.scheduler, pipe.scheduler)
    if config.lora_scale != GenerateConfig.lora_scale and config.lora:
        raise UserError(
            "--lora_scale is the strength of the run's one LoRA; with --lora give weights: FILE:0.8."
        )
    if config.lora_scale != GenerateConfig.lora_scale:
        adapters = pipe.get_active_adapters() if hasattr(pipe, "get_active_adapters") else []
        if not adapters:
            raise UserError("--lora_scale: this run has no LoRA; leave it out.")
        pipe.set_adapters(adapters, [config.lora_scale] * len(adapters))
    if config.init_image and not config.subject_images:
        from diffusers import AutoPipelineForImage2Image

        from customize.backbones.families import family_of
        from customize.backbones.text import expand_words

        if family_of(pipe).needs_references:
            raise UserError(
                "--init_image: this model edits images; name yours with --subject_images instead."
            )

        pipe = AutoPipelineForImage2Image.from_pipe(pipe)
        expand_words(pipe)
    return pipe


def make_scheduler(name: str, present: Any) -> Any:
    """A scheduler by its short name or diffusers class, with the settings of the present one.

    UserError if there is none of this name, or if one is for flow models and the other for DDPM models.
    """
    import diffusers

    kind: Any = getattr(diffusers, SCHEDULERS.get(name.lower(), name), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise UserError(
            f"--scheduler: there is no '{name}'; use {', '.join(SCHEDULERS)} or a diffusers class."
            f"{nearest(name, SCHEDULERS)}"
        )
    made = cast(Any, kind).from_config(present.config)
    if hasattr(made, "alphas_cumprod") != hasattr(present, "alphas_cumprod"):
        raise UserError(
            f"--scheduler {name} does not fit this base model, which uses {type(present).__name__}."
        )
    return made


def subject_files(words: Sequence[str]) -> dict[str, list[str]]:
    """The images of each subject: FILE is of `<s>`, '<s2>=FILE' of `<s2>`."""
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
            raise UserError(f"--{flag} needs --subject_images, images of what the prompt calls <s>.")
    from customize.adapters import holds_encoder

    if holds_encoder(run):
        raise UserError(
            f"'{run}' is a subject encoder: name images of what the prompt calls <s> with --subject_images."
        )


def draw(
    pipe: Any,
    prompt: str,
    seeds: Sequence[int],
    config: GenerateConfig,
    subjects: dict | None = None,
    **given: Any,
) -> list[Any]:
    """An image for each seed; `given` are more arguments of the pipeline's call."""
    import torch

    from customize.backbones.families import as_called

    if subjects:
        given["subject_images"] = subjects
    if subjects and config.subject_scale != GenerateConfig.subject_scale:
        given["subject_scale"] = config.subject_scale
    if subjects and config.side_by_side:
        given["subject_masks"] = "side by side"
    if config.init_image:
        from customize.imaging import flatten, read_image

        image = flatten(read_image(Path(config.init_image), MOST_PIXELS))
        sides = [side // 8 * 8 for side in image.size]
        given |= {"image": image.resize(sides), "strength": config.strength}
    optional = {
        name: getattr(config, name) for name in ("guidance_scale", "negative_prompt", "height", "width")
    }
    if config.attention_groups:
        from customize.pipelines.guidance import AttentionGuidance

        kind: Any = config.attention_guidance
        guidance = AttentionGuidance(pipe, prompt, config.attention_groups, kind, config.attention_strength)
        given |= guidance.arguments
    arguments = {
        "prompt": prompt,
        "num_images_per_prompt": len(seeds),
        "num_inference_steps": config.num_inference_steps,
        # on the CPU, so that a seed gives the same noise on every device, and one for each image, so that
        # each can be drawn again alone
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **{name: value for name, value in optional.items() if value not in (None, "")},
        **given,
    }
    with along(pipe, config):
        return pipe(**as_called(pipe, arguments)).images


def directions_of(config: GenerateConfig) -> list[Any]:
    """The directions of --direction; UserError for one that cannot be read."""
    from customize.pipelines.directions import parse_direction

    return [parse_direction(text) for text in config.direction]


def along(pipe: Any, config: GenerateConfig) -> AbstractContextManager[None]:
    """Context in which images follow the directions of --direction, if there are any."""
    if not config.direction:
        return nullcontext()
    from customize.pipelines.directions import directed

    return directed(pipe, directions_of(config))


def replaces_prompt(name: str) -> bool:
    """Whether `name`, a run or a file, is an encoder that takes the place of the prompt."""
    from customize.adapters import subject_files

    return subject_files.replaces_prompt(name)


def class_words(run: str) -> dict[str, str]:
    """The learned words of a run, with the words of their classes; empty where a class is not known."""
    info = run_info(run)
    names = (info["config"].get(name) or "" for name in ("placeholder_token", "initializer_token"))
    words, starts = (name.split("+") for name in names)
    return {
        word: start for word, start in zip(words, starts, strict=False) if word in info["words"] and start
    }


def check_context(run: str, prompts: list[str], config: GenerateConfig) -> None:
    """UserError where words cannot be tuned for a prompt."""
    if not config.context_steps:
        return
    info, words = run_info(run), class_words(run)
    if not info["words"] or info["config"].get("optimize") == "output":
        raise UserError(
            f"--context_steps tunes words that the text encoder reads, and '{run}' has none; leave it out."
        )
    if not words:
        raise UserError(
            f"--context_steps compares a word with its class's, which '{run}' does not name; leave it out."
        )
    if config.init_image:
        raise UserError("--context_steps does not go with --init_image; leave one of the two out.")
    for prompt in prompts:
        if not any(word in prompt for word in words):
            raise UserError(
                f"--context_steps: the prompt '{shortened(prompt)}' has none of the run's learned words "
                f"({', '.join(words)})."
            )


def context_of(pipe: Any, run: str, prompt: str, config: GenerateConfig) -> AbstractContextManager[None]:
    """Context in which the run's words are tuned for a prompt, if that was asked for."""
    if not config.context_steps:
        return nullcontext()
    from customize.pipelines.context_tuning import context_tuned

    return context_tuned(pipe, prompt, class_words(run), config.context_steps, seed=config.seed)


def draw_with_maps(
    pipe: Any, prompt: str, seeds: Sequence[int], config: GenerateConfig, subjects: dict | None = None
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The images, and for each word of --attention_maps the images under its maps."""
    if not config.attention_maps:
        return draw(pipe, prompt, seeds, config, subjects), {}
    from customize.pipelines.guidance import overlay, word_maps

    with word_maps(pipe, prompt, config.attention_maps) as maps:
        images = draw(pipe, prompt, seeds, config, subjects)
    return images, {word: [*map(overlay, images, own)] for word, own in maps.items()}


def save(image: Any, folder: Path, run: str, prompt: str, seed: int, config: GenerateConfig) -> Path:
    """Writes the image, with the settings that reproduce it, under a name that is not taken yet."""
    from customize.runs.output import save_image

    parameters = {"run": run, "prompt": prompt, "negative_prompt": config.negative_prompt, "seed": seed}
    parameters |= {"steps": config.num_inference_steps, "scale": config.guidance_scale, "dtype": config.dtype}
    parameters |= {"width": image.width, "height": image.height}
    settings = ("scheduler", "lora_scale", "init_image", "strength", "base_model", "attention_guidance")
    for name in (*settings, "single_file_config", "attention_strength", "context_steps"):
        if getattr(config, name) != getattr(GenerateConfig, name):
            parameters[name] = getattr(config, name)
    for name in ("attention_groups", "lora", "direction"):
        if getattr(config, name):
            parameters[name] = getattr(config, name)
    if config.subject_images:
        names = ("subject_images", "subject_scale", "side_by_side", "subject_adapter", "image_encoder")
        parameters |= {name: getattr(config, name) for name in names}
    stem, text = f"{slug(prompt)}-{seed}", json.dumps(without_places(parameters))
    for path in (
        folder / f"{stem}{ending}.png" for ending in chain([""], (f"-{number}" for number in count(2)))
    ):
        if not path.exists():
            with suppress(FileExistsError):  # another program draws into the folder too
                save_image(image, path, exclusive=True, texts={"parameters": text})
                break
    return path


def save_map(image: Any, beside: Path, word: str) -> Path:
    """Writes an attention map beside its image."""
    from customize.runs.output import save_image

    path = beside.with_name(f"{beside.stem}-map-{slug(word)}.png")
    save_image(image, path)
    return path


def slug(prompt: str) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.lower())[:50].strip("-")
    return words.encode()[:150].decode(errors="ignore") or "image"  # names of files have at most 255 bytes

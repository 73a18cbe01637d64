"""From the words of a command line to a finished run."""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from customize import embedded
from customize.cache import TensorCache
from customize.config import build, check_config, help_text, read_given, table
from customize.data.concepts import Concept
from customize.data.training_data import Preparation, TrainingData
from customize.errors import UserError, nearest, parameters_named
from customize.quiet import quiet_libraries
from customize.randomness import fixed_randomness
from customize.runs.card import write_card
from customize.runs.output import check_writable
from customize.trainers.claim import (
    check_output,
    check_progress,
    claimed_output,
    clear_output,
    resumed_folder,
)
from customize.trainers.continuation import PLACES, check_same_inputs, check_same_settings, earlier_settings
from customize.trainers.dry_run import dry_run
from customize.trainers.interruption import interruption
from customize.trainers.loop import train
from customize.trainers.memory import RunPlan
from customize.trainers.methods.base import Method
from customize.trainers.optimizers import check_optimizer, make_optimizer, optimizer_defaults
from customize.trainers.prepare import add_assistant, check_quantizations, load_backbone
from customize.trainers.registry import display_name, find_method, general_usage
from customize.trainers.scorers import check_scored, make_scorer
from customize.trainers.session import enable_xformers
from customize.trainers.settings import (
    ModelConfig,
    TrainConfig,
    check_settings,
    make_accelerator,
)

HELP = {"--help", "-h"}
Configs = tuple[ModelConfig, Any, TrainConfig, Any]  # of base model, data, training and method


def configs(method: type[Method]) -> list[type]:
    return [ModelConfig, method.Source.Config, TrainConfig, method.Config]


def usage(name: str) -> str:
    """The help of a method: what it is, its defaults on the embedded model, and its flags."""
    method = find_method(name)
    title = " ".join((sys.modules[method.__module__].__doc__ or "").strip().split("\n\n")[0].split())
    there = described(method.defaults_for(embedded.NAME, {}))
    note = f"On the embedded base model, {embedded.NAME}, other defaults are used: {there}."
    flags = help_text(configs(method), method.defaults_for("", {}))
    return f"customize train {name} [FILE.yaml] [--flag value ...]\n\n{title}\n\n{note}\n\n{flags}"


def described(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "none"


def train_command(words: list[str]) -> None:
    """`customize train`: trains, or prints the help of a method."""
    if words and words[0] in HELP:
        return print(general_usage())
    if not words:
        raise UserError("customize train needs a METHOD: `customize methods` lists them.")
    find_method(words[0])
    if HELP & set(words):
        return print(usage(words[0]))
    quiet_libraries()
    if folder := run(words):
        print(f"the run is in {folder}")


def run(words: list[str]) -> Path | None:
    """Trains the method `words[0]` under the settings of the other words; returns the run folder, None for a
    dry run, which makes none."""
    made, defaults = complete(words[0], read_given(configs(find_method(words[0])), words[1:]))
    return launch(words[0], *made, defaults=defaults)


def train_method(method: str, **settings: Any) -> Path | None:
    """Trains a method from Python; returns the run folder, None for a dry run, which makes none. `settings`
    have the names of the command line's flags.

    UserError for a method or a setting that does not exist, and for what the user can mend.
    """
    known = table(configs(find_method(method)))
    for name in settings:
        if name not in known:
            raise UserError(
                f"{method} has no setting '{name}': customize train {method} --help lists them."
                f"{nearest(name, known)}"
            )
    values = {known[name].name: _plain(value) for name, value in settings.items()}
    with parameters_named():
        made, defaults = complete(method, values)
        return launch(method, *made, defaults=defaults)


def _plain(value: Any) -> Any:
    """A setting from Python as settings are kept: paths as text, tuples as lists."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def complete(name: str, given: Mapping[str, Any]) -> tuple[Configs, dict[str, Any]]:
    """The configurations of a run, and which of the method's defaults are in them.

    What is not given is taken from the run that is resumed, else from the method's defaults on this base
    model, else from the configurations' own defaults.
    """
    method = find_method(name)
    kinds = configs(method)
    if {"max_train_steps", "num_train_epochs"} <= given.keys():
        raise UserError("--max_train_steps and --num_train_epochs both say when to stop; leave one out.")
    earlier = earlier_settings(given, table(kinds))
    base = (earlier | given).get("pretrained_model_name_or_path", embedded.NAME)
    defaults = {} if earlier else optimizer_defaults(given, method.defaults_for(base, given))
    used = {setting: value for setting, value in defaults.items() if setting not in given}
    model, data, train, own = (build(kind, defaults | earlier | given) for kind in kinds)
    return (model, data, train, own), used


def launch(
    name: str,
    model_config: ModelConfig,
    data_config: Any,
    train_config: TrainConfig,
    method_config: Any,
    defaults: Mapping[str, Any] | None = None,
) -> Path | None:
    """Checks what can be checked, prepares, trains, and writes the run folder with its model card.

    `data_config` and `method_config` are instances of the method's `Source.Config` and `Config`; `defaults`
    are those of their settings that the user did not choose, to be said. UserError for what the user can
    mend.
    """
    kind, base = find_method(name), model_config.pretrained_model_name_or_path
    parts = model_config, data_config, train_config, method_config
    for part in parts:
        check_config(part)
    check_settings(kind, model_config, data_config, train_config)
    check_optimizer(train_config)
    kind.check_settings(model_config, train_config, method_config)
    config = {k: v for part in parts for k, v in asdict(part).items()}
    if train_config.dry_run:
        report(name, kind, parts, config, defaults or {})
        return None
    with claimed_output(model_config, train_config, config):
        resumed = resumed_folder(train_config)
        check_same_settings(resumed, config, table(configs(kind)))
        source = kind.Source.read(data_config, base, train_config.seed)
        accelerator = make_accelerator(train_config)
        scorer = None
        if train_config.validation_metric == "score":
            with fixed_randomness(train_config.seed):  # loading encoders draws random numbers
                word = method_config.starting_word
                scorer = make_scorer(train_config, base, source.concepts, source.images, word)
        backbone = load_backbone(model_config, data_config, accelerator)
        kind.check_base(backbone)
        source.check(backbone)
        info: dict[str, Any] = {"base_model": embedded.lasting_name(base), "method": display_name(name)}
        info["base_fingerprint"] = backbone.fingerprint()
        kind.prepare_data(source, backbone, train_config, method_config, accelerator)
        if model_config.assistant_lora:
            add_assistant(backbone, model_config.assistant_lora)
        method = kind(backbone, method_config, source.concepts)
        with backbone.denoiser_left_out():
            method.to(accelerator.device)
        method.check_drawing(train_config.validation_prompt)
        data = source.prepare(method, preparation(model_config, train_config, accelerator))
        backbone.denoiser.to(accelerator.device)  # now that the text encoders may be gone
        if train_config.num_train_epochs:
            train_config.max_train_steps = steps_of(data, train_config, accelerator)
            check_progress(train_config)
        places = {name: embedded.lasting_name(config[name]) for name in PLACES}
        info |= {"config": config | places | {"max_train_steps": train_config.max_train_steps}}
        info |= data.described() | method.described()
        check_same_inputs(resumed, info)
        clear_output(train_config, accelerator)
        if accelerator.is_main_process:
            announce(name, source, data, method, train_config, accelerator, defaults or {})
        train(method, data, train_config, accelerator, info, scorer)
        return finish(model_config, train_config, source.concepts, accelerator)


def report(
    name: str, kind: type[Method], parts: Configs, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Prints what a run would be and how much memory it would take. UserError for what the run would refuse,
    as far as weights do not decide it."""
    model_config, data_config, train_config, _ = parts
    base = model_config.pretrained_model_name_or_path
    check_output(model_config, train_config, config)
    if model_config.cache_dir:
        check_writable(Path(model_config.cache_dir), "--cache_dir")
    resumed = resumed_folder(train_config)
    check_same_settings(resumed, config, table(configs(kind)))
    source: Any = kind.Source.read(data_config, base, train_config.seed)
    if train_config.validation_metric == "score":
        check_scored(train_config, source.concepts)
    accelerator = make_accelerator(train_config)
    check_quantizations(model_config, accelerator)

    def check(method: Method, data: TrainingData) -> None:
        if train_config.num_train_epochs:
            train_config.max_train_steps = steps_of(data, train_config, accelerator)
            check_progress(train_config)
        if "" not in data.digests:  # of class images that are still to be drawn
            check_same_inputs(resumed, data.described() | method.described())
        make_optimizer(method, train_config, accelerator.num_processes)
        if train_config.enable_xformers_memory_efficient_attention:
            enable_xformers(method)
        announce(name, source, data, method, train_config, accelerator, defaults or {})

    planned = RunPlan(kind, *parts, source)
    print(dry_run(display_name(name), planned, accelerator, check))


def announce(
    name: str,
    source: Any,
    data: TrainingData,
    method: Method,
    config: TrainConfig,
    accelerator: Accelerator,
    defaults: Mapping[str, Any],
) -> None:
    """Says what a run will do, and warns of words that its base model does not know."""
    base = method.backbone.name
    warn_of_words(source, method, base, config)
    print(plan(name, base, data, method, config, accelerator.num_processes))
    if defaults:
        print(f"used, as nothing else is set: {described(defaults)}")


def warn_of_words(source: Any, method: Method, base: str, config: TrainConfig) -> None:
    """Warns of words that the embedded base model does not know, if it is the one that is trained on."""
    if embedded.is_embedded(base):
        starts = getattr(method.config, "initializer_token", "").split("+")
        classes = [concept.class_prompt for concept in source.concepts]
        embedded.warn_of_words(
            source.captions, method.learned_words, classes, starts, config.validation_prompt
        )


def preparation(
    model_config: ModelConfig, train_config: TrainConfig, accelerator: Accelerator
) -> Preparation:
    folder = Path(model_config.cache_dir) if model_config.cache_dir else None
    cache = TensorCache(folder) if model_config.cache_latents else None
    place = accelerator.process_index, accelerator.num_processes
    return Preparation(train_config.train_batch_size, cache, train_config.validation_prompt, *place)


def batch_of(config: TrainConfig, processes: int) -> int:
    """The images that one optimizer step sees, over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes


def steps_of(data: TrainingData, config: TrainConfig, accelerator: Accelerator) -> int:
    """The optimizer steps of `num_train_epochs`; UserError for data without an end."""
    if not (batches := data.batches_in_epoch(config.train_batch_size)):
        raise UserError("--num_train_epochs: this data has no end; give --max_train_steps instead.")
    together = config.gradient_accumulation_steps * accelerator.num_processes
    return math.ceil(round(config.num_train_epochs * batches / together, 6))  # means are not exact


def plan(
    name: str, base: str, data: TrainingData, method: Method, config: TrainConfig, processes: int
) -> str:
    """What a run will do, in one line."""
    steps, batch = config.max_train_steps, batch_of(config, processes)
    if batches := data.batches_in_epoch(config.train_batch_size):
        together = config.gradient_accumulation_steps * processes
        epochs = f" ({steps * together / batches:.3g} epochs)"
    else:
        epochs = ""
    count = sum(parameter.numel() for parameter in method.trainable().values())
    done = f"{steps} steps of {batch} image{'s' * (batch > 1)}{epochs}"
    return f"{display_name(name)} on {base}: {data.size}, {done}, {count:,} trained parameters"


def finish(
    model_config: ModelConfig, train_config: TrainConfig, concepts: list[Concept], accelerator: Accelerator
) -> Path:
    """Writes the model card of the run folder, and uploads it if that was asked for."""
    output = Path(train_config.output_dir)
    if accelerator.is_main_process:
        with interruption():  # a signal lets the complete run have its card
            write_card(output, concepts)
        if model_config.push_to_hub:
            from customize.runs.hub import push

            print(push(output, model_config.hub_model_id, model_config.hub_private_repo))
    return output

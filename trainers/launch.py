"""From the words of a command line to a finished run."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from customize.cache import TensorCache
from customize.config import build, check_ranges, help_text, parse, table
from customize.data.concepts import Concept
from customize.data.training_data import Preparation
from customize.errors import UserError, nearest
from customize.quiet import quiet_libraries
from customize.randomness import fixed_randomness
from customize.runs.card import write_card
from customize.trainers.interruption import interruption
from customize.trainers.loop import train
from customize.trainers.methods.base import Method
from customize.trainers.output import claimed_output, clear_output
from customize.trainers.prepare import load_backbone
from customize.trainers.registry import find_method
from customize.trainers.scorers import make_scorer
from customize.trainers.settings import ModelConfig, TrainConfig, check_settings, make_accelerator


def configs(method: type[Method]) -> list[type]:
    return [ModelConfig, method.Source.Config, TrainConfig, method.Config]


def usage(name: str) -> str:
    method = find_method(name)
    title = (sys.modules[method.__module__].__doc__ or "").strip().splitlines()[0]
    return f"customize train {name} [FILE.yaml] [--flag value ...]\n\n{title}\n\n{help_text(configs(method))}"


def train_command(words: list[str]) -> None:
    """`customize train`: trains, or prints the help of a method."""
    if not words:
        raise UserError("customize train needs a METHOD: `customize methods` lists them.")
    find_method(words[0])
    if {"--help", "-h"} & set(words):
        return print(usage(words[0]))
    quiet_libraries()
    print(f"the run is in {run(words)}")


def run(words: list[str]) -> Path:
    """Trains the method `words[0]` under the settings of the other words; returns the run folder."""
    method_class = find_method(words[0])
    model, data, settings, options = parse(configs(method_class), words[1:])
    return launch(words[0], model, data, settings, options)


def train_method(method: str, **settings: Any) -> Path:
    """Trains a method from Python; returns the run folder. `settings` have the names of the command line's
    flags.

    UserError for a method or a setting that there is none of, and for what the user can mend.
    """
    kinds = configs(find_method(method))
    known = table(kinds)
    for name in settings:
        if name not in known:
            raise UserError(
                f"{method} has no setting '{name}': customize train {method} --help lists them."
                f"{nearest(name, known)}"
            )
    values = {known[name].name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    return launch(method, *(build(kind, values) for kind in kinds))


def launch(name: str, model: ModelConfig, data: Any, settings: TrainConfig, options: Any) -> Path:
    """Checks what can be checked, prepares, trains, and writes the run folder with its model card.

    `data` and `options` are instances of the method's `Source.Config` and `Config`. UserError for what the
    user can mend.
    """
    kind, base = find_method(name), model.pretrained_model_name_or_path
    for part in (model, data, settings, options):
        check_ranges(part)  # of configurations that were made in Python
    check_settings(model, data, settings)
    kind.check_settings(model, settings, options)
    config = {k: v for part in (model, data, settings, options) for k, v in asdict(part).items()}
    with claimed_output(model, settings, config):
        source = kind.Source.read(data, base, settings.seed)
        accelerator = make_accelerator(settings)
        scorer = None
        if settings.validation_metric == "score":
            with fixed_randomness(settings.seed):  # loading encoders draws random numbers
                scorer = make_scorer(settings, base, source.concepts, source.images, options.starting_word)
        backbone = load_backbone(model, data, accelerator)
        source.check(backbone)
        kind.prepare_data(source, backbone, settings, options, accelerator)
        method = kind(backbone, options, source.concepts).to(accelerator.device)
        method.check_drawing(settings.validation_prompt)
        training_data = source.prepare(method, preparation(model, settings, accelerator))
        clear_output(settings, accelerator)
        info: dict[str, Any] = {"base_model": base, "method": name, "config": config}
        if training_data.digests:
            info["dataset"] = training_data.digests
        train(method, training_data, settings, accelerator, info, scorer)
        return finish(model, settings, source.concepts, accelerator)


def preparation(model: ModelConfig, settings: TrainConfig, accelerator: Accelerator) -> Preparation:
    cache = TensorCache(Path(model.cache_dir) if model.cache_dir else None) if model.cache_latents else None
    place = accelerator.process_index, accelerator.num_processes
    return Preparation(settings.train_batch_size, cache, settings.validation_prompt, *place)


def finish(model: ModelConfig, settings: TrainConfig, concepts: list[Concept], accelerator) -> Path:
    """Writes the model card of the run folder, and uploads it if that was asked for."""
    output = Path(settings.output_dir)
    if accelerator.is_main_process:
        with interruption():  # a signal lets the complete run have its card
            write_card(output, concepts)
        if model.push_to_hub:
            from customize.runs.hub import push

            print(push(output, model.hub_model_id, model.hub_private_repo))
    return output

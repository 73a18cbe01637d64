"""`accelerate launch -m customize.trainers METHOD [FILE.yaml] [--flag value ...]`: the trainer that `customize train` runs."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from customize.cache import TensorCache
from customize.card import write_card
from customize.config import check_ranges, help_text, parse
from customize.data import Concept, DataConfig, SubjectDataset, read_concepts, split_holdout
from customize.errors import UserError, shortened
from customize.pictures import Picture
from customize.trainers.loop import interruption, train
from customize.trainers.method import Method
from customize.trainers.prepare import (
    LatentDataset,
    cache_text,
    check_captions,
    check_lengths,
    class_pictures,
    held_out_batches,
    read_pictures,
)
from customize.trainers.references import ReferenceConfig
from customize.trainers.registry import find_method
from customize.trainers.selection import make_scorer
from customize.trainers.settings import TrainConfig, make_accelerator
from customize.trainers.setup import ModelConfig, check_settings, claimed_output, clear_output, load_backbone
from customize.trainers.sources import read_references
from customize.trainers.state import fixed_randomness


def configs(method: type[Method]) -> list[type]:
    return [ModelConfig, method.Data, TrainConfig, method.Config]


def usage(name: str) -> str:
    method = find_method(name)
    title = (sys.modules[method.__module__].__doc__ or "").strip().splitlines()[0]
    return f"customize train {name} [FILE.yaml] [--flag value ...]\n\n{title}\n\n{help_text(configs(method))}"


def run(words: list[str]) -> Path:
    """Trains the method `words[0]` under the settings of the other words; returns the run folder."""
    method_class = find_method(words[0])
    model, data, settings, options = parse(configs(method_class), words[1:])
    return launch(words[0], model, data, settings, options)


def launch(name: str, model: ModelConfig, data: DataConfig | ReferenceConfig, settings: TrainConfig, options) -> Path:
    """Checks what can be checked, prepares, trains, and writes the run folder with its model card."""
    for part in (model, data, settings, options):
        check_ranges(part)  # of configurations that were made in Python
    check_settings(model, data, settings)
    config = {k: v for part in (model, data, settings, options) for k, v in asdict(part).items()}
    with claimed_output(model, settings, config):
        start = launch_encoder if isinstance(data, ReferenceConfig) else launch_subject
        return start(name, model, data, settings, options, config)


def launch_subject(name: str, model: ModelConfig, data: DataConfig, settings: TrainConfig, options, config: dict) -> Path:
    concepts = read_concepts(data)
    pictures = read_pictures(concepts, data)
    train_pictures, held_out = split_holdout(pictures, data.holdout, settings.seed)
    accelerator = make_accelerator(settings)
    scorer = None
    if settings.validation_metric == "score":
        starts, base = getattr(options, "initializer_token", ""), model.pretrained_model_name_or_path
        with fixed_randomness(settings.seed):  # loading encoders draws random numbers
            scorer = make_scorer(settings, base, concepts, train_pictures, starts)
    backbone = load_backbone(model, data, accelerator)
    prompts = {f"class prompt '{shortened(concept.class_prompt)}'": concept.class_prompt for concept in concepts}
    check_lengths(backbone, prompts | {f"caption of '{p.path}'": p.caption for p in [*train_pictures, *held_out]})
    if getattr(options, "with_prior_preservation", False) and options.prior_source == "images":
        train_pictures += prior_pictures(backbone, concepts, settings, data, options, accelerator)
    method = find_method(name)(backbone, options, concepts).to(accelerator.device)
    check_captions(method, [*train_pictures, *held_out])
    dataset, validation = prepared(method, train_pictures, held_out, model, data, settings)
    clear_output(settings, accelerator)
    info: dict[str, Any] = {"base_model": model.pretrained_model_name_or_path, "method": name, "config": config}
    info["dataset"] = sorted(p.digest for p in train_pictures)
    train(method, dataset, settings, accelerator, validation, info, scorer)
    return finish(model, settings, concepts, accelerator)


def launch_encoder(name: str, model: ModelConfig, data: ReferenceConfig, settings: TrainConfig, options, config: dict) -> Path:
    """The same for a method that trains a subject encoder, from many subjects."""
    if settings.validation_prompt and not options.validation_images:
        raise UserError("--validation_prompt: name pictures of the subject to draw with --validation_images.")
    if settings.validation_metric == "score":
        raise UserError("--validation_metric score rates runs of one subject; an encoder's best step goes by --holdout's loss.")
    if model.cache_dir or settings.export_kohya:
        flag = "--cache_dir" if model.cache_dir else "--export_kohya"
        raise UserError(f"{flag} is for LoRA and learned words; an encoder sees new pictures at every step and is one file.")
    accelerator = make_accelerator(settings)
    backbone = load_backbone(model, data, accelerator)
    method = find_method(name)(backbone, options).to(accelerator.device)
    method.check_drawing(settings.validation_prompt)
    train_set, held_out = read_references(model, data, settings, method.tower.pixels, accelerator)
    clear_output(settings, accelerator)
    info: dict[str, Any] = {"base_model": model.pretrained_model_name_or_path, "method": name, "config": config}
    train(method, train_set, settings, accelerator, held_out, info)
    return finish(model, settings, [], accelerator)


def finish(model: ModelConfig, settings: TrainConfig, concepts: list[Concept], accelerator) -> Path:
    """Writes the model card of the run folder, and uploads it if that was asked for."""
    output = Path(settings.output_dir)
    if accelerator.is_main_process:
        with interruption():  # a signal lets the complete run have its card
            write_card(output, concepts)
        if model.push_to_hub:
            from customize.hub import push

            print(push(output, model.hub_model_id, model.hub_private_repo))
    return output


def prior_pictures(
    backbone, concepts: list[Concept], settings: TrainConfig, data: DataConfig, options, accelerator
) -> list[Picture]:
    """Every concept's class pictures; the first process draws those that are missing."""
    found: list[Picture] = []
    with accelerator.main_process_first(), accelerator.autocast():
        for i, concept in enumerate(concepts):
            if not concept.class_prompt:
                raise UserError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog".')
            folder = Path(concept.class_data_dir or f"{settings.output_dir}/class_images/{i}")
            count, at_once = options.num_class_images, options.sample_batch_size
            found += class_pictures(backbone, concept, i, folder, count, data, settings.seed, at_once)
    return found


def prepared(
    method: Method,
    pictures: list[Picture],
    held_out: list[Picture],
    model: ModelConfig,
    data: DataConfig,
    settings: TrainConfig,
):
    """The training set and the held-out batches, encoded once where nothing that trains could change them."""
    factor, device = method.backbone.factor, method.backbone.device
    dataset, held = SubjectDataset(pictures, data, factor), SubjectDataset(held_out, data, factor)
    if model.cache_latents:
        cache = TensorCache(Path(model.cache_dir) if model.cache_dir else None)
        dataset, held = LatentDataset(dataset, method.backbone, cache), LatentDataset(held, method.backbone, cache)
        cache_text(method, [*pictures, *held_out], settings.validation_prompt, cache)
        if not settings.validation_prompt:
            method.backbone.vae.cpu()  # nothing is encoded or decoded any more
    return dataset, held_out_batches(held, device)


def main() -> int:
    from customize.app.cli import main as cli

    return cli(["train", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())

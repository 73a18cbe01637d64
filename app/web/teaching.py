"""What the page proposes for teaching: a method by what one has, its settings, and a check of the images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from PIL import Image

from customize.config import Flag, build, flags_of, members
from customize.embedded import RARE, is_embedded
from customize.errors import UserError
from customize.trainers.launch import configs
from customize.trainers.optimizers import optimizer_defaults
from customize.trainers.registry import find_method


class Case(NamedTuple):
    """What a user has, and the method for it."""

    name: str
    method: str
    hint: str


CASES = (
    Case("a few images of one thing", "dreambooth", "3 to 20 images that differ in place, side and distance"),
    Case("one cut-out image", "single_insert", "one image, cut out of its background"),
    Case("several things in each image", "mcpl", "each image shows the same two or three things"),
    Case("a style", "dreambooth", "5 to 20 images in one style, of different things"),
)
# of text: those that name no file, folder or address
PROPOSED = {"instance_prompt", "class_prompt", "placeholder_token", "initializer_token"}
TEXTS = PROPOSED | {"lora_layers"}
OUTSIDE = {"push_to_hub", "hub_private_repo", "allow_outside_files", "dataloader_num_workers"}
SET_HERE = OUTSIDE | {"dry_run", "overwrite_output_dir", "validation_steps", "checkpointing_steps"}
# what visitors may set: nothing that takes more memory or time than the page's own settings
GUESTS = PROPOSED | {"max_train_steps", "learning_rate", "lr_scheduler", "rank", "seed", "snr_gamma"}
VALIDATIONS = 5  # of a run


def case_of(images: Sequence[Image.Image]) -> Case:
    """The case that images speak for."""
    if len(images) == 1 and images[0].has_transparency_data:
        return CASES[1]
    return CASES[0]


def case_named(name: str) -> Case:
    found = next((case for case in CASES if case.name == name), None)
    if found is None:
        raise UserError(f"Choose what you have: {', '.join(case.name for case in CASES)}.")
    return found


def proposed(case: Case, words: str) -> dict[str, Any]:
    """The settings of a case; `words` are what the images show, such as fox, or fox, bus."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    if case.name == "several things in each image":
        if len(names) < 2:
            raise UserError("Name the things in the images, with commas between: fox, bus.")
        marks = [f"<my-{name.replace(' ', '-')}>" for name in names]
        return {
            "instance_prompt": f"a {' and a '.join(marks)}",
            "placeholder_token": "+".join(marks),
            "initializer_token": "+".join(name.split()[-1] for name in names),
        }
    if case.name == "a style":
        return {"instance_prompt": f"a {RARE[1]} {names[0] if names else 'image'}"}
    if len(names) != 1:
        raise UserError("Name in one word what the images show, such as fox.")
    if case.method == "single_insert":
        mark = f"<my-{names[0].replace(' ', '-')}>"
        return {
            "instance_prompt": f"a {mark}",
            "placeholder_token": mark,
            "initializer_token": names[0].split()[-1],
        }
    return {"instance_prompt": f"a {RARE[0]} {names[0]}", "class_prompt": f"a {names[0]}"}


def defaults_for(method: str, base: str) -> dict[str, Any]:
    """Every setting of a method as it is used on a base model if nothing is set."""
    kind = find_method(method)
    own = {flag.name: flag.default for cls in configs(kind) for flag in flags_of(cls)}
    return own | kind.defaults_for(base, {})


def settings_of(case: Case, base: str, words: str, images: Path, expert: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run; UserError for expert settings that do not exist here or do not fit."""
    kinds = configs(find_method(case.method))
    for name in expert:
        if name not in {flag.name for flag in expert_flags(case.method)}:
            raise UserError(f"'{str(name)[:60]}' is no setting of this method that can be set here.")
    values = defaults_for(case.method, base) | proposed(case, words) | dict(expert)
    steps = int(values["max_train_steps"])
    every = max(steps // VALIDATIONS, 1)
    own = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(images),
        "validation_prompt": validation_prompts(str(values["instance_prompt"])),
        "validation_steps": every,
        "checkpointing_steps": every,
        "checkpoints_total_limit": 0,  # any step can be chosen by eye
    }
    for kind in kinds:
        build(kind, values | own)  # refuses what does not fit
    plain = defaults_for(case.method, base)
    return {name: value for name, value in (values | own).items() if plain.get(name) != value or name in own}


def validation_prompts(prompt: str) -> list[str]:
    """What is drawn while a run goes on: the subject as it was taught, and in another place."""
    return [f"{prompt} on the beach", f"{prompt} in the snow"]


def expert_flags(method: str, owner: bool = True) -> list[Flag]:
    """The settings of a method that the page offers its owner, or others: numbers, switches and choices, and
    texts that name no file."""
    found = [flag for cls in configs(find_method(method)) for flag in flags_of(cls)]
    safe = [flag for flag in found if flag.name not in SET_HERE and (flag.name in TEXTS or _is_safe(flag))]
    return [flag for flag in safe if owner or flag.name in GUESTS]


def _is_safe(flag: Flag) -> bool:
    """Whether a setting can hold no text of the user's own."""
    kinds = [kind for kind in members(flag.type) if kind is not NoneType]
    items = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in kinds]
    return all(kind in (bool, int, float) or get_origin(kind) is Literal for kind in items)


def in_one_sentence(case: Case, base: str, changed: Mapping[str, Any] | None = None) -> str:
    """The settings that matter, for the page; `changed` are those of the expert form."""
    given = {k: v for k, v in (changed or {}).items() if v is not None}
    own = optimizer_defaults(given, defaults_for(case.method, base)) | given
    where = "the embedded model" if is_embedded(base) else base
    trains = {"dreambooth": "a LoRA", "single_insert": "a word and a LoRA", "mcpl": "words"}[case.method]
    batch = own["train_batch_size"]
    return (
        f"`{case.method}` learns {trains} for {where}: {own['max_train_steps']} steps of "
        f"{batch} image{'s' * (batch != 1)} at a learning rate of {own['learning_rate']:g}."
    )

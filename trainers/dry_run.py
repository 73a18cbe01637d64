"""`customize train METHOD ... --dry_run`: checks a run, says what memory it would take, writes nothing."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from customize.data.training_data import TrainingData
from customize.errors import UserError
from customize.trainers.memory import (
    Estimate,
    Phase,
    RunPlan,
    estimate,
    priced,
)
from customize.trainers.methods.base import Method
from customize.trainers.optimizers import chosen
from customize.trainers.prepare import PRECISIONS
from customize.trainers.settings import size_of

HELPS = 0.99  # a change that leaves more of what is above the limit than this is not proposed
WIDTH = 26  # of the table's names
Settings = dict[str, Any]
Check = Callable[[Method, TrainingData], None]


def dry_run(name: str, plan: RunPlan, accelerator: Accelerator, check: Check) -> str:
    """The report on a run that is planned: a table and, under `--memory_limit`, what would bring it below.

    `check` is called with the method and its data; it raises UserError for what the real run would refuse.
    """
    found = priced(estimate(plan, accelerator, check=check), plan)
    lines = [f"dry run of {name} on {plan.model.pretrained_model_name_or_path}: nothing is written", ""]
    lines += table(found, plan)
    if plan.train.memory_limit:
        limit = size_of(plan.train.memory_limit)
        lines += ["", verdict(found, plan, limit, Search(plan, accelerator, found))]
    return "\n".join(lines)


# table


def table(found: Estimate, plan: RunPlan) -> list[str]:
    """Parameters by component, and memory by part of each phase."""
    lines = [row("parameters", "number")]
    lines += [row(f"  {name}", f"{count:,}") for name, count in found.parameters.items()]
    lines += [row("  trained", f"{found.trained:,}"), ""]
    for phase in found.phases:
        peak = "  <- the peak" if phase is found.largest else ""
        lines += [row(f"memory: {phase.name}", size(phase.total)) + peak]
        lines += [row(f"  {part}", size(bytes)) for part, bytes in parts(phase, plan).items() if bytes]
    lines += ["", row("CUDA and its libraries", size(found.overhead)) + "  (assumed)"]
    lines += [row("estimated peak", size(found.peak))]
    if found.cached:
        where = f"disk, in {plan.model.cache_dir}" if plan.model.cache_dir else "main memory"
        lines += [row("caches", size(found.cached)) + f"  of {where}"]
    return lines


def row(name: str, value: str) -> str:
    return f"{name:<{WIDTH}} {value:>15}"


def parts(phase: Phase, plan: RunPlan) -> Mapping[str, int]:
    """Bytes by part: weights by component, and what is made beside them."""
    weights = {f"weights: {name}": value for name, value in phase.weights.items()}
    names = {"optimizer": f"optimizer: {chosen(plan.train)}"}
    return weights | {names.get(name, name): value for name, value in phase.others.items()}


def size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


# advice


class Search:
    """Prices runs with other settings; what only changes the optimizer or the precision of frozen weights
    needs no further simulation."""

    def __init__(self, plan: RunPlan, accelerator: Accelerator, first: Estimate):
        self.plan, self.accelerator = plan, accelerator
        self.simulated = {_key(plan): first}

    def __call__(self, settings: Settings) -> Estimate:
        plan = self.plan.changed(**settings)
        if _key(plan) not in self.simulated:
            with warnings.catch_warnings():  # they were given once
                warnings.simplefilter("ignore")
                self.simulated[_key(plan)] = estimate(plan, self.accelerator)
        return priced(self.simulated[_key(plan)], plan)


def _key(plan: RunPlan) -> tuple:
    """The settings that change what a simulation finds."""
    train = plan.train
    precision = train.mixed_precision, train.gradient_checkpointing
    return (
        *precision,
        train.train_batch_size,
        plan.data.resolution,
        plan.model.cache_latents,
        bool(train.validation_prompt),
    )


def verdict(found: Estimate, plan: RunPlan, limit: int, search: Search) -> str:
    """Whether the run fits, or the flags with which it would, the least harmful that suffice."""
    asked = f"--memory_limit {plan.train.memory_limit}"
    if found.peak <= limit:
        return f"{asked}: it fits."
    chosen, best = remedies(plan, limit, search)
    flags = shown(chosen)
    if best.peak > limit:
        least = f" the least is {size(best.peak)}, with {flags}." if flags else ""
        return f"{asked}: it does not fit, and no settings bring it below:{least or ' none helps.'}"
    return f"{asked}: it does not fit; it would take {size(best.peak)} with {flags}"


def remedies(plan: RunPlan, limit: int, search: Search) -> tuple[list[Settings], Estimate]:
    """Changes that bring a run below the limit, in the order of least harm, and its memory with them. Where
    none suffices, all that help."""
    chosen: list[Settings] = []
    if (best := search({})).peak <= limit:
        return chosen, best
    for settings in changes(plan):
        found = _tried(search, [*chosen, settings])
        if found and _excess(found, limit) < HELPS * _excess(best, limit):
            chosen, best = [*chosen, settings], found
        if best.peak <= limit:
            break
    if best.peak > limit:
        return chosen, best
    for settings in list(chosen):
        rest = [own for own in chosen if own is not settings]
        if (found := _tried(search, rest)) and found.peak <= limit:
            chosen, best = rest, found
    return chosen, best


def _tried(search: Search, chosen: list[Settings]) -> Estimate | None:
    """The memory with these changes; None if the run is refused with them."""
    settings = {name: value for own in chosen for name, value in own.items()}
    try:
        return search(settings)
    except UserError:
        return None


def _excess(found: Estimate, limit: int) -> float:
    """Bytes above the limit, over all phases."""
    return sum(max(found.peak - found.largest.total + phase.total - limit, 0) for phase in found.phases)


def changes(plan: RunPlan) -> Iterator[Settings]:
    """Settings that take less memory, from those that cost time to those that cost quality."""
    train, side = plan.train, plan.data.resolution
    if not plan.model.cache_latents:
        yield {"cache_latents": True}
    if not train.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if train.mixed_precision not in PRECISIONS:
        yield {"mixed_precision": "bf16"}
    if chosen(plan.train) == "adamw":
        yield {"optimizer": "adamw8bit"}
    if train.train_batch_size > 1:
        together = train.train_batch_size * train.gradient_accumulation_steps
        yield {"train_batch_size": 1, "gradient_accumulation_steps": together}
    yield from _quantizations(plan)
    if train.validation_prompt:
        yield {"validation_prompt": []}
    for share in (0.75, 0.5):
        if (lower := int(share * side) // 64 * 64) >= 64:
            yield {"resolution": lower}


def _quantizations(plan: RunPlan) -> Iterator[Settings]:
    for name in ("quantize", "quantize_text_encoder"):
        if getattr(plan.model, name) == "none" and not (name == "quantize" and plan.setting("full_finetune")):
            yield {name: "int8"}
    for name in ("quantize", "quantize_text_encoder"):
        if getattr(plan.model, name) != "nf4" and not plan.setting("full_finetune"):
            yield {name: "nf4"}


def shown(chosen: list[Settings]) -> str:
    """Settings as flags; of one that was changed twice, the last counts."""
    return " ".join(_flags({name: value for own in chosen for name, value in own.items()}))


def _flags(settings: Settings) -> Iterator[str]:
    for name, value in settings.items():
        if value is True:
            yield f"--{name}"
        else:
            yield f"no --{name}" if value == [] else f"--{name} {value}"

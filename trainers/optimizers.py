"""Optimizers by name, each by the package that implements it, and what each needs of the other settings."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from customize.adapters.lora import with_own_rates
from customize.errors import UserError
from customize.trainers.methods.base import Method
from customize.trainers.settings import TrainConfig


@dataclass(frozen=True)
class Kind:
    """Where an optimizer's class is, which of `SETTINGS` it takes with its own default for each, and the
    arguments that are always given."""

    module: str
    name: str
    package: str
    settings: Mapping[str, float | None]
    fixed: Mapping[str, Any] = field(default_factory=dict)


SETTINGS = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
ADAM = dict(zip(SETTINGS, (0.9, 0.999, 1e-2, 1e-8), strict=True))
PRODIGY, SCHEDULE_FREE = "prodigy", "schedule_free_adamw"
KINDS = {
    "adamw": Kind("torch.optim", "AdamW", "torch", ADAM, {"fused": True}),
    "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", ADAM),
    # Mishchenko and Defazio, 2023, arXiv 2306.06101
    PRODIGY: Kind(
        "prodigyopt", "Prodigy", "prodigyopt", ADAM, {"use_bias_correction": True, "safeguard_warmup": True}
    ),
    # Shazeer and Stern, 2018, arXiv 1804.04235; with a learning rate from outside
    "adafactor": Kind(
        "transformers",
        "Adafactor",
        "transformers",
        {"adam_beta1": None, "adam_weight_decay": 1e-2},
        {"scale_parameter": False, "relative_step": False},
    ),
    # Chen et al., 2023, arXiv 2302.06675
    "lion": Kind(
        "bitsandbytes.optim",
        "Lion",
        "bitsandbytes",
        {"adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 1e-2},
    ),
    # Defazio et al., 2024, arXiv 2405.15682
    SCHEDULE_FREE: Kind("schedulefree", "AdamWScheduleFree", "schedulefree", ADAM),
}


def optimizer_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The `defaults` of a method as the optimizer among the settings `given` needs them: Prodigy multiplies
    the rate that it finds by one learning rate, which is 1; schedule-free AdamW needs a constant one."""
    found = dict(defaults)
    if given.get("optimizer") == PRODIGY:
        own = dict.fromkeys((name for name in defaults if name.endswith("_learning_rate")), 0.0)
        found |= own | {"learning_rate": 1.0}
    elif given.get("optimizer") == SCHEDULE_FREE and "lr_scheduler" in defaults:
        found["lr_scheduler"] = "constant"
    return found


def chosen(config: TrainConfig) -> str:
    """The name of a run's optimizer; UserError if two are named."""
    if config.use_8bit_adam and config.optimizer not in ("adamw", "adamw8bit"):
        raise UserError(
            f"--use_8bit_adam means --optimizer adamw8bit, not {config.optimizer}; leave one of the two out."
        )
    return "adamw8bit" if config.use_8bit_adam else config.optimizer


def check_optimizer(config: TrainConfig) -> None:
    """UserError for an optimizer whose package is missing, and for settings that it does not take."""
    name = chosen(config)
    _class_of(name)
    for setting in SETTINGS:
        if setting not in KINDS[name].settings and getattr(config, setting) is not None:
            raise UserError(f"--{setting}: the optimizer {name} has no such setting; leave it out.")
    if name == PRODIGY and config.scale_lr:
        raise UserError("--scale_lr: prodigy finds the learning rate itself; leave the flag out.")
    if name == SCHEDULE_FREE and config.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UserError(
            f"--lr_scheduler {config.lr_scheduler}: schedule_free_adamw takes the place of a schedule; use "
            "constant."
        )
    if name == SCHEDULE_FREE and config.use_ema:
        raise UserError("--use_ema: schedule_free_adamw saves an average of its own; leave the flag out.")


def _class_of(name: str) -> Any:
    kind = KINDS[name]
    try:
        return getattr(import_module(kind.module), kind.name)
    except ImportError:
        flag = "--use_8bit_adam" if name == "adamw8bit" else f"--optimizer {name}"
        raise UserError(f"{flag} needs {kind.package}: pip install {kind.package}.") from None


def make_optimizer(method: Method, config: TrainConfig, processes: int) -> torch.optim.Optimizer:
    """The optimizer of everything that the method trains. UserError for what `check_optimizer` refuses, and
    for a method that this optimizer cannot train."""
    check_optimizer(config)
    name, lr = chosen(config), config.learning_rate
    if config.scale_lr:
        lr *= processes * config.train_batch_size * config.gradient_accumulation_steps
    groups = with_own_rates(method.parameter_groups(lr))
    _check_method(name, method, [group["lr"] for group in groups])
    with redirect_stdout(io.StringIO()):  # Prodigy says that its weight decay is decoupled
        return _class_of(name)(groups, lr=lr, **_arguments(name, config), **KINDS[name].fixed)


def _arguments(name: str, config: TrainConfig) -> dict[str, Any]:
    """The settings of a run as arguments of the optimizer's class."""
    given = {setting: getattr(config, setting) for setting in SETTINGS}
    values = {k: default if given[k] is None else given[k] for k, default in KINDS[name].settings.items()}
    found: dict[str, Any] = {"weight_decay": values["adam_weight_decay"]}
    if "adam_beta2" in values:
        found["betas"] = values["adam_beta1"], values["adam_beta2"]
    else:
        found["beta1"] = values["adam_beta1"]
    return found | ({"eps": values["adam_epsilon"]} if "adam_epsilon" in values else {})


def _check_method(name: str, method: Method, rates: list[float]) -> None:
    if name == PRODIGY and len({rate for rate in rates if rate}) > 1:
        listed = " and ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
        raise UserError(
            f"--optimizer prodigy finds one learning rate for all that is trained, which here has {listed}; "
            "set all learning rates to that of --learning_rate, or use another optimizer."
        )
    if name == SCHEDULE_FREE and type(method).after_step is not Method.after_step:
        raise UserError(
            f"--optimizer {name}: {type(method).__name__} corrects what is trained after each step, which an "
            "average of the steps would lose; use another optimizer."
        )


@contextmanager
def at_average(optimizer: Any) -> Iterator[None]:
    """Context in which the parameters of a schedule-free optimizer hold the average that is validated and
    saved; afterwards every bit is as before. Other optimizers are left alone."""
    groups = optimizer.param_groups
    if "train_mode" not in groups[0]:
        yield
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)

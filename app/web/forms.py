"""Forms from configuration dataclasses: the same labels, help texts, ranges and choices as on the command
line."""

import re
from collections.abc import Sequence
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from customize.config import Flag, convert, flags_of, members, unmet
from customize.errors import UserError


def label_of(name: str) -> str:
    """`max_train_steps` as "Max train steps"."""
    return name.replace("_", " ").capitalize()


def component(flag: Flag, default: Any = MISSING) -> Any:
    """The form's element of one setting."""
    value = flag.default if default is MISSING else default
    info = re.sub(r"--(\w+)", lambda flag: f"'{label_of(flag[1])}'", flag.help)
    shown: dict[str, Any] = {"label": label_of(flag.name), "info": info, "interactive": True}
    kinds = [kind for kind in members(flag.type) if kind is not NoneType]
    kind = kinds[0]
    if kind is bool:
        return gr.Checkbox(bool(value), **shown)
    if get_origin(kind) is Literal and len(kinds) == len(members(flag.type)):
        return gr.Dropdown([str(choice) for choice in get_args(kind)], value=str(value), **shown)
    if get_origin(kind) is list:
        return gr.Textbox("\n".join(map(str, value or [])), lines=2, placeholder="one a line", **shown)
    if kind in (int, float) and len(kinds) == len(members(flag.type)):
        return gr.Number(value, precision=0 if kind is int else None, **shown)
    return gr.Textbox("" if value in (None, MISSING) else str(value), **shown)


def values_of(flags: Sequence[Flag], given: Sequence[Any]) -> dict[str, Any]:
    """What the elements of a form hold, by the settings' names; UserError for what does not fit one."""
    return {flag.name: value_of(flag, value) for flag, value in zip(flags, given, strict=True)}


def value_of(flag: Flag, given: Any) -> Any:
    """One setting from its element, under the command line's rules."""
    label = f"'{label_of(flag.name)}'"
    if isinstance(given, bool):
        return given
    if get_origin(flag.type) is list:
        given = [line.strip() for line in str(given or "").splitlines() if line.strip()]
    elif given is None or given == "":
        if NoneType in members(flag.type):
            return None
        given = "" if str in members(flag.type) else None
    elif isinstance(given, float) and given.is_integer() and int in members(flag.type):
        given = str(int(given))
    else:
        given = str(given)
    value = convert(given, flag.type, label)
    if isinstance(value, int | float) and (wanted := unmet(flag.range, value)):
        raise UserError(f"{label} must be {wanted}, not {value}.")
    return value


def flags(cls: type, leave_out: Sequence[str] = ()) -> list[Flag]:
    return [flag for flag in flags_of(cls) if flag.name not in leave_out]

"""Configuration: flat dataclasses, filled from a YAML file and then from the command line on top."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from customize.errors import UserError, nearest, shortened
from customize.other_tools import renamed
from customize.reading import read_text

BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "none"}
DIGITS = 18  # of whole numbers: torch and numpy hold those


class Range(NamedTuple):
    """The range of a number; `above` and `below` are excluded."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        closed = (self.least is None or self.least <= number) and (self.most is None or number <= self.most)
        open = (self.above is None or self.above < number) and (self.below is None or number < self.below)
        return closed and open and (isinstance(number, int) or math.isfinite(number))

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        names = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        return " and ".join(
            f"{word} {end}" for k, word in names.items() if (end := getattr(self, k)) is not None
        )


def option(
    default: Any,
    help: str,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    essential: bool = False,
) -> Any:
    """A dataclass field that is a flag with a help text, and with the range that its numbers must lie in;
    the help lists `essential` flags first."""
    about = {"help": help, "range": Range(least, most, above, below), "essential": essential}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


class Flag(NamedTuple):
    """One field of a dataclass as a command-line flag."""

    name: str
    type: Any
    default: Any
    help: str
    alias: str | None
    range: Range
    essential: bool


class WordLoader(yaml.BaseLoader):
    """Reads every YAML scalar except null as text, so that `1e-4` and `no` mean the same as on the
    command line."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for more than memory holds
            raise yaml.MarkedYAMLError(
                problem="write the value itself, not *its name", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is given twice; YAML's own loader keeps the last one."""
        found: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                problem = f"'{shortened(key.value)}' is given twice, keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)


WordLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
WordLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def parse(dataclasses: list[type], words: Sequence[str]) -> list[Any]:
    """One instance of each dataclass from `[FILE.yaml] --flag value ...`. Flags override the file, the
    file overrides defaults."""
    values = read_given(dataclasses, words)
    return [build(cls, values) for cls in dataclasses]


def read_given(dataclasses: list[type], words: Sequence[str]) -> dict[str, Any]:
    """What `[FILE.yaml] --flag value ...` sets, by the names of the dataclasses' fields."""
    known, words = table(dataclasses), list(words)
    values = read_file(words.pop(0), known) if words and words[0].endswith((".yaml", ".yml")) else {}
    return values | read_words(words, known)


def check_config(config: Any) -> None:
    """UserError for the first value of a configuration that is of another type than its field, or a number
    that is not finite or outside its range."""
    for flag in flags_of(type(config)):
        value = getattr(config, flag.name)
        if not is_of_type(value, flag.type):
            given = shortened(repr(value))
            raise UserError(f"--{flag.name} must be {expected(flag.type)}, not {given}.")
    check_ranges(config)


def is_of_type(value: Any, wanted: Any) -> bool:
    """Whether a value has the type of a field; whole numbers count as numbers."""
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if get_origin(wanted) is list:
        return isinstance(value, list) and all(is_of_type(item, get_args(wanted)[0]) for item in value)
    if len(members(wanted)) > 1:
        return any(is_of_type(value, member) for member in members(wanted))
    kinds = (int, float) if wanted is float else wanted
    return isinstance(value, kinds) and (wanted is bool or not isinstance(value, bool))


def check_ranges(config: Any) -> None:
    """UserError for the first number of a configuration that is not finite or outside its range."""
    for flag in flags_of(type(config)):
        value = getattr(config, flag.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if wanted := unmet(flag.range, number):
                raise UserError(f"--{flag.name} must be {wanted}, not {shortened(str(number))}.")


def unmet(limits: Range, number: float) -> str:
    """The requirement that a number does not meet, in words; empty if it meets all."""
    if not limits.holds(number):
        endless = (
            not isinstance(number, int)
            and not math.isfinite(number)
            and limits.most is None
            and limits.below is None
        )
        return " and ".join(filter(None, ("finite" * endless, str(limits))))
    return (
        f"a number of at most {DIGITS} digits"
        if isinstance(number, int) and abs(number) >= 10**DIGITS
        else ""
    )


def help_text(dataclasses: list[type], defaults: Mapping[str, Any] | None = None) -> str:
    """One line a flag, with its help and default: the essential ones first, the others under the name of
    their dataclass. `defaults` take the place of the dataclasses' own."""
    own = {
        cls: [flag._replace(default=(defaults or {}).get(flag.name, flag.default)) for flag in flags_of(cls)]
        for cls in dataclasses
    }
    groups = {"Essential": [flag for flags in own.values() for flag in flags if flag.essential]}
    for cls, flags in own.items():
        said = (cls.__doc__ or "").strip()
        title = said if said.startswith("customize ") else cls.__name__.removesuffix("Config")
        groups[title] = [flag for flag in flags if not flag.essential]
    listed = {title: flags for title, flags in groups.items() if flags}
    return "\n\n".join("\n".join([f"{title}:", *map(help_line, flags)]) for title, flags in listed.items())


def help_line(flag: Flag) -> str:
    kind = ", ".join(filter(None, (expected(flag.type), str(flag.range))))
    empty = flag.default in ("", [])  # the help says what that means
    ending = "required" if flag.default is MISSING else "" if empty else f"default {flag.default!r}"
    also = f"also --{flag.alias}" if flag.alias else ""
    about = "; ".join(filter(None, (kind, ", ".join(filter(None, (ending, also))))))
    return f"  --{flag.name:<30} {flag.help} ({about})"


def flags_of(cls: type) -> list[Flag]:
    types = get_type_hints(cls)
    return [flag_of(f, types[f.name]) for f in fields(cls)]


def flag_of(field: Field, wanted: Any) -> Flag:
    about = field.metadata
    return Flag(
        field.name,
        wanted,
        default(field),
        about.get("help", ""),
        about.get("alias"),
        about.get("range", Range()),
        about.get("essential", False),
    )


def default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def table(dataclasses: list[type]) -> dict[str, Flag]:
    """Every name and alias with its flag."""
    known: dict[str, Flag] = {}
    for flag in (flag for cls in dataclasses for flag in flags_of(cls)):
        for name in filter(None, (flag.name, flag.alias)):
            assert name not in known, f"two fields are called {name}"
            known[name] = flag
    return known


def build(cls: type, values: dict[str, Any]) -> Any:
    for flag in flags_of(cls):
        if flag.default is MISSING and flag.name not in values:
            raise UserError(
                f"--{flag.name} is missing: give it on the command line or as `{flag.name}:` in the YAML "
                "file."
            )
    config = cls(**{flag.name: values[flag.name] for flag in flags_of(cls) if flag.name in values})
    check_ranges(config)
    return config


def read_file(path: str, known: dict[str, Flag]) -> dict[str, Any]:
    values = {}
    for key, value in load_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            told = renamed(name, known) or nearest(shortened(name), known)
            raise UserError(f"{path} has an unknown key '{shortened(str(key))}': rename or remove it.{told}")
        flag = known[name]
        if flag.name in values:
            raise UserError(f"{path} sets '{flag.name}' twice, once as '{key}': keep one of the two.")
        values[flag.name] = convert(value, flag.type, f"'{key}' in {path}")
    return values


def load_yaml(path: str) -> dict[Any, Any]:
    text = read_text(Path(path))
    try:
        content = yaml.load(text, WordLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = (
            "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        )
        raise UserError(f"{path} is not valid YAML, write one `name: value` a line: {reason}.") from error
    if not isinstance(content, dict | NoneType):
        raise UserError(f"{path} must hold a `name: value` on each line: it holds something else.")
    return content or {}


def read_words(words: Sequence[str], known: dict[str, Flag]) -> dict[str, Any]:
    values, rest = {}, list(words)
    while rest:
        label, has_value, attached = rest.pop(0).partition("=")
        following = list(takewhile(lambda word: not word.startswith("--"), rest))
        del rest[: len(following)]
        flag, negated = find_flag(label, known)
        given = [attached] * bool(has_value) + ["false"] * negated + following
        if not given and bool not in members(flag.type):
            raise UserError(f"{label} needs a value: write {label} followed by {expected(flag.type)}.")
        values[flag.name] = convert(given if len(given) > 1 else (given or ["true"])[0], flag.type, label)
    return values


def find_flag(label: str, known: dict[str, Flag]) -> tuple[Flag, bool]:
    """The flag that a word such as --lr or --no_cache names, and whether the word negates it."""
    if not label.startswith("--"):
        raise UserError(
            f"'{shortened(label)}' belongs to no flag: write it after the --flag that it is the value of."
        )
    name = label[2:].replace("-", "_")
    if name in known:
        return known[name], False
    positive = name.removeprefix("no_")
    if positive != name and positive in known and bool in members(known[positive].type):
        return known[positive], True
    told = renamed(name, known) or nearest(shortened("--" + name), ["--" + k for k in known])
    raise UserError(f"Unknown flag {shortened(label)}: --help lists all flags.{told}")


def members(wanted: Any) -> tuple[Any, ...]:
    return get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)


def expected(wanted: Any) -> str:
    """A type in words, for messages and help."""
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, get_args(wanted)))
    if get_origin(wanted) is list:
        return f"a list of {expected(get_args(wanted)[0]).removeprefix('a ')}"
    return EXPECTED[wanted] if wanted in EXPECTED else " or ".join(map(expected, members(wanted)))


def convert(value: Any, wanted: Any, label: str) -> Any:
    """A word, a list of words or None as the wanted type; `label` names the flag or key in the message."""
    # None comes first, or the word "none" would be good text.
    for member in sorted(members(wanted), key=lambda member: member is not NoneType):
        with suppress(ValueError, KeyError):
            return cast(value, member)
    raise UserError(
        f"{label} expects {expected(wanted)}, not {'nothing' if value is None else shortened(repr(value))}."
    )


def cast(value: Any, wanted: Any) -> Any:
    """The value as one type that is no union; ValueError or KeyError if it does not fit."""
    if wanted is NoneType:
        return {"none": None}[str(value).lower()]
    if get_origin(wanted) is list and isinstance(value, str | list):
        return [cast(item, get_args(wanted)[0]) for item in ([value] if isinstance(value, str) else value)]
    if not isinstance(value, str):
        raise ValueError
    if get_origin(wanted) is Literal:
        return {str(choice): choice for choice in get_args(wanted)}[value]
    return BOOLS[value.lower()] if wanted is bool else wanted(value)

"""Attributes of images, such as age, with a learned word for each of their categories: how they are written,
and the prompts that are balanced over them."""

from collections.abc import Sequence
from itertools import product

from customize.errors import UserError, shortened


def read_attributes(text: str) -> list[list[str]]:
    """The words of each attribute's categories, as --attributes writes them; UserError unless each attribute
    has two or more, all different."""
    found = [[word.strip() for word in part.split("+")] for part in text.split(",")]
    words = [word for own in found for word in own]
    if not all(words) or len(set(words)) < len(words) or min(map(len, found)) < 2:
        raise UserError(
            "--attributes: name two or more different words for each attribute, such as '<young>+<old>' or "
            "'<young>+<old>,<dark>+<light>'."
        )
    return found


def inclusive_prompts(template: str, attributes: Sequence[Sequence[str]]) -> dict[tuple[str, ...], str]:
    """The prompts of all combinations of categories, one of each attribute: `template` with their words in
    the place of {}. Drawn equally often, they are balanced over every attribute."""
    return {words: template.replace("{}", " ".join(words)) for words in product(*attributes)}


def split_prompts(prompts: Sequence[str], words: Sequence[str]) -> tuple[list[str], str]:
    """The category's word in each prompt, and what all prompts are with {} in its place; UserError unless
    each prompt says one of the words, all words are said, and the rest is the same."""
    found: list[str] = []
    templates: dict[str, str] = {}
    for prompt in prompts:
        said = [word for word in words if word in prompt]
        if len(said) != 1:
            raise UserError(
                f"--concepts_list: the prompt '{shortened(prompt)}' must say one of the words of "
                f"--attributes, not {len(said)}."
            )
        found += said
        templates[prompt.replace(said[0], "{}")] = prompt
    if missing := [word for word in words if word not in found]:
        raise UserError(
            f"--attributes: no concept's prompt says {missing[0]}; add its folder and prompt to "
            "--concepts_list."
        )
    if len(templates) > 1:
        first, second, *_ = map(shortened, templates.values())
        raise UserError(
            f"--concepts_list: '{first}' and '{second}' differ in more than the category's word; make the "
            "rest of them the same."
        )
    return found, next(iter(templates))

"""The words for subjects in prompts."""

import re
from collections.abc import Collection

from customize.errors import UserError, nearest, shortened


def subject_words(prompt: str) -> str:
    """The subject's words in an instance prompt: "a photo of a sks dog" gives "sks dog"."""
    start = r"^((an?|the)\s+)?((photo|picture|image|painting)\s+of\s+)?((an?|the)\s+)?"
    return re.sub(start, "", prompt.strip(), flags=re.IGNORECASE)


def class_word(instance_prompt: str, class_prompt: str = "", initializer_token: str = "") -> str:
    """The subject's class: that of the class prompt, the word that a learned word started from, or the
    subject's last word.

    UserError if that is the subject's only word, which is a rare or learned one.
    """
    given, words = subject_words(class_prompt or initializer_token), subject_words(instance_prompt).split()
    if not given and len(words) < 2:
        raise UserError(
            "the subject's class is not known: train with --class_prompt, such as 'a photo of a dog'."
        )
    return given or words[-1]


WORDS = ("<s>", "<s2>", "<s3>", "<s4>")  # of the subjects of one prompt, in their order


MAX_REFERENCES = 4  # images of one subject


def without_words(prompt: str) -> str:
    """The prompt without subjects' words, for an adapter that has none."""
    for word in WORDS:
        prompt = prompt.replace(f"{word} ", "").replace(word, "")
    return prompt


def check_words(prompt: str, subjects: Collection[str], has_words: bool) -> None:
    """UserError unless the prompt holds the word of every subject, and every such word has a subject."""
    for word in subjects:
        if word not in WORDS:
            raise UserError(
                f"subject_images: '{word}' is no subject's word; those are "
                f"{', '.join(WORDS)}.{nearest(word, WORDS)}"
            )
        if has_words and word not in prompt:
            raise UserError(
                f"the prompt '{shortened(prompt)}' does not say {word}: write it before the noun, as in 'a "
                f"{word} dog'."
            )
    if has_words:
        check_shown(prompt, subjects)


def check_shown(
    prompt: str, subjects: Collection[str] = (), why: str = "there are no subject_images of it"
) -> None:
    """UserError if the prompt says the word of a subject that is not among `subjects`."""
    for word in WORDS:
        if word in prompt and word not in subjects:
            raise UserError(f"the prompt '{shortened(prompt)}' says {word}, but {why}.")

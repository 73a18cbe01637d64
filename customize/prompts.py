"""What prompts call the subject."""

import re

from customize.errors import UserError


def subject_words(prompt: str) -> str:
    """What stands for the subject in an instance prompt: "a photo of a sks dog" gives "sks dog"."""
    start = r"^((an?|the)\s+)?((photo|picture|image|painting)\s+of\s+)?((an?|the)\s+)?"
    return re.sub(start, "", prompt.strip(), flags=re.IGNORECASE)


def class_word(instance_prompt: str, class_prompt: str = "", initializer_token: str = "") -> str:
    """The subject's class: that of the class prompt, or the word that a learned one started from, or the subject's last word.

    UserError where that would be the subject's only word, which is a rare or learned one.
    """
    given, words = subject_words(class_prompt or initializer_token), subject_words(instance_prompt).split()
    if not given and len(words) < 2:
        raise UserError("the subject's class is not known: train with --class_prompt, such as 'a photo of a dog'.")
    return given or words[-1]

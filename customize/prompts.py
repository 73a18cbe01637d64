"""What prompts call the subject."""

import re


def subject_words(prompt: str) -> str:
    """What stands for the subject in an instance prompt: "a photo of a sks dog" gives "sks dog"."""
    start = r"^((an?|the)\s+)?((photo|picture|image|painting)\s+of\s+)?((an?|the)\s+)?"
    return re.sub(start, "", prompt.strip(), flags=re.IGNORECASE)


def class_word(instance_prompt: str, class_prompt: str = "", initializer_token: str = "") -> str:
    """The subject's class: that of the class prompt, or the word that a learned one started from, or the subject's last."""
    given = class_prompt or initializer_token
    return subject_words(given) if given else subject_words(instance_prompt).split()[-1]

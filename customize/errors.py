"""What goes wrong through the user's input, said in one sentence with its remedy."""

from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can mend: the command line prints the message alone and exits with code 2."""


def nearest(name: str, known) -> str:
    """' Did you mean X?' for a misspelt name, or nothing."""
    close = get_close_matches(name, list(known), 1)
    return f" Did you mean '{close[0]}'?" if close else ""


def shortened(text: str, most: int = 80) -> str:
    """A text as messages quote it: on one line, of about `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 3] + "..."

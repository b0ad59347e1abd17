"""The three errors a user can cause. Each message is one line: what is wrong, where, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class LdmError(Exception):
    """Base of every error that the user, not the code, can mend."""


class ConfigError(LdmError):
    """A setting, argument or configuration key that cannot be used."""


class CheckpointError(LdmError):
    """A model folder or weight file that is missing, damaged or of another shape."""


class DataError(LdmError):
    """A data set, picture or caption that cannot be read."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """The end of an error line: the nearest choice if there is one, and all of them.

    >>> suggest("eulr", ["euler", "ddim"])
    "did you mean 'euler'? Choose from: ddim, euler"
    """
    choices = sorted(choices)
    near = get_close_matches(word, choices, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}Choose from: {', '.join(choices)}"

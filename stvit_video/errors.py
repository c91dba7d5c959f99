"""What a user can get wrong, said in one line."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that was given is wrong: the message names value, rule and place in one line.

    The commands print it and exit with code 2.
    """


class DecodeError(InputError):
    """A file, or a frame of it, that cannot be read; one line: the file, the frame, the cause."""


class ListError(InputError):
    """A list of videos that cannot be read: file and line, what was found, what was expected."""


def cause_of(failure: str, path: str) -> str:
    """What such a line says behind the path that it begins with: for tables with a column of paths."""
    return failure.removeprefix(f"{path}: ")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    match = [other for other in known if other.startswith(name)][:1]
    match = match or difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else f" (known: {', '.join(known)})"

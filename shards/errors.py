"""What alexprep raises on purpose, and the checks and words of numbers that many places need.

Where an error is shown to the user is the business of `alexprep.cli`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

TRACEBACK = "ALEXPREP_TRACEBACK"  # environment variable: let unexpected errors through, for a bug report


class AlexprepError(Exception):
    """Something the caller can mend: the message names the value, the bound and the next step.

    The command line prints the message alone, without a traceback, and ends with `exit_status`; any other exception is a bug.
    """

    exit_status = 1


class AmbiguousSourceError(AlexprepError):
    """A source that can be read in several ways, or in none that is safe: nothing was done, and the caller has to choose.

    The message says in a sentence or two what was found; a line for each of `ways` follows: (what to give, what it means).
    """

    exit_status = 2

    def __init__(self, found: str, ways: Iterable[tuple[str, str]]) -> None:
        self.found, self.ways = found, tuple(ways)
        width = max((len(what) for what, _ in self.ways), default=0)
        super().__init__("\n".join([found, *(f"  {what:<{width}}  {meaning}" for what, meaning in self.ways)]))


class DeviceLostError(Exception):
    """A GPU failed in a way that only a new process mends."""


def counted(number: int, noun: str) -> str:
    """A number and a noun, for messages.

    >>> counted(1, "class"), counted(1200, "class"), counted(0, "picture")
    ('1 class', '1,200 classes', '0 pictures')
    """
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """Returns `value` as an int, after checking that it is one.

    Raises:
        AlexprepError: it is no whole number from `low` to `high`.

    >>> whole_number("batch_size", 128, 1, 1000)
    128
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise AlexprepError(f"{name} {value!r} is not a whole number") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise AlexprepError(f"{name} {value} is not in [{low}, {high}]")
    return number


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises AlexprepError where `value` is not among `choices`."""
    choices = list(choices)
    if value not in choices:
        raise AlexprepError(f"{name} {value!r} is not one of {', '.join(choices)}")


def number_within(name: str, value: Any, low: float, high: float) -> None:
    """Raises AlexprepError where `value` is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise AlexprepError(f"{name} {value!r} is not a number in [{low}, {high}]")

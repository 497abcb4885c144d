"""What alexprep raises on purpose, and the checks and words of numbers that many places need.

Where an error is shown to the user is the business of `alexprep.cli`.
"""

from __future__ import annotations

import contextlib
import json
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

TRACEBACK = "ALEXPREP_TRACEBACK"  # environment variable: let unexpected errors through, for a bug report


# Options in messages: `--device cpu` in backticks, or bare; a bare one has a value only where that cannot be a word of the sentence.
_VALUES = "all|auto|cpu|cuda|exact|folded|folders|imagefolder|ilsvrc|keep|none|ray|reject|sorted|tar"
_OPTION = re.compile(
    r"`--(?P<quoted>[a-z-]+)(?: (?P<all>[^`]+))?`|`[^`]*`"
    rf"|(?:(?<=[\s(])|^)--(?P<bare>[a-z-]+)(?: (?P<value>'[^']*'|(?:{_VALUES}|[A-Z]+|(?=[^\s;,]*[^a-z\s;:,.()])[^\s;,(][^\s;]*?)"
    r"(?=[:;,.)]*(?:\s|$))))?"
)
_PARAMETERS = {"out": "folder", "ray-address": "address"}  # the others are called as the options are
_FLAGS = {"unlabelled"}
_PAIRS = {"columns", "split-folders"}

_on_command_line = False


@contextlib.contextmanager
def command_line_words() -> Iterator[None]:
    """Messages name options as on the command line, and not as the parameters of functions."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def in_python(message: str) -> str:
    """A message that names options of the command line, with the parameters that a programmer knows in their place.

    Commands in backticks stay what they are.

    >>> in_python("there is no GPU: use --device cpu, fewer --workers, or `alexprep verify --repair SOURCE`")
    'there is no GPU: use device="cpu", fewer workers, or `alexprep verify --repair SOURCE`'
    >>> in_python("say --unlabelled, or name both with --columns image=NAME,label=NAME")
    'say unlabelled=True, or name both with columns=(("image", "NAME"), ("label", "NAME"))'
    """
    return _OPTION.sub(_as_parameter, message)


def _as_parameter(found: re.Match[str]) -> str:
    option, value = found["quoted"] or found["bare"], found["all"] or found["value"]
    if option is None:
        return found[0]
    name = _PARAMETERS.get(option, option.replace("-", "_"))
    if option in _FLAGS:
        return f"{name}=True" + (f" {value}" if value else "")
    if value is None:
        return name
    value = value.strip("'")
    if option in _PAIRS and "=" in value:
        pairs = [", ".join(_quoted(part) for part in pair.split("=", 1)) for pair in value.split(",")]
        return f"{name}=({', '.join(f'({pair})' for pair in pairs)}{',' * (len(pairs) == 1)})"
    plain = value.isupper() or re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value)
    return f"{name}={value if plain else _quoted(value)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class AlexprepError(Exception):
    """Something the caller can mend: the message names the value, the bound and the next step.

    The message is made with options as the command line has them, and shown so by the command line, without a traceback and with
    `exit_status`; to a program it names parameters, see `in_python`. Any other exception is a bug.
    """

    exit_status = 1

    @property
    def as_made(self) -> str:
        """The message as it was made, for a process that passes it on to another. (torch's DataLoader takes `message` for something else.)"""
        return super().__str__()

    def __str__(self) -> str:
        """The message, in the words of whoever asked."""
        return self.as_made if _on_command_line else in_python(self.as_made)


class StoreError(AlexprepError):
    """A store that was asked as long as the patience lasts, or that refuses."""


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

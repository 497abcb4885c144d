"""What the value of a label means: a whole number, which is the label itself, or the name of a class.

One rule for the columns of tables, for the .cls and .json of webdatasets, and for the index of other people's tars. A number is
one however it was stored: 3, "3", "003", 3.0, "3.0", "3.000e+00" and eight bytes are the number 3. Whether numbers and names may stand
together is decided where all labels of a source are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

# What columns of tables (in lower case) and fields of JSON are called that hold a label; the first in its order counts. The names are the
# same; each has those first that it has known longest, so that no set is read by another one than before.
LABEL_COLUMNS = ("label", "class", "wnid", "target", "category", "y", "class_id", "cls")
LABEL_FIELDS = ("label", "cls", "class", "class_id", "wnid", "target", "category", "y")
MAX_LABEL = 10**6  # far above what sets have (Google Landmarks v2: 203,094 classes); each number up to it takes a class

_MAX_NAME = 1000  # characters; beyond that it is prose
_INTEGER_BYTES = 8  # of numpy's and torch's int64
_MISSING = "the label is missing: fill it in, or leave the image out"
_decimal = re.compile(r"[+-]?[0-9]+").fullmatch
_with_point = re.compile(r"[+-]?[0-9]*\.[0-9]*(?:[eE][+-]?[0-9]+)?").fullmatch
_number = re.compile(r"0|[1-9][0-9]*").fullmatch


class LabelError(Exception):
    """A value that is no label: the message is a sentence with the next step."""


def label_in(value: Any) -> str:
    """The label that a stored value stands for: a whole number in digits without leading zeros, or a name.

    Args:
        value: text, bytes, a number, or what else JSON and tables can hold.

    Raises:
        LabelError: there is none, or several, or it is a number that is below 0 or not whole.

    >>> label_in("3.0"), label_in(b"tench"), label_in(b"\\x03" + bytes(7)), label_in("3 spine stickleback")
    ('3', 'tench', '3', '3 spine stickleback')
    """
    text = text_of(value)
    if len(text) > _MAX_NAME:
        raise LabelError(
            f"the label has {len(text):,} characters, more than {_MAX_NAME:,}: is this the label, or a description?"
        )
    if _decimal(text) or _with_point(text):
        return _digits(text)
    parts = re.split(r"[\s,]+", text.strip("[]() "))
    if re.search(r"[|;]", text) or re.fullmatch(r"\[.*\]", text) or (len(parts) > 1 and all(map(_decimal, parts))):
        raise LabelError(several(text))
    if any(ord(character) < 32 for character in text):
        raise LabelError(f"the label {text[:80]!r} holds a control character: write numbers and names as plain text")
    return text


def text_of(value: Any) -> str:
    """A stored value as text, without spaces at its ends, never empty; LabelError where it is nothing or can be none.

    Eight bytes are a little-endian whole number where that is at most `MAX_LABEL`: they end in five NULs, as no text does.
    """
    if isinstance(value, bytes | bytearray):
        if len(value) == _INTEGER_BYTES and (number := int.from_bytes(value, "little")) <= MAX_LABEL:
            return str(number)
        try:
            value = bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise LabelError(
                f"{bytes(value[:8])!r} is neither text in UTF-8 nor a little-endian whole number of 8 bytes up to {MAX_LABEL:,}: "
                "write the number in digits"
            ) from None
    if isinstance(value, list | tuple | dict):
        raise LabelError("it has several labels; one is needed")
    if isinstance(value, bool):
        return str(value).lower()  # as tables write it
    if isinstance(value, float):
        if math.isnan(value):
            raise LabelError(_MISSING)
        if not value.is_integer():
            raise LabelError(_not_whole(repr(value)))
        return str(int(value))
    text = "" if value is None else str(value).strip(" \t\r\n")
    if text in ("", "nan", "NaN"):
        raise LabelError(_MISSING)
    return text


def is_number(label: str) -> bool:
    """Whether what `label_in` returned is a number, not a name."""
    return _number(label) is not None


def check_range(label: str) -> None:
    """Raises LabelError where what `label_in` returned is a number above `MAX_LABEL`."""
    if is_number(label) and int(label) > MAX_LABEL:
        shown = label if len(label) <= 30 else f"{label[:30]}…"
        raise LabelError(f"the label {shown} is above {MAX_LABEL:,}: number the classes from 0, or give them names")


def label_name(names: Iterable[str], order: Sequence[str]) -> str | None:
    """Which of these columns or fields holds the label, by `LABEL_COLUMNS` or `LABEL_FIELDS`; None for none. "y" beside "x" is a coordinate."""
    names = set(names)
    found = (name for name in order if name in names and not (name == "y" and "x" in names))
    return next(found, None)


def several(label: str) -> str:
    """What is wrong with a label that is more than one."""
    return f"the cell {label!r} gives one image several labels; one is needed: keep one, or write one without | ; and ,"


def _digits(text: str) -> str:
    """A number, as text that was taken for one, in digits alone."""
    if _decimal(text):
        number = int(text)
    else:
        try:
            value = float(text)
        except ValueError:  # a point alone
            raise LabelError(_not_whole(text)) from None
        if not value.is_integer():
            raise LabelError(_not_whole(text))
        number = int(value)
    if number < 0:
        raise LabelError(f"the label {text[:30]} is below 0: number the classes from 0")
    return str(number)


def _not_whole(text: str) -> str:
    return f"the label {text} is no whole number: write it without a point, or give the class a name"

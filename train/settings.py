"""Settings, FIELD=VALUE: any field of a recipe changed by its name and a text; which fields there are, of what type, and what they mean.

A field's name is its path from the recipe on: `lr`, `network.pool`, `augmentation.mean`, `schedule.patience`. All that is known of a field is
what its dataclass says: its type is the annotation, its meaning the docstring's, and its bounds are checked where the dataclass is made.
A field that is added to a recipe, a network, a schedule or an augmentation is a setting with that.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from alexprep.pipeline.augmentation import PRESETS, Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train.lr_schedule import KINDS, SCHEDULES, Schedule, Steps, describe
from alexprep.train.recipes import DEFAULT_RECIPE, RECIPES, NetworkFactory, Recipe, as_begun, recipe, with_network
from alexprep.train.user_code import UserNetwork, user_network

SET = "--set"
SETTING = re.compile(r"(?P<field>[A-Za-z_]\w*(\.[\w-]+)*)=(?P<value>.*)", re.DOTALL)
STEPS = re.compile(r"steps:(\d{1,6}(,\d{1,6})*)")
PART = "schedule."  # what fields of the schedule begin with
# Fields that have an option of their own, for what no text can say.
ELSEWHERE = {
    "name": "the recipe's name stays: --name names the run",
    "network.name": "a network keeps its name",
    "augmentation.hooks": "an operation of your own is named with --hook",
}
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "JSON value"}


class Field(NamedTuple):
    """A field of a recipe that a setting can change."""

    path: str
    value: str  # as a setting would give it
    type: str  # in words
    meaning: str
    choices: list[str]  # values that complete it


class _Unfit(ValueError):
    """A text is no value of a type."""


def recipe_of(options: Mapping[str, Any], began: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that options name, with their network, batch size, rate and settings; but for the schedule, which depends on the run.

    Args:
        options: of a run: recipe, model, batch_size, lr, settings; None where not given.
        began: what a run that goes on recorded of its recipe.

    >>> recipe_of({"recipe": "tiny", "batch_size": 8, "lr": None, "settings": ["clip=1"]}).clip
    1.0
    """
    named = recipe(options["recipe"] or DEFAULT_RECIPE)
    if began is not None:
        named = as_begun(named, began)
    if options.get("model") is not None:
        named = with_network(named, user_network(options["model"]))
    given = {name: options[name] for name in ("batch_size", "lr") if options.get(name) is not None}
    told = {field: value for field, value in by_field(options.get("settings") or ()).items() if not _of_schedule(field)}
    return with_settings(named, given | told)


def by_field(settings: Iterable[str]) -> dict[str, str]:
    """Settings FIELD=VALUE by their fields; a later one takes the place of what was said of its field, and of fields below it, before.

    Raises:
        AlexprepError: one has no such form.

    >>> by_field(["schedule.final=0.1", "lr=0.1", "lr=0.2", "schedule=cosine"])
    {'lr': '0.2', 'schedule': 'cosine'}
    """
    found: dict[str, str] = {}
    for text in settings:
        parts = SETTING.fullmatch(text) if isinstance(text, str) else None  # a run's config.json may hold anything
        if parts is None:
            raise AlexprepError(f"{SET} {text!r} is not FIELD=VALUE, such as lr=0.02 or network.pool=2")
        name = parts["field"]
        found = {other: value for other, value in found.items() if not f"{other}.".startswith(f"{name}.")}
        found[name] = parts["value"]
    return found


def with_settings(changed: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with some fields changed, all at once: values that only fit together come together.

    Args:
        changed: the recipe.
        settings: values by field, as texts or as they shall be.

    Raises:
        AlexprepError: there is no such field, or it cannot have the value; the message names both, and a field that may be meant.

    >>> with_settings(RECIPES["alexnet"], {"network.pool": "2", "augmentation.share": "32"}).network.pool
    2
    """
    for name in settings:
        if name in ELSEWHERE:
            raise AlexprepError(f"{SET} {name}: {ELSEWHERE[name]}")
    made: Recipe = _changed(changed, dict(settings), "", Recipe, changed)
    return made


def settable(told: Recipe) -> list[Field]:
    """Every field of a recipe that a setting can change, with the fields of what it has: network, augmentation, schedule and so on."""
    return list(_fields_of(told, ""))


def value_of(text: str, kind: type[Any], name: str) -> Any:
    """The value that a text is of a dataclass's field; not None, which there means that nothing is said.

    Raises:
        AlexprepError: it is none; the message names it, and the type.
    """
    hint = get_type_hints(kind)[name]
    hint = next(each for each in (*get_args(hint), hint) if each is not NoneType)
    try:
        return _value(text, hint)
    except _Unfit:
        raise AlexprepError(_misfit(name, text, hint)) from None


def completions(told: Recipe, begun: str) -> list[str]:
    """The settings that a text may become: FIELD= or FIELD=VALUE."""
    name, equals, _ = begun.partition("=")
    known = settable(told)
    if not equals:
        return [f"{one.path}=" for one in known if one.path.startswith(begun)]
    words = [f"{name}={choice}" for one in known if one.path == name for choice in one.choices]
    return [word for word in words if word.startswith(begun)]


def schedule_named(text: str) -> Schedule:
    """The schedule of a text: a kind with its numbers; that of a recipe, such as the 2012 code's rates by hand; or JSON, as runs record it.

    Raises:
        AlexprepError: there is none of this name.

    >>> schedule_named("steps:8,9")
    Steps(after=(8, 9), divisor=10.0)
    """
    if steps := STEPS.fullmatch(text):
        return Steps(after=tuple(map(int, steps[1].split(","))))
    if text in SCHEDULES:
        return SCHEDULES[text]
    if text in RECIPES:
        return RECIPES[text].schedule
    if text.startswith("{"):
        try:
            return _described_schedule(json.loads(text))
        except (ValueError, TypeError) as error:
            raise AlexprepError(f"schedule {text} is not JSON as a run's config.json has it: {error}") from None
    raise AlexprepError(
        f"there is no schedule {text!r}: choose one of {', '.join(SCHEDULES)}, steps:8,9 for a tenth of the rate after 8 and 9 epochs, or a "
        "recipe's name, for that recipe's"
    )


def plain(value: Any) -> str:
    """A field's value as a setting would give it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Augmentation):
        return next((name for name, preset in PRESETS.items() if preset == value), "of its own")
    if hasattr(value, "after_epoch"):
        return _schedule_text(value)
    if is_dataclass(value) and not callable(value):
        return type(value).__name__
    if callable(value):
        own = value.title if isinstance(value, UserNetwork) else getattr(value, "__name__", type(value).__name__)
        return next((one.name for one in RECIPES.values() if one.network == value), own)
    if isinstance(value, tuple | list) and not any(isinstance(each, tuple | list) for each in value):
        return ",".join(map(plain, value)) or "none"
    return json.dumps(value) if isinstance(value, Mapping | tuple | list) else f"{value}"


def _described_schedule(told: Any) -> Schedule:
    """The schedule that `describe` tells, with the checks of a setting; ValueError or TypeError says what is wrong."""
    kind = KINDS.get(told.get("kind", "")) if isinstance(told, dict) else None
    if kind is None:
        raise ValueError(f"{json.dumps(told)} has no kind, one of {', '.join(KINDS)}")
    hints, values = get_type_hints(kind), {}
    for name, each in told.items():
        if name == "kind":
            continue
        if name not in hints:
            raise ValueError(f"{kind.__name__} has no {name}")
        try:
            text = each if isinstance(each, str) else json.dumps(each)
            values[name] = _described_schedule(each) if hints[name] is Schedule else _value(text, hints[name])
        except _Unfit:
            raise ValueError(f"{name} {json.dumps(each)} does not fit, it takes: {_words(hints[name])}") from None
    made: Schedule = kind(**values)
    return made


def _of_schedule(name: str) -> bool:
    return f"{name}.".startswith(PART)


def _schedule_text(schedule: Schedule) -> str:
    for names in (SCHEDULES, {one.name: one.schedule for one in RECIPES.values()}):
        if not isinstance(schedule, Steps) and schedule in names.values():
            return next(name for name, each in names.items() if each == schedule)
    if isinstance(schedule, Steps) and schedule == Steps(schedule.after):
        return f"steps:{','.join(map(str, schedule.after))}" if schedule.after else "constant"
    return json.dumps(describe(schedule))


def _changed(value: Any, settings: dict[str, Any], at: str, hint: Any, whole: Recipe) -> Any:
    """A value with settings, by their fields below it; "" is the value itself."""
    if "" in settings:
        given = settings.pop("")
        as_it_is = _has_fields(value) and not callable(value) and given == type(value).__name__
        value = value if as_it_is else _read(given, hint, at, whole) if isinstance(given, str) else given
    if not settings:
        return value
    if isinstance(value, collections.abc.Mapping):
        each = (get_args(hint) or (str, Any))[1]
        return {**value, **{key: _read(text, each, f"{at}.{key}", whole) for key, text in settings.items()}}
    kinds = _dataclasses(hint)
    begun = kinds[0] if value is None and len(kinds) == 1 else None  # a part that is made now, of what is said
    owner: Any = value.factory if isinstance(value, UserNetwork) else begun or value
    if not (begun or _has_fields(owner)):
        names = [kind.__name__ for kind in kinds]
        choice = f": say first which, {at}={' or '.join(names)}" if names else ""
        raise AlexprepError(
            f"{SET} {at}.{next(iter(settings))}: {at} of recipe {whole.name} is {plain(value)}, which has no fields{choice}"
        )
    hints = get_type_hints(owner if begun else type(owner))
    below: dict[str, dict[str, Any]] = {}
    for path, given in settings.items():
        head, _, rest = path.partition(".")
        if head not in hints or head not in {each.name for each in fields(owner)}:
            raise AlexprepError(_unknown(f"{at}.{path}" if at else path, at, owner, whole))
        below.setdefault(head, {})[rest] = given
    parts = {
        head: _changed(getattr(owner, head, None), inner, f"{at}.{head}" if at else head, hints[head], whole)
        for head, inner in below.items()
    }
    made: Any = begun(**parts) if begun else replace(owner, **parts)
    return replace(value, factory=made) if isinstance(value, UserNetwork) else made


def _unknown(path: str, at: str, owner: Any, whole: Recipe) -> str:
    """What to say of a field that `owner`, which is the recipe's field `at`, does not have."""
    begun = f"{at}." if at else ""
    inside = [f"{begun}{each.name}" for each in fields(owner)]
    near = difflib.get_close_matches(path, [*inside, *(one.path for one in settable(whole))], 1)
    hint = f"perhaps {near[0]} is meant; " if near else ""
    what = (
        f"{at} of recipe {whole.name}, {getattr(owner, '__name__', type(owner).__name__)},"
        if at
        else f"recipe {whole.name}"
    )
    listed = f"there are {', '.join(inside)}" if len(inside) < 8 else f"`alexprep recipes {whole.name}` lists all"
    return f"{SET} {path}: {what} has no such field: {hint}{listed}"


def _misfit(name: str, text: str, hint: Any) -> str:
    return f"{SET} {name}={text}: {text!r} does not fit, {name} takes: {_words(hint)}"


def _has_fields(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _dataclasses(hint: Any) -> list[type[Any]]:
    """The dataclasses that an annotation allows."""
    return [each for each in (hint, *get_args(hint)) if inspect.isclass(each) and is_dataclass(each)]


# Texts and types.


def _read(text: Any, hint: Any, at: str, whole: Recipe) -> Any:
    """The value that a text is; what is no text stays."""
    if not isinstance(text, str):
        return text
    if hint is Augmentation:
        return _augmentation(text, whole.augmentation)
    if hint is Schedule:
        return schedule_named(text)
    if hint is NetworkFactory:
        if text in RECIPES:
            return RECIPES[text].network
        raise AlexprepError(
            f"{SET} {at}={text}: a network is that of a recipe, one of {', '.join(RECIPES)}; one of your own is named with --model"
        )
    try:
        return _value(text, hint)
    except _Unfit:
        raise AlexprepError(_misfit(at, text, hint)) from None


def _augmentation(text: str, present: Augmentation) -> Augmentation:
    """A preset, at the crop that a recipe has; "none": what evaluation shows."""
    if text == "none":
        return present.without_chance()
    if text in PRESETS:
        return replace(PRESETS[text], crop=present.crop)
    raise AlexprepError(f"{SET} augmentation={text}: {text!r} is not one of {', '.join(PRESETS)}")


def _value(text: str, hint: Any) -> Any:
    """The value of a type that a text is; `_Unfit` where it is none."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in sorted(parts, key=lambda part: part is not NoneType):
            try:
                return _value(text, each)
            except _Unfit:
                continue
    elif hint is NoneType and text.lower() in ("none", "null"):
        return None
    elif origin is Literal and text in map(str, parts):
        return next(part for part in parts if str(part) == text)
    elif origin is tuple:
        return _tuple(text, parts)
    elif hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif hint is int and re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return int(text)
    elif hint is float:
        return _number(text)
    elif hint is str:
        return text
    elif origin is collections.abc.Mapping or hint is Any:
        return _json(text, hint)
    elif inspect.isclass(hint) and is_dataclass(hint) and text == hint.__name__:
        return hint()
    raise _Unfit


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise _Unfit from None
    if not math.isfinite(number):
        raise _Unfit
    return number


def _tuple(text: str, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values with commas between them, or a JSON list; "none" for none of them."""
    if text.startswith("["):
        values = _json(text, list)
    else:
        values = [] if text.lower() in ("none", "") else text.split(",")
    kinds = [parts[0]] * len(values) if parts[-1] is Ellipsis else list(parts)
    if len(kinds) != len(values):
        raise _Unfit
    words = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return tuple(_value(word, kind) for word, kind in zip(words, kinds, strict=True))


def _json(text: str, hint: Any) -> Any:
    try:
        found = json.loads(text, parse_constant=_no_number)
    except ValueError:
        if hint is Any:
            return text
        raise _Unfit from None
    wanted = {list: list, Any: object}.get(hint, dict)
    if not isinstance(found, wanted):
        raise _Unfit
    if isinstance(found, dict) and get_args(hint)[1:] == (float,):
        return {key: _number(json.dumps(value)) for key, value in found.items()}
    return found


def _no_number(text: str) -> None:
    raise ValueError(text)


def _words(hint: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(each) for each in parts)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin is tuple:
        if parts[-1] is Ellipsis:
            if get_origin(parts[0]) is Literal:
                return f"some of {_words(parts[0])}; none"
            return "rows, a JSON list" if get_origin(parts[0]) is tuple else f"{_words(parts[0])}s with commas; none"
        return f"{len(parts)} {_words(parts[0])}s with commas"
    if origin is collections.abc.Mapping:
        return "JSON object"
    if hint is NoneType:
        return "none"
    if hint is Schedule:
        return "schedule"
    if hint is NetworkFactory:
        return "a recipe's name"
    if hint is Augmentation:
        return "preset"
    if kinds := _dataclasses(hint):
        return f"{kinds[0].__name__} with {', '.join(each.name for each in fields(kinds[0]))}"
    return WORDS.get(hint) or str(hint)


# Fields and what they mean.


def _fields_of(owner: Any, prefix: str) -> Iterable[Field]:
    hints, meanings = get_type_hints(type(owner)), _meanings(type(owner))
    for each in fields(owner):
        path, value, hint = f"{prefix}{each.name}", getattr(owner, each.name), hints[each.name]
        if path in ELSEWHERE:
            continue
        yield Field(path, plain(value), _words(hint), meanings.get(each.name, ""), _choices(hint))
        inner: Any = value.factory if isinstance(value, UserNetwork) else value
        if _has_fields(inner):
            yield from _fields_of(inner, f"{path}.")


def _choices(hint: Any) -> list[str]:
    if hint is Schedule:
        return [*SCHEDULES, "steps:", *RECIPES]
    if hint is Augmentation:
        return list(PRESETS)
    if hint is NetworkFactory:
        return list(RECIPES)
    if get_origin(hint) in (Union, UnionType):
        return [choice for each in get_args(hint) for choice in _choices(each)]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint is bool:
        return ["true", "false"]
    return ["none"] if hint is NoneType else [kind.__name__ for kind in _dataclasses(hint)]


def _meanings(kind: type[Any]) -> dict[str, str]:
    """What a dataclass's docstring says of its fields, below "Args:" or "Attributes:".

    >>> _meanings(Augmentation)["noise_sigma"]
    '0.1 in the paper.'
    """
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}

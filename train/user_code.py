"""Code of the user's own, named on the command line: FILE.py:NAME or MODULE:NAME → an object.

Only what the user names there is ever loaded: what a file on the disk names is not.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from alexprep.shards.errors import TRACEBACK, AlexprepError

# -------------------- Errors in code of the user's own become one sentence, with the file and line in it that they came by.


@contextlib.contextmanager
def blamed(what: str, folder: Path | None, only: bool = False) -> Iterator[None]:
    """Inside the block, an exception of the user's code becomes one sentence: what failed, in which file and line, and how.

    Args:
        what: the sentence's beginning.
        folder: of the user's code; None for an installed library.
        only: leave exceptions alone that did not come by way of a file in `folder`.

    Raises:
        AlexprepError: instead of any other exception, unless the environment variable ALEXPREP_TRACEBACK is set.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = _place(error, folder)
        if os.environ.get(TRACEBACK) or (only and place is None):
            raise
        kind = "" if isinstance(error, AlexprepError) else f"{type(error).__name__}: "
        if isinstance(error, SyntaxError):
            words = error.msg
        else:
            words = next(iter(str(error).splitlines()), "")
        said = f"{kind}{words}".removesuffix(": ")
        raise AlexprepError(f"{what}: {said}" if place is None else f"{what}: {place}: {said}") from error


def _place(error: BaseException, folder: Path | None) -> str | None:
    """File and line of the user's code that an exception last came by."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        f"{frame.f_code.co_filename}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_own(frame.f_code.co_filename, frame.f_globals.get("__name__", ""), folder)
    ]
    return frames[-1] if frames else None


def _is_own(file: str | None, module: str, folder: Path | None) -> bool:
    """Whether code is the user's: in that folder, and neither installed there nor Python's or alexprep's own."""
    if folder is None or file is None or "site-packages" in file:
        return False
    top = module.partition(".")[0]
    return Path(file).is_relative_to(folder) and top != "alexprep" and top not in sys.stdlib_module_names


# -------------------- Code of the user's own, named on the command line: FILE.py:NAME or MODULE:NAME → an object.


_roots: set[Path] = set()  # folders that files were loaded from


class Named(NamedTuple):
    """An object that was named, and where it is from."""

    value: Any
    title: str  # MODULE:NAME, without the folder: the same wherever the file lies
    folder: Path | None  # of the user's code; None for an installed library


def is_reference(text: str) -> bool:
    """Whether a text names code, and is no plain name.

    >>> [is_reference(text) for text in ("alexnet", "nets.py", "nets:make", "~/nets.py:make")]
    [False, True, True, True]
    """
    return ":" in text or text.endswith(".py")


def resolved(reference: str, option: str) -> str:
    """The same reference, understood from any folder: a file's path is made absolute, a module in this folder becomes its file.

    Args:
        reference: FILE.py, FILE.py:NAME, MODULE or MODULE:NAME.
        option: that it was given with, for messages.

    Raises:
        AlexprepError: it is none of these, or there is no such file.
    """
    place, colon, name = _parts(reference, option)
    if place.endswith(".py"):
        file = Path(place).expanduser().absolute()
    else:
        stem = Path.cwd().joinpath(*place.split("."))
        files = [file for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py") if file.is_file()]
        if not files:
            return reference
        file = files[0]
    _check_file(file, option)
    return f"{file.parent.resolve() / file.name}{colon}{name}"


def load(reference: str, option: str, default: str | None = None) -> Named:
    """Runs the named file or imports the named module, and takes the named object out of it.

    A file is run anew each time, with its folder first among those that it imports from; one inside a package (a folder with
    `__init__.py`) is imported as part of it.

    Args:
        reference: see `resolved`.
        option: that it was given with, for messages.
        default: the object's name where the reference has none; failing that, the only function that the file defines.

    Raises:
        AlexprepError: there is no such file, module or object, or running it failed; the message says in which line. With the
            environment variable ALEXPREP_TRACEBACK an error of the user's code comes through as it is.
    """
    place, _, name = _parts(reference, option)
    if place.endswith(".py"):
        file = Path(place).expanduser().absolute()
        _check_file(file, option)
        folder, dotted = _package(file)
        with blamed(f"{option} {reference}", folder):
            module = _run(file, folder, dotted)
        root: Path | None = folder
    else:
        root, dotted = _home(place), place
        with blamed(f"{option} {reference}", root):
            module = importlib.import_module(place)
    name = name or _only(module, default, f"{option} {reference}")
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise AlexprepError(f"{option} {reference}: {place} has no {name!r}{_offer(name, _functions(module))}")
        found = getattr(found, part)
    return Named(found, f"{dotted}:{name}", root)


def _parts(reference: str, option: str) -> tuple[str, str, str]:
    """Place, colon and name."""
    whole = ":" not in reference or reference.endswith(".py")
    place, colon, name = (reference, "", "") if whole else reference.rpartition(":")
    fit = all(part.isidentifier() for part in name.split(".")) if colon else True
    if fit and (place.endswith(".py") or all(part.isidentifier() for part in place.split("."))):
        return place, colon, name
    raise AlexprepError(f"{option} {reference!r} names no Python code: write FILE.py:FUNCTION or MODULE:FUNCTION")


def _check_file(file: Path, option: str) -> None:
    if not file.is_file():
        raise AlexprepError(f"there is no file {file}: say where it is with {option} FILE.py:FUNCTION")


def _home(module: str) -> Path | None:
    """The folder of an installed module's outermost package."""
    spec = find_spec(module.partition(".")[0])
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _package(file: Path) -> tuple[Path, str]:
    """The folder that a file's imports begin at, and its module's name from there."""
    names = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _run(file: Path, root: Path, dotted: str) -> ModuleType:
    """The file as a module, run anew."""
    _forget_all()
    if "site-packages" not in root.parts:
        _roots.add(root)
    with _first_on_path(str(root)):
        if "." in dotted or file.name == "__init__.py":
            return importlib.import_module(dotted)
        # Under a name of its own, so that a file called like a library is not taken for it.
        spec = spec_from_file_location(f"alexprep_own_{dotted}", file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module


def _forget_all() -> None:
    """Takes what earlier files imported from their folders out of Python's memory, so that each file finds what lies beside it."""
    for name, module in list(sys.modules.items()):
        source = str(getattr(module, "__file__", None))
        top = name.partition(".")[0]
        if any(source.startswith((f"{root}/{top}/", f"{root}/{top}.py")) for root in _roots):
            del sys.modules[name]


@contextlib.contextmanager
def _first_on_path(root: str) -> Iterator[None]:
    """Inside the block imports look in `root` first, and afterwards last: for those that a function makes when it is called."""
    writes = sys.dont_write_bytecode
    sys.path.insert(0, root)
    sys.dont_write_bytecode = True  # compiled files are told apart by whole seconds: a quick edit would not be seen
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(root)
        if root not in sys.path:
            sys.path.append(root)


def _functions(module: ModuleType) -> list[str]:
    """What a module itself defines and can be called."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def _only(module: ModuleType, default: str | None, what: str) -> str:
    """The name meant where none was given."""
    functions = _functions(module)
    if default is not None and hasattr(module, default):
        return default
    if len(functions) == 1:
        return functions[0]
    raise AlexprepError(f"{what}: say which function is meant, after a colon{_offer('', functions)}")


def _offer(name: str, functions: list[str]) -> str:
    """The end of a sentence: what there is."""
    near = difflib.get_close_matches(name, functions, 1)
    if near:
        return f": perhaps {near[0]} is meant"
    return f": there are {', '.join(functions)}" if functions else ": it defines no function"

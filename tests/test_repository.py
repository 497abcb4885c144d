"""Conventions as tests: one-way imports, public faces, docstrings, declared dependencies, packages that are packed."""

from __future__ import annotations

import ast
import configparser
import doctest
import functools
import graphlib
import importlib
import inspect
import itertools
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there, and packaging everywhere

ORDER = ["shards", "pipeline", "train", "cli"]
ROOT = Path(__file__).parents[1]
FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = [
    module.name
    for package in ORDER
    for module in pkgutil.walk_packages(importlib.import_module(f"alexprep.{package}").__path__, f"alexprep.{package}.")
    if not module.name.endswith("__main__")
]
# Each heavy or fenced library, and the only places that may import it.
FENCES = {
    "click": ("cli/",),
    "rich": ("cli/", "train/logger.py"),
    "torch": (
        "train/",
        *(
            "pipeline/autotune.py",
            "pipeline/batch.py",
            "pipeline/device.py",
            "pipeline/loader.py",
            "pipeline/resampling.py",
            "pipeline/loader_settings.py",
        ),
        "pipeline/wds_pipeline.py",
        "pipeline/evaluation_views.py",
        "shards/image_codec_cuda.py",
    ),
    "nvidia.dali": ("pipeline/dali_graph.py", "pipeline/dali_ops.py", "pipeline/dali_reader.py"),
    "webdataset": ("pipeline/wds_pipeline.py",),
    "sklearn": ("train/neighbour_search.py",),
    "pickle": (),
    "subprocess": ("shards/worker_pool.py", "train/launch.py"),
    "ray": ("shards/ray_runner.py",),
    "huggingface_hub": ("shards/hub.py",),
}


# Inside train/ an import goes to the same floor or to a lower one. A name stands for itself and for what is below it.
FLOORS = [
    ("field_values", "lazy_module", "signals_and_memory", "distributed.world"),
    ("distributed.tensor_parallel", "lr_schedule", "optimizer", "precision", "checkpoint", "models", "losses"),
    ("model_libraries", "layer_file_lines", "layer_files", "user_code", "metrics", "data"),
    ("logger", "profiler", "recipes", "settings", "distributed.parallel", "distributed.hosts"),
    ("run_dir", "run_writer", "initial_weights", "config"),
    ("training_state",),
    ("nonfinite",),
    ("trainer",),
    (
        "predictions",
        "ensemble",
        "prediction_table",
        "evaluation",
        "loading",
        "classifier",
        "export",
        "neighbour_search",
        "layer_outputs",
        "binary_codes",
        "similar_images",
        "report",
        "launch",
        "ablation",
        "gradient_check",
        "loader_overlap",
        "demo",
    ),
]


@functools.cache
def _imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """What a file imports, also in functions and for type checkers: modules, and the names that are taken from each."""
    return list(_imports_of(path.read_text()))


def _imports_of(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("alexprep", *(parts[:-1] if parts[-1] == "__init__" else parts)))


NAMES = {_module_name(path): path for path in FILES}
FACES = [f"alexprep.{package}" for package in ORDER[:-1]]


@functools.cache
def _graph() -> dict[str, set[str]]:
    """Which module imports which: a name that is taken from a package may itself be a module."""
    return {
        name: {
            f"{module}.{each}" if f"{module}.{each}" in NAMES else module
            for module, names in _imports(path)
            for each in names or ("",)
            if module in NAMES
        }
        for name, path in NAMES.items()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    here = ORDER.index(place.split("/")[0])
    for name, _ in _imports(path):
        assert not name.startswith("."), f"write alexprep.…, not the relative {name!r}"
        top, _, rest = name.partition(".")
        assert top not in ORDER, f"write alexprep.{name}, not {name!r}"
        if top == "alexprep":
            assert rest, "import a package, not the bare namespace"
            assert ORDER.index(rest.split(".")[0]) <= here, f"{place} may not import {name}"
        for library, places in FENCES.items():
            if name == library or name.startswith(library + "."):
                assert place.startswith(places) if places else False, f"{place} may not import {library}"


def test_imports_go_round_in_no_circle() -> None:
    """Those in functions and those of the faces count too."""
    graphlib.TopologicalSorter(_graph()).prepare()


def test_modules_import_modules_and_no_face() -> None:
    found = [f"{name} imports {each}" for name, imported in _graph().items() for each in imported if each in FACES]
    assert found == []


def test_imports_inside_train_go_down() -> None:
    """A new module of train/ is given its place in `FLOORS`."""

    def floor(module: str) -> int:
        name = module.removeprefix("alexprep.train.") + "."
        found = [n for n, names in enumerate(FLOORS) if name.startswith(tuple(f"{each}." for each in names))]
        assert found, f"{module} has no place in FLOORS"
        return found[0]

    inside = [name for name, path in NAMES.items() if name.startswith("alexprep.train.") and path.stem != "__init__"]
    for name in inside:
        for other in _graph()[name] & set(inside):
            assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"


def test_from_the_command_to_the_loss_are_three_modules() -> None:
    """cli/train.py, then at most three more, the last of which computes the loss."""
    reached, steps = {"alexprep.cli.train"}, 0
    while not any("loss = F.cross_entropy(output, labels" in NAMES[name].read_text() for name in reached):
        reached, steps = {other for name in reached for other in _graph()[name]}, steps + 1
        assert steps <= 3 and reached


def _public_names(face: str) -> list[str]:
    names: list[str] = importlib.import_module(face).__all__
    return names


@pytest.mark.parametrize("face", FACES)
def test_a_face_gives_what_it_promises(face: str) -> None:
    """After every module has been imported: one of a public name's name would come in its place."""
    for name in MODULES:
        importlib.import_module(name)
    module = importlib.import_module(face)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for name in module.__all__:
        assert f"{face}.{name}" not in NAMES, f"{name} is a public name and a module's"
        value = getattr(module, name)
        assert not isinstance(value, ModuleType)
        if inspect.isclass(value) or inspect.isfunction(value):
            told = value.__doc__ or ""
            assert told and not told.startswith(f"{name}("), f"{face}.{name} has no docstring"  # a dataclass makes one
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.usefixtures("cold_processes")
def test_a_face_loads_nothing_heavy() -> None:
    code = "import sys, {}; print([m for m in ('torch', 'nvidia', 'numpy', 'pyarrow', 'PIL') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code.format(", ".join(FACES))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def _taught() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What README, docs and examples import of alexprep: where, from which module, which names."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.py"))]:
        text = page.read_text()
        sources = (
            [text] if page.suffix == ".py" else re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        )
        for module, names in itertools.chain.from_iterable(map(_imports_of, sources)):
            if module.split(".")[0] == "alexprep":
                yield page.relative_to(ROOT).as_posix(), module, names


def test_every_module_is_on_the_map() -> None:
    words = set(re.findall(r"[\w/]+\.py", (ROOT / "docs" / "house.md").read_text()))
    names = {path.name for path in FILES if not path.stem.startswith("__")}
    assert names == {word.rpartition("/")[2] for word in words} - {"test_repository.py"}


def test_docs_know_no_deeper_name() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*")]:
        if page.suffix in (".md", ".py"):
            assert not re.search(r"(from|import) alexprep\.(shards|pipeline|train)\.", page.read_text()), page


@pytest.mark.parametrize(("page", "module", "names"), list(_taught()))
def test_docs_import_public_names_alone(page: str, module: str, names: tuple[str, ...]) -> None:
    assert module in FACES, f"{page} imports {module}"
    assert set(names) <= set(_public_names(module)), page


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_package_is_packed() -> None:
    """A folder that setup.cfg does not list works in an editable install and is missing from the wheel."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {".".join(("alexprep", *path.parent.relative_to(ROOT).parts)) for path in FILES}
    compiled = {
        f"alexprep.{room}.compiled" for room in ("shards", "pipeline", "train.models")
    }  # C alone, where there is a compiler
    assert found | compiled == listed
    for package in ORDER:
        assert (ROOT / package / "py.typed").exists()


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_what_is_required_is_pinned_within_its_bounds(python: str) -> None:
    """constraints.txt has one version of each requirement, for each Python that it tells apart."""
    project = _project()
    lists = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]
    pins: dict[str, list[str]] = {}
    own = (ROOT / "tests/ecosystem/constraints.txt").read_text().splitlines()
    lines = [
        *(ROOT / "constraints.txt").read_text().splitlines(),
        *(line for line in own if not line.startswith("torch==")),
    ]
    for line in lines:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (bound,) = pin.specifier
            assert bound.operator == "==", line
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                pins.setdefault(canonicalize_name(pin.name), []).append(bound.version)
    for required in map(Requirement, itertools.chain.from_iterable(lists)):
        if required.marker is not None and not required.marker.evaluate({"python_version": python}):
            continue
        (version,) = pins.get(canonicalize_name(required.name), ["none"])
        assert version != "none" and version in required.specifier, f"{required}, but constraints.txt has {version}"
    assert all(len(versions) == 1 for versions in pins.values()), pins


# What cannot be told from the import's first word, or from an import at all.
DISTRIBUTIONS = {
    "nvidia.dali": "nvidia-dali-cuda120",
    "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu12",
    "tomli": "tomli",
    "google": "protobuf",
}
UNSEEN = {"tensorboard": "torch.utils.tensorboard imports it"}


def _distributions(paths: list[Path]) -> set[str]:
    """What must be installed for these files' imports."""
    found: set[str] = set()
    known = packages_distributions()
    for path in paths:
        for name, names in _imports(path):
            word = name.split(".")[0]
            if word == "nvidia":
                word = ".".join([*name.split("."), *names][:2])
            owners = (
                {DISTRIBUTIONS[word]} if word in DISTRIBUTIONS else {*known.get(word, [])}
            )  # none: a module of ours
            assert len(owners) <= 1, f"{path}: which distribution has {word}?"
            found |= {canonicalize_name(owner) for owner in owners} - {"alexprep"}
    return found


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}


def test_no_module_bears_the_name_of_a_library() -> None:
    """Where a program of this folder is run by its path, it would be taken for the library."""
    project = _project()
    listed = [project["project"]["dependencies"], project["dependency-groups"]["dev"]]
    declared = _names(list(itertools.chain.from_iterable(listed)))
    libraries = {
        word for word, names in packages_distributions().items() if {*map(canonicalize_name, names)} & declared
    }
    names = {path.stem for path in FILES} - {"__init__", "__main__"}
    assert names & (sys.stdlib_module_names | libraries) == set()


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    """benchmarks/contestants/ have environments of their own."""
    project = _project()
    required = _names(project["project"]["dependencies"])
    extras = _names(list(itertools.chain.from_iterable(project["project"]["optional-dependencies"].values())))
    dev = _names(project["dependency-groups"]["dev"])
    product = _distributions(FILES)
    assert required | (extras & (product | set(UNSEEN))) == product | set(UNSEEN)
    assert extras <= product | set(UNSEEN)
    others = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").rglob("*.py")]
    assert _distributions(others) - required - dev == set()


def test_the_version_has_an_entry_in_the_changelog() -> None:
    assert f"## [{_project()['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()

"""Conventions as tests: one-way imports, docstrings that run, packages that are packed."""

from __future__ import annotations

import ast
import configparser
import doctest
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
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
        *("pipeline/autotune.py", "pipeline/device.py", "pipeline/loader.py", "pipeline/loader_settings.py"),
        "pipeline/wds_pipeline.py",
        "shards/image_codec_cuda.py",
    ),
    "nvidia.dali": ("pipeline/dali_graph.py", "pipeline/dali_ops.py"),
    "webdataset": ("pipeline/wds_pipeline.py",),
    "sklearn": (),
    "pickle": (),
    "subprocess": ("shards/worker_pool.py", "train/launch.py"),
    "ray": ("shards/ray_runner.py",),
}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    here = ORDER.index(place.split("/")[0])
    for name in _imported(path):
        assert not name.startswith("."), f"write alexprep.…, not the relative {name!r}"
        top, _, rest = name.partition(".")
        assert top not in ORDER, f"write alexprep.{name}, not {name!r}"
        if top == "alexprep":
            assert rest, "import a package, not the bare namespace"
            assert ORDER.index(rest.split(".")[0]) <= here, f"{place} may not import {name}"
        for library, places in FENCES.items():
            if name == library or name.startswith(library + "."):
                assert place.startswith(places) if places else False, f"{place} may not import {library}"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_package_is_packed() -> None:
    """A folder that setup.cfg does not list works in an editable install and is missing from the wheel."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {".".join(("alexprep", *path.parent.relative_to(ROOT).parts)) for path in FILES}
    assert found == listed
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
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (bound,) = pin.specifier
            assert bound.operator == "==", line
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                pins.setdefault(canonicalize_name(pin.name), []).append(bound.version)
    for required in map(Requirement, itertools.chain.from_iterable(lists)):
        (version,) = pins.get(canonicalize_name(required.name), ["none"])
        assert version != "none" and version in required.specifier, f"{required}, but constraints.txt has {version}"
    assert all(len(versions) == 1 for versions in pins.values()), pins


def test_the_version_has_an_entry_in_the_changelog() -> None:
    assert f"## [{_project()['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()

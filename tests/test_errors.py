"""Messages name options to users of the command line, and parameters to programs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexprep.shards import errors
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError, command_line_words, in_python

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("message", "to_a_program"),
    [
        ("there is no cuda:1 here: use --device cpu", 'there is no cuda:1 here: use device="cpu"'),
        (
            "--device cuda: no GPU (x); --device cpu does without",
            'device="cuda": no GPU (x); device="cpu" does without',
        ),
        ("--max-rejects 2.5% allows; raise --max-rejects, or", 'max_rejects="2.5%" allows; raise max_rejects, or'),
        ("--seed -1 is not in [0, 9]", "seed=-1 is not in [0, 9]"),
        ("--out /a/b.c lies in it: use a new --out.", 'folder="/a/b.c" lies in it: use a new folder.'),
        ("give --labels FILE with one name a line", "give labels=FILE with one name a line"),
        ("--labels ilsvrc-id needs the devkit", 'labels="ilsvrc-id" needs the devkit'),
        (
            "--cache-limit 500 has no effect without --cache: name the folder with --cache FOLDER",
            "cache_limit=500 has no effect without cache: name the folder with cache=FOLDER",
        ),
        ("say with --layout what it is (or --limit)", "say with layout what it is (or limit)"),
        ("--layout odd is not one of tar", "layout odd is not one of tar"),
        ("leave it out with --metadata", "leave it out with metadata"),
        ("--unlabelled takes all", "unlabelled=True takes all"),
        ("use --columns label=NAME.", 'use columns=(("label", "NAME"),).'),
        ("--split-folders 'val=a b,test=c' is not", 'split_folders=(("val", "a b"), ("test", "c")) is not'),
        ("shard with `--labels ilsvrc-id`", 'shard with labels="ilsvrc-id"'),
        ("mend it with `alexprep verify --repair SOURCE`", "mend it with `alexprep verify --repair SOURCE`"),
        ("SOURCE /x/--layout/a--b is not -- here", "SOURCE /x/--layout/a--b is not -- here"),
    ],
)
def test_options_become_parameters(message: str, to_a_program: str) -> None:
    assert in_python(message) == to_a_program


def test_who_asks_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_on_command_line", False)
    error = AlexprepError("use --device cpu")
    ask = AmbiguousSourceError("Which?", [("--layout folders", "classes"), ("--unlabelled", "none")])
    assert str(error) == 'use device="cpu"' and repr(error) == "AlexprepError('use --device cpu')"
    with pytest.raises(RuntimeError), command_line_words():
        assert str(error) == "use --device cpu" and "\n  --layout folders  classes\n" in str(ask)
        raise RuntimeError
    assert str(ask).split("\n")[1:] == ['  layout="folders"  classes', "  unlabelled=True      none"]


def _texts(node: ast.AST) -> Iterator[str]:
    """The strings below a node that are no docstrings, with {} for what is put in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from _texts(child)


@pytest.mark.parametrize("floor", ["shards", "pipeline"])
def test_no_message_of_a_library_keeps_an_option(floor: str) -> None:
    """Of what is raised there: commands in backticks apart."""
    left, seen = [], 0
    for path in sorted((ROOT / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for text in _texts(node) if isinstance(node, ast.Raise) else ():
                seen += "--" in text
                left += (
                    [(path.name, text)] if re.search(r"(?<!\w)--[a-z]", re.sub("`[^`]*`", "", in_python(text))) else []
                )
    assert not left and seen > (40 if floor == "shards" else 1)

"""alexprep recipes: lists the recipes, or shows all that one of them says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import json_option

if TYPE_CHECKING:
    from alexprep.train.recipes import Recipe


@click.command(short_help="What can be trained, and how.")
@click.argument("name", metavar="[NAME | FILE.py[:FUNCTION]]", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes; or all that one of them says, by its name or, for one of your own, by its file.

    \b
    Example: alexprep recipes alexnet-2012
    """
    from alexprep.cli import output
    from alexprep.train import recipes as known

    if name is not None:
        document = _document(known.recipe(name))
        output.table(f"Recipe {document['name']}", _rows(document))
        output.json_line(document, as_json)
        return
    width = max(map(len, known.RECIPES))
    click.echo(f"{'recipe':<{width}}  stored, pixels  crop  batch   rate  epochs  schedule")
    for one in known.RECIPES.values():
        low, high = one.stored_sizes
        sizes = f"{low}" if low == high else f"{low}-{high}"
        numbers = f"{sizes:>14}  {one.crop:>4}  {one.batch_size:>5}  {one.lr:>5g}  {one.epochs:>6}"
        click.echo(f"{one.name:<{width}}  {numbers}  {type(one.schedule).__name__}")
    output.json_line({name: _document(one) for name, one in known.RECIPES.items()}, as_json)


def _document(recipe: Recipe) -> dict[str, Any]:
    """Every field as JSON values."""
    return recipe.planned().describe() | {"epochs": recipe.epochs, "stored_sizes": list(recipe.stored_sizes)}


def _rows(document: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested fields as names with dots."""
    rows = []
    for name, value in document.items():
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, "none" if value in (None, {}) else str(value)))
    return rows

"""alexprep recipes: lists the recipes, or shows every field of one of them, with its type and its meaning."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import json_option, settings_option

if TYPE_CHECKING:
    from alexprep.train.recipes import Recipe

WIDTH = 110  # of a terminal that does not say


@click.command(short_help="What can be trained, and how.")
@click.argument("name", metavar="[NAME | FILE.py[:FUNCTION]]", required=False)
@settings_option
@json_option
def recipes(name: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """List the recipes; or every field of one of them, by its name or, for one of your own, by its file.

    A field is shown as `--set FIELD=VALUE` takes it, with its type and its meaning.

    \b
    Example: alexprep recipes alexnet-2012
    """
    from alexprep.cli import output
    from alexprep.train import recipes as known
    from alexprep.train.settings import by_field, with_settings

    if name is None and settings:
        raise click.UsageError("--set is for one recipe: name it.")
    if name is not None:
        chosen = with_settings(known.recipe(name), by_field(settings))
        _show(name, chosen)
        output.json_line(_document(chosen), as_json)
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


def _show(name: str, recipe: Recipe) -> None:
    """The fields of the recipe that was named so, two lines each: what `--set` takes and its type, then the meaning."""
    import shutil

    from alexprep.train.settings import settable

    width = max(60, shutil.get_terminal_size((WIDTH, 24)).columns)
    click.echo(f"Recipe {recipe.name}. `alexprep train --recipe {name} --set FIELD=VALUE` changes a field.")
    if summary := recipe.summary():
        click.echo(f"Layers of {summary}.")
    for one in settable(recipe):
        click.echo(f"{one.path}={one.value}  ({one.type})")
        click.echo(textwrap.fill(one.meaning, width, initial_indent="    ", subsequent_indent="    "))

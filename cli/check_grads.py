"""`alexprep check-grads`: its options, and what it found. Gradients are checked in `alexprep.train.gradient_check`."""

from __future__ import annotations

import click

from alexprep.cli.options import AT_LEAST_1, json_option, model_option, settings_option


@click.command("check-grads", short_help="A network's gradients against differences of its loss.")
@click.option("--recipe", metavar="NAME | FILE.py[:FUNCTION]", help="Whose network.  [default: alexnet]")
@model_option
@settings_option
@click.option("--classes", type=click.IntRange(2), default=10, show_default=True, help="Of the network.")
@click.option("--images", type=AT_LEAST_1, default=2, show_default=True, help="Made-up ones, of the recipe's crop.")
@click.option("--entries", type=AT_LEAST_1, default=5, show_default=True, help="Weights of each tensor to change.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, images and picks.")
@json_option
def check_grads(
    recipe: str | None,
    model: str | None,
    settings: tuple[str, ...],
    classes: int,
    images: int,
    entries: int,
    seed: int,
    as_json: bool,
) -> None:
    """Change single weights of a network, in float64, and compare what the loss does with the gradient.

    For networks with layers of your own. Exit status 1 where a gradient is wrong: farther from the difference than 1e-5 of it, and than rounding explains.

    \b
    Example: alexprep check-grads --recipe cifar10-quick --model layers.cfg
    """
    from alexprep.cli import output
    from alexprep.train.gradient_check import check_gradients
    from alexprep.train.settings import recipe_of

    made = recipe_of({"recipe": recipe, "model": model, "settings": settings})
    found = check_gradients(made, classes, seed=seed, images=images, entries=entries)
    rows = [("parameter", "shape", "weights changed", "gradient", "difference", "apart", "")]
    for one in found:
        shape = " x ".join(map(str, one.shape))
        verdict = "right" if one.agrees else "WRONG" if one.wrong else "too small to tell"
        values = (f"{one.gradient:.6g}", f"{one.difference:.6g}", f"{one.apart:.0e}", verdict)
        rows.append((one.name, shape, f"{one.entries}", *(values if one.entries else ("no part", "", "", ""))))
    output.columns(rows)
    wrong = [one.name for one in found if one.wrong]
    output.json_line({"wrong": wrong, "parameters": [one._asdict() for one in found]}, as_json)
    if wrong:
        output.note(f"The gradient of {', '.join(wrong)} is not that of the loss.")
        click.get_current_context().exit(1)

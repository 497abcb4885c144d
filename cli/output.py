"""What commands show: a live bar on a terminal, plain lines in a log, tables, one JSON line."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

_LOG_SECONDS = 10.0


@contextlib.contextmanager
def progress(what: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """Shows how far a job is: yields a function to be called with (finished, total), both in `unit`."""
    start = last = time.monotonic()
    if not (sys.stderr and sys.stderr.isatty()):  # a process may have none

        def say(finished: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _LOG_SECONDS or finished >= total:
                return
            last = now
            rate = finished / (now - start)
            left = f", {(total - finished) / rate:,.0f} s left" if rate else ""
            click.echo(f"{what}: {finished:,} of {total:,}, {rate:,.0f} {unit}/s{left}", err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate="–")

        def show(finished: int, total: int) -> None:
            rate = finished / max(1e-9, time.monotonic() - start)
            bar.update(task, completed=finished, total=total, rate=f"{rate:,.0f}")

        yield show


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    click.echo(title)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}")


def columns(rows: Iterable[tuple[str, ...]]) -> None:
    """Prints rows of as many texts each, the first column to the left, the others to the right."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True)]
        click.echo("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())


def note(words: str) -> None:
    """Prints lines on stderr; above a live bar, which stands in the place of `sys.stderr` meanwhile."""
    click.echo(words, file=sys.stderr)


def json_line(document: dict[str, Any], wanted: bool) -> None:
    """Prints the document as one line, if asked for: the last thing a command prints."""
    if wanted:
        click.echo(json.dumps(document))


def leave_if_stopped(signal_name: str | None) -> None:
    """Ends the command with 128 and the signal that stopped its work, as shells report it; does nothing where none did."""
    if signal_name:
        click.get_current_context().exit(128 + signal.Signals[signal_name])

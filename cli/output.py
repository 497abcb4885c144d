"""What commands show: a live bar on a terminal, plain lines in a log, tables, one JSON line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

_LOG_SECONDS = 10.0


@contextlib.contextmanager
def progress(what: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """Shows how far a job is: yields a function to be called with (finished, total), both in `unit`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, rate="–")
        start = time.monotonic()

        def show(finished: int, total: int) -> None:
            rate = finished / max(1e-9, time.monotonic() - start)
            bar.update(task, completed=finished, total=total, rate=f"{rate:,.0f}")

        yield show


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._start = self._last = time.monotonic()

    def __call__(self, finished: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _LOG_SECONDS or finished >= total:
            return
        self._last = now
        rate = finished / (now - self._start)
        left = f", {(total - finished) / rate:,.0f} s left" if rate else ""
        click.echo(f"{self._what}: {finished:,} of {total:,}, {rate:,.0f} {self._unit}/s{left}", err=True)


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    click.echo(title)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}")


def json_line(document: dict[str, Any], wanted: bool) -> None:
    """Prints the document as one line, if asked for: the last thing a command prints."""
    if wanted:
        click.echo(json.dumps(document))


def size(count: int) -> str:
    """A number of bytes for people.

    >>> size(123), size(9_768_960)
    ('123 B', '9.8 MB')
    """
    if count < 1000:
        return f"{count} B"
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"

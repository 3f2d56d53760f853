"""What the commands print: tables on a terminal, JSON for machines, progress only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click
import msgspec
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from reconciler.fleet import Progress as Tell
from reconciler.moment import clock
from reconciler.moment import span as ago

__all__ = ["ago", "clock", "console", "emit", "reading", "size", "table"]

_WIDTH_IN_A_PIPE = 4000


def console() -> Console:
    """Standard output; as wide as the terminal, or as wide as it takes in a pipe."""
    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE, highlight=False, markup=False
    )


def emit(value: Any) -> None:
    """One JSON value, on one line."""
    click.echo(msgspec.json.encode(value).decode())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; columns whose name ends in # are numbers."""
    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.ROUNDED if sys.stdout.isatty() else None,
    )
    for column in columns:
        number = column.endswith("#")
        made.add_column(column.rstrip("#"), justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return made


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**20:.1f} MiB"


class _Rate(ProgressColumn):
    """Entries a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s", style="dim")


def reading(total: int) -> AbstractContextManager[Tell]:
    """A progress bar over entries read, on a terminal; silent in a pipe and for short logs."""
    return progress("reading the log", total if total >= 20_000 else 0)


@contextmanager
def progress(what: str, total: int) -> Iterator[Tell]:
    """A progress bar on a terminal; silent in a pipe, and where there is nothing to count."""
    if not sys.stderr.isatty() or total == 0:
        yield lambda count: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.update(task, advance=count)

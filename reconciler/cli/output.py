"""What the commands print: tables on a terminal, JSON for machines, progress only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
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
_BORDER = 3
"""What a column takes beyond its text: a line and a blank on either side."""
_SHORT = 14


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # Left to the command line; rich would end the program with status 1.


def console() -> Console:
    """Standard output; as wide as the terminal, or as wide as it takes in a pipe."""
    return _Console(
        width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE, highlight=False, markup=False
    )


def emit(value: Any) -> None:
    """One JSON value, on one line."""
    click.echo(msgspec.json.encode(value).decode())


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], spare: Sequence[str] = ()
) -> Table:
    """A table.

    Args:
        title: above it.
        columns: their heads; those whose name ends in # are numbers.
        rows: a cell for each column.
        spare: columns that are left out, first to last, where a terminal is too narrow for all words.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    texts = {
        name: [name.rstrip("#"), *(row[at] for row in cells)] for at, name in enumerate(columns)
    }
    least = {name: max(map(_unbroken, column)) for name, column in texts.items()}
    for name in spare:
        if _room(least) >= 0:
            break
        del least[name]
    terminal = sys.stdout.isatty()
    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.ROUNDED if terminal else None,
    )
    room = _room(least)
    for name, width in least.items():
        # rich makes the widest columns narrower, and breaks words where others have blanks to break at.
        more = min(max(map(len, texts[name])) - width, max(room, 0))
        room -= more
        made.add_column(
            name.rstrip("#"),
            justify="right" if name.endswith("#") else "left",
            overflow="fold",
            width=width + more if terminal and room >= 0 else None,
        )
    for row in cells:
        made.add_row(
            *(Text(text) for name, text in zip(columns, row, strict=True) if name in least)
        )
    return made


def _room(widths: Mapping[str, int]) -> int:
    """How much wider than these columns the terminal is."""
    return console().width - sum(widths.values()) - _BORDER * len(widths) - 1


def _unbroken(text: str) -> int:
    """The narrowest that a cell may become: short ones stay on one line, long ones break between words."""
    return len(text) if len(text) <= _SHORT else max(map(len, text.split()), default=0)


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

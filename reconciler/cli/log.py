"""`agent-reconciler log`: the events, as they stand in the log, and as they come."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator

import click
from rich.console import Console
from rich.text import Text

from reconciler.cli.explain import check_resource, unknown
from reconciler.cli.options import common, opened
from reconciler.cli.output import clock, console, emit
from reconciler.history import missing_beginning
from reconciler.life import REFS_KEPT
from reconciler.nearest import nearest
from store.errors import ReconcilerError, UnknownProcess
from store.event import LogEntry
from store.log import EventLog
from store.namespace import Namespace

_STYLES = {
    "created": "green",
    "adopted": "green",
    "cleaned_up": "cyan",
    "cleanup_requested": "yellow",
    "cleanup_refused": "magenta",
    "cleanup_failed": "red",
    "process_lost": "red",
}


@click.command(short_help="Print events as they stand, and as they come.")
@common
@click.option("-f", "--follow", is_flag=True, help="Go on with events as they come.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last N events.")
@click.option("--process", help="Only of this process: its id, or the name of a service.")
@click.option("--resource", help="Only about this resource, kind/id.")
def log(
    url: str,
    namespace: str,
    as_json: bool,
    follow: bool,
    lines: int | None,
    process: str | None,
    resource: str | None,
) -> None:
    """Print the log: who did what to which resource, why, and by which order."""

    if resource is not None:
        check_resource(resource, "--resource")
    asyncio.run(_print(url, namespace, as_json, follow, lines, _Wanted(process, resource)))


class _Wanted:
    """Which entries are printed.

    Args:
        process: only of this one, its id or the name of its service; None is all.
        resource: only about this one; None is all.
    """

    def __init__(self, process: str | None, resource: str | None) -> None:
        self._process = process
        self._resource = resource
        self._processes: set[str] = set()
        self._refs: set[str] = set()
        self._resource_seen = False

    def __call__(self, entry: LogEntry) -> bool:
        event = entry.event
        ids = {event.process, event.holder or event.process}
        names = ids | {one.partition("@")[0] for one in ids}
        if self._process is not None:
            self._processes |= names
        if self._resource is not None and len(self._refs) < REFS_KEPT:
            self._refs.add(event.ref)
        self._resource_seen |= event.ref == self._resource
        return self._process in {None, *names} and self._resource in (None, event.ref)

    def missing(self, namespace: Namespace) -> ReconcilerError | None:
        """What to say when what is wanted was not among all entries so far."""
        if self._resource is not None and not self._resource_seen:
            return unknown(self._resource, self._refs, namespace)
        if self._process is not None and self._process not in self._processes:
            near = nearest(self._process, self._processes)
            offer = f"the nearest are {', '.join(near)}" if near else "no name in it is like that"
            return UnknownProcess(
                f"the log of namespace {namespace.name} never heard of process {self._process!r}; "
                f"{offer}; see `agent-reconciler status`"
            )
        return None


async def _print(
    url: str, name: str, as_json: bool, follow: bool, lines: int | None, wanted: _Wanted
) -> None:
    out = console()
    async with opened(url, name) as (store, namespace):
        event_log = EventLog(store, namespace)
        ends = await event_log.last()
        past = (entry async for entry in event_log.read() if wanted(entry))
        async for entry in _last(past, lines):
            _show(out, entry, as_json)
        if (error := wanted.missing(namespace)) is not None:
            lost = await missing_beginning(namespace)
            if lost is None:
                raise error
            raise type(error)(
                f"{error}; events up to {clock(lost.until_ms)} UTC were dropped (archive: off)"
            )
        if follow:
            async for entry in event_log.follow(ends):
                if wanted(entry):
                    _show(out, entry, as_json)
                    sys.stdout.flush()


async def _last(entries: AsyncIterator[LogEntry], count: int | None) -> AsyncIterator[LogEntry]:
    if count is None:
        async for entry in entries:
            yield entry
        return
    kept: deque[LogEntry] = deque(maxlen=count)
    async for entry in entries:
        kept.append(entry)
    for entry in kept:
        yield entry


def _show(out: Console, entry: LogEntry, as_json: bool) -> None:
    if as_json:
        emit(
            {
                "id": entry.id,
                "partition": entry.partition,
                **entry.event.model_dump(exclude_none=True),
            }
        )
    else:
        out.print(line(entry), soft_wrap=True)


def line(entry: LogEntry) -> Text:
    """An event as one line for people."""
    event = entry.event
    attrs = event.attrs or {}
    text = Text()
    text.append(clock(entry.at_ms), style="dim")
    text.append(f"  {event.type:<17}", style=_STYLES.get(event.type, ""))
    text.append(f"  {event.ref}", style="bold")
    if "registry" in attrs:
        text.append(f" in {attrs['registry']}[{attrs['key']}]")
    if event.uses:
        text.append(f"  uses {', '.join(event.uses)}")
    if event.owned_by:
        text.append(f"  owned by {event.owned_by}")
    if attrs.get("in_use"):
        text.append(f"  in use by {attrs['in_use']}")
    if event.reason:
        text.append(f"  {event.reason}")
    if event.order_id:
        text.append(f"  [{event.order_id}]", style="yellow")
    text.append(f"  by {event.process} #{event.seq}", style="dim")
    if event.holder and event.holder != event.process:
        text.append(f" at {event.holder}", style="dim")
    return text

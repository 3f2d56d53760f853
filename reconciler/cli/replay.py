"""`agent-reconciler replay`: the past. What was alive, what changed, step by step, one life, exported."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import click

from reconciler.changes import Changes
from reconciler.cli.explain import check_resource, read_lives, unknown
from reconciler.cli.lookback import (
    describe_changes,
    describe_lives,
    show_alive,
    show_changes,
    show_lives,
)
from reconciler.cli.options import common, opened
from reconciler.cli.output import console, emit, reading
from reconciler.cli.step import Walk, walk
from reconciler.describe import describe_resource
from reconciler.export import exporting
from reconciler.fleet import fold_log
from reconciler.fold import FleetState
from reconciler.history import missing_beginning
from reconciler.moment import check_past, clock, parse_moment
from reconciler.phrases import counted
from reconciler.scan import check_entry, entry_id, scan
from store.errors import BadMoment
from store.log import EventLog
from store.namespace import Namespace
from store.position import START, Key

MOMENT = "TIME|ID"


@click.command(short_help="Show the past, according to the log.")
@common
@click.option("--at", "at", metavar=MOMENT, help="What was alive then; now if left out.")
@click.option("--from", "begin", metavar=MOMENT, help="What changed after this …")
@click.option("--to", "end", metavar=MOMENT, help="… and up to this; now if left out.")
@click.option("--step", is_flag=True, help="One event at a time, forward and back, by keys.")
@click.option("--resource", help="The life of this resource, kind/id.")
@click.option(
    "--export",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the events to FILE: .jsonl (CloudEvents) or .parquet.",
)
def replay(
    url: str,
    namespace: str,
    as_json: bool,
    at: str | None,
    begin: str | None,
    end: str | None,
    step: bool,
    resource: str | None,
    file: Path | None,
) -> None:
    """Show the past, according to the log.

    TIME is ISO 8601 (2026-11-21T14:03:00, UTC unless it says otherwise), a time of today (14:03:00),
    or seconds since 1970; ID is the id of a log entry. --step, --resource and --export take the same
    bounds: of the whole log, if none is given.
    """
    if resource is not None:
        check_resource(resource, "--resource")
    if at is not None and (begin is not None or end is not None):
        raise click.UsageError(
            "--at is one moment, --from and --to are two: give the one or the other"
        )
    if step and file is not None:
        raise click.UsageError("--step and --export do not go together")
    stretch = begin is not None or end is not None
    if stretch and resource is not None and not (step or file):
        raise click.UsageError(
            "--resource goes with --at, --step or --export, not with --from and --to"
        )
    moments = {
        name: parse_moment(text, f"--{name}")
        for name, text in (("at", at), ("from", begin), ("to", end))
        if text is not None
    }
    check_order(moments)
    asyncio.run(_run(url, namespace, as_json, moments, step, resource, file))


def check_order(moments: dict[str, Key]) -> None:
    """Raises BadMoment when --from is after --to."""
    if "from" in moments and "to" in moments and moments["from"] > moments["to"]:
        begin, end = (clock(moments[name][0]) for name in ("from", "to"))
        raise BadMoment(f"--from {begin} UTC is after --to {end} UTC: give the earlier one first")


async def _run(
    url: str,
    name: str,
    as_json: bool,
    moments: dict[str, Key],
    step: bool,
    resource: str | None,
    file: Path | None,
) -> None:
    async with opened(url, name) as (store, namespace):
        now = await store.now_ms()
        event_log = EventLog(store, namespace)
        for what, moment in moments.items():
            check_past(moment, now, f"--{what}")
            await check_entry(event_log, moment, f"--{what}")
        at = moments.get("at")
        stretch = file is not None or (step and at is None) or "to" in moments
        if stretch and "from" not in moments:
            await _tell_what_is_missing(namespace)
        if file is not None:
            await _export(namespace, file, moments, resource, as_json=as_json)
        elif step:
            await _step(event_log, moments, resource, as_json=as_json)
        elif resource is not None:
            await _life(namespace, resource, at, now, as_json=as_json)
        elif "from" in moments or "to" in moments:
            await _changes(event_log, moments, now, as_json=as_json)
        else:
            with reading(await event_log.length()) as tell:
                state = await fold_log(event_log, until=at, progress=tell)
            at_ms = at[0] if at else now
            if as_json:
                emit(_alive(state, at_ms))
            else:
                show_alive(state, at_ms)


async def _tell_what_is_missing(namespace: Namespace) -> None:
    """Says in one line that the log has lost its beginning, where that is what is asked for."""
    missing = await missing_beginning(namespace)
    if missing is None:
        return
    names = ", ".join(map(str, missing.partitions))
    line = (
        f"incomplete: events up to {clock(missing.until_ms)} UTC of partition {names} were dropped "
        "(archive: off), and what began with them is not shown; "
    )
    if missing.complete_ms is None:
        line += "no snapshot that can be read tells what was alive then"
    else:
        line += f"from {clock(missing.complete_ms)} UTC on (--from) everything is"
    click.echo(line, err=True)


def _alive(state: FleetState, at_ms: int, resource: str | None = None) -> dict[str, Any]:
    return {
        "at_ms": at_ms,
        "events": state.events,
        "processes": list(state.processes),
        "alive": [
            describe_resource(process.id, found)
            for process in state.processes.values()
            for found in process.resources.values()
            if resource in (None, found.ref)
        ],
    }


async def _life(
    namespace: Namespace, resource: str, at: Key | None, now: int, *, as_json: bool
) -> None:
    with reading(await EventLog(namespace.store, namespace).length()) as tell:
        lives, state = await read_lives(
            namespace, resource, until=entry_id(at) if at else "+", progress=tell
        )
    if not lives.lives:
        raise unknown(resource, lives.refs, namespace)
    at_ms = at[0] if at else now
    if as_json:
        emit(_alive(state, at_ms, resource) | {"lives": describe_lives(lives.sorted())})
    else:
        show_lives(lives.sorted(), at_ms)


async def _changes(
    event_log: EventLog, moments: dict[str, Key], now: int, *, as_json: bool
) -> None:
    begin, end = moments.get("from"), moments.get("to")
    with reading(await event_log.length()) as tell:
        state = await fold_log(event_log, until=begin, progress=tell) if begin else FleetState()
        changes = Changes(state)
        await scan(
            event_log,
            [changes.see],
            after=entry_id(begin) if begin else START,
            until=entry_id(end) if end else "+",
            progress=tell,
        )
    bounds = (begin[0] if begin else None, end[0] if end else now)
    if as_json:
        emit(describe_changes(changes, bounds))
    else:
        show_changes(changes, bounds)


async def _step(
    event_log: EventLog, moments: dict[str, Key], resource: str | None, *, as_json: bool
) -> None:
    begin, end = moments.get("from") or moments.get("at"), moments.get("to")
    state = await fold_log(event_log, until=begin) if begin else FleetState()
    entries = event_log.read(
        entry_id(begin) if begin else START, until=entry_id(end) if end else "+"
    )
    async with aclosing(entries):  # type: ignore[type-var]
        await walk(Walk(state, entries, resource), as_json=as_json)


async def _export(
    namespace: Namespace,
    file: Path,
    moments: dict[str, Key],
    resource: str | None,
    *,
    as_json: bool,
) -> None:
    event_log = EventLog(namespace.store, namespace)
    begin, end = moments.get("from"), moments.get("to") or moments.get("at")
    written = 0
    with exporting(file, namespace.name) as writer, reading(await event_log.length()) as tell:
        async for entry in event_log.read(
            entry_id(begin) if begin else START, until=entry_id(end) if end else "+"
        ):
            tell(1)
            if resource in (None, entry.event.ref):
                writer.write(entry)
                written += 1
    if as_json:
        emit({"file": str(file), "events": written})
    else:
        console().print(f"{counted(written, 'event')} written to {file}")

"""`agent-reconciler replay`: fold the log up to a moment, and print what was alive then."""

from __future__ import annotations

import asyncio

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import ago, clock, console, emit, reading, table
from reconciler.describe import describe_resource
from reconciler.fleet import fold_log
from reconciler.fold import FleetState, Resource
from reconciler.moment import check_past, parse_moment
from store.errors import BadMoment
from store.event import check_ref
from store.log import EventLog


@click.command()
@common
@click.option(
    "--at", "moment", metavar="TIME|ID", help="A time, or the id of a log entry; now if left out."
)
@click.option("--resource", help="Only this resource, kind/id.")
def replay(
    url: str, namespace: str, as_json: bool, moment: str | None, resource: str | None
) -> None:
    """Show what was alive at a moment, according to the log.

    TIME is ISO 8601 (2026-11-21T14:03:00, UTC unless it says otherwise), a time of today (14:03:00),
    or seconds since 1970.
    """
    if resource is not None:
        try:
            check_ref(resource)
        except ValueError as error:
            raise BadMoment(f"--resource {error}") from None
    until = parse_moment(moment) if moment is not None else None
    state, at_ms = asyncio.run(_fold(url, namespace, until))
    rows = [
        (process, found)
        for process, process_state in state.processes.items()
        for found in process_state.resources.values()
        if resource in (None, found.ref)
    ]
    if as_json:
        emit(
            {
                "at_ms": at_ms,
                "events": state.events,
                "processes": list(state.processes),
                "alive": [describe_resource(process, found) for process, found in rows],
            }
        )
    else:
        _show(state, rows, at_ms)


async def _fold(url: str, name: str, until: tuple[int, int] | None) -> tuple[FleetState, int]:
    async with opened(url, name) as (store, namespace):
        now = await store.now_ms()
        if until is not None:
            check_past(until, now)
        event_log = EventLog(store, namespace)
        with reading(await event_log.length()) as tell:
            state = await fold_log(event_log, until=until, progress=tell)
        return state, until[0] if until else now


def _show(state: FleetState, rows: list[tuple[str, Resource]], at_ms: int) -> None:
    title = (
        f"alive at {clock(at_ms)} UTC: {len(rows)} resources in {len(state.processes)} processes"
    )
    out = console()
    if not rows:
        out.print(f"{title} ({state.events} events)")
        return
    cells = [
        (
            r.ref,
            process,
            clock(r.created_ms),
            f"{ago(at_ms - r.used_ms)} before",
            "yes" if r.in_use else "",
            ", ".join(r.uses),
            r.owned_by,
        )
        for process, r in rows
    ]
    columns = ["resource", "process", "created", "last used", "in use", "uses", "owned by"]
    out.print(table(title, columns, cells))

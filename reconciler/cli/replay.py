"""`agent-reconciler replay`: fold the log up to a moment, and print what was alive then."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime
from typing import Any

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import ago, clock, console, emit, reading, table
from reconciler.fleet import fold_log
from reconciler.fold import FleetState, Resource
from store.errors import BadMoment
from store.event import check_ref
from store.log import EventLog, id_key

_ENTRY_ID = re.compile(r"\d{10,}-\d+")
_LAST_OF_MS = 2**63


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
                "alive": [_describe(process, found) for process, found in rows],
            }
        )
    else:
        _show(state, rows, at_ms)


async def _fold(url: str, name: str, until: tuple[int, int] | None) -> tuple[FleetState, int]:
    async with opened(url, name) as (store, namespace):
        now = await store.now_ms()
        if until is not None and until[0] > now:
            raise BadMoment(
                f"--at {clock(until[0])} UTC is in the future; it is {clock(now)} UTC now"
            )
        event_log = EventLog(store, namespace)
        with reading(await event_log.length()) as tell:
            state = await fold_log(event_log, until=until, progress=tell)
        return state, until[0] if until else now


def parse_moment(text: str) -> tuple[int, int]:
    """A time or an entry id, as the last entry id that belongs to it: (ms, n).

    Raises:
        BadMoment: it is neither.
    """
    text = text.strip()
    if _ENTRY_ID.fullmatch(text):
        return id_key(text)
    if re.fullmatch(r"\d{9,11}(\.\d+)?", text):
        return int(float(text) * 1000), _LAST_OF_MS
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?", text):
        today = time.strftime("%Y-%m-%d", time.gmtime())
        text = f"{today}T{text.zfill(len(text) + (text[1] == ':'))}"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadMoment(
            f"--at {text!r} is neither a time nor an entry id: write 2026-11-21T14:03:00, 14:03:00, "
            "seconds since 1970, or 1763733780000-0"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1000), _LAST_OF_MS


def _describe(process: str, resource: Resource) -> dict[str, Any]:
    return {
        "ref": resource.ref,
        "process": process,
        "created_ms": resource.created_ms,
        "used_ms": resource.used_ms,
        "uses": list(resource.uses),
        "owned_by": resource.owned_by,
        "in_use": resource.in_use,
        "seq": resource.seq,
    }


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

"""`agent-reconciler verify`: is the log what was written? Looks at every event, changes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import console, emit, reading, table
from reconciler.phrases import counted
from store.log import EventLog
from store.verify import Verification, verify_log


@click.command(short_help="Find events that were changed, removed or added.")
@common
def verify(url: str, namespace: str, as_json: bool) -> int:
    """Find events that were edited, removed, added or moved, in stream and archive.

    Status 0: the log is whole; 1: it is damaged, each place is listed; 2: it could not be looked at.
    """
    found = asyncio.run(_verify(url, namespace))
    if as_json:
        emit({"whole": found.whole, **asdict(found)})
    else:
        _show(found)
    return 0 if found.whole else 1


async def _verify(url: str, name: str) -> Verification:
    async with opened(url, name) as (store, namespace):
        event_log = EventLog(store, namespace)
        with reading(await event_log.length()) as tell:
            return await verify_log(event_log, progress=tell)


def _show(found: Verification) -> None:
    out = console()
    looked_at = (
        f"{counted(found.events, 'event')} of "
        f"{counted(found.processes, 'process', 'processes')}, {counted(found.segments, 'segment')}"
    )
    for process, seq in found.began_late.items():
        out.print(f"{process} begins with seq {seq}: what came before was dropped (archive: off)")
    if found.whole:
        out.print(f"the log is whole: {looked_at}")
        return
    rows = [
        (p.kind, p.partition, p.position, p.process, p.seq or "", p.where, p.detail)
        for p in found.problems
    ]
    columns = ["what", "partition#", "entry", "process", "seq#", "where", "detail"]
    out.print(table(f"the log is DAMAGED: {looked_at}", columns, rows))
    if found.problem_count > len(rows):
        out.print(f"{found.problem_count - len(rows)} more are not listed")

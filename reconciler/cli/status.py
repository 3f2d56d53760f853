"""`agent-reconciler status`: what is alive, what is drift, who works on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import ago, console, emit, reading, size, table
from reconciler.describe import describe
from reconciler.fleet import Fleet, read_fleet
from store.log import EventLog


@click.command()
@common
def status(url: str, namespace: str, as_json: bool) -> None:
    """Show processes, live resources, drift, stuck teardowns and workers."""
    fleet = asyncio.run(_look(url, namespace))
    if as_json:
        emit(describe(fleet))
    else:
        _show(fleet)


async def _look(url: str, name: str) -> Fleet:
    async with opened(url, name) as (store, namespace):
        with reading(await EventLog(store, namespace).length()) as tell:
            return await read_fleet(store, namespace, progress=tell)


def _show(fleet: Fleet) -> None:
    out = console()
    now = fleet.now_ms
    rows: list[tuple[Any, ...]] = []
    for name, process in fleet.state.processes.items():
        summary = fleet.summaries.get(name)
        kinds = Counter(r.kind for r in process.resources.values())
        idle = max((now - r.used_ms for r in process.resources.values() if not r.in_use), default=0)
        rows.append(
            (
                name,
                ago(now - process.started_ms),
                ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
                sum(1 for r in process.resources.values() if r.in_use),
                ago(idle),
                size(summary.rss) if summary else "?",
                summary.fds if summary else "?",
            )
        )
    columns = ["process", "up", "alive", "in use#", "oldest idle", "memory#", "fds#"]
    out.print(table("processes", columns, rows) if rows else "no process is alive")
    drift = fleet.drift
    if drift:
        rows = [
            (
                item.sort,
                item.ref,
                f"{item.registry}[{item.key}]" if item.registry else "",
                item.process,
                item.reason,
            )
            for item in list(drift)[:20]
        ]
        more = sum(1 for _ in drift) - len(rows)
        title = "drift" + (f" (the first 20; {more} more)" if more else "")
        out.print(table(title, ["sort", "resource", "entry", "process", "why"], rows))
    else:
        out.print("no drift")
    if fleet.plan.stuck:
        rows = [(w.item.ref, w.item.process, w.failures, w.reason) for w in fleet.plan.stuck]
        out.print(table("stuck teardowns", ["resource", "process", "failures#", "why"], rows))
    rows = [
        (
            worker,
            len(beat.get("partitions", [])),
            f"{beat.get('lag_seconds', 0):.3f} s",
            ago(now - beat.get("at_ms", 0)),
        )
        for worker, beat in fleet.workers.items()
    ]
    out.print(
        table("workers", ["worker", "partitions#", "lag#", "last heard of"], rows)
        if rows
        else "no worker runs: start one with `agent-reconciler worker`"
    )
    if fleet.quarantined:
        rows = list(fleet.quarantined.items())
        out.print(table("quarantined entries", ["entry", "why it is not an event"], rows))

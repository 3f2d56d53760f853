"""`agent-reconciler status`: what is alive, what is drift, who works on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import ago, console, emit, reading, size, table
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


def describe(fleet: Fleet) -> dict[str, Any]:
    """A fleet as plain values."""
    processes = []
    for name, process in fleet.state.processes.items():
        summary = fleet.summaries.get(name)
        processes.append(
            {
                "process": name,
                "started_ms": process.started_ms,
                "last_event_ms": process.last_ms,
                "events": process.seq,
                "resources": dict(Counter(r.kind for r in process.resources.values())),
                "in_use": sum(1 for r in process.resources.values() if r.in_use),
                "registries": {r.name: r.count for r in summary.registries} if summary else {},
                "rss": summary.rss if summary else None,
                "fds": summary.fds if summary else None,
                "outbox": summary.outbox if summary else None,
                "spilled": summary.spilled if summary else None,
                "dropped": summary.dropped if summary else None,
                "outbox_problem": summary.outbox_problem if summary else None,
            }
        )
    drift = fleet.drift
    return {
        "now_ms": fleet.now_ms,
        "processes": processes,
        "resources": dict(
            Counter(r.kind for p in fleet.state.processes.values() for r in p.resources.values())
        ),
        "drift": {
            "orphans": len(drift.orphans),
            "dangling": len(drift.dangling),
            "ghosts": len(drift.ghosts),
            "untracked": len(drift.untracked),
        },
        "waiting": len(fleet.plan.waiting),
        "stuck": [
            {
                "ref": w.item.ref,
                "process": w.item.process,
                "failures": w.failures,
                "reason": w.reason,
            }
            for w in fleet.plan.stuck
        ],
        "workers": fleet.workers,
        "quarantined": fleet.quarantined,
        "events": fleet.state.events,
        "processes_lost": fleet.state.lost,
        "processes_stopped": fleet.state.stopped,
    }


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

"""`agent-reconciler status`: what is alive, what is drift, who works on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import ago, console, emit, reading, size, table
from reconciler.fleet import Fleet, read_fleet
from store.lease import holders
from store.log import EventLog

Held = dict[int, str | None]
"""Partition -> the worker that has its lease, None where nobody has."""


@click.command()
@common
def status(url: str, namespace: str, as_json: bool) -> None:
    """Show processes, live resources, drift, stuck teardowns and workers."""
    fleet, held = asyncio.run(_look(url, namespace))
    if as_json:
        emit(describe(fleet) | {"partitions": {str(p): worker for p, worker in held.items()}})
    else:
        _show(fleet, held)


async def _look(url: str, name: str) -> tuple[Fleet, Held]:
    async with opened(url, name) as (store, namespace):
        with reading(await EventLog(store, namespace).length()) as tell:
            fleet = await read_fleet(store, namespace, progress=tell)
        leases = await holders(namespace, namespace.all_partitions())
        return fleet, {p: token and token.rpartition(" ")[0] for p, token in leases.items()}


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


def _show(fleet: Fleet, held: Held) -> None:
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
    _show_workers(fleet, held)
    if fleet.quarantined:
        rows = list(fleet.quarantined.items())
        out.print(table("quarantined entries", ["entry", "why it is not an event"], rows))


def _show_workers(fleet: Fleet, held: Held) -> None:
    out = console()
    names = sorted(fleet.workers.keys() | {worker for worker in held.values() if worker})
    rows = []
    for worker in names:
        beat = fleet.workers.get(worker, {})
        mine = [partition for partition, holder in held.items() if holder == worker]
        heard = ago(fleet.now_ms - beat["at_ms"]) if "at_ms" in beat else "?"
        rows.append((worker, len(mine), spans(mine), f"{beat.get('lag_seconds', 0):.3f} s", heard))
    if rows:
        columns = ["worker", "partitions#", "which", "lag#", "last heard of"]
        out.print(table("workers", columns, rows))
    else:
        out.print("no worker runs: start one with `agent-reconciler worker`")
    free = [partition for partition, holder in held.items() if holder is None]
    if free and rows:
        out.print(
            f"nobody acts for partitions {spans(free)}: a worker takes them within a lease time"
        )


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: `0-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)

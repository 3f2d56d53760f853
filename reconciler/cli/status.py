"""`agent-reconciler status`: what is alive, what is drift, who works on it; once, or kept in view."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live

from reconciler.cli.options import common, opened
from reconciler.cli.output import ago, clock, console, emit, reading, size, table
from reconciler.describe import describe, describe_resource
from reconciler.fleet import Fleet
from reconciler.fleet_view import FleetView, Rates, oldest_idle
from reconciler.phrases import counted
from reconciler.stuck import find_stuck
from store.lease import holders
from store.log import EventLog
from store.namespace import Namespace

Held = dict[int, str | None]
"""Partition -> the worker that has its lease, None where nobody has."""

_IDLE_SHOWN = 5
_DRIFT_AT_LEAST = 5
_LINES_PER_ROW = 3
"""Of a table on a narrow terminal, at most: cutting too little only costs another try."""


@click.command(short_help="Show what is alive, drift, and who works on it.")
@common
@click.option("-w", "--watch", is_flag=True, help="Go on looking, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
def status(url: str, namespace: str, as_json: bool, watch: bool, interval: float) -> None:
    """Show processes, live resources, drift, oldest idle, stuck teardowns, workers and rates."""
    asyncio.run(_status(url, namespace, as_json, interval if watch else None))


async def _status(url: str, name: str, as_json: bool, interval: float | None) -> None:
    async with opened(url, name) as (store, namespace):
        view = FleetView(store, namespace)
        with reading(await EventLog(store, namespace).length()) as tell:
            await view.open(tell)
        if interval is not None:
            await _watch(view, namespace, interval, as_json=as_json)
            return
        fleet, rates = await view.look()
        held = await _held(namespace)
        if as_json:
            emit(describe_status(fleet, rates, held))
        else:
            console().print(picture(fleet, rates, held), soft_wrap=not sys.stdout.isatty())


async def _held(namespace: Namespace) -> Held:
    leases = await holders(namespace, namespace.all_partitions())
    return {p: token and token.rpartition(" ")[0] for p, token in leases.items()}


async def _watch(view: FleetView, namespace: Namespace, interval: float, *, as_json: bool) -> None:
    """Redraws on a terminal; in a pipe each look is a line."""
    out = console()
    if out.is_terminal and not as_json:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                fleet, rates = await view.look()
                live.update(fitting(out, fleet, rates, await _held(namespace)), refresh=True)
                await asyncio.sleep(interval)
    while True:
        fleet, rates = await view.look()
        if as_json:
            emit(describe_status(fleet, rates, await _held(namespace)))
        else:
            click.echo(line_of(fleet, rates))
        sys.stdout.flush()
        await asyncio.sleep(interval)


def describe_status(fleet: Fleet, rates: Rates, held: Held) -> dict[str, Any]:
    """A fleet, its rates and who works on it as plain values."""
    return describe(fleet) | {
        "partitions": {str(partition): worker for partition, worker in held.items()},
        "oldest_idle": [
            describe_resource(process, resource) | {"idle_ms": fleet.now_ms - resource.used_ms}
            for process, resource in oldest_idle(fleet.state, _IDLE_SHOWN)
        ],
        "rates": {
            "seconds": rates.seconds,
            "dropped_ms": rates.dropped_ms,
            "appeared": rates.appeared,
            "went": rates.went,
            "torn_down": rates.torn_down,
            "failed": rates.failed,
            "refused": rates.refused,
            "appeared_per_minute": rates.per_minute(rates.appeared),
            "went_per_minute": rates.per_minute(rates.went),
        },
    }


def line_of(fleet: Fleet, rates: Rates) -> str:
    """A fleet in one line, for a pipe."""
    drift = fleet.drift
    kinds = Counter(r.kind for p in fleet.state.processes.values() for r in p.resources.values())
    stuck = sum(1 for _ in find_stuck(fleet.state.processes.values(), fleet.policy))
    alive = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "nothing alive"
    return (
        f"{clock(fleet.now_ms)}  "
        f"{counted(len(fleet.state.processes), 'process', 'processes')}  {alive}  drift: "
        f"{counted(len(drift.orphans), 'orphan')}, {len(drift.dangling)} dangling, "
        f"{counted(len(drift.ghosts), 'ghost')}, "
        f"{len(drift.untracked)} untracked  {stuck} stuck  "
        f"+{rates.per_minute(rates.appeared):.1f} -{rates.per_minute(rates.went):.1f} a minute"
    )


class Room(NamedTuple):
    """How many rows of the long tables are shown."""

    processes: int = sys.maxsize
    drift: int = 20
    idle: int = _IDLE_SHOWN

    def less(self, lines: int) -> Room:
        """Rows that take about so many lines fewer; what matters least goes first."""
        rows = max(1, lines // _LINES_PER_ROW)
        if self.drift > _DRIFT_AT_LEAST:
            return self._replace(drift=max(_DRIFT_AT_LEAST, self.drift - rows))
        if self.idle:
            return self._replace(idle=max(0, self.idle - rows))
        if self.drift > 1:
            return self._replace(drift=max(1, self.drift - rows))
        return self._replace(processes=max(1, self.processes - rows))


def fitting(out: Console, fleet: Fleet, rates: Rates, held: Held) -> Group:
    """A fleet as tables, as much of it as fits the height of a terminal."""
    room = Room(processes=max(1, min(len(fleet.state.processes), out.height)))
    room = room._replace(drift=min(room.drift, len(list(fleet.drift))))
    while True:
        made = picture(fleet, rates, held, room)
        over = len(out.render_lines(made, pad=False)) - out.height
        if over <= 0 or room.less(over) == room:
            return made
        room = room.less(over)


def picture(fleet: Fleet, rates: Rates, held: Held, room: Room = Room()) -> Group:  # noqa: B008
    """A fleet as tables: trouble first, then what is alive and who acts for it."""
    parts: list[RenderableType] = [*_nobody(fleet, held), *_stuck(fleet), *_quarantined(fleet)]
    parts.append(_processes(fleet, room.processes))
    kinds = Counter(r.kind for p in fleet.state.processes.values() for r in p.resources.values())
    if kinds:
        parts.append(
            f"alive: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
        )
    dropped = ", before which the log was dropped" if rates.dropped_ms is not None else ""
    parts.append(
        f"in the last {ago(rates.seconds * 1000)}{dropped}: {rates.appeared} appeared "
        f"({rates.per_minute(rates.appeared):.1f} a minute), {rates.went} went "
        f"({rates.per_minute(rates.went):.1f} a minute), {rates.torn_down} of them by order; "
        f"{counted(rates.refused, 'teardown')} refused, {rates.failed} failed"
    )
    parts += [_drift(fleet, room.drift), *_workers(fleet, held), *_idle(fleet, room.idle)]
    return Group(*parts)


def _processes(fleet: Fleet, shown: int) -> RenderableType:
    now = fleet.now_ms
    processes = fleet.state.processes
    rows: list[tuple[Any, ...]] = []
    for name, process in islice(processes.items(), shown):
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
    if not rows:
        return "no process is alive"
    title = "processes" + (f" ({shown} of {len(processes)})" if shown < len(processes) else "")
    columns = ["process", "up", "alive", "in use#", "oldest idle", "memory#", "fds#"]
    return table(title, columns, rows, spare=["fds#", "up", "oldest idle", "in use#", "memory#"])


def _drift(fleet: Fleet, shown: int) -> RenderableType:
    drift = fleet.drift
    if not drift:
        return "no drift"
    rows = [
        (
            item.sort,
            item.ref,
            f"{item.registry}[{item.key}]" if item.registry else "",
            item.process,
            item.reason,
        )
        for item in islice(drift, shown)
    ]
    counts = [
        counted(len(drift.orphans), "orphan"), f"{len(drift.dangling)} dangling",
        counted(len(drift.ghosts), "ghost"), f"{len(drift.untracked)} untracked",
    ]  # fmt: skip
    title = f"drift: {', '.join(text for text in counts if not text.startswith('0 '))}"
    title += f" (the first {len(rows)})" if len(rows) < sum(1 for _ in drift) else ""
    columns = ["sort", "resource", "entry", "process", "why"]
    return table(title, columns, rows, spare=["process", "entry", "sort"])


def _idle(fleet: Fleet, shown: int) -> list[RenderableType]:
    idle = sum(
        1 for p in fleet.state.processes.values() for r in p.resources.values() if not r.in_use
    )
    if not idle:
        return []
    if not shown:
        return [f"longest idle: there is no room to show any of {idle}"]
    rows = [
        (resource.ref, process, ago(fleet.now_ms - resource.used_ms), ", ".join(resource.uses))
        for process, resource in oldest_idle(fleet.state, shown)
    ]
    more = f", and {idle - len(rows)} more" if idle > len(rows) else ""
    columns = ["resource", "process", "idle#", "uses"]
    return [table(f"longest idle{more}", columns, rows, spare=["uses", "process"])]


def _stuck(fleet: Fleet) -> list[RenderableType]:
    rows = [
        (one.ref, one.entry, one.process, one.failures, clock(one.next_try_ms), one.reason)
        for one in find_stuck(fleet.state.processes.values(), fleet.policy)
    ]
    columns = ["resource", "entry", "process", "failures#", "next try", "why"]
    spare = ["process", "next try", "entry"]
    return [table("stuck teardowns", columns, rows, spare)] if rows else []


def _quarantined(fleet: Fleet) -> list[RenderableType]:
    rows = list(fleet.quarantined.items())
    columns = ["entry", "why it is not an event"]
    return [table("quarantined entries", columns, rows)] if rows else []


def _nobody(fleet: Fleet, held: Held) -> list[RenderableType]:
    free = [partition for partition, holder in held.items() if holder is None]
    if len(free) == len(held) and not fleet.workers:
        return ["no worker runs: start one with `agent-reconciler worker`"]
    if free:
        return [
            f"nobody acts for partitions {spans(free)}: a worker takes them within a lease time"
        ]
    return []


def _workers(fleet: Fleet, held: Held) -> list[RenderableType]:
    rows = []
    for worker in sorted(fleet.workers.keys() | {worker for worker in held.values() if worker}):
        beat = fleet.workers.get(worker, {})
        mine = [partition for partition, holder in held.items() if holder == worker]
        heard = ago(fleet.now_ms - beat["at_ms"]) if "at_ms" in beat else "?"
        rows.append((worker, len(mine), spans(mine), f"{beat.get('lag_seconds', 0):.3f} s", heard))
    columns = ["worker", "partitions#", "which", "lag#", "last heard of"]
    return [table("workers", columns, rows, spare=["which", "lag#"])] if rows else []


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: `0-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)

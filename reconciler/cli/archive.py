"""`agent-reconciler archive`: what is kept where, and archive and trim now.

A partition that a worker holds is archived by that worker, on request; one that nobody holds is taken
for the time it takes. So there is never more than one who writes a segment or trims a stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import console, emit, progress, table
from reconciler.fold import FleetState
from reconciler.fold_page import fold_page
from reconciler.history import Kept, keep_history, nearest_snapshot, save_snapshot
from store.archive import Archive, place
from store.connection import Store, shown
from store.errors import ArchiveError, ReconcilerError
from store.event import process_id
from store.inbox import ask
from store.lease import HeldByOther, Lease, release_lease, take_lease
from store.log import EventLog
from store.messages import Note
from store.namespace import Namespace
from store.retention import OFF, Retention, read_retention, write_retention
from store.tasks import end_tasks

_LEASE_MS = 10_000
_ANSWER_SECONDS = 600.0


@click.command(short_help="Move old events to the archive, now and from now on.")
@common
@click.option(
    "--to",
    "to",
    metavar="URL|off",
    help="Archive to this folder or fsspec URL from now on; `off` drops instead.",
)
@click.option(
    "--keep",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long entries stay in Redis from now on; 7 days unless it was set.",
)
def archive(url: str, namespace: str, as_json: bool, to: str | None, keep: float | None) -> int:
    """Move what is older than it is kept from Redis to the archive, now.

    The settings are recorded in the namespace, and its workers follow them. Status 0: done; 1: a worker
    did not answer for some partitions; 2: it could not run.
    """
    chosen = to if to in (None, OFF) else place(to)
    result = asyncio.run(_archive(url, namespace, chosen, keep))
    if as_json:
        emit(result)
    else:
        _show(result)
    return int(bool(result["silent"]))


async def _archive(url: str, name: str, to: str | None, keep: float | None) -> dict[str, Any]:
    async with opened(url, name) as (store, namespace):
        retention = await read_retention(namespace)
        chosen = retention.changed(to, keep)
        if chosen.archive is None:
            raise ArchiveError(
                f"namespace {name} has no archive: name one with --to URL, or write --to off to drop "
                "what is older than it is kept"
            )
        if chosen.archive != OFF:
            await asyncio.to_thread(Archive(chosen.archive, name).try_writing)
        if chosen != retention:
            await write_retention(namespace, chosen)
        done: list[Kept] = []
        silent: list[int] = []
        with progress("archiving", namespace.partitions) as tell:
            for partition in namespace.all_partitions():
                kept = await _keep(store, namespace, partition)
                if kept is None:
                    silent.append(partition)
                else:
                    done.append(kept)
                tell(1)
        return _result(chosen, done, silent)


def _result(retention: Retention, done: list[Kept], silent: list[int]) -> dict[str, Any]:
    return {
        "archive": shown(retention.archive or OFF),
        "keep_seconds": retention.keep_seconds,
        "archived": sum(kept.archived for kept in done),
        "trimmed": sum(kept.trimmed for kept in done),
        "partitions": [asdict(kept) for kept in done],
        "silent": silent,
    }


async def _keep(store: Store, namespace: Namespace, partition: int) -> Kept | None:
    """Archives one partition, by ourselves or by the worker that holds it; None when it is silent."""
    holder = process_id("admin")
    lease = await take_lease(namespace, partition, holder, _LEASE_MS)
    if isinstance(lease, HeldByOther):
        reply = await ask(namespace, partition, Note("archive"), _ANSWER_SECONDS)
        if reply is None:
            return None
        answer = json.loads(reply)
        if "error" in answer:
            raise ReconcilerError(answer["error"])
        return Kept(**answer)
    async with _held(namespace, lease):
        event_log = EventLog(store, namespace)
        state, position = await _fold(event_log, partition)
        if state is not None:
            await save_snapshot(namespace, lease, state, position)
        return await keep_history(namespace, event_log, lease, await store.now_ms())


async def _fold(event_log: EventLog, partition: int) -> tuple[FleetState | None, str]:
    """The state of a partition and its position; None when its newest snapshot is that already."""
    state, beginning = await nearest_snapshot(await event_log.namespace(), partition)
    position = beginning
    async for page in event_log.pages(partition, beginning):
        fold_page(state, page.events, page.times)
        position = page.position
    return (state if position != beginning else None), position


@asynccontextmanager
async def _held(namespace: Namespace, lease: Lease) -> AsyncIterator[None]:
    """Renews a lease meanwhile, and gives it back."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(_LEASE_MS / 3000)
            await take_lease(namespace, lease.partition, lease.holder, _LEASE_MS, lease)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        await end_tasks([task])
        await release_lease(namespace, lease)


def _show(result: dict[str, Any]) -> None:
    out = console()
    rows = [
        (row["partition"], row["archived"], row["segments"], row["trimmed"], row["position"])
        for row in result["partitions"]
        if row["archived"] or row["trimmed"]
    ]
    if rows:
        columns = ["partition#", "archived#", "segments#", "trimmed#", "up to entry"]
        out.print(table(f"archive: {result['archive']}", columns, rows))
    else:
        out.print(f"archive: {result['archive']}: nothing is older than it is kept")
    out.print(f"entries stay in Redis for {result['keep_seconds']:g} s")
    if result["silent"]:
        names = ", ".join(map(str, result["silent"]))
        out.print(f"the workers that hold partitions {names} did not answer: try again")

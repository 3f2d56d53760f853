"""The fleet as it stands in Redis: for commands that look, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reconciler.drift import Drift, find_drift
from reconciler.fold import FleetState
from reconciler.fold_page import fold_page
from reconciler.history import nearest_snapshot
from reconciler.plan import Plan, make_plan
from reconciler.policy import Policy
from store.connection import Store
from store.inventories import InventoryReader
from store.log import EventLog
from store.messages import Inventory, Summary
from store.namespace import Namespace

Progress = Callable[[int], None]
"""Called with the number of entries read since the last call."""


def _silent(count: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What one look at a namespace gave.

    Attributes:
        state: the fold of the log.
        inventories, summaries: by process, as last published.
        policy: that the workers run with.
        drift, plan: of all that, now.
        workers: heartbeat by worker id.
        quarantined: malformed entries, id -> reason.
        now_ms: Redis time of the look.
    """

    state: FleetState
    inventories: dict[str, Inventory]
    summaries: dict[str, Summary]
    policy: Policy
    drift: Drift
    plan: Plan
    workers: dict[str, dict[str, Any]]
    quarantined: dict[str, str]
    now_ms: int


async def fold_log(
    event_log: EventLog, *, until: tuple[int, int] | None = None, progress: Progress = _silent
) -> FleetState:
    """The state at the entry id `until` (ms, n), itself included; None is the present end.

    Each partition begins with its nearest snapshot at or before the moment. They are folded one after
    the other: no event speaks of a process in another partition.

    Raises:
        HistoryDropped: the moment lies before what the log still has.
        ArchiveError: a part of the log is archived, and cannot be read there.
    """
    state = FleetState()
    namespace = await event_log.namespace()
    for partition in namespace.all_partitions():
        state.take(await fold_partition(event_log, partition, until=until, progress=progress))
    return state


async def fold_partition(
    event_log: EventLog,
    partition: int,
    *,
    until: tuple[int, int] | None = None,
    progress: Progress = _silent,
) -> FleetState:
    """The state of one partition; see `fold_log`."""
    state, position = await nearest_snapshot(await event_log.namespace(), partition, until)
    progress(state.events)
    high = "+" if until is None else f"{until[0]}-{until[1]}"
    async for page in event_log.pages(partition, position, until=high):
        fold_page(state, page.events, page.times)
        progress(page.entries)
        if page.malformed:
            await event_log.quarantine(partition, page.malformed)
    return state


async def recorded_policy(namespace: Namespace) -> Policy:
    """The policy that the last worker of the namespace ran with; the default where there was none.

    Raises:
        PolicyError: what is recorded cannot be meant.
    """
    text = await namespace.store.redis.get(namespace.keys.policy)
    values = json.loads(text) if text else {}
    return Policy.read(values, f"recorded in namespace {namespace.name}")


async def read_workers(namespace: Namespace) -> dict[str, dict[str, Any]]:
    """The last heartbeat of each worker, by its id."""
    beats = await namespace.store.redis.hgetall(namespace.keys.workers)
    return {worker.decode(): json.loads(beat) for worker, beat in beats.items()}


async def read_fleet(
    store: Store,
    namespace: Namespace,
    *,
    policy: Policy | None = None,
    progress: Progress = _silent,
) -> Fleet:
    """Looks at everything once.

    Args:
        store: where.
        namespace: which.
        policy: to judge by; None takes what is recorded in the namespace.
        progress: told how many entries were read.
    """
    policy = policy or await recorded_policy(namespace)
    event_log = EventLog(store, namespace)
    state = await fold_log(event_log, progress=progress)
    reader = InventoryReader(namespace)
    inventories: dict[str, Inventory] = {}
    summaries: dict[str, Summary] = {}
    for process in state.processes:
        inventory = await reader.read(process)
        summary = reader.summary(process)
        if inventory is not None and summary is not None:
            inventories[process], summaries[process] = inventory, summary
    now = await store.now_ms()
    drift = find_drift(state, inventories, policy, now)
    return Fleet(
        state=state,
        inventories=inventories,
        summaries=summaries,
        policy=policy,
        drift=drift,
        plan=make_plan(state, drift, inventories, policy, now),
        workers=await read_workers(namespace),
        quarantined=await event_log.quarantined(),
        now_ms=now,
    )

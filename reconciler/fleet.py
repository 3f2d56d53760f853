"""The fleet as it stands in Redis: for commands that look, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reconciler.drift import Drift, find_drift
from reconciler.fold import FleetState
from reconciler.plan import Plan, make_plan
from reconciler.policy import Policy
from store.channel import InventoryReader
from store.connection import Store
from store.log import PAGE, START, EventLog, id_key
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
    """Folds the log, up to and including the entry id `until` (ms, n); None is the present end.

    Partitions are folded one after the other: no event speaks of a process in another one.
    """
    state = FleetState()
    namespace = await event_log.namespace()
    high = "+" if until is None else f"{until[0]}-{until[1]}"
    for partition in namespace.all_partitions():
        position = START
        while True:
            page = await event_log.page(partition, position, until=high)
            for entry_id, row in page.rows:
                state.apply(row, id_key(entry_id)[0])
            read = len(page.rows) + len(page.malformed)
            progress(read)
            if page.malformed:
                await event_log.quarantine(partition, page.malformed)
            if read < PAGE:
                break
            position = page.position
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

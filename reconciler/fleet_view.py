"""The fleet, kept in view: one look costs the whole log once, each further look only what is new.

The first look folds up to a little before now (from the nearest snapshot, where there are any), and
reads the rest event by event, which also gives the rates. From then on it follows: new entries,
changed buckets of inventories, and drift at the cost of what changed, as a worker does it. Unlike a
worker it changes nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections import Counter
from dataclasses import dataclass
from math import inf

from reconciler.drift import Drift
from reconciler.fleet import Fleet, Progress, fold_log, recorded_policy
from reconciler.fold import Event, FleetState, ProcessState, Resource
from reconciler.history import nearest_snapshot
from reconciler.plan import make_plan
from reconciler.policy import Policy
from reconciler.scan import END, entry_id
from reconciler.watch import ProcessWatch, Watches
from store.connection import Store
from store.errors import HistoryDropped
from store.inventories import InventoryReader
from store.log import EventLog
from store.namespace import Namespace
from store.position import ms_of

RATE_MS = 600_000
"""Rates are over this long."""
_SLOT_MS = 10_000


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened over the last minutes.

    Attributes:
        seconds: over how long.
        appeared, went: resources.
        torn_down: of those that went, by order.
        failed, refused: teardowns.
        dropped_ms: what came before this time was dropped from the log, and is not counted; None where
            nothing is missing.
    """

    seconds: float
    appeared: int = 0
    went: int = 0
    torn_down: int = 0
    failed: int = 0
    refused: int = 0
    dropped_ms: int | None = None

    def per_minute(self, count: int) -> float:
        return count * 60 / self.seconds if self.seconds > 0 else 0.0


class FleetView:
    """Follows a namespace.

    Args:
        store: where.
        namespace: which.
    """

    def __init__(self, store: Store, namespace: Namespace) -> None:
        self._store = store
        self._namespace = namespace
        self._log = EventLog(store, namespace)
        self._reader = InventoryReader(namespace)
        self._positions: dict[int, str] = {}
        self._state = FleetState()
        self._policy = Policy()
        self._watches = Watches(self._policy)
        self._slots: dict[int, Counter[str]] = {}
        self._dropped_ms = 0

    async def open(self, progress: Progress = lambda count: None) -> None:
        """Folds what there is, up to the minutes that the rates are over."""
        # What comes after this id is read below, whatever the clock of its server says.
        begin = (max(0, await self._store.now_ms() - RATE_MS), END)
        try:
            self._state = await fold_log(self._log, until=begin, progress=progress)
            self._positions = {p: entry_id(begin) for p in self._namespace.all_partitions()}
        except HistoryDropped:
            # What was then can no longer be told; what is now can.
            self._state = FleetState()
            for partition in self._namespace.all_partitions():
                part, position = await nearest_snapshot(self._namespace, partition)
                self._state.take(part)
                self._positions[partition] = position
                self._dropped_ms = max(self._dropped_ms, ms_of(position))
        await self._follow(progress)

    async def look(self) -> tuple[Fleet, Rates]:
        """The fleet as it is now."""
        policy = await recorded_policy(self._namespace)
        if policy != self._policy:
            self._policy, self._watches = policy, Watches(policy)
        await self._follow(lambda count: None)
        now = await self._store.now_ms()
        processes = self._state.processes
        watches = {name: await self._watch(process) for name, process in processes.items()}
        drift = Drift.of(watch.drift(now) for watch in watches.values())
        graphs = {name: watch.graph for name, watch in watches.items()}
        beats = await self._store.redis.hgetall(self._namespace.keys.workers)
        summaries = {name: self._reader.summary(name) for name in processes}
        fleet = Fleet(
            state=self._state,
            inventories={},
            summaries={name: one for name, one in summaries.items() if one is not None},
            policy=policy,
            drift=drift,
            plan=make_plan(self._state, drift, {}, policy, now, graphs=graphs),
            workers={worker.decode(): json.loads(beat) for worker, beat in beats.items()},
            quarantined=await self._log.quarantined(),
            now_ms=now,
        )
        return fleet, self._rates(now)

    async def _watch(self, process: ProcessState) -> ProcessWatch:
        watch = self._watches.of(process)
        change = await self._reader.update(process.id)
        if watch.fresh:
            change = self._reader.everything(process.id)
            watch.fresh = False
        if change is not None:
            watch.inventory_changed(change)
        return watch

    async def _follow(self, progress: Progress) -> None:
        await asyncio.gather(*(self._catch_up(p, progress) for p in self._positions))

    async def _catch_up(self, partition: int, progress: Progress) -> None:
        while True:
            page = await self._log.page(partition, self._positions[partition])
            if page.position == self._positions[partition]:
                return
            for event, at_ms in zip(page.events, page.times, strict=True):
                self._count(event, at_ms)
                self._watches.fold(self._state, event, at_ms)
            self._positions[partition] = page.position
            progress(page.entries)
            await self._log.quarantine(partition, page.malformed)

    def _count(self, event: Event, at_ms: int) -> None:
        if at_ms <= self._dropped_ms:
            return  # Other partitions may go back further: all are counted from the same time on.
        kind = event.type
        holder = self._state.processes.get(event.holder or event.process)
        went = 0
        if kind == "cleaned_up" and "registry" not in (event.attrs or {}):
            went = int(holder is not None)  # What no process held did not go from the fleet.
        elif kind in {"process_lost", "process_stopped"} and holder is not None:
            went = len(holder.resources)
        new = kind in {"created", "adopted"} and (
            holder is None or event.ref not in holder.resources
        )
        slot = self._slots.setdefault(at_ms // _SLOT_MS, Counter())
        slot["appeared"] += new
        slot["went"] += went
        slot["torn_down"] += bool(went and kind == "cleaned_up" and event.order_id)
        slot["failed"] += kind == "cleanup_failed"
        slot["refused"] += kind == "cleanup_refused"

    def _rates(self, now_ms: int) -> Rates:
        begin = now_ms - RATE_MS
        for slot in [slot for slot in self._slots if (slot + 1) * _SLOT_MS <= begin]:
            del self._slots[slot]
        total: Counter[str] = Counter()
        for counts in self._slots.values():
            total.update(counts)
        # A log that is younger than the minutes asked about is judged by its own age.
        first = min((p.started_ms for p in self._state.processes.values()), default=begin)
        since = max(begin, first, self._dropped_ms)
        seconds = max(1.0, (now_ms - since) / 1000)
        return Rates(
            seconds,
            total["appeared"],
            total["went"],
            total["torn_down"],
            total["failed"],
            total["refused"],
            self._dropped_ms if self._dropped_ms > begin else None,
        )


def oldest_idle(state: FleetState, count: int) -> list[tuple[str, Resource]]:
    """The resources whose last use is longest ago, of those that are not in use: (process, resource)."""
    return heapq.nsmallest(
        count,
        (
            (process.id, resource)
            for process in state.processes.values()
            for resource in process.resources.values()
            if not resource.in_use
        ),
        key=lambda pair: pair[1].used_ms if pair[1].used_ms else inf,
    )

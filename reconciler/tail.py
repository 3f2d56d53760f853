"""The tail: one reader of the log, which folds what it reads, partition by partition.

It begins with the newest snapshot of a partition that is whole, and goes on from there. Whoever reads,
the state is folded exactly once: an entry at or before the position of its partition is passed over.
So the loop that waits for new entries and a pass that catches up at once can share one state.

Each partition has a state of its own, because snapshots are of partitions; `state` is all of them as
one, and shares the processes with them. No process is in two partitions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import structlog

from reconciler.fold import ENDS, FleetState, ProcessState
from reconciler.history import nearest_snapshot
from reconciler.metrics import Metrics
from store.event import EventRow
from store.log import EventLog, Page, parse_page
from store.position import id_key, ms_of

log = structlog.get_logger("reconciler.tail")

_BEGINS = frozenset({"created", "adopted"})

Hook = Callable[[int, int, EventRow], None]
"""(partition, Redis time in ms, event) -> nothing; called for each event after it was folded."""


Fold = Callable[[FleetState, EventRow, int], ProcessState | None]
"""(state, event, Redis time in ms) -> its process; folds the event into the state."""


class Tail:
    """Follows some partitions and keeps the state.

    Attributes:
        state: the fold of everything read.
        parts: the same, by partition.
        positions: partition -> id of the last entry folded.
        begun: partition -> events in the snapshot that it began with, 0 without one.
    """

    def __init__(
        self, event_log: EventLog, metrics: Metrics, hook: Hook, fold: Fold = FleetState.apply
    ) -> None:
        self._apply = fold
        self.state = FleetState()
        self.parts: dict[int, FleetState] = {}
        self.positions: dict[int, str] = {}
        self.begun: dict[int, int] = {}
        self._log = event_log
        self._metrics = metrics
        self._hook = hook
        self._opening: set[int] = set()

    async def add(self, partitions: Iterable[int]) -> list[str]:
        """Follows these partitions too, from snapshot and log, to the present end.

        Returns:
            The processes that are alive in those that are new.
        """
        new = [p for p in partitions if p not in self.positions]
        namespace = await self._log.namespace()
        self._opening.update(new)
        try:
            for partition in new:
                part, position = await nearest_snapshot(namespace, partition)
                if partition not in self.positions:
                    self.parts[partition], self.positions[partition] = part, position
                    self.begun[partition] = part.events
                    self.state.take(part)
            await self.catch_up(new)
        finally:
            self._opening.difference_update(new)
        if new:
            self._log.interrupt()  # The wait that is going on does not know of them.
        return [p for one in new if one in self.parts for p in self.parts[one].processes]

    async def catch_up(self, partitions: Iterable[int] | None = None) -> None:
        """Folds everything up to the present end."""
        for partition in list(self.positions if partitions is None else partitions):
            if partition not in self.positions:
                continue
            async for page in self._log.pages(partition, self.positions[partition]):
                await self._absorb(page)

    async def wait(self, *, block_ms: int) -> bool:
        """Waits for new entries and folds them; False when none came."""
        asked = dict(self.positions)
        answer = await self._log.wait(asked, block_ms=block_ms)
        for partition, raw in answer:
            await self._absorb(parse_page(partition, raw, asked[partition]))
        return bool(answer)

    async def _absorb(self, page: Page) -> None:
        partition = page.partition
        if partition not in self.positions:
            return  # Given up while the page was read.
        position = id_key(self.positions[partition])
        if id_key(page.position) <= position or id_key(page.after) > position:
            return  # Folded already, or given up and taken again meanwhile.
        self._fold(page, position)
        self.positions[partition] = page.position
        fresh = [item for item in page.malformed if id_key(item[0]) > position]
        if fresh:
            self._metrics.quarantined.inc(len(fresh))
            for entry_id, reason in fresh:
                log.warning(
                    "entry quarantined: it is not an event; folding goes on",
                    entry_id=entry_id, partition=partition, reason=reason,
                )  # fmt: skip
            await self._log.quarantine(partition, fresh)

    def _fold(self, page: Page, position: tuple[int, int]) -> None:
        """Folds what of a page is after a position, without a pause: the state is of one instant."""
        part, everyone, metrics = self.parts[page.partition], self.state.processes, self._metrics
        events, lost, stopped = part.events, part.lost, part.stopped
        types: Counter[str] = Counter()
        created: Counter[str] = Counter()
        ended: Counter[str] = Counter()
        skip = id_key(page.after) < position
        for entry_id, row in page.rows:
            if skip and id_key(entry_id) <= position:
                continue
            at_ms = ms_of(entry_id)
            process = self._apply(part, row, at_ms)
            if process is not None:
                if row.type in ENDS:
                    everyone.pop(process.id, None)
                elif process.id not in everyone:
                    everyone[process.id] = process
            types[row.type] += 1
            if row.type in _BEGINS:
                created[row.ref.partition("/")[0]] += 1
            elif row.type == "cleaned_up":
                if row.attrs is None or "registry" not in row.attrs:
                    ended[row.ref.partition("/")[0]] += 1
            elif row.type in ENDS and process is not None:
                ended.update(resource.kind for resource in process.resources.values())
            self._hook(page.partition, at_ms, row)
        metrics.count_events(types)
        if page.partition not in self._opening:  # What is history was counted by somebody else.
            metrics.count_resources(created, ended)
        self.state.events += part.events - events
        self.state.lost += part.lost - lost
        self.state.stopped += part.stopped - stopped

    def drop(self, partitions: Iterable[int]) -> None:
        """Gives partitions up: their processes leave the state."""
        for partition in partitions:
            self.positions.pop(partition, None)
            part = self.parts.pop(partition, None)
            if part is not None:
                self.state.leave(part)
        self._log.interrupt()

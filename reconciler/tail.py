"""The tail: one reader of the log, which folds what it reads.

Whoever reads, the state is folded exactly once: an entry at or before the position of its partition
is passed over. So the loop that waits for new entries and a pass that catches up at once can share
one state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

import structlog

from reconciler.fold import FleetState
from reconciler.metrics import Metrics
from store.event import EventRow
from store.log import PAGE, START, EventLog, Page, id_key, parse_page

log = structlog.get_logger("reconciler.tail")

Hook = Callable[[int, int, EventRow], None]
"""(partition, Redis time in ms, event) -> nothing; called for each event after it was folded."""


Fold = Callable[[FleetState, EventRow, int], object]
"""(state, event, Redis time in ms) -> anything; folds the event into the state."""


class Tail:
    """Follows some partitions and keeps the state.

    Attributes:
        state: the fold of everything read.
        positions: partition -> id of the last entry folded.
    """

    def __init__(
        self, event_log: EventLog, metrics: Metrics, hook: Hook, fold: Fold = FleetState.apply
    ) -> None:
        self._fold = fold
        self.state = FleetState()
        self.positions: dict[int, str] = {}
        self._log = event_log
        self._metrics = metrics
        self._hook = hook

    async def add(self, partitions: Iterable[int]) -> None:
        """Follows these partitions too, from the beginning of the log to its present end."""
        new = [p for p in partitions if p not in self.positions]
        for partition in new:
            self.positions[partition] = START
        await self.catch_up(new)
        if new:
            self._log.interrupt()  # The wait that is going on does not know of them.

    async def catch_up(self, partitions: Iterable[int] | None = None) -> None:
        """Folds everything up to the present end."""
        for partition in list(self.positions) if partitions is None else partitions:
            while (after := self.positions.get(partition)) is not None:
                page = await self._log.page(partition, after)
                await self._absorb(page, after)
                if len(page.rows) + len(page.malformed) < PAGE:
                    break
                await asyncio.sleep(0)  # A long history must not starve the lease.

    async def wait(self, *, block_ms: int) -> bool:
        """Waits for new entries and folds them; False when none came."""
        asked = dict(self.positions)
        answer = await self._log.wait(asked, block_ms=block_ms)
        for partition, raw in answer:
            after = asked[partition]
            await self._absorb(parse_page(partition, raw, after), after)
        return bool(answer)

    async def _absorb(self, page: Page, after: str) -> None:
        """Folds a page that was read from the position `after` on."""
        partition, metrics, state = page.partition, self._metrics, self.state
        if partition not in self.positions:
            return  # Given up meanwhile.
        position = id_key(self.positions[partition])
        # A page that begins beyond what is folded was asked for before the partition was given up and
        # taken again.
        if not id_key(after) <= position < id_key(page.position):
            return
        for entry_id, row in page.rows:
            key = id_key(entry_id)
            if key <= position:
                continue
            self._fold(state, row, key[0])
            metrics.events.labels(row.type).inc()
            self._hook(partition, key[0], row)
        self.positions[partition] = page.position
        fresh = [item for item in page.malformed if id_key(item[0]) > position]
        if fresh:
            metrics.quarantined.inc(len(fresh))
            for entry_id, reason in fresh:
                log.warning(
                    "entry quarantined: it is not an event; folding goes on",
                    entry_id=entry_id, partition=partition, reason=reason,
                )  # fmt: skip
            await self._log.quarantine(partition, fresh)

    def drop(self, partitions: Iterable[int], process_partition: Mapping[str, int]) -> None:
        """Gives partitions up: their processes leave the state."""
        given_up = set(partitions)
        for partition in given_up:
            self.positions.pop(partition, None)
        for name in list(self.state.processes):
            if process_partition.get(name) in given_up:
                del self.state.processes[name]
        self._log.interrupt()

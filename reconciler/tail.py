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


class Tail:
    """Follows some partitions and keeps the state.

    Attributes:
        state: the fold of everything read.
        positions: partition -> id of the last entry folded.
    """

    def __init__(self, event_log: EventLog, metrics: Metrics, hook: Hook) -> None:
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

    async def catch_up(self, partitions: Iterable[int] | None = None) -> None:
        """Folds everything up to the present end."""
        for partition in list(self.positions) if partitions is None else partitions:
            while True:
                after = self.positions[partition]
                page = await self._log.page(partition, after)
                await self._absorb(page, after)
                if len(page.rows) + len(page.malformed) < PAGE:
                    break
                await asyncio.sleep(0)  # A long history must not starve the lease.

    async def wait(self, *, block_ms: int) -> bool:
        """Waits for new entries and folds them; False when none came."""
        if not self.positions:
            await asyncio.sleep(block_ms / 1000)
            return False
        asked = dict(self.positions)
        answer = await self._log.wait(asked, block_ms=block_ms)
        for partition, raw in answer:
            if partition in self.positions:
                after = asked[partition]
                await self._absorb(parse_page(partition, raw, after), after)
        return bool(answer)

    async def start_over(
        self, process_partition: Mapping[str, int], *, new_server: bool
    ) -> list[int]:
        """Folds partitions afresh of which Redis may have forgotten what was read.

        Args:
            process_partition: of the processes in the state.
            new_server: another server answers, or the same one was started again: what it lacks
                may be hidden behind what was written since, so everything is folded afresh.

        Returns:
            The partitions.
        """
        gone = list(self.positions) if new_server else await self._log.forgotten(self.positions)
        if gone:
            log.warning("Redis failed over or was restarted; folding afresh", partitions=gone)
            self.drop(gone, process_partition)
            await self.add(gone)
        return gone

    async def _absorb(self, page: Page, after: str) -> None:
        partition, metrics, state = page.partition, self._metrics, self.state
        position = id_key(self.positions[partition])
        if id_key(page.position) <= position:
            return
        if id_key(after) > position:
            return  # It was read before the partition was begun anew: what lies between is missing.
        for entry_id, row in page.rows:
            key = id_key(entry_id)
            if key <= position:
                continue
            state.apply(row, key[0])
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

"""Housekeeping of the partitions a worker holds: snapshots as the log grows, archive and trim.

A snapshot costs in proportion to what is alive, so one is due when as many events were folded since
the last as there are resources alive, and some thousands at least; or after a while, if anything
happened at all. Taking one over costs no more than folding the events since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from redis.exceptions import RedisError

from reconciler.history import Kept, keep_history, save_snapshot
from reconciler.metrics import Metrics
from reconciler.tail import Tail
from store.errors import ArchiveError, Fenced
from store.lease import Lease
from store.log import EventLog
from store.logs import get_logger
from store.refusals import Unavailable

log = get_logger("reconciler.housekeeping")

SNAPSHOT_EVENTS = 20_000
SNAPSHOT_SECONDS = 300.0
_FAILURES = 3
"""So many partitions that cannot be archived, one after the other, are the fault of the archive."""


class Housekeeping:
    """Looks after snapshots, archive and the length of the streams.

    Args:
        event_log, tail, metrics: of the worker.
        leases: gives the leases it holds, by partition.
        now_ms: gives the time of Redis.
        snapshot_events: so many events after the last snapshot there is another one.
        snapshot_seconds: so long after it at the latest, if there were events.
    """

    def __init__(
        self,
        event_log: EventLog,
        tail: Tail,
        metrics: Metrics,
        leases: Callable[[], Mapping[int, Lease]],
        now_ms: Callable[[], int],
        *,
        snapshot_events: int = SNAPSHOT_EVENTS,
        snapshot_seconds: float = SNAPSHOT_SECONDS,
    ) -> None:
        self._log = event_log
        self._tail = tail
        self._metrics = metrics
        self._leases = leases
        self._now_ms = now_ms
        self._events = snapshot_events
        self._seconds = snapshot_seconds
        self._taken: dict[int, tuple[int, int]] = {}
        self._busy = asyncio.Lock()

    async def snapshots(self) -> None:
        """Takes the snapshots that are due."""
        async with self._busy:
            for partition, lease in self._leases().items():
                try:
                    if self._due(partition):
                        await self._snapshot(partition, lease)
                except Fenced as error:
                    log.warning("snapshot not written: the lease is gone", error=str(error))
                except Unavailable as error:
                    self._metrics.snapshot_failures.inc()
                    self._metrics.redis_away("snapshot")
                    log.warning("snapshot not written: Redis is away", error=str(error))
                    return
                except RedisError as error:
                    self._metrics.snapshot_failures.inc()
                    log.error("snapshot not written", partition=partition, error=str(error))

    def _due(self, partition: int) -> bool:
        part = self._tail.parts.get(partition)
        if part is None:
            return False
        now = self._now_ms()
        events, at = self._taken.setdefault(partition, (self._tail.begun.get(partition, 0), now))
        since = part.events - events
        return since > 0 and (
            since >= max(self._events, part.size) or now - at >= self._seconds * 1000
        )

    async def _snapshot(self, partition: int, lease: Lease) -> None:
        part, position = self._tail.parts[partition], self._tail.positions[partition]
        events, now = part.events, self._now_ms()
        size = await save_snapshot(await self._log.namespace(), lease, part, position)
        self._taken[partition] = events, now
        log.debug("snapshot", partition=partition, position=position, events=events, bytes=size)

    async def archive(self) -> None:
        """Archives and trims what is older than it is kept, in all partitions."""
        failures = 0
        for partition in list(self._leases()):
            try:
                await self.keep(partition)
                failures = 0
            except Fenced as error:
                log.warning(
                    "archive left: the lease is gone", partition=partition, error=str(error)
                )
            except Unavailable as error:
                self._metrics.archive_failures.inc()
                self._metrics.redis_away("archive")
                log.warning("archive put off: Redis is away", error=str(error))
                return
            except (ArchiveError, RedisError) as error:
                self._metrics.archive_failures.inc()
                log.error("archive failed", partition=partition, error=str(error))
                failures += 1
                if failures == _FAILURES:
                    return

    async def keep(self, partition: int) -> Kept:
        """Takes a snapshot of one partition if anything happened, then archives and trims.

        Raises:
            Fenced: the lease is no longer held.
            ArchiveError: the archive cannot be written; nothing that is not in it was trimmed.
        """
        async with self._busy:
            lease = self._leases().get(partition)
            part = self._tail.parts.get(partition)
            if lease is None or part is None:
                raise Fenced(f"partition {partition} is not held by this worker")
            namespace = await self._log.namespace()
            if self._taken.get(partition, (0, 0))[0] < part.events:
                await self._snapshot(partition, lease)
            kept = await keep_history(namespace, self._log, lease, self._now_ms())
        if kept.archived or kept.trimmed:
            log.info(
                "history kept", partition=partition, archived=kept.archived, trimmed=kept.trimmed
            )
        return kept

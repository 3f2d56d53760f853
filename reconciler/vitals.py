"""Vitals: how a worker and what it keeps are doing, where only Redis can tell.

How far the fold is behind the log, how long ago the last snapshot was, how much is overdue for the
archive: asked every few seconds, at the cost of a few replies of one entry each, and put into the
metrics. What a collector reads is what was found last, so it gets an answer while Redis is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError, ResponseError

from reconciler.metrics import Metrics
from reconciler.partitions import Partitions
from reconciler.tail import Tail
from store.errors import ArchiveError
from store.logs import get_logger
from store.namespace import Namespace
from store.position import START, Key, id_key, key_id, ms_of
from store.refusals import Unavailable
from store.retention import Retention, read_retention
from store.snapshots import newest_first
from store.tasks import check_cancelled

log = get_logger("reconciler.vitals")

LOOK_SECONDS = 2.0
COUNTED = 1000
"""Entries of a partition that are counted at the most when it is behind."""


@dataclass(frozen=True, slots=True)
class PartitionVitals:
    """What one look at a partition gave; entry ids, None where there is no such entry.

    Attributes:
        unfolded: the oldest entry that is not folded.
        uncovered: the oldest entry that no snapshot covers.
        oldest: the oldest entry of the stream that may leave it; the last one never does.
    """

    unfolded: str | None
    uncovered: str | None
    oldest: str | None


class Vitals:
    """Keeps the metrics of a worker up to date with what Redis has.

    Args:
        namespace: of the log.
        tail: the fold.
        acting: the partitions that the worker holds.
        metrics: of the worker.
        now_ms: the time of Redis, in ms.
        longest_wait: gives the longest that an event waited to be folded since it was last asked, in s.
    """

    def __init__(
        self,
        namespace: Namespace,
        tail: Tail,
        acting: Partitions,
        metrics: Metrics,
        now_ms: Callable[[], int],
        longest_wait: Callable[[], float],
    ) -> None:
        self._namespace = namespace
        self._tail = tail
        self._acting = acting
        self._metrics = metrics
        self._now_ms = now_ms
        self._longest_wait = longest_wait
        metrics.all_partitions.set(namespace.partitions)

    async def watch(self) -> None:
        """Looks, for ever."""
        while True:
            check_cancelled()
            try:
                await self.look()
            except Unavailable:
                self._metrics.redis_up.set(0)
                self._metrics.redis_away("vitals")
            except (ArchiveError, RedisError) as error:
                log.error("the state of log and archive is not known", error=str(error))
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Looks once.

        Raises:
            Unavailable: Redis is away.
            ArchiveError: the retention of the namespace cannot be read.
        """
        metrics, acting = self._metrics, self._acting
        retention = await read_retention(self._namespace)
        held = [p for p in acting.channels if p in self._tail.positions]
        found = await self._partitions(held)
        now = self._now_ms()
        behind = {p: v.unfolded for p, v in found.items() if v.unfolded is not None}
        waiting = max((_age(now, entry) for entry in behind.values()), default=0.0)
        metrics.lag.set(max(waiting, self._longest_wait()))
        metrics.behind.set(sum(await self._count(behind)))
        ages = [_age(now, v.uncovered) for v in found.values() if v.uncovered is not None]
        metrics.snapshot_age.set(max(ages, default=0.0))
        metrics.archive_lag.set(_overdue(now, retention, found.values()))
        metrics.workers.set(len(acting.leases.workers))
        metrics.redis_up.set(1)

    async def _partitions(self, held: Sequence[int]) -> dict[int, PartitionVitals]:
        batch = self._namespace.store.batch
        keys = {p: self._namespace.keys.partition(p) for p in held}
        positions = {p: self._tail.positions[p] for p in held}
        commands: list[Sequence[Any]] = []
        for p in held:
            commands += [
                _first_after(keys[p].log, positions[p]),
                ("XRANGE", keys[p].log, "-", "+", "COUNT", 2),
                ("HKEYS", keys[p].snapshots),
            ]
        answers = await batch(commands)
        unfolded, streams = _checked(answers[0::3]), _checked(answers[1::3])
        covered = [
            _covered(names, positions[p]) for p, names in zip(held, answers[2::3], strict=True)
        ]
        uncovered = _checked(
            await batch(
                [_first_after(keys[p].log, key_id(at)) for p, at in zip(held, covered, strict=True)]
            )
        )
        return {
            p: PartitionVitals(
                _first(unfolded[n]), _first(uncovered[n]), _first(streams[n]) if len(streams[n]) > 1 else None
            )
            for n, p in enumerate(held)
        }  # fmt: skip

    async def _count(self, behind: dict[int, str]) -> list[int]:
        """How many entries there are from these on, partition by partition."""
        log_of = self._namespace.keys.partition
        commands = [
            ("XRANGE", log_of(p).log, entry, "+", "COUNT", COUNTED) for p, entry in behind.items()
        ]
        return [len(answer) for answer in _checked(await self._namespace.store.batch(commands))]


def _first_after(key: str, position: str) -> tuple[Any, ...]:
    after = "-" if position == START else f"({position}"
    return ("XRANGE", key, after, "+", "COUNT", 1)


def _first(entries: Sequence[Any]) -> str | None:
    return entries[0][0].decode() if entries else None


def _covered(names: Any, position: str) -> Key:
    """Up to which entry the snapshots of these names cover what was folded up to `position`.

    A key that is not the hash of snapshots (somebody overwrote it) covers nothing.
    """
    if isinstance(names, ResponseError) and not isinstance(names, Unavailable):
        return (0, 0)
    if isinstance(names, Exception):
        raise names
    known = newest_first((name.decode("ascii", "replace") for name in names), id_key(position))
    return id_key(known[0]) if known else (0, 0)


def _checked(answers: Sequence[Any]) -> Sequence[Any]:
    """Raises what one of the answers is."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _age(now_ms: int, entry: str) -> float:
    return max(0, now_ms - ms_of(entry)) / 1000


def _overdue(now_ms: int, retention: Retention, found: Any) -> float:
    """For how long the oldest entry should have left its stream, in seconds."""
    if retention.archive is None:
        return 0.0
    ages = [_age(now_ms, one.oldest) for one in found if one.oldest is not None]
    return max(0.0, max(ages, default=0.0) - retention.keep_seconds)

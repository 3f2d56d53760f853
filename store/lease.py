"""Leases: who may act for a partition, and the epoch that fences off whoever no longer may.

A lease is a key with a time to live; taking it anew makes the epoch grow. Each write by a worker
names holder and epoch, and the script that writes refuses when the key says otherwise, so a worker
that slept through the loss of its lease can do no harm when it wakes.

Workers that share the partitions know of each other by a heartbeat (`join`), in the time of Redis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from store.namespace import Namespace


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease held.

    Attributes:
        partition: which.
        holder: the process id of the worker.
        epoch: grows with each take.
    """

    partition: int
    holder: str
    epoch: int

    @property
    def token(self) -> str:
        """What the scripts compare."""
        return f"{self.holder} {self.epoch}"


@dataclass(frozen=True, slots=True)
class HeldByOther:
    """A lease that could not be taken, and who has it."""

    partition: int
    holder: str
    epoch: int


Taken = Lease | HeldByOther


async def take_lease(
    namespace: Namespace, partition: int, holder: str, ttl_ms: int, held: Lease | None = None
) -> Taken:
    """Takes a free lease, or renews the one held.

    Args:
        namespace: where.
        partition: which.
        holder: process id of the worker.
        ttl_ms: how long it lasts unless it is renewed.
        held: the lease to renew; None takes afresh, under a new epoch.
    """
    keys, args = _taking(namespace, partition, holder, ttl_ms, held)
    return _taken(partition, holder, await namespace.store.script("lease_take", keys, args))


async def take_leases(
    namespace: Namespace, wanted: Mapping[int, Lease | None], holder: str, ttl_ms: int
) -> dict[int, Taken | Exception]:
    """Takes or renews many leases at once; see `take_lease`.

    Args:
        namespace: where.
        wanted: partition -> the lease to renew, or None to take afresh.
        holder: process id of the worker.
        ttl_ms: how long they last unless they are renewed.

    Returns:
        For each partition what came of it; an exception where its node cannot be reached.
    """
    calls = [_taking(namespace, p, holder, ttl_ms, held) for p, held in wanted.items()]
    answers = await namespace.store.scripts("lease_take", calls)
    return {
        partition: answer if isinstance(answer, Exception) else _taken(partition, holder, answer)
        for partition, answer in zip(wanted, answers, strict=True)
    }


def _taking(
    namespace: Namespace, partition: int, holder: str, ttl_ms: int, held: Lease | None
) -> tuple[list[str], list[str | int]]:
    keys = namespace.keys.partition(partition)
    return [keys.lease, keys.epoch], [holder, ttl_ms, held.epoch if held else 0]


def _taken(partition: int, holder: str, answer: Sequence[Any]) -> Taken:
    if answer[1]:
        return Lease(partition, holder, int(answer[0]))
    return HeldByOther(partition, answer[2].decode(), int(answer[0]))


async def holders(namespace: Namespace, partitions: Sequence[int]) -> dict[int, str | None]:
    """Who holds the leases of some partitions: `holder epoch`, None where nobody does.

    A partition whose node cannot be reached is left out.
    """
    answers = await namespace.store.batch(
        [("GET", namespace.keys.partition(partition).lease) for partition in partitions]
    )
    return {
        partition: None if answer is None else answer.decode()
        for partition, answer in zip(partitions, answers, strict=True)
        if not isinstance(answer, Exception)
    }


async def release_lease(namespace: Namespace, lease: Lease) -> None:
    """Gives a lease back; nothing happens when it is no longer held."""
    keys = namespace.keys.partition(lease.partition)
    await namespace.store.script("lease_release", [keys.lease], [lease.token])


async def release_leases(namespace: Namespace, leases: Iterable[Lease]) -> None:
    """Gives leases back, as far as Redis can be reached; the others lapse."""
    calls = [([namespace.keys.partition(one.partition).lease], [one.token]) for one in leases]
    if calls:
        await namespace.store.scripts("lease_release", calls)


async def join(namespace: Namespace, worker: str, ttl_ms: int) -> list[str]:
    """Says that a worker is there, for a time.

    Returns:
        All workers that are there now, sorted. Time is that of Redis.
    """
    answer = await namespace.store.script("member_beat", [namespace.keys.members], [worker, ttl_ms])
    return sorted(member.decode() for member in answer)


async def leave(namespace: Namespace, worker: str) -> None:
    """Says that a worker is there no longer."""
    await namespace.store.redis.zrem(namespace.keys.members, worker)

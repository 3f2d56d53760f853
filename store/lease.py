"""Leases: who may act for a partition, and the epoch that fences off whoever no longer may.

A lease is a key with a time to live; taking it anew makes the epoch grow. Each write by a worker
names holder and epoch, and the script that writes refuses when the key says otherwise, so a worker
that slept through the loss of its lease can do no harm when it wakes.
"""

from __future__ import annotations

from dataclasses import dataclass

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


async def take_lease(
    namespace: Namespace, partition: int, holder: str, ttl_ms: int, held: Lease | None = None
) -> Lease | HeldByOther:
    """Takes a free lease, or renews the one held.

    Args:
        namespace: where.
        partition: which.
        holder: process id of the worker.
        ttl_ms: how long it lasts unless it is renewed.
        held: the lease to renew; None takes afresh, under a new epoch.
    """
    keys = namespace.keys.partition(partition)
    answer = await namespace.store.script(
        "lease_take", [keys.lease, keys.epoch], [holder, ttl_ms, held.epoch if held else 0]
    )
    if answer[1]:
        return Lease(partition, holder, int(answer[0]))
    return HeldByOther(partition, answer[2].decode(), int(answer[0]))


async def release_lease(namespace: Namespace, lease: Lease) -> None:
    """Gives a lease back; nothing happens when it is no longer held."""
    keys = namespace.keys.partition(lease.partition)
    await namespace.store.script("lease_release", [keys.lease], [lease.token])

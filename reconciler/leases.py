"""Which partitions this worker acts for: a fair share of them, by leases.

Every worker says by heartbeat that it is there, sees who else is, and computes from that what each may
hold: shares that differ by one at most. Who has too much gives back, who has too little takes what is
free. Nobody is asked and nobody decides for others, so any worker may vanish at any moment.

The times leave room within one lease time: a lease lapses after 0.8 of it, everybody looks every 0.1,
and so what a dead worker held is taken after 0.9 at the latest. Workers are forgotten sooner (0.6), so
that the shares of the others have grown by the time there is something to take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from store.lease import (
    HeldByOther,
    Lease,
    holders,
    join,
    leave,
    release_leases,
    take_leases,
)
from store.namespace import Namespace
from store.refusals import Unavailable

LAPSES, FORGOTTEN, LOOK = 0.8, 0.6, 0.1
"""Of the lease time: when a lease lapses, when a worker is forgotten, how often everybody looks."""


def share(worker: str, workers: Collection[str], partitions: int) -> int:
    """How many partitions a worker may hold: all shares add up, and differ by one at most.

    The first ones in the order of their names have the one more.
    """
    everybody = sorted({worker, *workers})
    whole, rest = divmod(partitions, len(everybody))
    return whole + (everybody.index(worker) < rest)


@dataclass(slots=True)
class Change:
    """What one look brought.

    Attributes:
        gained: leases held now under an epoch that is new.
        lost: partition -> why it is no longer ours.
        surplus: partitions beyond the share: stop acting for them, then `give_back`.
        reached: partitions whose node answered.
        unreached: partitions held whose node did not; they are ours until the lease lapses.
    """

    gained: list[Lease] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    surplus: list[int] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    unreached: set[int] = field(default_factory=set)


class Leases:
    """The leases of one worker.

    Args:
        namespace: whose partitions.
        worker: process id of the worker.
        lease_seconds: after so long at the latest others act for what this worker held when it died.

    Attributes:
        held: partition -> lease.
        workers: that were there at the last look, this one among them.
    """

    def __init__(self, namespace: Namespace, worker: str, lease_seconds: float) -> None:
        self.held: dict[int, Lease] = {}
        self.workers: list[str] = [worker]
        self._namespace = namespace
        self._worker = worker
        self._ttl_ms = int(lease_seconds * LAPSES * 1000)
        self._forgotten_ms = int(lease_seconds * FORGOTTEN * 1000)

    @property
    def share(self) -> int:
        """How many partitions this worker may hold."""
        return share(self._worker, self.workers, self._namespace.partitions)

    async def look(self, busy: Collection[int] = ()) -> Change:
        """Says that the worker is there, renews what it holds, and takes or names what evens out.

        Args:
            busy: partitions that are not given back now.

        Raises:
            Unavailable: Redis is away; in a cluster, only when no node answers.
        """
        change = await self.renew()
        if change.unreached and not change.reached:
            return change
        try:
            await self._even_out(change, busy)
        except Unavailable:
            # What was renewed, or lost, is known by now and must be heard of: the shares stay as they
            # were. Where nothing was asked for yet, nobody has noticed that Redis is away. In a cluster
            # it may be the node with the list of workers alone.
            if not change.reached and not self._namespace.store.is_cluster:
                raise
        return change

    async def _even_out(self, change: Change, busy: Collection[int]) -> None:
        self.workers = await join(self._namespace, self._worker, self._forgotten_ms)
        too_many = len(self.held) - self.share
        if too_many > 0:
            idle = [partition for partition in sorted(self.held) if partition not in busy]
            change.surplus = idle[-too_many:]
        elif too_many < 0:
            others = [p for p in self._namespace.all_partitions() if p not in self.held]
            await self._take(others, -too_many, change)

    async def renew(self) -> Change:
        """Renews what is held, and nothing else.

        Raises:
            Unavailable: Redis is away; not in a cluster.
        """
        change = Change()
        if self.held:
            await self._take_or_renew(list(self.held), change)
        return change

    async def take_free(self, partitions: Iterable[int]) -> Change:
        """Takes those of some partitions that nobody holds, whatever the share; see `look`."""
        change = await self.renew()
        await self._take([p for p in partitions if p not in self.held], None, change)
        return change

    async def give_back(self, partitions: Iterable[int]) -> None:
        """Gives leases back, so that others need not wait until they lapse."""
        given = [self.held.pop(partition) for partition in partitions if partition in self.held]
        await release_leases(self._namespace, given)

    async def leave(self) -> None:
        """Gives everything back, and says that the worker is there no longer."""
        await self.give_back(list(self.held))
        await leave(self._namespace, self._worker)

    async def _take(self, partitions: Sequence[int], at_most: int | None, change: Change) -> None:
        known = await holders(self._namespace, partitions)
        # A lease in our own name that we do not hold is one that a failover has brought back.
        free = [
            partition
            for partition in partitions
            if partition in known
            and ((holder := known[partition]) is None or holder.rpartition(" ")[0] == self._worker)
        ]
        if at_most is not None and free:
            # Each begins elsewhere, so that several that take at once do not all want the same.
            begin = self.workers.index(self._worker) * len(free) // len(self.workers)
            free = (free[begin:] + free[:begin])[:at_most]
        if free:
            await self._take_or_renew(free, change)

    async def _take_or_renew(self, partitions: Sequence[int], change: Change) -> None:
        wanted = {partition: self.held.get(partition) for partition in partitions}
        answers = await take_leases(self._namespace, wanted, self._worker, self._ttl_ms)
        for partition, answer in answers.items():
            before = wanted[partition]
            if isinstance(answer, Unavailable):
                if before is not None:
                    change.unreached.add(partition)
                continue
            if isinstance(answer, Exception):
                raise answer
            change.reached.add(partition)
            if isinstance(answer, HeldByOther):
                if before is not None:
                    change.lost[partition] = f"now held by {answer.holder}"
                    self.held.pop(partition, None)
            elif before is None or before.epoch != answer.epoch:
                change.gained.append(answer)
                self.held[partition] = answer

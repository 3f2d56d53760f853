"""The partitions a worker acts for, from taking a lease to giving it back.

A lease alone is not enough to act: the log of the partition is folded first. Reading it may take long,
and the leases are renewed meanwhile by another task. Giving up goes the other way round: the worker
stops acting, then gives the lease back, so that two never act for one partition.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from math import inf

from redis.exceptions import RedisError

from reconciler.leases import LOOK, Change, Leases
from reconciler.metrics import Metrics
from reconciler.tail import Tail
from store.channel import WorkerChannel, lapsed_hosts
from store.errors import Fenced, ReconcilerError, SequenceGap
from store.event import EventRow, process_id
from store.inbox import Inbox
from store.lease import Lease
from store.logs import Trouble, get_logger
from store.namespace import Namespace
from store.refusals import Unavailable
from store.tasks import check_cancelled, end_tasks

log = get_logger("reconciler.partitions")

_HOSTS_RETURN_SECONDS = 6.0
"""After Redis or this worker was away, hosts have so long to be heard of again before they count as
lost."""
_UNWATCHED_SECONDS = 3.0
_AGAIN_SECONDS = 0.2
_UNREAD_SECONDS = 3.0

Touch = Callable[[Iterable[str]], None]


class Partitions:
    """What one worker holds, and acts for.

    Args:
        namespace: of the log.
        tail: folds the partitions.
        inbox: hears of what hosts and commands want.
        name, process: of the worker.
        lease_seconds: after so long at the latest others act for what this worker held when it died.
        metrics: of the worker.
        touch: called with processes that are to be looked at.
        forget: called with processes that are no longer looked at.

    Attributes:
        channels: partition -> the end to write to, of those that it acts for.
        busy: partition -> requests that are being answered; it is not given back meanwhile.
    """

    def __init__(
        self,
        namespace: Namespace,
        tail: Tail,
        inbox: Inbox,
        *,
        name: str,
        process: str,
        lease_seconds: float,
        metrics: Metrics,
        touch: Touch,
        forget: Touch,
    ) -> None:
        self.channels: dict[int, WorkerChannel] = {}
        self.busy: Counter[int] = Counter()
        self.leases = Leases(namespace, process, lease_seconds)
        self._namespace = namespace
        self._tail = tail
        self._inbox = inbox
        self._name = name
        self._lease_seconds = lease_seconds
        self._every = lease_seconds * LOOK
        self._metrics = metrics
        self._touch = touch
        self._forget = forget
        self._opening: dict[int, Lease] = {}
        self._paused: dict[int, WorkerChannel] = {}
        self._unread: dict[int, str] = {}
        self._gained = asyncio.Event()
        self._opened = asyncio.Event()
        self._changing = asyncio.Lock()
        self._hosts_return: dict[int, float] = {}
        self._looked = False
        self._looked_at = inf

    @property
    def opening(self) -> bool:
        """It is reading the log of partitions that it will act for."""
        return bool(self._opening.keys() - self._unread.keys())

    def watches(self) -> bool:
        """Whether hosts of all its partitions have had the time to be heard of."""
        now = time.monotonic()
        return all(self._hosts_return.get(p, 0.0) <= now for p in self.channels)

    def unready(self) -> str | None:
        """Why it does not act for its share; None when it does."""
        if unread := next(iter(self._unread.items()), None):
            return f"the log of partition {unread[0]} cannot be read: {unread[1]}"
        if self._opening or not self._looked:
            return "the log has not been read to its end yet"
        silent = time.monotonic() - self._looked_at
        if silent > self._lease_seconds:
            return f"Redis has not answered for {silent:.0f} s: the leases may have lapsed"
        if not self.channels and self.leases.share:
            return "no partition is held: another worker has them, or Redis is away"
        return None

    # --- taking and giving --------------------------------------------------------------------------

    async def look(self) -> None:
        """Renews, takes and gives back, so that all workers have their share.

        Raises:
            Unavailable: Redis is away.
        """
        async with self._changing:
            try:
                change = await self.leases.look(busy=+self.busy)
            except Unavailable:
                self._away(self.leases.held)
                self._count("renew_failed", len(self.leases.held))
                raise
            now = time.monotonic()
            if now - self._looked_at > max(_UNWATCHED_SECONDS, 3 * self._every):
                # Redis or this worker stood still, and nothing failed.
                self._away(self.leases.held)
            self._looked_at = now
            self._take_up(change)
            if change.surplus:
                for partition in change.surplus:
                    self._stop(partition)
                await self.leases.give_back(change.surplus)
                self._count("released", len(change.surplus))
                log.info("partitions handed over", partitions=change.surplus)
                self._take_up(Change())

    def _count(self, event: str, count: int = 1) -> None:
        self._metrics.lease_changes.labels(event).inc(count)

    def _take_up(self, change: Change) -> None:
        self._count("taken", len(change.gained))
        self._count("renew_failed", len(change.unreached))
        for lease in change.gained:
            self.channels.pop(lease.partition, None)
            self._opening[lease.partition] = lease
            self._gained.set()
        for partition, why in change.lost.items():
            self.lose(partition, why)
        self._away(change.unreached)
        self._looked = True
        self._metrics.partitions.set(len(self.channels))

    def _away(self, partitions: Iterable[int]) -> None:
        until = time.monotonic() + _HOSTS_RETURN_SECONDS
        self._hosts_return.update(dict.fromkeys(partitions, until))

    def lose(self, partition: int, why: str) -> None:
        """Stops acting for a partition whose lease is gone."""
        if partition in self.channels or partition in self._opening:
            log.warning("lease lost", partition=partition, why=why)
            self._count("lost")
        self.leases.held.pop(partition, None)
        self._stop(partition)

    def _stop(self, partition: int) -> None:
        self.channels.pop(partition, None)
        self._opening.pop(partition, None)
        self._unread.pop(partition, None)
        self._paused.pop(partition, None)
        of = {p: self._namespace.partition_of(p) for p in self._tail.state.processes}
        self._tail.drop([partition])
        self._forget([process for process, where in of.items() if where == partition])

    def begin_anew(self, partitions: Iterable[int]) -> None:
        """Redis forgot some of what was read of these: their log is read again before it acts on."""
        chosen = {p: self.channels[p] for p in partitions if p in self.channels}
        for partition, channel in chosen.items():
            self._stop(partition)
            # Its numbers go on: what was written under them may still be there.
            self._paused[partition] = channel
            self._opening[partition] = channel.lease
        self._inbox.forget(chosen)
        self._away(chosen)
        self._gained.set()

    async def open_gained(self) -> None:
        """Reads the log of partitions that were gained; from then on the worker acts for them.

        Raises:
            Unavailable: Redis is away; what was not read yet is read next time.
            ArchiveError, HistoryDropped, RedisError: the log of a partition cannot be read; the others
                were, and it is tried again next time.
        """
        failed: Exception | None = None
        for partition, lease in list(self._opening.items()):
            try:
                await self._inbox.open([*self.channels, partition])
                await self._tail.add([partition])
            except Unavailable as error:
                failed = error
                continue
            except (ReconcilerError, RedisError) as error:
                failed = error
                self._unread[partition] = str(error)
                continue
            self._unread.pop(partition, None)
            if self._opening.get(partition) is not lease:
                # It was lost, or taken anew, while the log was read.
                if partition not in self._opening and partition not in self.channels:
                    self._tail.drop([partition])
                continue
            del self._opening[partition]
            channel = self._paused.pop(partition, None)
            if channel is None or channel.lease is not lease:
                writer = process_id(f"{self._name}-p{partition}-e{lease.epoch}")
                channel = WorkerChannel(self._namespace, lease, writer)
            self.channels[partition] = channel
            self._metrics.partitions.set(len(self.channels))
            self._touch(
                p for p in self._tail.state.processes
                if self._namespace.partition_of(p) == partition
            )  # fmt: skip
        self._opened.set()
        self._opened.clear()
        if failed is not None:
            raise failed

    async def acts_for(self, partition: int) -> bool:
        """Whether it acts for a partition, once what it is reading has been read."""
        while partition in self._opening:
            await self._opened.wait()
        return partition in self.channels

    async def release(self) -> None:
        """Gives everything back, as far as Redis can be reached."""
        self._count("released", len(self.leases.held))
        for partition in list(self.leases.held):
            self._stop(partition)
        with contextlib.suppress(*Unavailable):
            await self.leases.leave()

    @asynccontextmanager
    async def borrowed(self, partitions: Sequence[int]) -> AsyncIterator[None]:
        """Acts for those of some partitions that nobody holds, without a share: for a command."""
        async with self._changing:
            self._take_up(await self.leases.take_free(partitions))
        renewing = asyncio.create_task(self._renew())
        try:
            await self.open_gained()
            yield
        finally:
            await end_tasks([renewing])
            await self.release()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            with contextlib.suppress(*Unavailable):
                async with self._changing:
                    self._take_up(await self.leases.renew())
                await self.open_gained()

    # --- the loops ----------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Looks at the leases, for ever."""
        # Nobody knows what was before: Redis may have come back a moment ago, and hosts may not have.
        self._away(self._namespace.all_partitions())
        away = Trouble(log, "leases not renewed: Redis is away")
        while True:
            check_cancelled()
            began = time.monotonic()
            try:
                await self.look()
                away.over()
            except Unavailable as error:
                self._metrics.redis_away("leases")
                away.say(error=str(error))
            await asyncio.sleep(max(0.01, began + self._every - time.monotonic()))

    async def open(self) -> None:
        """Opens what is gained, for ever."""
        away = Trouble(log, "log not read: Redis is away")
        unread = Trouble(log, "a partition cannot be opened, it is tried again")
        while True:
            check_cancelled()
            await self._gained.wait()
            self._gained.clear()
            try:
                await self.open_gained()
                away.over()
                unread.over()
            except Unavailable as error:
                self._metrics.redis_away("log")
                away.say(error=str(error))
                self._gained.set()
                await asyncio.sleep(_AGAIN_SECONDS)
            except (ReconcilerError, RedisError) as error:
                # The other partitions are acted for meanwhile; /readyz says it too.
                unread.say(error=str(error))
                asyncio.get_running_loop().call_later(_UNREAD_SECONDS, self._gained.set)

    async def watch_hosts(self) -> None:
        """Closes processes whose own lease has lapsed, for ever."""
        away = Trouble(log, "lapsed hosts not closed: Redis is away, or forgot")
        while True:
            check_cancelled()
            await asyncio.sleep(min(1.0, self._every * 3))
            try:
                await self.close_lost()
                away.over()
            except (*Unavailable, SequenceGap) as error:
                self._metrics.redis_away("hosts")
                away.say(error=str(error))

    async def close_lost(self) -> None:
        """Closes, in the log, the processes whose lease has lapsed."""
        now = time.monotonic()
        chosen = [p for p in self.channels if self._hosts_return.get(p, 0.0) <= now]
        found = await lapsed_hosts(self._namespace, chosen)
        for partition, processes in found.items():
            for process in processes:
                if (channel := self.channels.get(partition)) is not None:
                    await self._close(channel, process)

    async def _close(self, channel: WorkerChannel, process: str) -> None:
        known = self._tail.state.processes.get(process)
        event = EventRow(
            "process_lost", f"process/{process}", "", 0, time.time(), process,
            reason="its lease lapsed: the process was not heard of in time",
            attrs={"last_seq": known.seq} if known is not None else None,
        )  # fmt: skip
        partition = channel.lease.partition
        try:
            if await channel.close_lost(process, event):
                self._metrics.lost.inc()
                log.warning("process lost", process=process)
        except Fenced as error:
            if self.channels.get(partition) is channel:
                self.lose(partition, str(error))

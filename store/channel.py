"""The messages of `store.messages`, through Redis: one end for the host, one for the worker.

A host publishes its inventory (changed buckets and a summary) and reads its order stream. A worker
reads inventories, and writes orders together with the events that announce them, under the epoch of
its lease. Reading inventories is in `store.inventories`, the notes that wake a worker up in
`store.inbox`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from redis.exceptions import RedisError

from store.connection import BLOCK_MS
from store.errors import MalformedEntry, SequenceGap
from store.event import NO_DIGEST, EventRow, encode
from store.lease import Lease
from store.log import START, id_key
from store.messages import (
    Note,
    Order,
    Summary,
    decode_order,
    encode_message,
)
from store.namespace import Namespace
from store.refusals import Unavailable
from store.streams import read_streams

_ORDERS_REMEMBERED = 2000


class HostChannel:
    """The host's end: publish, receive orders, renew the lease, leave.

    Attributes:
        last_seq: the last seq of the process in the log, as of the last `beat`.
    """

    def __init__(self, namespace: Namespace, process: str) -> None:
        self._namespace = namespace
        self._keys = namespace.partition_keys(process)
        self._process = process
        self._orders_read = START
        self._orders_seen: dict[str, None] = {}
        self._published = 0
        self.last_seq = 0

    @property
    def publishes_all(self) -> bool:
        """The next publication must hold all buckets: nothing is known to be there."""
        return self._published == 0

    async def publish(
        self, summary: Summary, root: str, buckets: Mapping[str, tuple[str, bytes]]
    ) -> bool:
        """Publishes what changed of the inventory.

        Args:
            summary: over all of it.
            root: digest over the digests of all buckets.
            buckets: those that changed, bucket number -> (digest, content); without content the
                bucket is dropped.

        Returns:
            False when Redis does not have what was published before; nothing was written, and all
            buckets are to be published anew. The same holds after an error: see `publishes_all`.

        Raises:
            Fenced: the process was declared lost.
        """
        changes = [part for bucket, change in buckets.items() for part in (bucket, *change)]
        number, self._published = self._published + 1, 0
        done = await self._namespace.store.script(
            "inventory",
            [self._keys.inventory(self._process), self._keys.inbox, self._keys.seqs],
            [
                self._process,
                encode_message(summary),
                root,
                encode_message(Note("inventory", self._process)),
                number,
                *changes,
            ],
        )
        if done:
            self._published = number
        return bool(done)

    async def beat(self, ttl_ms: int) -> int:
        """Renews the lease of the process; the answer is the time of Redis in ms.

        It also brings `last_seq`, the last seq of the process in the log, up to date.

        Raises:
            Fenced: the process was declared lost.
        """
        now, self.last_seq = await self._namespace.store.script(
            "host_beat", [self._keys.hosts, self._keys.seqs], [self._process, ttl_ms]
        )
        return int(now)

    async def orders(self, *, block_ms: int = BLOCK_MS) -> list[Order]:
        """Waits for orders; empty when none came. What is malformed is passed over."""
        key = self._keys.orders(self._process)
        orders = []
        for _, raw in await read_streams(self._namespace.store, {key: self._orders_read}, block_ms):
            for entry_id, fields in raw:
                self._orders_read = entry_id.decode()
                try:
                    orders.append(decode_order((fields or [b"", b""])[1]))
                except MalformedEntry:
                    continue
        orders = [order for order in orders if self._is_new(order)]
        if orders:
            # What was read is done with: the stream stays short. If that fails now, the next one does.
            with contextlib.suppress(RedisError, *Unavailable):
                await self._namespace.store.redis.xtrim(
                    key, minid=self._orders_read, approximate=True
                )
        return orders

    def _is_new(self, order: Order) -> bool:
        if order.id in self._orders_seen:
            return False
        self._orders_seen[order.id] = None
        while len(self._orders_seen) > _ORDERS_REMEMBERED:
            del self._orders_seen[next(iter(self._orders_seen))]
        return True

    async def look_back(self) -> None:
        """After a failover: reads the orders anew if the stream ends before what was read already.

        The clock of the new server may be behind, and then new orders have lower ids than old ones.
        Orders that were seen are not given again.
        """
        last = await self._namespace.store.redis.xrevrange(
            self._keys.orders(self._process), count=1
        )
        if not last or id_key(last[0][0].decode()) < id_key(self._orders_read):
            self._orders_read = START

    async def leave(self) -> None:
        """Says that the process has ended in good order; its lease, inventory and orders go."""
        await self._namespace.store.script(
            "host_stop",
            [
                self._keys.hosts,
                self._keys.inventory(self._process),
                self._keys.orders(self._process),
                self._keys.inbox,
            ],
            [self._process, encode_message(Note("stopped", self._process))],
        )


class WorkerChannel:
    """The worker's end for one partition, under one lease.

    It is the writer of the worker's own events in that partition: each lease is a process of its
    own in the log, with sequence numbers from 1. When a write ends without an answer it is not known
    whether it was done: the channel then goes on as another process, so that no number is given twice.

    Attributes:
        lease: that it writes under.
        writer: the process that it writes as.
    """

    def __init__(self, namespace: Namespace, lease: Lease, writer: str) -> None:
        self._namespace = namespace
        self._keys = namespace.keys.partition(lease.partition)
        self.lease = lease
        self.writer = writer
        self._writers = 1
        self._seq = 0
        self._digest = NO_DIGEST
        # Passes, lost processes and ended conversations are written by tasks of their own, and each
        # write is numbered after the one before.
        self._writing = asyncio.Lock()

    @contextlib.contextmanager
    def _unanswered(self) -> Iterator[None]:
        """Starts as another process when the write within ends without an answer, or does not fit."""
        try:
            yield
        except (*Unavailable, SequenceGap, asyncio.CancelledError):
            self._writers += 1
            self.writer = f"{self.writer.partition('#')[0]}#{self._writers}"
            self._seq, self._digest = 0, NO_DIGEST
            raise

    def _encode(self, events: Sequence[EventRow]) -> tuple[list[bytes], str]:
        digest = self._digest
        payloads = []
        for offset, event in enumerate(events, start=1):
            row = msgspec.structs.replace(event, process=self.writer, seq=self._seq + offset)
            payload, digest = encode(row, digest)
            payloads.append(payload)
        return payloads, digest

    async def write(self, events: Sequence[EventRow], orders: Sequence[Order] = ()) -> None:
        """Appends events of the worker and sends orders, all or nothing.

        Args:
            events: writer and seq are filled in here.
            orders: for processes of this partition.

        Raises:
            Fenced: the lease is no longer held; nothing was written.
            SequenceGap: the log forgot what was written before; write again.
        """
        async with self._writing:
            await self._write(events, orders)

    async def _write(self, events: Sequence[EventRow], orders: Sequence[Order]) -> None:
        payloads, digest = self._encode(events)
        streams: dict[str, int] = {}
        sent: list[bytes | int] = []
        for order in orders:
            key = self._keys.orders(order.process)
            sent += [streams.setdefault(key, len(streams) + 4), encode_message(order)]
        with self._unanswered():
            await self._namespace.store.script(
                "order",
                [self._keys.lease, self._keys.log, self._keys.seqs, *streams],
                [self.lease.token, self.writer, self._seq + 1, len(payloads), *payloads, *sent],
            )
        self._seq += len(payloads)
        self._digest = digest

    async def lapsed_hosts(self) -> list[str]:
        """Host processes of this partition whose lease has lapsed."""
        return (await lapsed_hosts(self._namespace, [self.lease.partition]))[self.lease.partition]

    async def close_lost(self, process: str, event: EventRow) -> bool:
        """Declares a process lost and fences it; False when it has come back meanwhile.

        Raises:
            Fenced: the lease is no longer held; nothing was written.
        """
        async with self._writing:
            return await self._close_lost(process, event)

    async def _close_lost(self, process: str, event: EventRow) -> bool:
        payloads, digest = self._encode([event])
        with self._unanswered():
            written = await self._namespace.store.script(
                "process_lost",
                [
                    self._keys.lease,
                    self._keys.log,
                    self._keys.seqs,
                    self._keys.hosts,
                    self._keys.inventory(process),
                    self._keys.orders(process),
                ],
                [self.lease.token, self.writer, self._seq + 1, payloads[0], process],
            )
        if written:
            self._seq += 1
            self._digest = digest
        return bool(written)


async def lapsed_hosts(namespace: Namespace, partitions: Sequence[int]) -> dict[int, list[str]]:
    """Host processes whose lease has lapsed, by partition; a node that is away is left out."""
    calls: list[tuple[list[str], list[str]]] = [
        ([namespace.keys.partition(p).hosts], []) for p in partitions
    ]
    answers = await namespace.store.scripts("hosts_lapsed", calls)
    return {
        partition: [process.decode() for process in answer]
        for partition, answer in zip(partitions, answers, strict=True)
        if not isinstance(answer, Exception)
    }

"""The log: append, read, follow.

One stream per partition; all events of a process are in one partition, so they are in order. The
append is idempotent on (process, seq): a client that lost the reply sends the same batch again and
nothing is doubled. What was trimmed from a stream is read from the archive, and nobody who reads sees
the difference. A malformed entry never stops a reader: it is reported, set aside in the
quarantine hash with the reason, and the raw entry stays where it is.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from store.connection import BLOCK_MS, Store
from store.durability import confirmed
from store.entries import PAGE, Entries
from store.errors import MalformedEntry, NotConfirmed
from store.event import NO_DIGEST, LifecycleEvent, LogEntry, decode, decode_row, encode
from store.namespace import DEFAULT_NAMESPACE, Namespace, open_namespace
from store.page import Page, parse_page, payload_of
from store.position import START, RawEntry, id_key
from store.tasks import under_way

__all__ = ["PAGE", "START", "Appended", "EventLog", "Page", "RawEntry", "id_key", "parse_page"]


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append did.

    Attributes:
        last_seq: the last sequence number of the process that is now in the log.
        added: how many events of the batch were new.
    """

    last_seq: int
    added: int


class EventLog:
    """All events of a namespace.

    Args:
        store: an open store.
        namespace: its name.
        partitions: how many the namespace must have; None takes what is recorded in it.

    The namespace is opened, and made if it is new, by the first call; that call raises
    NamespaceError when it does not fit.
    """

    def __init__(
        self,
        store: Store,
        namespace: str | Namespace = DEFAULT_NAMESPACE,
        *,
        partitions: int | None = None,
    ) -> None:
        self._store = store
        self._opened = namespace if isinstance(namespace, Namespace) else None
        self._name = namespace if isinstance(namespace, str) else namespace.name
        self._wanted = partitions
        self._digests: dict[str, tuple[int, str]] = {}
        self._raw: Entries | None = None

    async def namespace(self) -> Namespace:
        """The opened namespace.

        Raises:
            NamespaceError: see `open_namespace`.
        """
        if self._opened is None:
            self._opened = await open_namespace(self._store, self._name, self._wanted)
        return self._opened

    async def _entries(self) -> Entries:
        if self._raw is None:
            self._raw = Entries(await self.namespace())
        return self._raw

    # --- append ---------------------------------------------------------------------------------

    async def append(self, events: Sequence[LifecycleEvent]) -> Appended:
        """Appends a batch of events of one process, in one round trip.

        Args:
            events: of one process, their `seq` ascending without gaps. What the log has already is
                skipped, so a batch may be sent again.

        Returns:
            The last sequence number now in the log, and how many events were new.

        Raises:
            SequenceGap: the batch starts beyond the next sequence number; nothing was written.
            Fenced: the process was declared lost; nothing was written.
            ValueError: the batch mixes processes or skips a number.
        """
        if not events:
            return Appended(0, 0)
        process, first = events[0].process, events[0].seq
        for offset, event in enumerate(events):
            if event.process != process or event.seq != first + offset:
                raise ValueError(
                    f"a batch holds events of one process with seq ascending by one; "
                    f"event {offset} is seq {event.seq} of {event.process}"
                )
        seq, digest = self._digests.get(process, (0, NO_DIGEST))
        if seq != first - 1:
            digest = await self._digest_before(process, first)
        payloads = []
        for event in events:
            payload, digest = encode(event, digest)
            payloads.append(payload)
        appended = await self.append_encoded(process, first, payloads)
        self._digests[process] = (events[-1].seq, digest)
        return appended

    async def append_encoded(
        self, process: str, first: int, payloads: Sequence[bytes], confirm: Sequence[str] = ()
    ) -> Appended:
        """Appends events that are encoded and chained already; see `append`.

        Args:
            process, first, payloads: the events.
            confirm: what `store.durability.confirmation` gave; none does not wait.

        Raises:
            NotConfirmed: the events are in the log, but not as durable as was asked.
        """
        keys = (await self.namespace()).partition_keys(process)
        args = [process, first, len(payloads), b"\n".join(payloads)]
        answer = await self._store.script("append", [keys.log, keys.seqs], args, confirm)
        if confirm:
            answer, reply = answer
            if not confirmed(reply):
                raise NotConfirmed(
                    f"Redis at {self._store.url} took events of {process} up to seq {answer[0]}, but "
                    f"{' '.join(confirm)} was answered {reply}"
                )
        return Appended(int(answer[0]), int(answer[1]))

    async def digest_of(self, process: str, seq: int) -> str:
        """The digest of one event, to chain the next to it; `NO_DIGEST` for seq 0."""
        return await self._digest_before(process, seq + 1)

    async def forgotten(self, positions: Mapping[int, str]) -> list[int]:
        """Partitions whose entry at this position is no longer there.

        Replication and the append-only file lose from the end only: a reader whose last entry is
        still there has read nothing that was lost since. (Ids alone do not tell: what comes after a
        failover may well have higher ones.)

        Args:
            positions: partition -> id of the last entry read.
        """
        return await (await self._entries()).forgotten(positions)

    async def _digest_before(self, process: str, seq: int) -> str:
        """The digest of event `seq - 1` of a process, read from the log backwards."""
        if seq == 1:
            return NO_DIGEST
        partition = (await self.namespace()).partition_of(process)
        backwards = (await self._entries()).backwards(partition)
        async with aclosing(backwards) as entries:  # type: ignore[type-var]
            async for _, fields in entries:
                try:
                    row = decode_row(payload_of(fields))
                except MalformedEntry:
                    continue
                if row.process == process and row.seq == seq - 1:
                    return row.digest
                if row.process == process and row.seq < seq - 1:
                    break
        return NO_DIGEST

    # --- read -----------------------------------------------------------------------------------

    async def latest_before(self, partition: int, entry_id: str) -> str | None:
        """The id of the last entry of a partition before `entry_id`; None when there is none."""
        raw = await (await self._entries()).before(partition, f"({entry_id}", 1)
        return raw[-1][0].decode() if raw else None

    async def page(
        self, partition: int, after: str = START, *, until: str = "+", count: int = PAGE
    ) -> Page:
        """Up to `count` entries of a partition after the entry `after`, decoded for the hot paths.

        Malformed entries are listed in the page; see `quarantine`.

        Raises:
            ArchiveError: trimmed entries cannot be read from the archive.
        """
        entries = await self._entries()
        raw = await entries.after(partition, after, until, count)
        page = parse_page(partition, raw, after)
        page.end = not raw or (entries.in_stream(partition, after) and len(raw) < count)
        return page

    async def pages(
        self, partition: int, after: str = START, *, until: str = "+"
    ) -> AsyncIterator[Page]:
        """The pages of a partition to its end; each is read while the one before it is folded.

        Raises:
            ArchiveError: trimmed entries cannot be read from the archive.
        """
        page = await self.page(partition, after, until=until)
        while not page.end:
            following = asyncio.create_task(self.page(partition, page.position, until=until))
            try:
                await under_way()
                yield page
                page = await following
            except BaseException:
                following.cancel()
                raise
        yield page

    async def read(
        self,
        after: str = START,
        *,
        until: str = "+",
        partition: int | None = None,
        process: str | None = None,
    ) -> AsyncIterator[LogEntry]:
        """All events from a position on, in the order of Redis time, until the present end.

        Args:
            after: an entry id; the entry itself is not read.
            until: an entry id, read inclusively, or `+`.
            partition: only this one; None merges all.
            process: only events of this process (its partition alone is read).

        Malformed entries are passed over.
        """
        namespace = await self.namespace()
        if process is not None:
            partition = namespace.partition_of(process)
        chosen = namespace.all_partitions() if partition is None else [partition]
        streams = [self._one(p, after, until) for p in chosen]
        async for entry in _merge(streams):
            if process is None or entry.event.process == process:
                yield entry

    async def _one(self, partition: int, after: str, until: str) -> AsyncIterator[LogEntry]:
        async for raw in self.raw_pages(partition, after, until):
            for entry_id, fields in raw:
                after = entry_id.decode()
                try:
                    event = decode(payload_of(fields))
                except MalformedEntry:
                    continue
                yield LogEntry(after, partition, event)

    async def raw_pages(
        self, partition: int, after: str = START, until: str = "+"
    ) -> AsyncIterator[list[RawEntry]]:
        """The entries of a partition as they stand in stream and archive, in pages.

        Raises:
            ArchiveError: trimmed entries cannot be read from the archive.
        """
        async for raw in (await self._entries()).pages(partition, after, until):
            yield raw

    async def follow(self, after: Mapping[int, str] | str | None = None) -> AsyncIterator[LogEntry]:
        """Events as they come, for ever.

        Args:
            after: a position for every partition, or one for all; None begins at the present end.
        """
        namespace = await self.namespace()
        if after is None:
            after = await self.last()
        positions = {
            p: after if isinstance(after, str) else after.get(p, START)
            for p in namespace.all_partitions()
        }
        entries = await self._entries()
        while True:
            found: list[LogEntry] = []
            for partition, answer in await self.wait(positions):
                raw = await entries.unbroken(partition, positions[partition], answer)
                positions[partition] = raw[-1][0].decode()
                for entry_id, fields in raw:
                    try:
                        event = decode(payload_of(fields))
                    except MalformedEntry:
                        continue
                    found.append(LogEntry(entry_id.decode(), partition, event))
            for entry in sorted(found, key=lambda e: id_key(e.id)):
                yield entry

    async def wait(
        self, positions: Mapping[int, str], *, block_ms: int = BLOCK_MS
    ) -> list[tuple[int, list[RawEntry]]]:
        """Waits for entries after `positions` (partition -> entry id); empty when none came."""
        return await (await self._entries()).wait(positions, block_ms)

    def interrupt(self) -> None:
        """Ends a `wait` that is going on, so that the next one can be for other partitions."""
        if self._raw is not None:
            self._raw.interrupt()

    async def last(self, partition: int | None = None) -> dict[int, str]:
        """The id of the last entry of each partition (or of one), `0-0` where there is none."""
        return await (await self._entries()).last(partition)

    async def end(self, partition: int) -> tuple[str, dict[str, int | None]]:
        """The last entry of a partition and, of the same instant, the last seq of each process.

        A process that was declared lost has None.
        """
        return await (await self._entries()).end(partition)

    async def last_seq(self, process: str) -> int:
        """The last sequence number of a process in the log; 0 when there is none."""
        keys = (await self.namespace()).partition_keys(process)
        value = await self._store.redis.hget(keys.seqs, process)
        return int(value) if value and value != b"lost" else 0

    async def length(self) -> int:
        """Entries in all partitions, archived ones included."""
        return await (await self._entries()).length()

    # --- quarantine -----------------------------------------------------------------------------

    async def quarantine(self, partition: int, malformed: Iterable[tuple[str, str]]) -> None:
        """Sets malformed entries aside: id and reason. The raw entries stay in the stream."""
        if reasons := dict(malformed):
            key = (await self.namespace()).keys.partition(partition).quarantine
            await self._store.redis.hset(key, mapping=reasons)

    async def quarantined(self) -> dict[str, str]:
        """All malformed entries known: entry id -> why it is not an event."""
        namespace = await self.namespace()
        pipe = self._store.redis.pipeline(transaction=False)
        for number in namespace.all_partitions():
            pipe.hgetall(namespace.keys.partition(number).quarantine)
        return {
            entry_id.decode(): reason.decode()
            for answer in await pipe.execute()
            for entry_id, reason in answer.items()
        }


async def _merge(streams: Sequence[AsyncIterator[LogEntry]]) -> AsyncIterator[LogEntry]:
    """Merges partitions into one sequence by entry id, the partition's number breaking ties."""
    heap: list[tuple[tuple[int, int], int, LogEntry]] = []
    for number, stream in enumerate(streams):
        async for entry in stream:
            heap.append((id_key(entry.id), number, entry))
            break
    heapq.heapify(heap)
    while heap:
        _, number, entry = heap[0]
        yield entry
        async for following in streams[number]:
            heapq.heapreplace(heap, (id_key(following.id), number, following))
            break
        else:
            heapq.heappop(heap)

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
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from store.connection import BLOCK_MS, Store
from store.durability import confirmed
from store.errors import MalformedEntry, NotConfirmed
from store.event import (
    NO_DIGEST,
    EventRow,
    LifecycleEvent,
    LogEntry,
    decode,
    decode_row,
    encode,
)
from store.namespace import DEFAULT_NAMESPACE, Namespace, open_namespace
from store.past import Past
from store.position import START, RawEntry, highest, id_key, key_id
from store.streams import Streams

PAGE = 1000
"""Entries read in one round trip."""


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


@dataclass(slots=True)
class Page:
    """A stretch of one partition, decoded for the hot paths.

    Attributes:
        partition: which.
        after: the position that it begins after.
        position: id of the last entry read; read on from there.
        rows: (entry id, event), in order.
        malformed: (entry id, why), of entries that are not events.
        end: there was nothing after it when it was read.
    """

    partition: int
    after: str
    position: str
    rows: list[tuple[str, EventRow]] = field(default_factory=list)
    malformed: list[tuple[str, str]] = field(default_factory=list)
    end: bool = False


def parse_page(partition: int, raw: Sequence[RawEntry], after: str) -> Page:
    """Decodes what XRANGE or XREAD answered (list of [id, [field, value, …]])."""
    page = Page(partition, after, after)
    rows = page.rows
    for entry_id, fields in raw:
        name = entry_id.decode()
        try:
            if fields is None or len(fields) != 2 or fields[0] != b"e":
                raise MalformedEntry(_NOT_ONE_FIELD)
            rows.append((name, decode_row(fields[1])))
        except MalformedEntry as error:
            page.malformed.append((name, str(error)))
    if raw:
        page.position = raw[-1][0].decode()
    return page


_NOT_ONE_FIELD = "the entry has no field e, or more than that"


def _payload(fields: Sequence[bytes] | None) -> bytes:
    if not fields or len(fields) != 2 or fields[0] != b"e":
        raise MalformedEntry(_NOT_ONE_FIELD)
    return fields[1]


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
        self._streams = Streams(store)
        self._trimmed: Past | None = None

    async def namespace(self) -> Namespace:
        """The opened namespace.

        Raises:
            NamespaceError: see `open_namespace`.
        """
        if self._opened is None:
            self._opened = await open_namespace(self._store, self._name, self._wanted)
        return self._opened

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
        keys = (await self.namespace()).keys
        asked = {p: at for p, at in positions.items() if at != START}
        answers = await self._store.batch(
            [("XRANGE", keys.partition(p).log, at, at, "COUNT", 1) for p, at in asked.items()]
        )
        return [p for p, answer in zip(asked, answers, strict=True) if answer == []]

    async def _digest_before(self, process: str, seq: int) -> str:
        """The digest of event `seq - 1` of a process, read from the log backwards."""
        if seq == 1:
            return NO_DIGEST
        partition = (await self.namespace()).partition_of(process)
        async with aclosing(self._backwards(partition)) as entries:
            async for _, raw in entries:
                try:
                    row = decode_row(_payload(raw))
                except MalformedEntry:
                    continue
                if row.process == process and row.seq == seq - 1:
                    return row.digest
                if row.process == process and row.seq < seq - 1:
                    break
        return NO_DIGEST

    async def _backwards(self, partition: int) -> AsyncGenerator[RawEntry, None]:
        end = "+"
        while raw := await self._before(partition, end, PAGE):
            for entry in raw:
                yield entry
            end = "(" + raw[-1][0].decode()

    # --- read -----------------------------------------------------------------------------------

    async def _past(self) -> Past:
        if self._trimmed is None:
            self._trimmed = Past(await self.namespace())
        return self._trimmed

    async def _after(self, partition: int, after: str, until: str, count: int) -> list[RawEntry]:
        """Entries after a position, from the archive where they are no longer in the stream.

        A trim may happen while somebody reads. The entry at the position is asked for too: where it
        still is in the stream, all that follows it is.
        """
        past = self._trimmed or await self._past()
        raw: list[RawEntry] = []
        position = id_key(after)
        if past.trimmed(partition) <= position:
            key = past.keys(partition).log
            raw = await self._store.redis.execute_command(
                "XRANGE", key, after, until, "COUNT", count + 1
            )
            if raw and raw[0][0] == after.encode():
                return raw[1:]
            trimmed = id_key((await past.look(partition)).trimmed)
            if trimmed <= position:
                return raw[:count]
        archived = await past.forward(partition, after, until, count)
        if archived or (raw and id_key(raw[0][0].decode()) > past.trimmed(partition)):
            return archived or raw[:count]
        # Nothing of the past is left to read: on with the stream, from where it begins now.
        beginning = max(position, past.trimmed(partition))
        if highest(until) <= beginning:
            return []
        return await self._after(partition, key_id(beginning), until, count)

    async def _before(self, partition: int, until: str, count: int) -> list[RawEntry]:
        """Entries up to a position, latest first; from the archive once the stream has no more."""
        past = self._trimmed or await self._past()
        key = past.keys(partition).log
        raw: list[RawEntry] = await self._store.redis.execute_command(
            "XREVRANGE", key, until, "-", "COUNT", count
        )
        if not raw and id_key((await past.look(partition)).trimmed) > (0, 0):
            return await past.backward(partition, until, count)
        return raw

    async def latest_before(self, partition: int, entry_id: str) -> str | None:
        """The id of the last entry of a partition before `entry_id`; None when there is none."""
        raw = await self._before(partition, f"({entry_id}", 1)
        return raw[-1][0].decode() if raw else None

    async def page(
        self, partition: int, after: str = START, *, until: str = "+", count: int = PAGE
    ) -> Page:
        """Up to `count` entries of a partition after the entry `after`, decoded for the hot paths.

        Malformed entries are listed in the page; see `quarantine`.

        Raises:
            ArchiveError: trimmed entries cannot be read from the archive.
        """
        raw = await self._after(partition, after, until, count)
        page = parse_page(partition, raw, after)
        in_stream = id_key(after) >= (await self._past()).trimmed(partition)
        page.end = not raw or (in_stream and len(raw) < count)
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
                await asyncio.sleep(
                    0
                )  # The request goes out, and whoever waits for the loop gets it.
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
                    event = decode(_payload(fields))
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
        while raw := await self._after(partition, after, until, PAGE):
            yield raw
            after = raw[-1][0].decode()

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
        while True:
            entries: list[LogEntry] = []
            for partition, answer in await self.wait(positions):
                raw = await self._unbroken(partition, positions[partition], answer)
                positions[partition] = raw[-1][0].decode()
                for entry_id, fields in raw:
                    try:
                        event = decode(_payload(fields))
                    except MalformedEntry:
                        continue
                    entries.append(LogEntry(entry_id.decode(), partition, event))
            for entry in sorted(entries, key=lambda e: id_key(e.id)):
                yield entry

    async def _unbroken(self, partition: int, after: str, raw: list[RawEntry]) -> list[RawEntry]:
        """What a wait gave, unless what came before it was trimmed meanwhile: then that."""
        trimmed = (await (await self._past()).look(partition)).trimmed
        if id_key(trimmed) <= id_key(after):
            return raw
        return await self._after(partition, after, "+", PAGE) or raw

    async def wait(
        self, positions: Mapping[int, str], *, block_ms: int = BLOCK_MS
    ) -> list[tuple[int, list[RawEntry]]]:
        """Waits for entries after `positions` (partition -> entry id); empty when none came."""
        keys = (await self.namespace()).keys
        by_key = {keys.partition(p).log.encode(): p for p in positions}
        answer = await self._streams.read(
            {keys.partition(p).log: at for p, at in positions.items()}, block_ms
        )
        return [(by_key[key], raw) for key, raw in answer if key in by_key]

    def interrupt(self) -> None:
        """Ends a `wait` that is going on, so that the next one can be for other partitions."""
        self._streams.interrupt()

    async def last(self, partition: int | None = None) -> dict[int, str]:
        """The id of the last entry of each partition (or of one), `0-0` where there is none."""
        namespace = await self.namespace()
        chosen = namespace.all_partitions() if partition is None else [partition]
        pipe = self._store.redis.pipeline(transaction=False)
        for number in chosen:
            pipe.xrevrange(namespace.keys.partition(number).log, count=1)
        answers = await pipe.execute()
        return {
            number: answer[0][0].decode() if answer else START
            for number, answer in zip(chosen, answers, strict=True)
        }

    async def end(self, partition: int) -> tuple[str, dict[str, int | None]]:
        """The last entry of a partition and, of the same instant, the last seq of each process.

        A process that was declared lost has None.
        """
        keys = (await self.namespace()).keys.partition(partition)
        async with self._store.redis.pipeline(transaction=True) as pipe:
            pipe.xrevrange(keys.log, count=1)
            pipe.hgetall(keys.seqs)
            last, seqs = await pipe.execute()
        numbers = {
            process.decode(): None if seq == b"lost" else int(seq) for process, seq in seqs.items()
        }
        return last[0][0].decode() if last else START, numbers

    async def last_seq(self, process: str) -> int:
        """The last sequence number of a process in the log; 0 when there is none."""
        keys = (await self.namespace()).partition_keys(process)
        value = await self._store.redis.hget(keys.seqs, process)
        return int(value) if value and value != b"lost" else 0

    async def length(self) -> int:
        """Entries in all partitions, archived ones included."""
        namespace = await self.namespace()
        pipe = self._store.redis.pipeline(transaction=False)
        for number in namespace.all_partitions():
            keys = namespace.keys.partition(number)
            pipe.xlen(keys.log)
            pipe.hget(keys.history, "trimmed_entries")
        return sum(int(count or 0) for count in await pipe.execute())

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

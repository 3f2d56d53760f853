"""The entries of the log as they stand in stream and archive: bytes, not decoded.

Reading goes by positions. What was trimmed from a stream is read from the archive, and nobody who reads
sees the difference, also when a trim happens meanwhile. `EventLog` stands on this and makes events of
the entries.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from store.namespace import Namespace
from store.past import Past
from store.position import START, RawEntry, highest, id_key, key_id
from store.streams import Streams

PAGE = 1000
"""Entries read in one round trip."""


class Entries:
    """All entries of a namespace.

    Args:
        namespace: which.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._store = namespace.store
        self._namespace = namespace
        self._past = Past(namespace)
        self._streams = Streams(namespace.store)

    # --- read -----------------------------------------------------------------------------------

    async def after(self, partition: int, after: str, until: str, count: int) -> list[RawEntry]:
        """Entries after a position, from the archive where they are no longer in the stream.

        A trim may happen while somebody reads. The entry at the position is asked for too: where it
        still is in the stream, all that follows it is.

        Raises:
            ArchiveError: trimmed entries cannot be read from the archive.
        """
        past = self._past
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
        return await self.after(partition, key_id(beginning), until, count)

    async def before(self, partition: int, until: str, count: int) -> list[RawEntry]:
        """Entries up to a position, latest first; from the archive once the stream has no more."""
        key = self._past.keys(partition).log
        raw: list[RawEntry] = await self._store.redis.execute_command(
            "XREVRANGE", key, until, "-", "COUNT", count
        )
        if not raw and id_key((await self._past.look(partition)).trimmed) > (0, 0):
            return await self._past.backward(partition, until, count)
        return raw

    async def backwards(self, partition: int) -> AsyncIterator[RawEntry]:
        """All entries of a partition, latest first."""
        end = "+"
        while raw := await self.before(partition, end, PAGE):
            for entry in raw:
                yield entry
            end = "(" + raw[-1][0].decode()

    async def pages(
        self, partition: int, after: str = START, until: str = "+"
    ) -> AsyncIterator[list[RawEntry]]:
        """The entries of a partition from a position on, in pages; see `after`."""
        while raw := await self.after(partition, after, until, PAGE):
            yield raw
            after = raw[-1][0].decode()

    def in_stream(self, partition: int, position: str) -> bool:
        """What follows the position is in the stream, as far as was seen."""
        return id_key(position) >= self._past.trimmed(partition)

    # --- wait -----------------------------------------------------------------------------------

    async def wait(
        self, positions: Mapping[int, str], block_ms: int
    ) -> list[tuple[int, list[RawEntry]]]:
        """Waits for entries after `positions` (partition -> entry id); empty when none came."""
        keys = self._namespace.keys
        by_key = {keys.partition(p).log.encode(): p for p in positions}
        answer = await self._streams.read(
            {keys.partition(p).log: at for p, at in positions.items()}, block_ms
        )
        return [(by_key[key], raw) for key, raw in answer if key in by_key]

    def interrupt(self) -> None:
        """Ends a `wait` that is going on, so that the next one can be for other partitions."""
        self._streams.interrupt()

    async def unbroken(self, partition: int, after: str, raw: list[RawEntry]) -> list[RawEntry]:
        """What a wait gave, unless what came before it was trimmed meanwhile: then that."""
        trimmed = (await self._past.look(partition)).trimmed
        if id_key(trimmed) <= id_key(after):
            return raw
        return await self.after(partition, after, "+", PAGE) or raw

    # --- where it ends --------------------------------------------------------------------------

    async def last(self, partition: int | None = None) -> dict[int, str]:
        """The id of the last entry of each partition (or of one), `0-0` where there is none."""
        chosen = self._namespace.all_partitions() if partition is None else [partition]
        pipe = self._store.redis.pipeline(transaction=False)
        for number in chosen:
            pipe.xrevrange(self._namespace.keys.partition(number).log, count=1)
        answers = await pipe.execute()
        return {
            number: answer[0][0].decode() if answer else START
            for number, answer in zip(chosen, answers, strict=True)
        }

    async def end(self, partition: int) -> tuple[str, dict[str, int | None]]:
        """See `EventLog.end`."""
        keys = self._namespace.keys.partition(partition)
        async with self._store.redis.pipeline(transaction=True) as pipe:
            pipe.xrevrange(keys.log, count=1)
            pipe.hgetall(keys.seqs)
            last, seqs = await pipe.execute()
        numbers = {
            process.decode(): None if seq == b"lost" else int(seq) for process, seq in seqs.items()
        }
        return last[0][0].decode() if last else START, numbers

    async def length(self) -> int:
        """Entries in all partitions, archived ones included."""
        pipe = self._store.redis.pipeline(transaction=False)
        for number in self._namespace.all_partitions():
            keys = self._namespace.keys.partition(number)
            pipe.xlen(keys.log)
            pipe.hget(keys.history, "trimmed_entries")
        return sum(int(count or 0) for count in await pipe.execute())

    async def forgotten(self, positions: Mapping[int, str]) -> list[int]:
        """See `EventLog.forgotten`."""
        keys = self._namespace.keys
        asked = {p: at for p, at in positions.items() if at != START}
        answers = await self._store.batch(
            [("XRANGE", keys.partition(p).log, at, at, "COUNT", 1) for p, at in asked.items()]
        )
        return [p for p, answer in zip(asked, answers, strict=True) if answer == []]

"""The past of a partition: what is no longer in its stream, read from the archive as if it were.

`EventLog` asks here for whatever lies at or before the last entry trimmed. Reading goes by entry ids
alone: the segment that holds the next id, the block within it, the entries from there on. A segment
that should be there and is not is an error that says between which entries; what was dropped because
the archive was off is simply not there.
"""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from store.archive import Archive, open_archives
from store.errors import ArchiveError
from store.keys import PartitionKeys
from store.namespace import Namespace
from store.position import Key, RawEntry, highest, id_key, key_id, lowest
from store.retention import Covered, read_covered, read_retention
from store.segment import Index


@dataclass(slots=True)
class _Shelf:
    """What is known of the archived part of one partition.

    Segments are read in threads, which a cancellation does not end: `reading` is held by the one that
    uses the index and the block at hand.
    """

    covered: Covered = field(default_factory=Covered)
    segments: list[tuple[Key, Key, Archive, str]] = field(default_factory=list)
    index: Index | None = None
    block: int = -1
    entries: list[RawEntry] = field(default_factory=list)
    reading: threading.Lock = field(default_factory=threading.Lock)


def _key(entry: RawEntry) -> Key:
    return id_key(entry[0].decode())


class Past:
    """Reads what was trimmed from the streams of a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._shelves: dict[int, _Shelf] = {}
        self._archives: list[Archive] = []

    def keys(self, partition: int) -> PartitionKeys:
        return self._namespace.keys.partition(partition)

    def trimmed(self, partition: int) -> Key:
        """The last entry that is known to be no longer in the stream."""
        shelf = self._shelves.get(partition)
        return id_key(shelf.covered.trimmed) if shelf else (0, 0)

    async def look(self, partition: int) -> Covered:
        """How far the partition has gone out of its stream, as of now."""
        covered = await read_covered(self._namespace, partition)
        self._shelves.setdefault(partition, _Shelf()).covered = covered
        return covered

    async def forward(self, partition: int, after: str, until: str, count: int) -> list[RawEntry]:
        """Up to `count` trimmed entries after `after`, up to and including `until`, oldest first.

        Raises:
            ArchiveError: they should be in the archive, and cannot be read there.
        """
        shelf = self._shelves.setdefault(partition, _Shelf())
        high = min(highest(until), id_key(shelf.covered.trimmed))
        await self._find(partition, shelf)
        return await self._in_thread(self._forward, shelf, id_key(after), high, count)

    async def backward(self, partition: int, until: str, count: int) -> list[RawEntry]:
        """Up to `count` trimmed entries up to and including `until`, latest first.

        Raises:
            ArchiveError: they should be in the archive, and cannot be read there.
        """
        shelf = self._shelves.setdefault(partition, _Shelf())
        high = min(highest(until), id_key(shelf.covered.trimmed))
        await self._find(partition, shelf)
        return await self._in_thread(self._backward, shelf, high, count)

    async def _in_thread(
        self, read: Callable[..., list[RawEntry]], shelf: _Shelf, *args: Any
    ) -> list[RawEntry]:
        def alone() -> list[RawEntry]:
            with shelf.reading:
                return read(shelf, *args)

        return await asyncio.to_thread(alone)

    async def _find(self, partition: int, shelf: _Shelf) -> None:
        """Lists the segments, unless those known go as far as was trimmed."""
        trimmed = id_key(shelf.covered.trimmed)
        if trimmed <= max((s[1] for s in shelf.segments), default=id_key(shelf.covered.dropped)):
            return
        retention = await read_retention(self._namespace)
        if [archive.url for archive in self._archives] != list(retention.archives):
            self._archives = open_archives(retention.archives, self._namespace.name)
        segments = []
        for archive in self._archives:
            for first, last in await asyncio.to_thread(archive.names, partition):
                segments.append((id_key(first), id_key(last), archive, f"{first}_{last}"))
        shelf.segments = sorted(segments, key=lambda segment: segment[:2])

    def _forward(self, shelf: _Shelf, after: Key, high: Key, count: int) -> list[RawEntry]:
        found: list[RawEntry] = []
        while len(found) < count and after < high:
            low = lowest("(" + key_id(after))
            segment = next((s for s in shelf.segments if s[1] >= low), None)
            if segment is None:
                self._check_gap(shelf, after, id_key(shelf.covered.trimmed))
                break
            index = self._open(shelf, segment)
            self._check_gap(shelf, after, id_key(index.after))
            number = next(n for n, b in enumerate(index.blocks) if id_key(b.last) >= low)
            entries = self._entries(shelf, segment, number)
            start = bisect_left(entries, low, key=_key)
            end = bisect_left(entries, lowest("(" + key_id(high)), key=_key)
            found += entries[start : min(end, start + count - len(found))]
            if end < len(entries):
                break
            after = _key(found[-1]) if found else after
        return found

    def _backward(self, shelf: _Shelf, high: Key, count: int) -> list[RawEntry]:
        found: list[RawEntry] = []
        while len(found) < count:
            segment = next((s for s in reversed(shelf.segments) if s[0] <= high), None)
            if segment is None:
                break
            index = self._open(shelf, segment)
            number = max(n for n, b in enumerate(index.blocks) if id_key(b.first) <= high)
            entries = self._entries(shelf, segment, number)
            end = bisect_left(entries, lowest("(" + key_id(high)), key=_key)
            found += reversed(entries[max(0, end - (count - len(found))) : end])
            high = highest("(" + found[-1][0].decode())
        return found

    def _check_gap(self, shelf: _Shelf, after: Key, found: Key) -> None:
        """What lies between two positions must have been dropped, or it is missing."""
        if found > max(after, id_key(shelf.covered.dropped)):
            where = ", ".join(archive.url for archive in self._archives) or "no archive is recorded"
            raise ArchiveError(
                f"entries after {key_id(after)} up to {key_id(found)} are neither in the stream nor in "
                f"the archive ({where}): bring the missing segments back; `agent-reconciler verify` "
                "says which"
            )

    def _open(self, shelf: _Shelf, segment: tuple[Key, Key, Archive, str]) -> Index:
        _, _, archive, name = segment
        if shelf.index is None or shelf.index.name != name:
            partition = next(p for p, known in self._shelves.items() if known is shelf)
            shelf.index, shelf.block = archive.index(partition, name), -1
        return shelf.index

    def _entries(
        self, shelf: _Shelf, segment: tuple[Key, Key, Archive, str], number: int
    ) -> list[RawEntry]:
        if shelf.block != number:
            assert shelf.index is not None
            shelf.entries, shelf.block = segment[2].block(shelf.index, number), number
        return shelf.entries

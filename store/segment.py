"""A segment: a stretch of one partition as compressed JSON lines, and the index of it. Pure.

One line is one entry, `{"id":"1763733780000-0","e":{…}}`, with the event byte for byte as it stood in
the stream, so that its digest still fits. What is no event is kept as it was too, its fields in
base64: `{"id":"…","raw":[["field","value"],…]}`. Lines are compressed in blocks; each block is a gzip
member of its own, so `zcat` reads the file and a reader that knows the index starts at any block.

Segments of a partition are chained: each names the position it begins after and the digest of the one
before, so that a segment that was taken away or put between is found.
"""

from __future__ import annotations

import gzip
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import blake2b

import msgspec

from store.errors import MalformedEntry
from store.event import decode_row
from store.position import RawEntry, id_key

BLOCK = 5_000
"""Entries in a block: what a reader decompresses to get at one of them."""
LONGEST = 200_000
"""Entries in a segment: what is written, read back and trimmed in one go."""
_ID = b'{"id":"'
_EVENT = b'","e":'


class Block(msgspec.Struct, frozen=True):
    """Where a block is in its segment, and what is in it: entry ids, and times in UTC."""

    offset: int
    length: int
    entries: int
    first: str
    last: str
    time: str


class Index(msgspec.Struct, frozen=True):
    """What there is to know of a segment without reading it.

    Attributes:
        namespace, partition: of the log.
        after: the position it begins after: the last entry of the segment before.
        first, last: its first and its last entry.
        first_time, last_time: their times, in UTC.
        entries: how many there are.
        length: of the file, in bytes.
        digest: BLAKE2b-256 of the file, with `previous` and `after` before it.
        previous: digest of the segment before; empty for the first.
        blocks: in their order.
    """

    namespace: str
    partition: int
    after: str
    first: str
    last: str
    first_time: str
    last_time: str
    entries: int
    length: int
    digest: str
    previous: str
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        return f"{self.first}_{self.last}"


class DamagedSegment(ValueError):
    """The bytes are not what was written."""


def time_of(entry_id: str) -> str:
    """The time of an entry, ISO 8601 in UTC, to the millisecond; of no known time, the epoch."""
    try:
        moment = datetime.fromtimestamp(id_key(entry_id)[0] / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        moment = datetime.fromtimestamp(0, UTC)
    return moment.isoformat(timespec="milliseconds")


def encode_line(entry: RawEntry) -> bytes:
    """An entry as one line."""
    entry_id, fields = entry
    if fields is not None and len(fields) == 2 and fields[0] == b"e" and b"\n" not in fields[1]:
        try:
            decode_row(fields[1])
            return b"%b%b%b%b}\n" % (_ID, entry_id, _EVENT, fields[1])
        except MalformedEntry:
            pass
    raw = [b64encode(part).decode() for part in fields or ()]
    pairs = list(zip(raw[::2], raw[1::2], strict=True))
    return msgspec.json.encode({"id": entry_id.decode(), "raw": pairs}) + b"\n"


def decode_line(line: bytes) -> RawEntry:
    """The entry of a line, as XRANGE would answer it.

    Raises:
        DamagedSegment: it is not such a line.
    """
    middle = line.find(_EVENT, len(_ID), len(_ID) + 64)
    if line.startswith(_ID) and middle > 0 and line.endswith(b"}"):
        return line[len(_ID) : middle], [b"e", line[middle + len(_EVENT) : -1]]
    try:
        found = msgspec.json.decode(line, type=_RawLine)
        fields = [b64decode(part) for pair in found.raw for part in pair]
    except (msgspec.MsgspecError, ValueError) as error:
        raise DamagedSegment(f"a line is not an entry: {error}") from None
    return found.id.encode(), fields


class _RawLine(msgspec.Struct):
    id: str
    raw: list[tuple[str, str]]


class SegmentBuilder:
    """Makes a segment of the entries it is given.

    Args:
        namespace, partition: of the log.
        after: the position it begins after.
        previous: digest of the segment before.
    """

    def __init__(self, namespace: str, partition: int, after: str, previous: str) -> None:
        self._place = (namespace, partition, after)
        self._previous = previous
        self._waiting: list[RawEntry] = []
        self._packed: list[bytes] = []
        self._blocks: list[Block] = []
        self._offset = 0
        self.entries = 0

    def add(self, entries: Sequence[RawEntry]) -> None:
        """Takes entries, in their order."""
        self.entries += len(entries)
        self._waiting.extend(entries)
        while len(self._waiting) >= BLOCK:
            self._pack(self._waiting[:BLOCK])
            del self._waiting[:BLOCK]

    def _pack(self, entries: Sequence[RawEntry]) -> None:
        packed = gzip.compress(b"".join(map(encode_line, entries)), 6, mtime=0)
        first, last = entries[0][0].decode(), entries[-1][0].decode()
        block = Block(self._offset, len(packed), len(entries), first, last, time_of(first))
        self._blocks.append(block)
        self._packed.append(packed)
        self._offset += len(packed)

    def finish(self) -> tuple[Index, bytes]:
        """The index and the file; there must be at least one entry."""
        if self._waiting:
            self._pack(self._waiting)
            self._waiting = []
        data = b"".join(self._packed)
        namespace, partition, after = self._place
        first, last = self._blocks[0].first, self._blocks[-1].last
        index = Index(
            namespace, partition, after, first, last, time_of(first), time_of(last), self.entries,
            len(data), digest_of(self._previous, after, data), self._previous, tuple(self._blocks),
        )  # fmt: skip
        return index, data


def digest_of(previous: str, after: str, data: bytes) -> str:
    """The digest of a segment; it covers the one before, so segments form a chain."""
    seal = blake2b(f"{previous} {after} ".encode(), digest_size=32)
    seal.update(data)
    return seal.hexdigest()


def read_block(packed: bytes) -> list[RawEntry]:
    """The entries of a block.

    Raises:
        DamagedSegment: it cannot be decompressed, or holds something else.
    """
    try:
        lines = gzip.decompress(packed).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedSegment(f"it cannot be decompressed: {error}") from None
    if lines.pop():
        raise DamagedSegment("its last line is cut off")
    return [decode_line(line) for line in lines]


def read_blocks(data: bytes) -> Iterator[list[RawEntry]]:
    """The entries of a whole file, block after block, without its index.

    Raises:
        DamagedSegment: when what cannot be read is reached; what came before it was given.
    """
    while data:
        member = zlib.decompressobj(wbits=31)
        try:
            lines = (member.decompress(data) + member.flush()).split(b"\n")
        except zlib.error as error:
            raise DamagedSegment(f"it cannot be decompressed: {error}") from None
        if not member.eof or lines.pop():
            raise DamagedSegment("it is cut off")
        yield [decode_line(line) for line in lines]
        data = member.unused_data

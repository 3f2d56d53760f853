"""Verify: finds events that were edited, removed, added or moved, by position, in stream and archive.

Three chains are followed. The events of a process have numbers without gaps, and each ends with a
digest of itself and of the one before (`store.event.chain`). The segments of a partition name the
digest of the one before (`store.segment`). And Redis knows the last number of each process and the
last segment, so that a missing end is found too.

The digests have no key. Whoever can write everything (stream, archive and the records in Redis) can
make a log that fits; what is found is every change short of that, and every accident.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from store.archive import Archive, open_archives, whole
from store.errors import ArchiveError, MalformedEntry
from store.event import NO_DIGEST, EventRow, chain, decode_row, split_digest
from store.log import EventLog
from store.position import START, RawEntry, id_key
from store.retention import Covered, read_covered, read_retention
from store.segment import DamagedSegment, Index, read_blocks

STREAM = "stream"
_LISTED = 1000
"""Problems listed; more are counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
        kind: `edited`, `removed`, `added`, `reordered`, or `segment` (of the archive).
        partition: of the log.
        where: `stream`, or the file of the segment.
        position: entry id at which it was noticed.
        process, seq: the event concerned; empty and 0 where that cannot be told.
        detail: in words.
    """

    kind: str
    partition: int
    where: str
    position: str
    process: str
    seq: int
    detail: str


@dataclass(slots=True)
class Verification:
    """What was found.

    Attributes:
        events, processes, segments: how many were looked at.
        problems: in the order in which they were noticed, at most `_LISTED`.
        problem_count: how many there are.
        began_late: process -> first seq seen, of those whose beginning was dropped (archive: off).
    """

    events: int = 0
    processes: int = 0
    segments: int = 0
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    began_late: dict[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return self.problem_count == 0

    def add(self, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < _LISTED:
            self.problems.append(problem)


@dataclass(slots=True)
class _Chain:
    """The events of one process, as far as they were seen."""

    seq: int
    digest: str | None
    """None where the event before is not known."""
    missing: dict[int, tuple[str, str]] = field(default_factory=dict)
    """seq -> (where, entry id) at which it was found missing."""


class ChainCheck:
    """Follows the chains of all processes of one partition. Pure: entries in, problems out."""

    def __init__(self, partition: int, found: Verification, *, dropped: bool = False) -> None:
        self._partition = partition
        self._found = found
        self._dropped = dropped
        self._chains: dict[str, _Chain] = {}
        self._ended: dict[str, int] = {}
        self._last = (0, 0)

    def feed(self, entries: Iterable[RawEntry], where: str) -> None:
        """Takes entries as they stand, in their order."""
        for entry_id, fields in entries:
            position = entry_id.decode("ascii", "replace")
            try:
                if not fields or len(fields) != 2 or fields[0] != b"e":
                    raise MalformedEntry("the entry has no field e, or more than that")
                row = decode_row(fields[1])
                body, digest = split_digest(fields[1])
            except MalformedEntry as error:
                self._say("added", where, position, "", 0, f"what stands here is no event: {error}")
                continue
            self._found.events += 1
            key = id_key(position)
            if key <= self._last:
                self._of(
                    row, "reordered", where, position, "its entry id is not after the one before"
                )
            self._last = max(key, self._last)
            self._follow(row, body, digest, where, position)

    def _follow(self, row: EventRow, body: bytes, digest: str, where: str, position: str) -> None:
        known = self._chains.get(row.process)
        if known is None:
            late = row.seq > 1 and self._dropped
            if late:
                self._found.began_late[row.process] = row.seq
            known = _Chain(row.seq - 1 if late else 0, None if late else NO_DIGEST)
            self._chains[row.process] = known
        if row.seq <= known.seq:
            self._again(known, row, where, position)
            return
        if row.seq > known.seq + 1:
            for seq in range(known.seq + 1, min(row.seq, known.seq + 1 + _LISTED)):
                known.missing[seq] = (where, position)
            known.digest = None
        if known.digest is not None and chain(known.digest, body) != digest:
            before = f", or seq {row.seq - 1} was and given a new digest" if row.seq > 1 else ""
            detail = f"its digest does not fit: it was changed{before}"
            self._of(row, "edited", where, position, detail)
        known.seq, known.digest = row.seq, digest
        if row.type == "process_lost" and row.holder and row.attrs:
            last = row.attrs.get("last_seq")
            self._ended[row.holder] = last if isinstance(last, int) else 0

    def _again(self, known: _Chain, row: EventRow, where: str, position: str) -> None:
        if known.missing.pop(row.seq, None) is not None:
            detail = f"it stands after seq {known.seq} of its process"
            self._of(row, "reordered", where, position, detail)
        else:
            self._of(row, "added", where, position, f"its process has a seq {row.seq} already")

    def finish(self, seqs: Mapping[str, int | None]) -> None:
        """Compares with what Redis knows: process -> its last seq, None when it was declared lost."""
        self._found.processes += len(self._chains)
        for process, known in self._chains.items():
            for seq, (where, position) in known.missing.items():
                detail = f"it is not there; noticed at entry {position}"
                self._say("removed", where, position, process, seq, detail)
            if process not in seqs:
                self._end(known, "added", process, known.seq, "nobody wrote events of this process")
        for process, recorded in seqs.items():
            last = self._ended.get(process, 0) if recorded is None else recorded
            chain_of = self._chains.get(process)
            seen = chain_of.seq if chain_of else 0
            if seen < last and (chain_of or not self._dropped):
                detail = f"the events of the process up to seq {last} are not there"
                self._end(chain_of, "removed", process, seen + 1, detail)
            elif recorded is not None and seen > recorded:
                detail = f"the process wrote only up to seq {recorded}"
                self._end(chain_of, "added", process, seen, detail)

    def _end(self, known: _Chain | None, kind: str, process: str, seq: int, detail: str) -> None:
        position = "-".join(map(str, self._last))
        self._say(kind, STREAM if known else "", position, process, seq, detail)

    def _of(self, row: EventRow, kind: str, where: str, position: str, detail: str) -> None:
        self._say(kind, where, position, row.process, row.seq, detail)

    def _say(
        self, kind: str, where: str, position: str, process: str, seq: int, detail: str
    ) -> None:
        problem = Problem(kind, self._partition, where, position, process, seq, detail)
        self._found.add(problem)


async def verify_log(
    event_log: EventLog, *, progress: Callable[[int], None] = lambda count: None
) -> Verification:
    """Looks at every event of a namespace, in the archive and in the streams.

    Args:
        event_log: of the namespace.
        progress: called with the number of entries read since the last call.

    Raises:
        ArchiveError: the place of the archive cannot be used at all.
    """
    namespace = await event_log.namespace()
    retention = await read_retention(namespace)
    archives = await asyncio.to_thread(open_archives, retention.archives, namespace.name)
    found = Verification()
    for partition in namespace.all_partitions():
        # The end first: what is written meanwhile is not looked at.
        end, seqs = await event_log.end(partition)
        covered = await read_covered(namespace, partition)
        check = ChainCheck(partition, found, dropped=id_key(covered.dropped) > (0, 0))
        segments = await asyncio.to_thread(_segments, archives, partition, covered, found)
        for archive, index in segments:
            found.segments += 1
            read = await asyncio.to_thread(_check_segment, archive, index, covered, check, found)
            progress(read)
        if id_key(end) > id_key(covered.trimmed):
            async for raw in event_log.raw_pages(partition, covered.trimmed, end):
                check.feed(raw, STREAM)
                progress(len(raw))
        check.finish(seqs)
    return found


def _segments(
    archives: Iterable[Archive], partition: int, covered: Covered, found: Verification
) -> list[tuple[Archive, Index]]:
    """The segments of a partition in the order of their chain; says where that is broken."""
    indexes = []
    for archive in archives:
        for first, last in archive.names(partition):
            name = f"{first}_{last}"
            try:
                indexes.append((archive, archive.index(partition, name)))
            except ArchiveError as error:
                path = archive.path(partition, name)
                found.add(Problem("segment", partition, path, first, "", 0, str(error)))
    # Of segments that overlap, those count that were recorded, or that another one follows.
    wanted = {index.previous for _, index in indexes} | {covered.segment}
    indexes.sort(key=lambda p: (id_key(p[1].after), p[1].digest not in wanted, p[1].last))
    dropped = id_key(covered.dropped)
    chosen: list[tuple[Archive, Index]] = []
    reached, digest = START, ""
    for archive, index in indexes:
        after = id_key(index.after)
        if after < id_key(reached) or id_key(index.last) > id_key(covered.archived):
            continue  # Left by a writer that was killed before it could record it.
        path = archive.path(partition, index.name)
        if after > id_key(reached) and after != dropped:
            detail = f"segments are missing before it: entries after {reached} up to {index.after}"
            found.add(Problem("removed", partition, path, index.first, "", 0, detail))
        elif after == id_key(reached) and index.previous != digest:
            detail = "it does not follow from the segment before it: one of the two was replaced"
            found.add(Problem("segment", partition, path, index.first, "", 0, detail))
        chosen.append((archive, index))
        reached, digest = index.last, index.digest
    if id_key(covered.archived) > id_key(reached):
        detail = f"segments are missing: entries after {reached} up to {covered.archived}"
        found.add(Problem("removed", partition, "archive", covered.archived, "", 0, detail))
    elif chosen and digest != covered.segment:
        path = chosen[-1][0].path(partition, chosen[-1][1].name)
        detail = "it is not the segment that was written"
        found.add(Problem("segment", partition, path, reached, "", 0, detail))
    return chosen


def _check_segment(
    archive: Archive, index: Index, covered: Covered, check: ChainCheck, found: Verification
) -> int:
    """Reads a whole segment without its index, and says what does not fit; how many entries it has."""
    path = archive.path(index.partition, index.name)
    trimmed = id_key(covered.trimmed)
    read = 0

    def damaged(reason: str) -> None:
        found.add(Problem("segment", index.partition, path, index.first, "", 0, reason))

    try:
        data = archive.data(index.partition, index.name)
        if not whole(index, data):
            damaged("its checksum does not fit: the file was changed")
        for entries in read_blocks(data):
            read += len(entries)
            # What is in the stream too is looked at there.
            check.feed([e for e in entries if id_key(e[0].decode()) <= trimmed], path)
        if read != index.entries:
            damaged(f"it holds {read} entries, its index says {index.entries}")
    except (ArchiveError, DamagedSegment, ValueError) as error:
        damaged(str(error))
    return read

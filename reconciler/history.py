"""History: where the fold of a partition begins, and how old entries leave the stream.

Snapshots first, then the archive, then the trim, each under the lease of the partition and each read
back before the next step relies on it. Every step may be the last one of a process that is killed:
what it leaves is a snapshot more, a segment more, or an entry that is in both places.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from reconciler.fold import FleetState
from reconciler.snapshot import OtherFold, decode_state, encode_state
from store.archive import Archive, open_archives
from store.errors import HistoryDropped
from store.lease import Lease
from store.log import EventLog
from store.logs import get_logger
from store.namespace import Namespace
from store.position import START, Key, id_key, key_id, ms_of
from store.retention import (
    OFF,
    Retention,
    read_covered,
    read_retention,
    record_archived,
    trim,
)
from store.segment import LONGEST, SegmentBuilder
from store.snapshots import (
    DamagedSnapshot,
    newest_first,
    read_snapshot,
    seal,
    snapshot_positions,
    unseal,
    warn_damaged,
    write_snapshot,
)

log = get_logger("reconciler.history")

Progress = Callable[[int], None]
"""Called with the number of entries done since the last call."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What one round over a partition did.

    Attributes:
        partition: which.
        archived, trimmed: how many entries were written to the archive, and left the stream.
        segments: how many segments they were written in.
        position: up to which entry the stream is trimmed now.
    """

    partition: int
    archived: int = 0
    trimmed: int = 0
    segments: int = 0
    position: str = START


# --- where a fold begins --------------------------------------------------------------------------


async def nearest_snapshot(
    namespace: Namespace, partition: int, until: Key | None = None
) -> tuple[FleetState, str]:
    """The latest snapshot at or before `until` that is whole, and its position; or an empty state.

    Raises:
        HistoryDropped: there is none at or before `until`, and the log no longer goes back so far.
    """
    covered = await read_covered(namespace, partition)
    for position in await snapshot_positions(namespace, partition):
        if until is not None and id_key(position) > until:
            continue
        data = await read_snapshot(namespace, partition, position)
        if data is not None and (state := await _decode(partition, position, data)) is not None:
            return state, position
    if id_key(covered.trimmed) > (0, 0):
        found = await _archived_snapshot(namespace, partition, until)
        if found is not None:
            return found
    if id_key(covered.dropped) > (0, 0):
        lost = (
            f"partition {partition} of namespace {namespace.name} was dropped up to {covered.dropped} "
            "(archive: off), and no snapshot that can be read is left"
        )
        if until is not None:
            raise HistoryDropped(
                f"the state at {key_id(until)} cannot be told: {lost} before it; ask for a later moment"
            )
        # Better a worker that knows only what came since than none.
        log.error("state incomplete: what was alive before is not known", reason=lost)
        return FleetState(), covered.dropped
    return FleetState(), START


@dataclass(frozen=True, slots=True)
class Missing:
    """The beginning of a log that was dropped, because the archive was off.

    Attributes:
        partitions: whose.
        until_ms: what came before this is nowhere any more.
        complete_ms: from here on a snapshot tells what was alive; None when none can be read.
    """

    partitions: tuple[int, ...]
    until_ms: int
    complete_ms: int | None


async def missing_beginning(namespace: Namespace) -> Missing | None:
    """What of the beginning of the log is gone; None when it has all of it."""
    partitions, until_ms = [], 0
    complete: list[int | None] = []
    for partition in namespace.all_partitions():
        dropped = (await read_covered(namespace, partition)).dropped
        if dropped == START:
            continue
        partitions.append(partition)
        until_ms = max(until_ms, ms_of(dropped))
        known = [
            position
            for position in await snapshot_positions(namespace, partition)
            if id_key(position) >= id_key(dropped)
            and await read_snapshot(namespace, partition, position) is not None
        ]
        complete.append(ms_of(known[-1]) + 1 if known else None)
    if not partitions:
        return None
    told = [ms for ms in complete if ms is not None]
    return Missing(tuple(partitions), until_ms, max(told) if len(told) == len(complete) else None)


async def _decode(partition: int, position: str, data: bytes) -> FleetState | None:
    try:
        return await asyncio.to_thread(decode_state, data)
    except OtherFold as error:
        warn_damaged(partition, position, str(error))
        return None


async def _archived_snapshot(
    namespace: Namespace, partition: int, until: Key | None
) -> tuple[FleetState, str] | None:
    retention = await read_retention(namespace)
    for archive in open_archives(retention.archives, namespace.name):
        for position in newest_first(await asyncio.to_thread(archive.snapshots, partition), until):
            sealed = await asyncio.to_thread(archive.snapshot, partition, position)
            try:
                data = await asyncio.to_thread(unseal, position, sealed)
            except (DamagedSnapshot, zlib.error) as error:
                warn_damaged(partition, position, str(error))
                continue
            if (state := await _decode(partition, position, data)) is not None:
                return state, position
    return None


# --- how entries leave the stream -------------------------------------------------------------------


async def save_snapshot(
    namespace: Namespace, lease: Lease, state: FleetState, position: str
) -> int:
    """Writes the state of a partition as a snapshot; its size in bytes.

    Args:
        namespace, lease: where, and as whom.
        state: of that partition alone; it is encoded before this first waits.
        position: id of the last entry folded in it.

    Raises:
        Fenced: the lease is no longer held.
    """
    return await write_snapshot(namespace, lease, position, encode_state(state))


async def keep_history(
    namespace: Namespace,
    event_log: EventLog,
    lease: Lease,
    now_ms: int,
    *,
    progress: Progress = lambda count: None,
) -> Kept:
    """Archives and trims what of a partition is older than it is kept; covered by a snapshot as it is.

    Args:
        namespace, event_log, lease: where, and as whom.
        now_ms: Redis time.
        progress: told how many entries were archived or dropped.

    Raises:
        Fenced: the lease is no longer held.
        ArchiveError: the archive cannot be written; nothing that is not in it was trimmed.
    """
    retention = await read_retention(namespace)
    covered = await read_covered(namespace, lease.partition)
    kept = Kept(lease.partition, position=covered.trimmed)
    if retention.archive is None:
        return kept
    limit = await _covered_by_snapshot(namespace, lease.partition, retention)
    limit = min(limit, (now_ms - int(retention.keep_seconds * 1000), 0))
    if retention.archive == OFF:
        return await _drop(namespace, lease, limit, kept, progress)
    archive = await asyncio.to_thread(Archive, retention.archive, namespace.name)
    return await _archive(namespace, event_log, lease, archive, limit, kept, progress)


async def _covered_by_snapshot(namespace: Namespace, partition: int, retention: Retention) -> Key:
    """Up to where a snapshot that can be read covers the partition.

    Where entries are dropped, the oldest snapshot counts: should the newest be damaged, the one before
    and the stream must still give the whole state.
    """
    whole = []
    for position in await snapshot_positions(namespace, partition):
        data = await read_snapshot(namespace, partition, position)
        if data is not None and await _decode(partition, position, data) is not None:
            whole.append(id_key(position))
            if retention.archive != OFF:
                break
    return min(whole, default=(0, 0))


async def _drop(
    namespace: Namespace, lease: Lease, limit: Key, kept: Kept, progress: Progress
) -> Kept:
    if limit <= id_key(kept.position):
        return kept
    gone, position = await trim(namespace, lease, key_id(limit), archived=False)
    progress(gone)
    return Kept(kept.partition, trimmed=gone, position=position)


async def _archive(
    namespace: Namespace,
    event_log: EventLog,
    lease: Lease,
    archive: Archive,
    limit: Key,
    kept: Kept,
    progress: Progress,
) -> Kept:
    """Segment by segment: write, read back, record, trim."""
    written, segments, trimmed, position = 0, 0, 0, kept.position
    while True:
        covered = await read_covered(namespace, lease.partition)
        after = covered.archive_from
        previous = covered.segment if covered.archived == after else ""
        builder = SegmentBuilder(namespace.name, lease.partition, after, previous)
        last = after
        async for page in event_log.raw_pages(lease.partition, after, key_id(limit)):
            await asyncio.to_thread(builder.add, page)
            last = page[-1][0].decode()
            if builder.entries >= LONGEST:
                break
        if builder.entries:
            index, data = await asyncio.to_thread(builder.finish)
            await asyncio.to_thread(archive.write, index, data, lease.epoch)
            await record_archived(namespace, lease, after, last, index.digest)
            written, segments = written + builder.entries, segments + 1
        elif segments:
            await _copy_snapshot(namespace, lease, archive)
        # What was archived already, but not trimmed because somebody was killed, goes now.
        reach = min(limit, id_key(last))
        if reach > id_key(position):
            gone, position = await trim(namespace, lease, key_id(reach), archived=True)
            trimmed += gone
        progress(builder.entries)
        if not builder.entries:
            return Kept(kept.partition, written, trimmed, segments, position)


async def _copy_snapshot(namespace: Namespace, lease: Lease, archive: Archive) -> None:
    """Puts the newest snapshot beside the segments: moments after it are then near to one."""
    for position in await snapshot_positions(namespace, lease.partition):
        data = await read_snapshot(namespace, lease.partition, position)
        if data is not None:
            sealed = await asyncio.to_thread(seal, position, data)
            await asyncio.to_thread(
                archive.write_snapshot, lease.partition, position, sealed, lease.epoch
            )
            return

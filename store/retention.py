"""Retention: what a namespace keeps where, how far each partition is archived and trimmed, and the trim.

Entries leave the stream only when three things are so: they are older than the time they are kept, a
snapshot covers them, and the archive holds them, written and read back. The script that trims checks
the last two by itself, under the epoch of the lease. Only where the operator wrote `archive: off` may
entries go without being archived; how far that went is recorded as `dropped`.

A namespace in which nobody has set an archive, or `off`, keeps everything in Redis.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from redis.exceptions import ResponseError

from store.errors import ArchiveError
from store.lease import Lease
from store.namespace import Namespace
from store.position import START, id_key

OFF = "off"
KEEP_SECONDS = 7 * 86400.0
"""How long entries stay in the stream, unless the namespace says otherwise."""


class Retention(msgspec.Struct, frozen=True):
    """What a namespace keeps where.

    Attributes:
        archive: URL or folder that entries are archived to; `off` drops them; None keeps all in Redis.
        keep_seconds: how long an entry stays in the stream at least.
        before: archives of earlier times, which are still read.
    """

    archive: str | None = None
    keep_seconds: float = KEEP_SECONDS
    before: tuple[str, ...] = ()

    @property
    def archives(self) -> tuple[str, ...]:
        """All places in which archived entries may be."""
        now = () if self.archive in (None, OFF) else (self.archive,)
        return (*now, *(url for url in self.before if url not in now))

    def changed(self, archive: str | None = None, keep_seconds: float | None = None) -> Retention:
        """With another archive, or another time to keep; None leaves it. Earlier archives stay known."""
        return Retention(
            self.archive if archive is None else archive,
            self.keep_seconds if keep_seconds is None else keep_seconds,
            self.archives if archive not in (None, self.archive) else self.before,
        )


@dataclass(frozen=True, slots=True)
class Covered:
    """How far the history of one partition has gone out of its stream; entry ids, `0-0` is nowhere.

    Attributes:
        archived: the last entry in the archive.
        trimmed: the last entry that is no longer in the stream.
        dropped: the last entry that is nowhere any more, because the archive was off.
        trimmed_entries: how many entries are in the archive only.
        segment: digest of the last segment written.
    """

    archived: str = START
    trimmed: str = START
    dropped: str = START
    trimmed_entries: int = 0
    segment: str = ""

    @property
    def archive_from(self) -> str:
        """The position from which the next segment goes on."""
        return max(self.archived, self.dropped, key=id_key)


async def read_retention(namespace: Namespace) -> Retention:
    """What the namespace keeps where.

    Raises:
        ArchiveError: the record cannot be read.
    """
    text = await namespace.store.redis.hget(namespace.keys.meta, "retention")
    if text is None:
        return Retention()
    try:
        return msgspec.json.decode(text, type=Retention)
    except msgspec.MsgspecError as error:
        raise ArchiveError(
            f"the retention recorded in namespace {namespace.name} cannot be read ({error}): "
            "set it again with `agent-reconciler archive --to URL --keep SECONDS`"
        ) from None


async def write_retention(namespace: Namespace, retention: Retention) -> None:
    """Records what the namespace keeps where; its workers follow from their next round on."""
    text = msgspec.json.encode(retention)
    await namespace.store.redis.hset(namespace.keys.meta, "retention", text)


async def read_covered(namespace: Namespace, partition: int) -> Covered:
    """How far a partition has gone out of its stream."""
    fields = ("archived", "trimmed", "dropped", "trimmed_entries", "segment")
    key = namespace.keys.partition(partition).history
    found = [
        value.decode() if value else "" for value in await namespace.store.redis.hmget(key, fields)
    ]
    archived, trimmed, dropped, count, segment = found
    return Covered(archived or START, trimmed or START, dropped or START, int(count or 0), segment)


async def record_archived(
    namespace: Namespace, lease: Lease, after: str, last: str, digest: str
) -> None:
    """Records a segment that was written and read back.

    Raises:
        Fenced: the lease is no longer held, or the segment does not follow the last one.
    """
    keys = namespace.keys.partition(lease.partition)
    await namespace.store.script(
        "archive_record", [keys.lease, keys.history], [lease.token, after, last, digest]
    )


async def trim(
    namespace: Namespace, lease: Lease, position: str, *, archived: bool
) -> tuple[int, str]:
    """Takes the entries up to `position` out of the stream; how many, and the id of the last of them.

    Args:
        namespace, lease: where, and as whom.
        position: this entry and all before it may go; the last entry of the stream stays.
        archived: they are in the archive; False drops them.

    Raises:
        Fenced: the lease is no longer held; nothing was trimmed.
        ArchiveError: no snapshot, or no archive, covers them; nothing was trimmed.
    """
    keys = namespace.keys.partition(lease.partition)
    try:
        gone, last = await namespace.store.script(
            "history_trim",
            [keys.lease, keys.log, keys.history, keys.snapshots],
            [lease.token, position, "archived" if archived else "dropped"],
        )
    except ResponseError as error:
        if not str(error).startswith("UNCOVERED"):
            raise
        raise ArchiveError(
            f"nothing was trimmed: not everything up to {position} in partition {lease.partition} "
            "is covered by a snapshot and the archive"
        ) from None
    return int(gone), last.decode()

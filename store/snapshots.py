"""Snapshots of a partition: written under the epoch of its lease, checked when they are read.

What is in a snapshot is for the reconciler to know; here it is bytes. On the way they are compressed
and sealed: `magic, BLAKE2b-256 of the rest, id of the last entry folded, zlib`. A snapshot whose seal
is broken is as good as none: the one before it is used, with a warning, and more of the log is folded.
The last few are kept in Redis; the archive keeps more (see `store.archive`).
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable
from hashlib import blake2b

from store.lease import Lease
from store.logs import get_logger
from store.namespace import Namespace
from store.position import id_key

log = get_logger("store.snapshots")

KEPT = 3
"""How many snapshots of a partition stay in Redis."""
_MAGIC = b"ARS1"
_DIGEST = 32
_LEVEL = 1  # A snapshot is written often and read seldom; level 6 is a third smaller and takes 5 x.


class DamagedSnapshot(ValueError):
    """The bytes are not what was written."""


def seal(position: str, data: bytes) -> bytes:
    """Compresses a snapshot and puts its digest before it."""
    rest = position.encode() + b"\0" + zlib.compress(data, _LEVEL)
    return _MAGIC + blake2b(rest, digest_size=_DIGEST).digest() + rest


def unseal(position: str, sealed: bytes) -> bytes:
    """What `seal` was given.

    Raises:
        DamagedSnapshot: it is not what was written, or not of that entry.
    """
    start = len(_MAGIC) + _DIGEST
    rest = sealed[start:]
    if not sealed.startswith(_MAGIC):
        raise DamagedSnapshot("it does not begin like a snapshot")
    if blake2b(rest, digest_size=_DIGEST).digest() != sealed[len(_MAGIC) : start]:
        raise DamagedSnapshot("its checksum does not fit")
    written, _, packed = rest.partition(b"\0")
    if written != position.encode():
        raise DamagedSnapshot(f"it belongs to entry {written.decode('ascii', 'replace')[:40]}")
    return zlib.decompress(packed)


def newest_first(positions: Iterable[str], until: tuple[int, int] | None = None) -> list[str]:
    """Entry ids at or before `until` (ms, n), the latest first; what is no entry id is left out."""
    found = []
    for position in positions:
        try:
            key = id_key(position)
        except ValueError:
            continue
        if until is None or key <= until:
            found.append((key, position))
    return [position for _, position in sorted(found, reverse=True)]


async def write_snapshot(namespace: Namespace, lease: Lease, position: str, data: bytes) -> int:
    """Keeps a snapshot, and lets the oldest go.

    Args:
        namespace, lease: where, and as whom.
        position: id of the last entry that is folded in it.
        data: the snapshot.

    Returns:
        Its size as it is kept, in bytes.

    Raises:
        Fenced: the lease is no longer held; nothing was written.
    """
    keys = namespace.keys.partition(lease.partition)
    sealed = await asyncio.to_thread(seal, position, data)
    await namespace.store.script(
        "snapshot_write", [keys.lease, keys.snapshots], [lease.token, position, sealed, KEPT]
    )
    return len(sealed)


async def snapshot_positions(namespace: Namespace, partition: int) -> list[str]:
    """Of which entries there are snapshots in Redis, the latest first."""
    keys = namespace.keys.partition(partition)
    return newest_first(
        name.decode("ascii", "replace")
        for name in await namespace.store.redis.hkeys(keys.snapshots)
    )


async def read_snapshot(namespace: Namespace, partition: int, position: str) -> bytes | None:
    """One snapshot; None when it is not there, or damaged, which is said in the log."""
    keys = namespace.keys.partition(partition)
    sealed = await namespace.store.redis.hget(keys.snapshots, position)
    if sealed is None:
        return None
    try:
        return await asyncio.to_thread(unseal, position, sealed)
    except (DamagedSnapshot, zlib.error) as error:
        warn_damaged(partition, position, str(error))
        return None


def warn_damaged(partition: int, position: str, reason: str) -> None:
    """The one line about a snapshot that cannot be used."""
    log.warning(
        "snapshot skipped: the one before it is used, nothing is lost",
        partition=partition, position=position, reason=reason,
    )  # fmt: skip

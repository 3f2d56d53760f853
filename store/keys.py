"""Every Redis key of the project is made here, and nowhere else.

All keys of one partition carry the same hash tag, `{namespace/partition}`, so that whatever one
script touches is in one slot and Redis Cluster needs no special care. Keys that belong to the
namespace as a whole carry the tag `{namespace}`.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from store.errors import NamespaceError

PREFIX = "ar"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def partition_of(process: str, partitions: int) -> int:
    """The partition that holds all events of `process`: a stable hash, the same in every language.

    CRC-32 (IEEE 802.3) of the UTF-8 bytes, modulo the number of partitions.
    """
    return zlib.crc32(process.encode()) % partitions


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """The keys of one partition; they all live in one slot."""

    namespace: str
    partition: int

    def _key(self, name: str) -> str:
        return f"{PREFIX}:{{{self.namespace}/{self.partition}}}:{name}"

    @property
    def log(self) -> str:
        """Stream: the events."""
        return self._key("log")

    @property
    def seqs(self) -> str:
        """Hash: process -> the last sequence number in the log, or `lost` once it is fenced."""
        return self._key("seqs")

    @property
    def hosts(self) -> str:
        """Sorted set: host process -> when its lease lapses, in ms of Redis time."""
        return self._key("hosts")

    @property
    def lease(self) -> str:
        """String with a time to live: `holder epoch` of the worker that acts for the partition."""
        return self._key("lease")

    @property
    def epoch(self) -> str:
        """Counter: grows with each lease taken."""
        return self._key("epoch")

    @property
    def inbox(self) -> str:
        """Stream: notes from hosts to the worker (an inventory changed) and requests to it."""
        return self._key("inbox")

    @property
    def quarantine(self) -> str:
        """Hash: id of a malformed log entry -> why it is not an event."""
        return self._key("quarantine")

    def inventory(self, process: str) -> str:
        """Hash: `summary` and one field per bucket of what a process holds."""
        return self._key(f"inventory:{process}")

    def orders(self, process: str) -> str:
        """Stream: orders for a process."""
        return self._key(f"orders:{process}")

    def reply(self, request: str) -> str:
        """List: the answer to a request made through the inbox."""
        return self._key(f"reply:{request}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a namespace.

    Raises:
        NamespaceError: the name has characters that a key or a hash tag cannot hold.
    """

    namespace: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.namespace):
            raise NamespaceError(
                f"namespace {self.namespace!r} cannot be used: give 1 to 64 of A-Z a-z 0-9 _ . -"
            )

    def _key(self, name: str) -> str:
        return f"{PREFIX}:{{{self.namespace}}}:{name}"

    @property
    def meta(self) -> str:
        """Hash: `schema`, `partitions`, `created_at`."""
        return self._key("meta")

    @property
    def policy(self) -> str:
        """String: the policy that the workers of this namespace run with, as JSON."""
        return self._key("policy")

    @property
    def workers(self) -> str:
        """Hash: worker id -> its heartbeat, as JSON."""
        return self._key("workers")

    def partition(self, number: int) -> PartitionKeys:
        return PartitionKeys(self.namespace, number)

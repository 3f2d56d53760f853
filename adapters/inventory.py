"""The inventory of a process, kept in buckets so that what has not changed is not sent.

Every line (a resource held, an index entry) falls into one of `BUCKETS` by its hash. A bucket's
digest is the XOR of the hashes of its lines, so that adding or removing a line costs the same however
much is held.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

from store.messages import BUCKETS, Bucket, IndexEntry, encode_message, hash_of

T = TypeVar("T", bound=Hashable)


class InventoryBook:
    """What a process holds, and which buckets changed since they were last taken."""

    def __init__(self) -> None:
        self._held: dict[int, set[str]] = {}
        self._entries: dict[int, set[IndexEntry]] = {}
        self._digests: dict[int, int] = {}
        self._dirty: set[int] = set()
        self._root = 0

    @property
    def dirty(self) -> bool:
        """Something changed since the last `take`."""
        return bool(self._dirty)

    def __len__(self) -> int:
        """Lines held."""
        return sum(map(len, self._held.values())) + sum(map(len, self._entries.values()))

    def hold(self, ref: str) -> None:
        """A resource is held now."""
        self._toggle(self._held, ref, ref, present=True)

    def let_go(self, ref: str) -> None:
        """A resource is held no longer."""
        self._toggle(self._held, ref, ref, present=False)

    def enter(self, entries: Iterable[IndexEntry]) -> None:
        """Index entries are there now."""
        for entry in entries:
            self._toggle(self._entries, entry, _line(entry), present=True)

    def strike(self, entries: Iterable[IndexEntry]) -> None:
        """Index entries are there no longer."""
        for entry in entries:
            self._toggle(self._entries, entry, _line(entry), present=False)

    def _toggle(self, lines: dict[int, set[T]], item: T, line: str, *, present: bool) -> None:
        number = hash_of(line)
        bucket = number % BUCKETS
        content = lines.get(bucket, set())
        if (item in content) == present:
            return
        if present:
            lines.setdefault(bucket, content).add(item)
        else:
            content.remove(item)
            if not content:
                del lines[bucket]
        self._root ^= number
        digest = self._digests.get(bucket, 0) ^ number
        if bucket in self._held or bucket in self._entries:
            self._digests[bucket] = digest
        else:
            self._digests.pop(bucket, None)
        self._dirty.add(bucket)

    def take(self) -> dict[str, tuple[str, bytes]]:
        """The buckets that changed: number -> (digest, content), without content where it is empty.

        They count as sent.
        """
        changed = {}
        for bucket in self._dirty:
            held = self._held.get(bucket, set())
            entries = self._entries.get(bucket, set())
            content = encode_message(Bucket(list(held), list(entries))) if held or entries else b""
            changed[str(bucket)] = (f"{self._digests.get(bucket, 0):016x}", content)
        self._dirty = set()
        return changed

    def root(self) -> str:
        """The digest over all buckets: equal content, equal root."""
        return f"{self._root:016x}"

    def put_back(self, buckets: Iterable[str]) -> None:
        """Buckets that were taken did not arrive: they are changed again."""
        self._dirty.update(int(bucket) for bucket in buckets)

    def put_back_all(self) -> None:
        """Everything is to be sent again, as by a new process."""
        self._dirty.update(self._digests)


def _line(entry: IndexEntry) -> str:
    return f"{entry.registry}\0{entry.key}\0{entry.target}\0{entry.whole}"

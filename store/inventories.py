"""Reads what hosts publish of what they hold: digests first, and only the buckets that differ.

What was read is kept, so that a fleet in sync moves a root digest per process and nothing else.
"""

from __future__ import annotations

from store.errors import MalformedEntry
from store.messages import (
    BUCKETS,
    Inventory,
    InventoryChange,
    InventoryMirror,
    Summary,
    decode_summary,
)
from store.namespace import Namespace


class InventoryReader:
    """The reading end of inventories: one mirror per process, of which only changes are moved.

    Attributes:
        bytes_moved: content received so far, in bytes.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._mirrors: dict[str, InventoryMirror] = {}
        self.bytes_moved = 0

    async def update(self, process: str) -> InventoryChange | None:
        """Brings the mirror of a process up to date; the answer is what changed.

        None when it has published nothing (any more).
        """
        key = self._namespace.partition_keys(process).inventory(process)
        mirror = self._mirrors.get(process) or InventoryMirror(process)
        script, store = "inventory_read", self._namespace.store
        answer = await store.script(script, [key], [BUCKETS, mirror.root])
        if len(answer) == 2:
            known = [part for item in mirror.digests.items() for part in item]
            answer = await store.script(script, [key], [BUCKETS, "", *known])
        if not answer:
            self.forget(process)
            return None
        self.bytes_moved += sum(len(part) for part in answer)
        try:
            change = mirror.update(
                decode_summary(answer[0]),
                answer[1].decode() if len(answer) > 1 else mirror.root,
                {
                    answer[i].decode(): (answer[i + 1].decode(), answer[i + 2])
                    for i in range(2, len(answer), 3)
                },
            )
        except MalformedEntry:
            # Written by something else: as good as not there, and it must not stop the others.
            self.forget(process)
            return None
        self._mirrors[process] = mirror
        return change

    async def read(self, process: str) -> Inventory | None:
        """What `process` holds, as last published; None when it has published nothing."""
        return None if await self.update(process) is None else self.inventory(process)

    def inventory(self, process: str) -> Inventory | None:
        """What `process` held when it was last read; None when that was never."""
        mirror = self._mirrors.get(process)
        return mirror.inventory() if mirror else None

    def everything(self, process: str) -> InventoryChange | None:
        """The same, as a change from nothing."""
        mirror = self._mirrors.get(process)
        return mirror.everything() if mirror else None

    def summary(self, process: str) -> Summary | None:
        """The summary last read."""
        mirror = self._mirrors.get(process)
        return mirror.summary if mirror else None

    def forget(self, process: str) -> None:
        self._mirrors.pop(process, None)

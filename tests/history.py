"""A log with a history: events of several processes, and the archive that they go to."""

from __future__ import annotations

import random
from pathlib import Path

from reconciler.fleet import fold_partition
from reconciler.history import Kept, keep_history, save_snapshot
from store import EventLog, LifecycleEvent, Store
from store.lease import Lease, take_lease
from store.namespace import Namespace, open_namespace
from store.retention import Retention, write_retention
from tests.support import event

PROCESSES = ("a@h:1:1", "b@h:2:2", "c@h:3:3")


class Story:
    """Writes events in one partition, and archives them.

    Args:
        log: with one partition.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.store = namespace.store
        self.log = EventLog(namespace.store, namespace)
        self.seqs = dict.fromkeys(PROCESSES, 0)
        self.dice = random.Random(7)
        self.lease: Lease | None = None

    async def write(self, count: int, process: str | None = None) -> None:
        """Appends `count` events, a few at a time, of all processes or of one."""
        while count > 0:
            writer = process or self.dice.choice(PROCESSES)
            size = min(count, self.dice.randint(1, 20))
            await self.log.append([self._event(writer) for _ in range(size)])
            count -= size

    def _event(self, process: str) -> LifecycleEvent:
        self.seqs[process] += 1
        type = self.dice.choice(["created", "created", "reused", "cleaned_up"])
        ref = f"session/{self.dice.randint(1, 200)}"
        return event(self.seqs[process], type, ref, process=process, uses=("runner/r",))

    async def held(self) -> Lease:
        """The lease of the partition."""
        if self.lease is None:
            lease = await take_lease(self.namespace, 0, "tester@h:9:9", 600_000)
            assert isinstance(lease, Lease)
            self.lease = lease
        return self.lease

    async def snapshot(self) -> str:
        """Takes a snapshot at the present end; its position."""
        position = (await self.log.last())[0]
        await save_snapshot(
            self.namespace, await self.held(), await fold_partition(self.log, 0), position
        )
        return position

    async def archive(self, to: Path | str, keep: float = 0) -> Kept:
        """Snapshot, archive and trim all but the last entry."""
        await write_retention(self.namespace, Retention(str(to), keep))
        await self.snapshot()
        now = (
            await self.store.now_ms() + 1000
        )  # What was written in this millisecond is old enough.
        return await keep_history(self.namespace, self.log, await self.held(), now)

    async def raw(self) -> list[tuple[bytes, list[bytes]]]:
        """What is in the stream."""
        found: list[tuple[bytes, list[bytes]]] = await self.store.redis.xrange(self.key)
        return found

    @property
    def key(self) -> str:
        return self.namespace.keys.partition(0).log

    async def replace(self, entries: list[tuple[bytes, list[bytes]]]) -> None:
        """Puts these entries into the stream instead of what is there: somebody tampers."""
        await self.store.redis.delete(self.key)
        for entry_id, fields in entries:
            await self.store.redis.execute_command("XADD", self.key, entry_id, *fields)


async def begin(store: Store, name: str) -> Story:
    """A story in a namespace of one partition."""
    return Story(await open_namespace(store, name, 1))

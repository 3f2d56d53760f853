"""What a worker has to keep `session_retention` with, and what it leaves behind, for tests.

Time passes by setting the last use of a conversation back; everything else is as in production.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reconciler import Policy
from reconciler.session_retention import SessionRetention
from store import EventLog, LifecycleEvent
from store.channel import WorkerChannel
from store.event import process_id
from store.keys import Keys
from store.lease import Lease, release_lease, take_lease
from store.namespace import Namespace
from tests.adapters.adk.sessions import NAME
from tests.support import entries_of

DAY_MS = 86400_000


class Keeper:
    """What a worker has to end conversations with, under a lease of its own."""

    def __init__(self, namespace: Namespace, lease: Lease, policy: Policy) -> None:
        self.channel = WorkerChannel(namespace, lease, process_id(f"worker-p0-e{lease.epoch}"))
        self.retention = SessionRetention(namespace, lambda: {0: self.channel}, policy)

    async def look(self) -> None:
        """What the worker does every few seconds; errors are not swallowed here."""
        await self.retention.keep("app", self.channel)


class Place:
    """A namespace of one partition, its archive, and ways to look at it."""

    def __init__(self, space: Namespace, archive: Path) -> None:
        self.space = space
        self.store = space.store
        self.archive = archive
        self.log = EventLog(space.store, space)

    async def keeper(self, **policy: Any) -> Keeper:
        """A worker takes the partition over from whoever has it."""
        held = await self.store.redis.get(self.space.keys.partition(0).lease)
        if held is not None:
            holder, epoch = held.decode().rsplit(" ", 1)
            await release_lease(self.space, Lease(0, holder, int(epoch)))
        lease = await take_lease(self.space, 0, process_id("worker"), 600_000)
        assert isinstance(lease, Lease)
        return Keeper(self.space, lease, Policy(**policy))

    async def age(self, days: float = 31, **name: str) -> None:
        """As if the conversation had not been used for so long."""
        names = NAME | name
        keys = Keys(self.space.name).app_sessions(names["app_name"])
        member = keys.session(names["user_id"], names["session_id"]).member
        at = await self.store.now_ms() - round(days * DAY_MS)
        await self.store.redis.zadd(keys.used, {member: at}, xx=True)
        # It may be noted as used again at once, where it is in use.
        assert await self.store.redis.zscore(keys.used, member) is not None

    async def told(self) -> list[LifecycleEvent]:
        """The events about conversations."""
        found = [entry.event for entry in await entries_of(self.log)]
        return [event for event in found if event.ref.startswith("conversation/")]

    def files(self) -> list[Path]:
        return sorted(self.archive.glob("**/conversations/**/*.jsonl.gz"))

    async def keys(self) -> set[str]:
        found = [key async for key in self.store.redis.scan_iter(f"ar:{{{self.space.name}/adk/*")]
        return {key.decode().partition("}:")[2] for key in found}

"""Notes, in Redis, which sessions of a process are in use, so that no retention ends them meanwhile.

A use of a conversation is noted when it is created, opened or appended to. A run that does neither for
longer than `session_retention`, because a tool or a person takes its time, is a use as well: the host
knows it, and says so every third of the shortest retention there can be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from adapters.adk.live_sessions import Identity
from adapters.adk.loop_stores import LoopStores
from adapters.host import Host
from store.errors import ReconcilerError
from store.logs import get_logger
from store.messages import SHORTEST_RETENTION
from store.refusals import Unavailable
from store.tasks import end_tasks

log = get_logger("adapters.adk.sessions")

StillUsed = Callable[[list[Identity]], Awaitable[None]]
"""Told which sessions are in use."""

EVERY_SECONDS = SHORTEST_RETENTION / 3


class SessionsInUse:
    """Looks at hosts from time to time, while they have sessions.

    Args:
        stores: the connections of the session service; looking ends with them.
        still_used: told what is in use.
        every: seconds between looks.
    """

    def __init__(
        self, stores: LoopStores, still_used: StillUsed, every: float = EVERY_SECONDS
    ) -> None:
        self._stores = stores
        self._still_used = still_used
        self._every = every
        self._tasks: dict[Host, asyncio.Task[None]] = {}

    def watch(self, host: Host) -> None:
        """Looks at this host, in its loop, until it has no sessions any more."""
        before = self._tasks.get(host)
        if before is not None and not before.done():
            return
        task = asyncio.get_running_loop().create_task(self._look(host), name="sessions in use")
        self._tasks[host] = task
        task.add_done_callback(lambda done: self._forget(host, done))
        endings = self._stores.of_this_loop().endings
        if self.stop not in endings:
            endings.append(self.stop)

    def _forget(self, host: Host, done: asyncio.Task[None]) -> None:
        if self._tasks.get(host) is done:
            del self._tasks[host]

    async def _look(self, host: Host) -> None:
        while True:
            await asyncio.sleep(self._every)
            alive = [e for e in host.entries.values() if e.ref.startswith("session/")]
            if not alive:
                return
            # Chats of the runtime and sessions of the service both know who they are.
            found = [getattr(entry.obj, "identity", None) for entry in alive if entry.holders]
            identities = [identity for identity in found if identity is not None]
            if identities:
                try:
                    await self._still_used(identities)
                except (ReconcilerError, RedisError, *Unavailable) as error:
                    # The next look may find Redis again, and must come before the retention ends.
                    log.warning("sessions in use are not noted", reason=str(error))

    async def stop(self) -> None:
        """Looks no more."""
        for task in list(self._tasks.values()):
            loop = task.get_loop()
            if loop is asyncio.get_running_loop():
                await end_tasks([task])
            elif loop.is_running():
                loop.call_soon_threadsafe(task.cancel)
        self._tasks.clear()

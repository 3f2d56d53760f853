"""A connection to Redis for each event loop that a service is used from.

ADK uses one service from several loops: its synchronous `Runner.run` starts a thread with a loop of
its own for every call. A connection belongs to the loop that made it, so each loop gets one on first
use, and it ends with the loop: an asynchronous generator that waits in the loop is closed by
`loop.shutdown_asyncgens`, which `asyncio.run` calls before it closes the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from weakref import WeakValueDictionary

from store.connection import Store, connect
from store.embedded import EmbeddedServer

EMBEDDED = "embedded://"


class LoopStore:
    """What one loop has.

    Attributes:
        store: its connection.
        locks: by name; they vanish when nobody holds them.
        endings: what has to end before the connection does.
    """

    def __init__(self) -> None:
        self.store: Store | None = None
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.opening = asyncio.Lock()
        self.lifetime: AsyncGenerator[None, None] | None = None
        self.endings: list[Callable[[], Awaitable[None]]] = []

    def lock(self, name: str) -> asyncio.Lock:
        lock = self.locks.get(name)
        if lock is None:
            lock = self.locks[name] = asyncio.Lock()
        return lock


class LoopStores:
    """The connections of one service, made when they are first needed.

    Args:
        url: what `store.connect` takes.

    Raises:
        BadAddress: the address cannot be used.
    """

    def __init__(self, url: str) -> None:
        connect(url).check()
        self.url = url
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopStore] = {}
        self._server: EmbeddedServer | None = None
        if url.startswith(EMBEDDED):
            # The server must outlive the loop that happened to be the first.
            self._server = EmbeddedServer(Path(url.removeprefix(EMBEDDED)))

    def of_this_loop(self) -> LoopStore:
        loop = asyncio.get_running_loop()
        held = self._by_loop.get(loop)
        if held is None:
            self._forget_closed_loops()
            held = self._by_loop[loop] = LoopStore()
        return held

    async def open(self) -> Store:
        """The connection of the running loop.

        Raises:
            BadAddress, RedisUnavailable: see `store.connect`.
        """
        held = self.of_this_loop()
        if held.store is not None:
            return held.store
        async with held.opening:
            if held.store is None:
                address = self.url
                if self._server is not None:
                    await self._server.start()
                    address = f"unix://{self._server.socket}"
                store = await connect(address)
                held.lifetime = self._lifetime(store)
                await anext(held.lifetime)
                held.store = store
        return held.store

    async def _lifetime(self, store: Store) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            held = self._by_loop.pop(asyncio.get_running_loop(), None)
            for ending in held.endings if held else ():
                await ending()
            await store.close()

    def _forget_closed_loops(self) -> None:
        # A loop closed without shutdown_asyncgens leaves its sockets to the garbage collector, which
        # can only have them once nothing here points to the loop.
        for loop in list(self._by_loop):
            if loop.is_closed():
                self._by_loop.pop(loop, None)

    async def close(self) -> None:
        """Closes the connections of every loop, and stops an embedded server this object started."""
        here = asyncio.get_running_loop()
        for loop, held in list(self._by_loop.items()):
            lifetime, held.lifetime, held.store = held.lifetime, None, None
            if lifetime is None or loop.is_closed():
                self._by_loop.pop(loop, None)
            elif loop is here:
                await lifetime.aclose()
            elif loop.is_running():
                ending = asyncio.run_coroutine_threadsafe(_end(lifetime), loop)
                await asyncio.wrap_future(ending)
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)


async def _end(lifetime: AsyncGenerator[None, None]) -> None:
    await lifetime.aclose()

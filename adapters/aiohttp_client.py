"""aiohttp client sessions, one per owner and configuration, closed with their owner.

A session is made when it is first asked for, and once: making it awaits nothing. Limits and time
limits stand in one `HttpConfig`. A session belongs to the event loop that it was made on; asked on
another loop there is another session, and what a closed loop left behind is severed at its sockets,
because nothing can run on that loop any more.

The one thing to know: sessions that a service makes itself are watched too (`watch=True`). These have
lost their owner when nothing but this refers to them any more: whoever still could use one keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

from adapters.creation import Creation, creations
from adapters.host import Host
from adapters.owned import CLOSE_SECONDS, Owned

SWEEP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """How a session behaves. Two that are equal mean one session.

    Attributes:
        total: seconds that one call may take in all; None is no limit.
        connect: seconds until there is a connection, waiting for a free one included.
        limit: connections of one session.
        limit_per_host: of those, to one host; 0 is no limit of its own.
        keepalive: seconds that an idle connection is kept.
        base_url: that relative URLs hang on.
        headers: sent with each request, (name, value).
    """

    total: float | None = 60.0
    connect: float | None = 10.0
    limit: int = 100
    limit_per_host: int = 20
    keepalive: float = 15.0
    base_url: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Traffic:
    """What went over the sessions of one `HttpClients`.

    Attributes:
        sessions: made.
        requests: begun.
        connections: opened.
        reused: requests that found a connection open.
    """

    sessions: int = 0
    requests: int = 0
    connections: int = 0
    reused: int = 0


@dataclass(slots=True)
class _Open:
    id: str
    session: aiohttp.ClientSession
    loop: asyncio.AbstractEventLoop = field(repr=False)


class HttpClients(Owned[aiohttp.ClientSession]):
    """The HTTP clients of a service: `async with HttpClients(host) as clients:`.

    Args:
        host: that shows them to the reconciler, kind `http_client`; None does without one.
        config: of sessions for which none is given.
        watch: also look after sessions that the service makes itself.
        close_timeout: seconds that closing one may take.

    Attributes:
        traffic: counts, to see that connections are reused.
    """

    def __init__(
        self,
        host: Host | None = None,
        *,
        config: HttpConfig | None = None,
        watch: bool = False,
        close_timeout: float = CLOSE_SECONDS,
    ) -> None:
        super().__init__(
            "http_client",
            host=host,
            teardown=close_session,
            busy=_busy,
            close_timeout=close_timeout,
        )
        self.config = config or HttpConfig()
        self.traffic = Traffic()
        self._open: dict[tuple[str | None, HttpConfig, int], _Open] = {}
        self._foreign: dict[str, Creation] = {}
        self._unwatch: Callable[[], None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._making = False
        # Held by the registry, a variable, the argument of getrefcount, and the entry of a host.
        self._nobody_else = 3 if host is None else 4
        if watch:
            creations.start()
            creations.find_older()
            self._unwatch = creations.listen(self._made_elsewhere)
            for note, session in creations.live("http_session"):
                self._take_in(note, session)

    # --- sessions of ours -----------------------------------------------------------------------

    def session(
        self, owner: object = None, config: HttpConfig | None = None
    ) -> aiohttp.ClientSession:
        """The session of an owner for a configuration, made when there is none yet.

        Call it for each use instead of keeping the session: it costs a microsecond, and what it
        returns is always open.

        Args:
            owner: a reference, or an object; None is shared by all who name no owner.
            config: another than that of these clients.

        Raises:
            NotAlive: these clients were closed, or the host knows no such owner.
            RuntimeError: no event loop runs here.
        """
        self.check_open()
        loop = asyncio.get_running_loop()
        config = config or self.config
        key = (self.owner_ref(owner), config, id(loop))
        found = self._open.get(key)
        if found is not None and found.loop is loop and not found.session.closed:
            return found.session
        if found is not None and found.session.closed:  # By the service.
            self.drop(found.id)
        self._let_go_of_closed_loops()
        self._making = True
        try:
            session = self._make(config)
        finally:
            self._making = False
        self._open[key] = _Open(self.add(session, owner), session, loop)
        return session

    def _make(self, config: HttpConfig) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=config.limit,
            limit_per_host=config.limit_per_host,
            keepalive_timeout=config.keepalive,
        )
        self.traffic.sessions += 1
        return aiohttp.ClientSession(
            base_url=config.base_url,
            connector=connector,
            headers=dict(config.headers),
            timeout=aiohttp.ClientTimeout(total=config.total, connect=config.connect),
            trace_configs=[self._counting()],
        )

    def _counting(self) -> aiohttp.TraceConfig:
        traffic = self.traffic  # Not self: a session must not keep its clients alive.
        trace = aiohttp.TraceConfig()

        async def began(session: Any, context: SimpleNamespace, params: Any) -> None:
            traffic.requests += 1

        async def opened(session: Any, context: SimpleNamespace, params: Any) -> None:
            traffic.connections += 1

        async def reused(session: Any, context: SimpleNamespace, params: Any) -> None:
            traffic.reused += 1

        trace.on_request_start.append(began)
        trace.on_connection_create_end.append(opened)
        trace.on_connection_reuseconn.append(reused)
        return trace

    def drop(self, id: str) -> None:
        super().drop(id)
        self._foreign.pop(id, None)
        for key, one in list(self._open.items()):
            if one.id == id:
                del self._open[key]

    def _let_go_of_closed_loops(self) -> None:
        for one in list(self._open.values()):
            if one.loop.is_closed():
                sever(one.session)
                self.drop(one.id)

    # --- sessions that the service makes itself ---------------------------------------------------

    def _made_elsewhere(self, note: Creation) -> None:
        if note.sort != "http_session" or self._making or self.closed:
            return
        session = note.object
        if self._host is None:
            self._take_in(note, session)
        else:  # It may be another thread than the host's.
            self._host.call(self._take_in, note, session)

    def _take_in(self, note: Creation, session: aiohttp.ClientSession) -> None:
        if session.closed or any(session is held for held in self._registry.values()):
            return
        id = self.add(session, label=note.site or "made by the service")
        self._foreign[id] = note

    def sweep(self) -> list[str]:
        """Looks for sessions that the service made and nobody has any more.

        With a host these become orphans, which the reconciler ends; without one they are closed in
        the background. `async with` has it done each second.

        Returns:
            References of what was found.
        """
        self.settle()
        found = []
        for id in list(self._foreign):
            session = self._registry.get(id)
            if session is None or session.closed:
                self.drop(id)
            elif session._loop.is_closed():
                sever(session)
                self.drop(id)
                found.append(f"{self.kind}/{id}")
            elif id not in self._owner_of and sys.getrefcount(session) <= self._nobody_else:
                found.append(f"{self.kind}/{id}")
                if self._host is not None:
                    self.abandon(id, "refers-to-it")
                else:
                    self._in_background(id, session)
        return found

    def _in_background(self, id: str, session: aiohttp.ClientSession) -> None:
        task = asyncio.get_running_loop().create_task(self._end(id, session))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep()

    # --- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> HttpClients:
        await super().__aenter__()
        if self._unwatch is not None:
            self._sweeping = asyncio.create_task(self._sweep_on(), name="agent-reconciler http")
        return self

    async def aclose(self) -> None:
        if self.closed:
            return
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        if self._unwatch is not None:
            self._unwatch()
            creations.stop()
            self._leave_to_service()
        self._let_go_of_closed_loops()
        await super().aclose()

    def _leave_to_service(self) -> None:
        # What the service made and still has is its own to close.
        for id in list(self._foreign):
            session = self._registry.get(id)
            if session is None or sys.getrefcount(session) > self._nobody_else:
                self.drop(id)


async def close_session(id: str, session: aiohttp.ClientSession) -> None:
    """Closes a session, whichever loop it belongs to."""
    if session._loop.is_closed():
        sever(session)
    elif session._loop is asyncio.get_running_loop():
        await session.close()
    else:
        # It lives on the loop of another thread, where alone it can be closed.
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(session.close(), session._loop))


def _busy(session: aiohttp.ClientSession) -> str | None:
    calls = len(getattr(session.connector, "_acquired", ()))
    return f"{calls} calls are under way" if calls else None


def sever(session: aiohttp.ClientSession) -> None:
    """Closes a session whose event loop is closed: its sockets, since nothing runs there any more."""
    connector = session.connector
    if connector is None:
        return
    idle = [protocol for group in connector._conns.values() for protocol, _ in group]
    transports = [p.transport for p in (*idle, *connector._acquired) if p.transport is not None]
    connector._close()
    connector._conns.clear()
    connector._acquired.clear()
    session.detach()
    for transport in transports:
        _sever(transport)


def _sever(transport: Any) -> None:
    # A transport closes by calling back through its loop. That loop is closed, so the socket goes
    # by hand, and the transport is told, for it warns of what it still believes open.
    inner = transport
    protocol = getattr(transport, "_ssl_protocol", None)
    if protocol is not None:
        transport._closed = True
        inner = getattr(protocol, "_transport", None)
    socket = getattr(inner, "_sock", None)
    if socket is not None:
        inner._sock = None
        with contextlib.suppress(OSError):
            socket.close()

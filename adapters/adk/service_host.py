"""How the sessions of a session service come to a host: one that is given, or one of its own.

A service that ADK makes from an address (`?name=chat-api`) has nobody who could give it a host. It
starts one in the first event loop that uses it, on that loop's connection, and the host ends with the
loop. When it cannot be started the conversation goes on without, and it is tried again later.

A loop ends in good order on Ctrl-C, but not on SIGTERM, by which Python ends at once: uvicorn, which ADK
runs, raises it again once it has shut down. Where nobody has said what SIGTERM does, it ends the program
as `sys.exit` does.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable

from adapters.adk.live_sessions import (
    Ending,
    Identity,
    LiveSession,
    LiveSessions,
    session_ref,
    until_ended,
)
from adapters.adk.loop_stores import LoopStores
from adapters.adk.sessions_in_use import SessionsInUse, StillUsed
from adapters.entry import current_order
from adapters.host import Host
from store.errors import ReconcilerError
from store.logs import get_logger
from store.refusals import Unavailable

log = get_logger("adapters.adk.sessions")

LifecycleCallback = Callable[[str, str, dict[str, str]], None]
"""Called with type (`created`, `reused`, `cleaned_up`), ref (`session/<id>`) and `{"app", "user"}`."""

_RETRY_SECONDS = 5.0
APPEND_SPACING = 1.0
"""Seconds between the recorded uses of a session that is only appended to."""


class ServiceHost:
    """The host of one session service, and what it is told.

    Args:
        host: that looks after the sessions; None to start one.
        name: of the service, for a host of its own.
        namespace: of its log.
        stores: the connections of the service.
        ending: what the teardown of a session has to do.
        still_used: told, from time to time, which sessions are in use.
    """

    def __init__(
        self,
        host: Host | None,
        name: str | None,
        namespace: str,
        stores: LoopStores,
        ending: Ending,
        still_used: StillUsed,
    ) -> None:
        self.host = host
        self.on_lifecycle: LifecycleCallback | None = None
        self._name = name
        self._namespace = namespace
        self._stores = stores
        self._ending = ending
        self._in_use = SessionsInUse(stores, still_used)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._not_before = 0.0
        if name is not None:
            _exit_on_sigterm()

    async def ready(self, identity: Identity | None = None) -> None:
        """Starts a host of its own where none runs, and waits for a teardown of the session."""
        if self._name is not None and (self._loop is None or self._loop.is_closed()):
            await self._start_once(self._name)
        host = self.host
        # An order, or what the runtime does to end a chat, may read the session that it ends.
        if host is None or identity is None or current_order.get() is not None:
            return
        entry = host.entries.get(session_ref(host, identity))
        if entry is not None and entry.terminating and isinstance(entry.obj, LiveSession):
            await until_ended(host, entry)

    async def _start_once(self, name: str) -> None:
        """Starts one host for all who come at once; one of them giving up does not stop it."""
        loop = asyncio.get_running_loop()
        if self._starting is None or self._starting.get_loop().is_closed():
            if time.monotonic() < self._not_before:
                return
            self._starting = loop.create_task(self._start(name))
        if self._starting.get_loop() is loop:
            await asyncio.shield(self._starting)

    async def _start(self, name: str) -> None:
        self._not_before = time.monotonic() + _RETRY_SECONDS
        loop = asyncio.get_running_loop()
        try:
            store = await self._stores.open()
            host = await Host.connect(store, name=name, namespace=self._namespace)
        except (ReconcilerError, *Unavailable) as error:
            log.warning("sessions are not looked after", service=name, reason=str(error))
            return
        finally:
            self._starting = None
        self.host, self._loop = host, loop
        self._stores.of_this_loop().endings.append(self.stop)

    async def stop(self) -> None:
        """Ends a host of its own."""
        await self._in_use.stop()
        if self._name is None or self.host is None:
            return
        host, self.host, self._loop = self.host, None, None
        self._not_before = 0.0
        await host.close()

    def tell(self, kind: str, identity: Identity, reason: str = "") -> None:
        """A session was created, opened (`reused`), or is gone (`cleaned_up`)."""
        if kind == "cleaned_up":
            self.gone(identity, reason)
        else:
            self.note_use(identity)
        if self.on_lifecycle is None:
            return
        app, user, session = identity
        try:
            self.on_lifecycle(kind, f"session/{session}", {"app": app, "user": user})
        except Exception:
            # The conversation must not suffer from whoever keeps the books.
            log.exception(f"on_lifecycle failed for {kind} of session/{session}")

    def note_use(self, identity: Identity, *, spacing: float = 0.0) -> None:
        """A session was created, opened or appended to."""
        if self.host is not None:
            self.host.call(self._used, self.host, identity, spacing)

    def _used(self, host: Host, identity: Identity, spacing: float) -> None:
        LiveSessions.of(host).note_use(identity, self._ending, spacing=spacing)
        self._in_use.watch(host)

    def watch(self, host: Host) -> None:
        """Sessions that this host has in use are noted as used; to be called in its loop."""
        self._in_use.watch(host)

    def knows(self, identity: Identity) -> bool:
        """The host has this session as a resource, and has it from here."""
        if self.host is None:
            return False
        entry = self.host.entries.get(session_ref(self.host, identity))
        return entry is not None and isinstance(entry.obj, LiveSession)

    def gone(self, identity: Identity, reason: str = "") -> None:
        """A session was deleted, or is found to be."""
        if self.host is not None:
            self.host.call(self._gone, self.host, identity, reason)

    def _gone(self, host: Host, identity: Identity, reason: str) -> None:
        LiveSessions.of(host).gone(identity, reason)


def _exit_on_sigterm() -> None:
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # A second one ends it at once.
    raise SystemExit(128 + number)

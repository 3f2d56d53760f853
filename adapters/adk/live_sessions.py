"""The ADK sessions that a process has in use, as one registry of its host.

The session service, the plugin and the runtime may all speak of the same session; here it gets one
name, `session/<id>`, whoever speaks first. ADK's session ids are unique per app and user only, so the
second of two that share an id in one process is named `session/<id>@<user>@<app>`.

What stands here is the session as a resource. Its teardown ends what this process keeps for it; the
conversation is another matter, see docs/session-service.md.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from adapters.executor import Entry
from adapters.host import Host

Identity = tuple[str, str, str]
"""App, user, session id: what ADK knows a session by."""

Ending = Callable[[Identity], Awaitable[None] | None]
"""Lets go of what is kept for a session in this process."""

_NAME_LIMIT = 150
_NOTE_SPACING = 1.0
_of_host: WeakKeyDictionary[Host, LiveSessions] = WeakKeyDictionary()


def short(text: str) -> str:
    """A text as a part of a reference: long ones become `#` and their SHA-256."""
    if len(text) <= _NAME_LIMIT:
        return text
    return "#" + sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def session_ref(host: Host, identity: Identity) -> str:
    """The reference of a session on this host, whether it is alive or would be new."""
    app, user, id = identity
    plain = f"session/{short(id)}"
    full = f"{plain}@{short(user)}@{short(app)}"
    if full in host.entries:
        return full
    entry = host.entries.get(plain)
    # What a service observes itself under this id has no identity of ours; it is taken for the same.
    taken = entry is not None and getattr(entry.obj, "identity", identity) != identity
    return full if taken else plain


class LiveSession:
    """One session that this process has in use.

    Attributes:
        identity: app, user, id.
        endings: what is to be done when it is torn down, each once.
        noted: when its use was last recorded, by the monotonic clock.
    """

    __slots__ = ("endings", "identity", "noted")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.endings: list[Ending] = []
        self.noted = 0.0


class LiveSessions:
    """The registry of one host; `LiveSessions.of(host)` gives it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.registry = host.registry(
            "session",
            name="adk_sessions",
            user=lambda _, live: live.identity[1],
            teardown=_end,
        )

    @classmethod
    def of(cls, host: Host) -> LiveSessions:
        """The one of this host, made when it is first asked for."""
        held = _of_host.get(host)
        if held is None:
            held = _of_host[host] = cls(host)
        return held

    def used(self, identity: Identity, ending: Ending | None = None) -> Entry | None:
        """A session is used: it comes alive, or its use is recorded (once a second is enough).

        Args:
            identity: of the session.
            ending: what its teardown has to do, too; the same one counts once.

        Returns:
            What the host knows of it; None when it is just being torn down.
        """
        ref = session_ref(self._host, identity)
        entry = self._host.entries.get(ref)
        now = time.monotonic()
        if entry is None:
            live = LiveSession(identity)
            live.noted = now
            self.registry[ref.partition("/")[2]] = live
            entry = self._host.entries[ref]
        elif isinstance(entry.obj, LiveSession):
            live = entry.obj
            if now - live.noted >= _NOTE_SPACING and not entry.terminating:
                live.noted = now
                self._host.entry_used(ref)
        else:
            # Another registry holds it, and its teardown is that one's business.
            if entry.terminating:
                return None
            self._host.entry_used(ref)
            return entry
        if ending is not None and ending not in live.endings:
            live.endings.append(ending)
        return None if entry.terminating else entry

    def gone(self, identity: Identity) -> None:
        """A session is no more: it was deleted, or somebody else looks after it now."""
        ref = session_ref(self._host, identity)
        entry = self._host.entries.get(ref)
        if entry is not None and isinstance(entry.obj, LiveSession):
            self.registry.pop(entry.key, None)


async def _end(_: str, live: Any) -> None:
    for ending in list(live.endings):
        result = ending(live.identity)
        if inspect.isawaitable(result):
            await result

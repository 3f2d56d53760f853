"""The ADK sessions that a process has in use, as one registry of its host.

The session service, the plugin and the runtime may all speak of the same session; here it gets one
name, `session/<id>`, whoever speaks first. ADK's session ids are unique per app and user only, so the
second of two that share an id in one process is named `session/<id>@<user>@<app>`, percent-encoded where
one of them has an `@`; so is one whose id looks like such a name.

What stands here is the session as a resource. Its teardown ends what this process keeps for it; the
conversation is another matter, see docs/session-service.md.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any

from adapters.entry import Entry
from adapters.holdings import Holdings
from adapters.host import Host
from adapters.registry import Registry

Identity = tuple[str, str, str]
"""App, user, session id: what ADK knows a session by."""

Ending = Callable[[Identity], Awaitable[None] | None]
"""Lets go of what is kept for a session in this process."""

_NAME_LIMIT = 150
_LOOK_AGAIN = 0.01


def short(text: str) -> str:
    """A text as a part of a reference: long ones become `#` and their SHA-256."""
    if len(text) <= _NAME_LIMIT:
        return text
    return "#" + sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def session_ref(host: Holdings, identity: Identity) -> str:
    """The reference of a session on this host, whether it is alive or would be new.

    It is never that of another session, however its id is spelt.
    """
    name = short(identity[2])
    plain = f"session/{name}"
    there = host.entries.get(plain)
    if there is not None and _identity_of(there) == identity:
        return plain
    full = "session/" + "@".join(map(_part, reversed(identity)))
    own = host.entries.get(full)
    if own is not None and _identity_of(own) == identity:
        return full
    if there is None:
        # An id that could be the full name of another session has no short one.
        return full if name.count("@") == 2 else plain
    # What a service observes itself under this id has no identity of ours; it is taken for the same.
    return plain if _identity_of(there) is None else full


def _identity_of(entry: Entry) -> Identity | None:
    identity: Identity | None = getattr(entry.obj, "identity", None)
    return identity


def _part(text: str) -> str:
    """A text as a part of a full name: no other text gives the same, and there is no `@` in it."""
    return short(text.replace("%", "%25").replace("@", "%40").replace("#", "%23"))


async def until_ended(host: Host, entry: Entry) -> None:
    """Waits until a teardown that is under way has succeeded, or was given up."""
    # An order comes from the executor, which gives nothing to wait for.
    while entry.terminating and host.entries.get(entry.ref) is entry:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_AGAIN)


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


class LiveSessions(Registry):
    """The registry of one host; `LiveSessions.of(host)` gives it."""

    def __init__(self) -> None:
        super().__init__(
            "session",
            name="adk_sessions",
            user=lambda _, live: str(live.identity[1]),
            teardown=_end,
        )

    @classmethod
    def of(cls, host: Host) -> LiveSessions:
        """The one of this host, made when it is first asked for."""
        for registry in host.registries:
            if isinstance(registry, cls):
                return registry
        made = cls()
        host.add(made)
        return made

    @property
    def _on(self) -> Holdings:
        assert self.host is not None
        return self.host

    def note_use(
        self, identity: Identity, ending: Ending | None = None, *, spacing: float = 0.0
    ) -> Entry | None:
        """A session is used: it comes alive, or its use is recorded.

        Args:
            identity: of the session.
            ending: what its teardown has to do, too; the same one counts once.
            spacing: not recorded if it was in the last so many seconds.

        Returns:
            What the host knows of it; None when it is just being torn down.
        """
        ref = session_ref(self._on, identity)
        entry = self._on.entries.get(ref)
        now = time.monotonic()
        if entry is None:
            live = LiveSession(identity)
            live.noted = now
            self[ref.partition("/")[2]] = live
            entry = self._on.entries[ref]
        elif isinstance(entry.obj, LiveSession):
            live = entry.obj
            if now - live.noted >= spacing and not entry.terminating:
                live.noted = now
                self._on.entry_used(ref)
        else:
            # Another registry holds it, and its teardown is that one's business.
            if entry.terminating:
                return None
            self._on.entry_used(ref)
            return entry
        if ending is not None and ending not in live.endings:
            live.endings.append(ending)
        return None if entry.terminating else entry

    def gone(self, identity: Identity, reason: str = "") -> None:
        """A session is no more: it was deleted, or somebody else looks after it now."""
        ref = session_ref(self._on, identity)
        entry = self._on.entries.get(ref)
        if entry is not None and isinstance(entry.obj, LiveSession):
            if reason and not entry.terminating:
                self._on.forget(entry, reason=reason)
            self.pop(entry.key, None)


async def _end(_: str, live: Any) -> None:
    for ending in list(live.endings):
        result = ending(live.identity)
        if inspect.isawaitable(result):
            await result

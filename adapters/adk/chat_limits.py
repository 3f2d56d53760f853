"""The limits of `AdkRuntime`: which chat makes room for a new one, and how it does.

Choosing and marking happen in the tick in which the new chat comes, so that of many that come at once
each has a place of its own or is refused. Least recently used first; who is in use, or has asked for a
stay, is passed over. A chat that cannot be saved stays, and the next one has to go.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from adapters.adk.chat import LiveChat
from adapters.adk.live_chats import LiveChats
from adapters.entry import Entry
from adapters.host import Host
from store.errors import LimitReached, PolicyError

TO_MAKE_ROOM = "to make room"


class Victim(NamedTuple):
    """A chat that has to go, and the user whose limit asks for it; None is the limit of all."""

    entry: Entry
    user: str | None


class Room:
    """Keeps the chats of a runtime within their limits.

    Args:
        host: of the registries.
        live: the chats.
        per_user, total: the limits; None is none.
        end: ends a chat that is marked, or raises and leaves it.
        report: says that a chat could not be ended.

    Raises:
        PolicyError: a limit below 1.
    """

    def __init__(
        self,
        host: Host,
        live: LiveChats,
        per_user: int | None,
        total: int | None,
        end: Callable[[LiveChat, Entry, str], Awaitable[None]],
        report: Callable[[Entry, Exception], None],
    ) -> None:
        for limit in (per_user, total):
            if limit is not None and limit < 1:
                raise PolicyError(f"a limit of {limit} chats cannot be: give at least 1, or None")
        self._host = host
        self._live = live
        self._chats = live.chats
        self._user_chats = live.user_chats
        self._per_user = per_user
        self._total = total
        self._end = end
        self._report = report
        self._going = 0

    def choose(self, user: str) -> list[Victim]:
        """The chats that have to go before one more of this user may come; they are marked.

        Raises:
            LimitReached: nobody can make room.
        """
        victims: list[Victim] = []
        try:
            names = self._user_chats.get(user, ())
            if self._per_user is not None and self._staying(names) >= self._per_user:
                victims.append(self._mark(user, f"user {user} has {self._per_user} chats"))
            if self._total is not None and len(self._chats) - self._going >= self._total:
                victims.append(self._mark(None, f"the process has {self._total} chats"))
        except LimitReached:
            self._unmark(victims)
            raise
        return victims

    def leaving(self, user: str) -> Entry | None:
        """A chat that is being ended anyway, by an order or by its user: its place can be waited for.

        Where a user is at their limit it must be one of theirs.
        """
        mine = self._user_chats.get(user, ())
        full = self._per_user is not None and self._staying(mine) >= self._per_user
        return self._live.leaving(mine if full else list(self._chats), but=TO_MAKE_ROOM)

    def _staying(self, names: Iterable[str]) -> int:
        entries = (self._host.entries[f"session/{name}"] for name in names)
        return sum(entry.terminating != TO_MAKE_ROOM for entry in entries)

    def _mark(self, user: str | None, limit: str, tried: frozenset[str] = frozenset()) -> Victim:
        names: Iterable[str] = self._chats
        if user is not None:
            mine = self._user_chats.get(user, ())
            names = sorted(mine, key=lambda name: float(self._chats[name].last_used))
        now = time.monotonic()
        for name in names:
            entry = self._host.entries.get(f"session/{name}")
            if entry is None or entry.in_use or entry.terminating or name in tried:
                continue
            if entry.obj.kept_until <= now:
                entry.terminating = TO_MAKE_ROOM
                self._going += 1
                return Victim(entry, user)
        raise LimitReached(
            f"{limit}, which is the limit, and none can make room: all are in use, kept alive, or "
            "cannot be saved"
        )

    def _unmark(self, victims: Iterable[Victim]) -> None:
        for entry, _ in victims:
            self._going -= 1
            if entry.terminating == TO_MAKE_ROOM:
                entry.terminating = ""

    async def make(self, victims: list[Victim]) -> None:
        """Ends the chosen chats, or others in their place.

        Raises:
            LimitReached: what cannot be saved stays, and nobody else can make room.
        """
        left = list(victims)
        tried: frozenset[str] = frozenset()
        try:
            while left:
                entry, user = left[-1]
                try:
                    await self._end(entry.obj, entry, TO_MAKE_ROOM)
                except Exception as error:
                    self._unmark([left.pop()])
                    self._report(entry, error)
                    tried |= {str(entry.key)}
                    of = "the process" if user is None else f"user {user}"
                    left.append(self._mark(user, f"{of} has as many chats as may be", tried))
                else:
                    left.pop()
                    self._going -= 1
        finally:
            self._unmark(left)

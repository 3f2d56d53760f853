"""What a process remembers of the sessions it has seen: their events, decoded, up to a bound.

Events never change and are numbered without gaps, so what was read once stays true and a session
that was seen is brought up to date by reading what comes after. The bound is in bytes, least
recently used first. Whoever gets events from here gets private copies, made when one is looked at.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex, overload

from google.adk.events.event import Event

from adapters.adk.session_codec import decode_event

START = b"0-0"
Entry = tuple[bytes, bytes]
"""Id and JSON of an event."""

# Measured: a decoded event takes about 4 kB and three times its JSON, mostly dicts of its models.
_EVENT_BYTES = 4000
_EVENT_FACTOR = 3
_SESSION_BYTES = 1000


def number_of(entry_id: bytes) -> int:
    """The number of an event in its session, 1, 2, 3 …: the second half of its entry id."""
    return int(entry_id.partition(b"-")[2])


@dataclass(frozen=True, slots=True)
class Position:
    """How much of a session is known: events `first` to the one with the entry id `last`."""

    incarnation: bytes = b""
    last: bytes = START
    first: int = 1


class CachedSession:
    """Consecutive events of one session.

    Attributes:
        incarnation: tells a session from a later one of the same name.
        first: the number of the first event here.
        last: the entry id of the last event here, or of the one before `first` when there is none.
        originals: ids (`id()`) of the decoded events here.
        size: what it takes in memory, about, in bytes.
    """

    __slots__ = ("_events", "_undecoded", "first", "incarnation", "last", "originals", "size")

    def __init__(self, incarnation: bytes, first: int = 1, last: bytes = START) -> None:
        self.incarnation = incarnation
        self.first = first
        self.last = last
        self.size = _SESSION_BYTES
        self._events: list[Event | Entry] = []
        self._undecoded = 0
        self.originals: set[int] = set()

    @classmethod
    def of(cls, incarnation: bytes, last: bytes, entries: Sequence[Entry]) -> Self:
        """What is known after the events up to `last` were read, or the last of them."""
        known = cls(incarnation, number_of(last) - len(entries) + 1, START if entries else last)
        known.extend(entries)
        return known

    @property
    def position(self) -> Position:
        return Position(self.incarnation, self.last, self.first)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Takes in entries that follow; those it has already are passed over."""
        last = self.first + len(self._events) - 1
        for entry in entries:
            if number_of(entry[0]) > last:
                self._events.append(entry)
                self._undecoded += 1
                self.last = entry[0]
                self.size += _EVENT_BYTES + _EVENT_FACTOR * len(entry[1])

    def events(
        self, last: int, wanted: int | None, after: float | None, *, where: str, share: bool
    ) -> list[Event]:
        """The events up to number `last`, as `GetSessionConfig` limits them.

        Args:
            last: the number of the last event.
            wanted: at most so many of the most recent; None is all.
            after: none that comes before the last event with an earlier timestamp than this.
            where: for messages.
            share: give out the cached events themselves.

        Raises:
            MalformedEntry: an event cannot be decoded.
        """
        stop = last - self.first + 1
        start = 0 if wanted is None else max(0, stop - wanted)
        if after is not None:
            for index in range(stop - 1, start - 1, -1):
                if self._decoded(index, where).timestamp < after:
                    start = index + 1
                    break
        if self._undecoded:
            for index in range(start, stop):
                self._decoded(index, where)
        chosen: list[Any] = self._events[start:stop]
        return chosen if share else PrivateEvents(chosen, self)

    def _decoded(self, index: int, where: str) -> Event:
        event = self._events[index]
        if isinstance(event, tuple):
            entry_id, text = event
            event = decode_event(text, where=f"{where}, entry {entry_id.decode()}")
            self._events[index] = event
            self._undecoded -= 1
            self.originals.add(id(event))
        return event


class PrivateEvents(list[Event]):
    """A list of events that are copied when they are looked at, and not before.

    It is made of cached events; the first look at one puts a private copy in its place. To look is to
    index, slice, iterate, pop or copy. What reads a list from C without asking it (pydantic's
    serializer, `==`) sees the cached event, which is equal, and does not change it. A session of 1,000
    events so costs 5 us to hand out; who goes through all of them pays for the copies (13 us each) then.
    """

    __slots__ = ("_source",)

    def __init__(self, events: list[Event], source: CachedSession) -> None:
        super().__init__(events)
        # Holding the source keeps every original alive, so that no other event can get its id.
        self._source = source

    def _own(self, index: int) -> Event:
        event = super().__getitem__(index)
        if id(event) in self._source.originals:
            event = copy.deepcopy(event)
            super().__setitem__(index, event)
        return event

    @overload
    def __getitem__(self, index: SupportsIndex) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Event | list[Event]:
        if isinstance(index, slice):
            return [self._own(i) for i in range(*index.indices(len(self)))]
        return self._own(index.__index__())

    def __iter__(self) -> Iterator[Event]:
        index = 0
        while index < len(self):
            yield self._own(index)
            index += 1

    def __reversed__(self) -> Iterator[Event]:
        for index in range(len(self) - 1, -1, -1):
            yield self._own(index)

    def pop(self, index: SupportsIndex = -1) -> Event:
        if len(self):
            self._own(index.__index__())
        return super().pop(index)

    def copy(self) -> list[Event]:
        return list(self)

    def __add__(self, other: list[Any]) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self]

    def __mul__(self, times: SupportsIndex) -> list[Event]:
        return list(self) * times

    __rmul__ = __mul__

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # copy.copy, copy.deepcopy and pickle make a plain list of it.
        return list, (list(self),)


class SessionCache:
    """The sessions a process has seen, by their key in Redis.

    Several event loops may use it, each in a thread of its own; hold `lock` around every use of it and
    of what it holds.

    Args:
        limit: bytes, about; 0 remembers nothing.
    """

    def __init__(self, limit: int) -> None:
        self.lock = threading.Lock()
        self._limit = limit
        self._sessions: OrderedDict[str, tuple[CachedSession, int]] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> CachedSession | None:
        """What is known of a session; it counts as used."""
        held = self._sessions.get(key)
        if held is None:
            return None
        self._sessions.move_to_end(key)
        return held[0]

    def put(self, key: str, session: CachedSession) -> None:
        """Remembers a session, or that it has grown, and forgets others to make room."""
        self.drop(key)
        if session.size > self._limit:
            return
        self._sessions[key] = session, session.size
        self.size += session.size
        while self.size > self._limit:
            self.drop(next(iter(self._sessions)))

    def remember(self, key: str, session: CachedSession) -> None:
        """The same, unless what is there knows more of its beginning."""
        held = self.get(key)
        if (
            held is None
            or held is session
            or held.incarnation != session.incarnation
            or held.first >= session.first
        ):
            self.put(key, session)

    def drop(self, key: str) -> None:
        """Forgets a session."""
        held = self._sessions.pop(key, None)
        if held is not None:
            self.size -= held[1]

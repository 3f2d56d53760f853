"""The sessions as Redis holds them: one method for each thing that can be asked of it.

No ADK object comes in here, only keys, bytes and numbers. Each change is one script. A read that is
too long for one answer goes on page by page, because Redis serves nobody else while it answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from adapters.adk.loop_stores import LoopStores
from adapters.adk.session_cache import START, Entry, Position, number_of
from adapters.adk.session_codec import StateDelta
from store.connection import Store
from store.conversations import note_app
from store.errors import RedisUnavailable
from store.keys import AppSessionKeys, Keys, SessionKeys
from store.refusals import Unavailable

PAGE = 1000
PAGE_BYTES = 4 * 2**20
_NOTE_APP_SECONDS = 3600.0

Fields = dict[bytes, bytes]


class Shared(NamedTuple):
    """The state that a session shares with others, as fields and JSON."""

    app: Fields
    user: Fields


@dataclass(frozen=True, slots=True)
class Opened:
    """A session as it was read.

    Attributes:
        own: the fields of its hash.
        shared: app and user state of the same instant.
        entries: the events that were asked for, oldest first.
        follows: they come after the position that was given; else they end with the last event.
    """

    own: Fields
    shared: Shared
    entries: list[Entry]
    follows: bool

    @property
    def incarnation(self) -> bytes:
        return self.own[b"incarnation"]

    @property
    def last(self) -> bytes:
        return self.own[b"last"]


@dataclass(frozen=True, slots=True)
class Append:
    """One event on its way.

    Attributes:
        freshness: how the writer shows that its copy is not stale; see session_append.lua.
        event_id: of the event.
        text: its JSON.
        timestamp: seconds since 1970.
        delta: its change of state.
    """

    freshness: tuple[str, str | bytes, str]
    event_id: bytes
    text: bytes
    timestamp: float
    delta: StateDelta


@dataclass(frozen=True, slots=True)
class Appended:
    """What came of it.

    Attributes:
        outcome: `appended`, `known`, `stale` or `gone`.
        incarnation: of the session.
        entry_id: of the event, when it was appended.
        before: of the event before it.
        same: when known: the events that have the same event id, for the caller to compare.
    """

    outcome: str
    incarnation: bytes = b""
    entry_id: bytes = START
    before: bytes = START
    same: tuple[Entry, ...] = ()


class StoredSessions:
    """What can be asked of the sessions in Redis.

    Args:
        stores: the connections.
        keys: of the namespace.

    Every method takes `doing`, what the caller is about, for the message when Redis fails, and raises
    RedisUnavailable then.
    """

    def __init__(self, stores: LoopStores, keys: Keys) -> None:
        self._stores = stores
        self._keys = keys
        self._apps: dict[str, float] = {}

    async def create(
        self,
        keys: SessionKeys,
        incarnation: bytes,
        names: tuple[bytes, bytes],
        at: float,
        delta: StateDelta,
        *,
        ttl: int,
        ephemeral: bool,
        doing: str,
    ) -> Shared | None:
        """Makes a session; None when there is one of that name.

        Args:
            keys: of the session.
            incarnation: a new name for it, so that a second attempt finds the work of the first.
            names: user and session id.
            at: its last update time.
            delta: its state, and changes of the shared states.
            ttl: time to live, ms; 0 is for ever.
            ephemeral: it is to go with its session, and is not worth archiving.
            doing: see the class.
        """
        args = [
            *(incarnation, keys.member, ttl, *names, repr(at), int(ephemeral)),
            *delta.script_args(),
        ]
        answer = await self._script("session_create", keys, args, doing)
        return None if answer is None else Shared(_fields(answer[0]), _fields(answer[1]))

    async def append(
        self, keys: SessionKeys, append: Append, differing: int, *, ttl: int, doing: str
    ) -> Appended:
        """Appends an event, unless events with its id are stored that it was not compared with.

        Args:
            keys: of the session.
            append: what to append.
            differing: how many stored events have its id and are known to be others.
            ttl: time to live, ms; 0 is for ever.
            doing: see the class.
        """
        args = [
            *append.freshness,
            *(append.event_id, append.text, repr(append.timestamp), differing, ttl, keys.member),
            *append.delta.script_args(),
        ]
        outcome, *rest = await self._script("session_append", keys, args, doing)
        match outcome:
            case b"appended":
                return Appended("appended", *rest)
            case b"known":
                same = tuple(zip(rest[1::2], rest[2::2], strict=True))
                return Appended("known", rest[0], same=same)
            case _:
                return Appended(outcome.decode())

    async def open(
        self,
        keys: SessionKeys,
        position: Position,
        wanted: int | None,
        after: float | None,
        *,
        ttl: int,
        doing: str,
    ) -> Opened | None:
        """Reads a session, and of its events those that are wanted and not known; None: there is none.

        Args:
            keys: of the session.
            position: what the reader has.
            wanted: at most so many recent events; None is all.
            after: events before the last one older than this are not wanted; None is no limit.
            ttl: time to live, ms; 0 is for ever.
            doing: see the class.
        """
        while True:
            args = [
                *(position.incarnation, position.last, position.first),
                *(-1 if wanted is None else wanted, 0 if after is None else 1),
                *(ttl, keys.member, PAGE, PAGE_BYTES),
            ]
            answer = await self._script("session_open", keys, args, doing)
            if answer is None:
                return None
            own, shared = _fields(answer[0]), Shared(_fields(answer[1]), _fields(answer[2]))
            how, page = answer[3], answer[4]
            if how == b"back":
                entries = await self._read_back(keys, page, wanted, after, doing)
                return Opened(own, shared, entries, follows=False)
            known = position.last if how == b"more" else START
            read = await self._read_on(keys, page, known, own[b"last"], doing)
            if read is not None:
                return Opened(own, shared, read, follows=how == b"more")
            # It was deleted, and perhaps made anew, while it was read: from the beginning.

    async def delete(self, keys: SessionKeys, *, doing: str) -> bool:
        """Deletes a session; False when there was none."""
        return bool(await self._script("session_delete", keys, [keys.member], doing))

    async def user_state(self, app: AppSessionKeys, user: str, *, doing: str) -> Fields:
        """The state of a user."""
        (fields,) = await self._read([("HGETALL", app.user_state(user))], doing)
        return fields  # type: ignore[no-any-return]

    async def listed(
        self, app: AppSessionKeys, user: str | None, *, doing: str
    ) -> list[tuple[Fields, Shared]]:
        """All sessions of an app, or of a user of it, without their events and in no order."""
        index = app.sessions if user is None else app.user_sessions(user)
        members, app_fields = await self._read(
            [("ZRANGE", index, 0, -1), ("HGETALL", app.state)], doing
        )
        names = [member.decode() for member in members]
        user_of = [name.partition("/")[0] for name in names]
        users = sorted(set(user_of))
        answers = await self._read(
            [("HGETALL", app.user_state_of(part)) for part in users]
            + [("HGETALL", app.member(name)) for name in names],
            doing,
        )
        shared = {
            part: Shared(app_fields, fields)
            for part, fields in zip(users, answers[: len(users)], strict=True)
        }
        sessions = zip(user_of, answers[len(users) :], strict=True)
        # What has expired, or was deleted since the index was read, is empty.
        return [(own, shared[part]) for part, own in sessions if own]

    # --- round trips ----------------------------------------------------------------------------

    async def _note_app(self, store: Store, app: AppSessionKeys) -> None:
        """Says that there is such an app, at times: Redis may have failed over and forgotten it."""
        now = time.monotonic()
        if now - self._apps.get(app.name, -_NOTE_APP_SECONDS) >= _NOTE_APP_SECONDS:
            await note_app(store, self._keys, app.name)
            self._apps[app.name] = now

    async def touch(self, sessions: Iterable[tuple[SessionKeys, int]], *, doing: str) -> None:
        """These are in use: retention and time to live begin afresh. What is gone stays gone.

        Args:
            sessions: keys, and time to live in ms; 0 is for ever.
            doing: see the class.
        """
        calls = [(keys.all(), [keys.member, ttl]) for keys, ttl in sessions]
        store = await self._stores.open()
        try:
            for start in range(0, len(calls), PAGE):
                for answer in await store.scripts("session_used", calls[start : start + PAGE]):
                    if isinstance(answer, Exception):
                        raise answer
        except (RedisError, *Unavailable) as error:
            raise _failed(store, doing, error) from error

    async def _script(self, name: str, keys: SessionKeys, args: list[Any], doing: str) -> Any:
        store = await self._stores.open()
        try:
            await self._note_app(store, keys.app)
            return await store.script(name, keys.all(), args)
        except (RedisError, *Unavailable) as error:
            raise _failed(store, doing, error) from error

    async def _read(self, commands: list[tuple[Any, ...]], doing: str) -> list[Any]:
        store = await self._stores.open()
        answers: list[Any] = []
        try:
            for start in range(0, len(commands), PAGE):
                pipe = store.redis.pipeline(transaction=False)
                for command in commands[start : start + PAGE]:
                    pipe.execute_command(*command)
                answers += await pipe.execute()
        except (RedisError, *Unavailable) as error:
            raise _failed(store, doing, error) from error
        return answers

    async def _read_on(
        self, keys: SessionKeys, page: list[Any], known: bytes, last: bytes, doing: str
    ) -> list[Entry] | None:
        """Reads until `last`; None when the stream no longer has it."""
        entries = _entries(page)
        while (at := entries[-1][0] if entries else known) != last:
            size = sum(len(text) for _, text in entries) // max(1, len(entries))
            count = max(1, min(PAGE, PAGE_BYTES // max(1, size)))
            command = ("XRANGE", keys.events, b"(" + at, last, "COUNT", count)
            (page,) = await self._read([command], doing)
            if not page:
                return None
            entries += _entries(page)
        return entries

    async def _read_back(
        self,
        keys: SessionKeys,
        page: list[Any],
        wanted: int | None,
        after: float | None,
        doing: str,
    ) -> list[Entry]:
        """Reads backwards until there is enough of what is wanted; answers oldest first."""
        entries = _entries(page)
        while page and (wanted is None or len(entries) < wanted):
            oldest = page[-1][0]
            too_old = after is not None and any(float(fields[3]) < after for _, fields in page)
            if too_old or number_of(oldest) == 1:
                break
            count = PAGE if wanted is None else min(PAGE, wanted - len(entries))
            command = ("XREVRANGE", keys.events, b"(" + oldest, "-", "COUNT", count)
            (page,) = await self._read([command], doing)
            entries += _entries(page)
        entries.reverse()
        return entries


def _failed(store: Store, doing: str, error: Exception) -> RedisUnavailable:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, Unavailable):
        return RedisUnavailable(
            f"{doing}: Redis at {store.url} does not answer ({cause}); whether it was done is not "
            "known, and to do it again is safe"
        )
    return RedisUnavailable(f"{doing}: Redis at {store.url} refused it: {cause}")


def _fields(flat: list[bytes]) -> Fields:
    """The answer of HGETALL, as a script gives it."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _entries(raw: list[Any]) -> list[Entry]:
    return [(entry_id, fields[1]) for entry_id, fields in raw]

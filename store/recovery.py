"""Recovery records: what is needed to go on with a conversation whose session was torn down.

One record per session, a Redis string with a time to live, written before an idle session goes. Where
the conversation itself is in Redis the record only says who and with which agent; where a process kept
it in memory the record carries the transcript, event by event as JSON text. Nothing here knows ADK.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from redis.exceptions import RedisError

from store.connection import Store
from store.errors import MalformedEntry, PolicyError, RedisUnavailable, TooLarge
from store.keys import Keys
from store.messages import SESSION_RETENTION
from store.namespace import DEFAULT_NAMESPACE
from store.refusals import Unavailable

RETENTION = SESSION_RETENTION
"""Seconds that a record is kept after it was saved, unless told otherwise."""

_MAX_BYTES = 64 * 2**20
_AT_ONCE = 16
"""Records on their way side by side: a thousand sessions that go together would take a connection each."""


class RecoveryRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a session that went.

    Attributes:
        app, user, session: its names.
        saved_at: seconds since 1970, by the clock of the process that saved it.
        process: that saved it.
        agent: the name of the agent configuration that it used last.
        state: its state, as JSON values.
        transcript: its events, each as JSON text; None when the conversation is kept elsewhere.
        updated_at: when the session was last updated, as the session service says.
        schema_version: of the writer.
    """

    app: str
    user: str
    session: str
    saved_at: float
    process: str = ""
    agent: str | None = None
    state: dict[str, Any] = {}
    transcript: tuple[str, ...] | None = None
    updated_at: float = 0.0
    schema_version: int = 1


class RecoveryStore:
    """Recovery records of one namespace.

    Args:
        store: an open store.
        namespace: keeps apart what shares a Redis.
        retention: seconds that a record is kept; None keeps it for ever.
        max_bytes: the most that one record may take, packed.

    Raises:
        NamespaceError: the namespace has a name that cannot be.
        PolicyError: a retention that is not positive.
    """

    def __init__(
        self,
        store: Store,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        retention: float | None = RETENTION,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        if retention is not None and not retention >= 0.001:
            raise PolicyError(
                f"retention={retention!r} cannot be: give seconds above 0, or None for ever"
            )
        self._store = store
        self._keys = Keys(namespace)
        self._retention_ms = None if retention is None else round(retention * 1000)
        self._max_bytes = max_bytes
        self._gate = asyncio.Semaphore(_AT_ONCE)

    def _key(self, app: str, user: str, session: str) -> str:
        return self._keys.app_sessions(app).recovery(user, session)

    async def save(self, record: RecoveryRecord) -> None:
        """Writes a record, in place of an earlier one.

        Raises:
            TooLarge: it takes more than `max_bytes`; an earlier record stays.
            RedisUnavailable: Redis does not answer, or refuses it.
        """
        packed = zlib.compress(msgspec.json.encode(record), 1)
        doing = f"saving the recovery record of session/{record.session}"
        if len(packed) > self._max_bytes:
            raise TooLarge(
                f"{doing}: it takes {len(packed) / 1e6:.1f} MB, the limit is "
                f"{self._max_bytes / 1e6:.1f} MB (max_bytes of the RecoveryStore)"
            )
        key = self._key(record.app, record.user, record.session)
        await self._do(doing, lambda: self._store.redis.set(key, packed, px=self._retention_ms))

    async def load(self, app: str, user: str, session: str) -> RecoveryRecord | None:
        """The record of a session, or None when there is none, or no longer.

        Raises:
            MalformedEntry: what is stored is not a record that this version can read.
            RedisUnavailable: Redis does not answer.
        """
        doing = f"loading the recovery record of session/{session}"
        packed = await self._do(doing, lambda: self._store.redis.get(self._key(app, user, session)))
        if packed is None:
            return None
        try:
            return msgspec.json.decode(zlib.decompress(packed), type=RecoveryRecord)
        except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MalformedEntry(f"{doing}: it cannot be read: {error}") from None

    async def purge(self, app: str, user: str, session: str) -> bool:
        """Deletes the record of a session; False when there was none.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        doing = f"purging the recovery record of session/{session}"
        return bool(
            await self._do(doing, lambda: self._store.redis.unlink(self._key(app, user, session)))
        )

    async def _do(self, doing: str, command: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with self._gate:
                return await command()
        except (RedisError, OSError) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            how = "does not answer" if isinstance(error, Unavailable) else "refused it"
            raise RedisUnavailable(f"{doing}: Redis at {self._store.url} {how}: {cause}") from error

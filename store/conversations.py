"""Conversations as data: what a worker asks of them to keep `session_retention`.

Sessions are written by the session service of `adapters.adk`; here is the other side, which knows no
ADK: which apps there are, which conversations nobody used for too long, what is in one, its end. The
conversations of an app are in one slot, and the leases of partitions in others, so the fence is the
app's own: a worker sets the epoch of its lease on the app, and whoever has an older one is refused.
What ended is noted in the same script that ends it, and the note stays until the log has it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec

from store.connection import Store
from store.event import REF_LIMIT
from store.keys import AppSessionKeys, Keys, SessionKeys, key_part, short_part
from store.lease import Lease
from store.namespace import Namespace

_PAGE = 500
_PREFIX = b"="


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """A conversation that is no more, as it waits to be written into the log.

    Attributes:
        member: user and session id, as key parts.
        reason: `retention`, `ttl`, `ephemeral`, or `gone` when its keys were deleted by hand.
        incarnation: tells it from another of the same name; empty where it had expired.
        archived: the file it was archived in; empty where it was not.
        events: how many it had.
        used_ms: its last use, Redis time.
    """

    member: str
    reason: str
    incarnation: str = ""
    archived: str = ""
    events: int = 0
    used_ms: int = 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is known of a conversation, but for its events.

    Attributes:
        keys: of it.
        app, user, id: its names.
        incarnation: tells it from another of the same name.
        last: entry id of its last event.
        updated_at: seconds since 1970, as ADK says.
        used_ms: its last use, Redis time; 0 where none was noted.
        ephemeral: it was declared to go with its session.
        state: its own state, key -> JSON.
    """

    keys: SessionKeys
    app: str
    user: str
    id: str
    incarnation: str
    last: str
    updated_at: float
    used_ms: int
    ephemeral: bool
    state: dict[str, bytes]

    @property
    def ref(self) -> str:
        return conversation_ref(self.keys.app, self.keys.member)


def conversation_ref(app: AppSessionKeys, member: str) -> str:
    """The reference of a conversation in the log: `conversation/APP/USER/ID`, each percent-encoded.

    Where that is too long for a reference, long parts are `#` and their SHA-256.
    """
    ref = f"conversation/{app.part}/{member}"
    if len(ref) <= REF_LIMIT:
        return ref
    return "/".join(["conversation", *(short_part(part) for part in ref.split("/")[1:])])


async def note_app(store: Store, keys: Keys, app: str) -> None:
    """Says that an app has conversations, so that workers find them."""
    await store.redis.sadd(keys.apps, _bytes(app))


def partition_of_app(namespace: Namespace, app: str) -> int:
    """Whoever acts for this partition looks after the conversations of the app."""
    return namespace.partition_of(f"conversations of {key_part(app)}")


async def known_apps(namespace: Namespace) -> list[str]:
    """The apps that have, or had, conversations."""
    names = await namespace.store.redis.smembers(namespace.keys.apps)
    return sorted(name.decode("utf-8", "surrogatepass") for name in names)


async def claim(
    namespace: Namespace,
    app: str,
    lease: Lease,
    retention_ms: int | None,
    *,
    most: int,
    skip: int = 0,
) -> tuple[list[str], list[tuple[bytes, Note]]]:
    """Says who looks after the conversations of an app, and finds what is to be done about them.

    Args:
        namespace, app: which.
        lease: of the worker, on the partition that the app belongs to.
        retention_ms: conversations that were not used for so long are due; None is none.
        most: answers of each sort.
        skip: how many that are due to pass over.

    Returns:
        The members that are due, longest unused first, and what ended and was not told yet.

    Raises:
        Fenced: a worker with a newer epoch looks after them.
    """
    keys = namespace.keys.app_sessions(app)
    due, notes = await namespace.store.script(
        "conversation_claim",
        [keys.keeper, keys.sessions, keys.used, keys.ended],
        [lease.token, "" if retention_ms is None else retention_ms, most, skip],
    )
    return (
        [member.decode() for member in due],
        [(raw, msgspec.json.decode(raw, type=Note)) for raw in notes],
    )


async def read_conversation(namespace: Namespace, app: str, member: str) -> Conversation | None:
    """A conversation without its events; None when it is gone."""
    app_keys = namespace.keys.app_sessions(app)
    keys = app_keys.of_member(member)
    redis = namespace.store.redis
    own = await redis.hgetall(keys.session)
    if not own:
        return None
    used = await redis.zscore(app_keys.used, member)
    return Conversation(
        keys,
        app,
        own[b"user"].decode("utf-8", "surrogatepass"),
        own[b"id"].decode("utf-8", "surrogatepass"),
        own[b"incarnation"].decode(),
        own[b"last"].decode(),
        float(own[b"at"]),
        int(used or 0),
        b"ephemeral" in own,
        {key[1:].decode(): text for key, text in own.items() if key.startswith(_PREFIX)},
    )


async def events_of(
    namespace: Namespace, conversation: Conversation
) -> AsyncIterator[list[tuple[bytes, bytes, bytes]]]:
    """Its events up to `last`, page by page: (entry id, timestamp, JSON)."""
    at = "-"
    while True:
        page = await namespace.store.redis.execute_command(
            "XRANGE", conversation.keys.events, at, conversation.last, "COUNT", _PAGE
        )
        if not page:
            return
        yield [(entry_id, fields[3], fields[1]) for entry_id, fields in page]
        at = f"({page[-1][0].decode()}"


async def end_conversation(
    namespace: Namespace, conversation: Conversation, lease: Lease, retention_ms: int, note: Note
) -> str:
    """Deletes a conversation, if it is still as it was read and nobody used it since.

    Returns:
        `ended`, `used`, `changed`, or `gone`.

    Raises:
        Fenced: another worker looks after the app; nothing was deleted.
    """
    keys = conversation.keys
    answer = await namespace.store.script(
        "conversation_end",
        [*keys.all(), keys.app.keeper],
        [
            *(lease.token, keys.member, conversation.incarnation, conversation.last),
            *(retention_ms, msgspec.json.encode(note)),
        ],
    )
    return str(answer.decode())


async def drop_name(namespace: Namespace, app: str, member: str, lease: Lease) -> None:
    """Takes a name whose conversation is gone out of the lists, and notes that.

    Raises:
        Fenced: another worker looks after the app.
    """
    keys = namespace.keys.app_sessions(app).of_member(member)
    await namespace.store.script(
        "conversation_end", [*keys.all(), keys.app.keeper], [lease.token, member, "", "", 0, ""]
    )


async def told(namespace: Namespace, app: str, lease: Lease, notes: Sequence[bytes]) -> None:
    """These have been written into the log.

    Raises:
        Fenced: another worker looks after the app; it tells them once more.
    """
    keys = namespace.keys.app_sessions(app)
    await namespace.store.script(
        "conversation_told", [keys.keeper, keys.ended], [lease.token, *notes]
    )


@dataclass(frozen=True, slots=True)
class Counted:
    """How many conversations a namespace has.

    Attributes:
        kept: in Redis.
        overdue: of these, not used for longer than they are kept.
        oldest_ms: for how long the one that was not used for the longest time is overdue; 0 for none.
    """

    kept: int = 0
    overdue: int = 0
    oldest_ms: int = 0


async def count_conversations(
    namespace: Namespace, retention_ms: int | None, now_ms: int
) -> Counted:
    """Counts the conversations of all apps; nothing is changed."""
    kept = overdue = oldest = 0
    redis = namespace.store.redis
    for app in await known_apps(namespace):
        keys = namespace.keys.app_sessions(app)
        kept += await redis.zcard(keys.sessions)
        if retention_ms is None:
            continue
        before = now_ms - retention_ms
        overdue += await redis.zcount(keys.used, "-inf", before)
        first = await redis.zrange(keys.used, 0, 0, withscores=True)
        if first:
            oldest = max(oldest, before - int(first[0][1]))
    return Counted(kept, overdue, oldest)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

"""Every Redis key of the project is made here, and nowhere else.

All keys of one partition carry the same hash tag, `{namespace/partition}`, so that whatever one
script touches is in one slot and Redis Cluster needs no special care. Keys that belong to the
namespace as a whole carry the tag `{namespace}`. Conversations are tagged by app, `{namespace/adk/app}`:
see `AppSessionKeys` for why.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote

from store.errors import NamespaceError

PREFIX = "ar"
_LONGEST_PART = 200
_SHORT_PART = 150
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANY_META = f"{PREFIX}:{{*}}:meta"
"""Pattern of SCAN that every `Keys.meta` matches."""
_META = re.compile(rf"{PREFIX}:\{{({_NAME.pattern})\}}:meta")


def namespace_of(meta: str) -> str | None:
    """The namespace that has this key as its `Keys.meta`; None where it is another key."""
    found = _META.fullmatch(meta)
    return found and found[1]


def partition_of(process: str, partitions: int) -> int:
    """The partition that holds all events of `process`: a stable hash, the same in every language.

    CRC-32 (IEEE 802.3) of the UTF-8 bytes, modulo the number of partitions.
    """
    return zlib.crc32(process.encode()) % partitions


def key_part(text: str) -> str:
    """Any text as a part of a key: no braces, colons, slashes, blanks or control characters.

    Percent-encoded UTF-8 (RFC 3986); different texts give different parts. What would be longer than
    200 characters becomes `#` and its SHA-256, since a key of megabytes helps nobody.
    """
    part = quote(text, safe="", errors="surrogatepass")
    if len(part) > _LONGEST_PART:
        return "#" + sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return part


def short_part(part: str) -> str:
    """A key part that three of fit into a reference: long ones become `#` and their SHA-256."""
    return part if len(part) <= _SHORT_PART else "#" + sha256(part.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """The keys of one partition; they all live in one slot."""

    namespace: str
    partition: int

    def _key(self, name: str) -> str:
        return f"{PREFIX}:{{{self.namespace}/{self.partition}}}:{name}"

    @property
    def log(self) -> str:
        """Stream: the events."""
        return self._key("log")

    @property
    def seqs(self) -> str:
        """Hash: process -> the last sequence number in the log, or `lost` once it is fenced."""
        return self._key("seqs")

    @property
    def hosts(self) -> str:
        """Sorted set: host process -> when its lease lapses, in ms of Redis time."""
        return self._key("hosts")

    @property
    def lease(self) -> str:
        """String with a time to live: `holder epoch` of the worker that acts for the partition."""
        return self._key("lease")

    @property
    def epoch(self) -> str:
        """Counter: grows with each lease taken."""
        return self._key("epoch")

    @property
    def inbox(self) -> str:
        """Stream: notes from hosts to the worker (an inventory changed) and requests to it."""
        return self._key("inbox")

    @property
    def quarantine(self) -> str:
        """Hash: id of a malformed log entry -> why it is not an event."""
        return self._key("quarantine")

    @property
    def snapshots(self) -> str:
        """Hash: id of the last entry folded -> the fold up to it; the last few."""
        return self._key("snapshots")

    @property
    def history(self) -> str:
        """Hash: `archived`, `trimmed`, `dropped` (entry ids), `trimmed_entries`, `segment` (the last)."""
        return self._key("history")

    def inventory(self, process: str) -> str:
        """Hash: `summary` and one field per bucket of what a process holds."""
        return self._key(f"inventory:{process}")

    def orders(self, process: str) -> str:
        """Stream: orders for a process."""
        return self._key(f"orders:{process}")

    def reply(self, request: str) -> str:
        """List: the answer to a request made through the inbox."""
        return self._key(f"reply:{request}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a namespace.

    Raises:
        NamespaceError: the name has characters that a key or a hash tag cannot hold.
    """

    namespace: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.namespace):
            raise NamespaceError(
                f"namespace {self.namespace!r} cannot be used: give 1 to 64 of A-Z a-z 0-9 _ . -"
            )

    def _key(self, name: str) -> str:
        return f"{PREFIX}:{{{self.namespace}}}:{name}"

    @property
    def meta(self) -> str:
        """Hash: `schema`, `partitions`, `created_at`, and `retention` once it was set."""
        return self._key("meta")

    @property
    def policy(self) -> str:
        """String: the policy that the workers of this namespace run with, as JSON."""
        return self._key("policy")

    @property
    def workers(self) -> str:
        """Hash: worker id -> its heartbeat, as JSON."""
        return self._key("workers")

    @property
    def members(self) -> str:
        """Sorted set: worker that takes part in sharing -> when it counts as gone, ms of Redis time."""
        return self._key("members")

    @property
    def apps(self) -> str:
        """Set: ADK apps that have, or had, conversations here; how a worker finds them."""
        return self._key("apps")

    def partition(self, number: int) -> PartitionKeys:
        return PartitionKeys(self.namespace, number)

    def app_sessions(self, app: str) -> AppSessionKeys:
        part = key_part(app)
        return AppSessionKeys(f"{PREFIX}:{{{self.namespace}/adk/{part}}}", app, part)


@dataclass(frozen=True, slots=True)
class AppSessionKeys:
    """The keys of all conversations of one ADK app; they all live in one slot.

    One append may change the session, the user's state and the app's state, and must change all or
    none. App state is shared by every session of the app, so one slot for the app is what makes that
    one script. The price: one app does not spread over the nodes of a cluster; many apps do.

    Attributes:
        tag: what all of them begin with.
        name: of the app.
        part: the same, as a key part.
    """

    tag: str
    name: str
    part: str

    @property
    def state(self) -> str:
        """Hash: key -> JSON, what ADK calls `app:` state."""
        return f"{self.tag}:state"

    @property
    def sessions(self) -> str:
        """Sorted set: `user/session` as key parts -> when it expires, in ms of Redis time, or inf."""
        return f"{self.tag}:sessions"

    @property
    def used(self) -> str:
        """Sorted set: the same names -> their last use, in ms of Redis time."""
        return f"{self.tag}:used"

    @property
    def ended(self) -> str:
        """Sorted set: conversations that expired or were archived, until a worker has said so."""
        return f"{self.tag}:ended"

    @property
    def keeper(self) -> str:
        """String: the epoch of the worker that looks after the conversations of the app."""
        return f"{self.tag}:keeper"

    def user_state(self, user: str) -> str:
        """Hash: key -> JSON, what ADK calls `user:` state."""
        return self.user_state_of(key_part(user))

    def user_sessions(self, user: str) -> str:
        """Sorted set: the part of `sessions` that is this user's."""
        return self.user_sessions_of(key_part(user))

    def user_state_of(self, part: str) -> str:
        return f"{self.tag}:user:{part}:state"

    def user_sessions_of(self, part: str) -> str:
        return f"{self.tag}:user:{part}:sessions"

    def session(self, user: str, session: str) -> SessionKeys:
        part = key_part(user)
        return SessionKeys(self, part, f"{part}/{key_part(session)}")

    def recovery(self, user: str, session: str) -> str:
        """String with a time to live: the recovery record of a session, packed."""
        return f"{self.tag}:recovery:{key_part(user)}/{key_part(session)}"

    def member(self, member: str) -> str:
        """The hash of a session, from its name in `sessions`; see `SessionKeys.session`."""
        return f"{self.tag}:session:{member}"

    def of_member(self, member: str) -> SessionKeys:
        """The keys of a session, from its name in `sessions`."""
        return SessionKeys(self, member.partition("/")[0], member)


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one ADK session.

    Attributes:
        app: the keys it shares with the other sessions of its app.
        user: the user's id, as a key part.
        member: the name of the session in the sorted sets of sessions.
    """

    app: AppSessionKeys
    user: str
    member: str

    @property
    def session(self) -> str:
        """Hash: what is known of the session, and its state, each key of it after a `=`."""
        return self.app.member(self.member)

    @property
    def events(self) -> str:
        """Stream: the ADK events, as JSON. The id of entry n is `<ms of Redis time>-<n>`."""
        return f"{self.session}:events"

    @property
    def seen(self) -> str:
        """Hash: event id -> the entries that carry it."""
        return f"{self.session}:seen"

    def all(self) -> list[str]:
        """What the session scripts take as KEYS, in their order."""
        return [
            self.session,
            self.events,
            self.seen,
            self.app.state,
            self.app.user_state_of(self.user),
            self.app.sessions,
            self.app.user_sessions_of(self.user),
            self.app.used,
            self.app.ended,
        ]

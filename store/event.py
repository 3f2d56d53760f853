"""The event: one immutable fact about one resource, and its codec.

Two shapes of the same thing. `LifecycleEvent` is the public, validated model (pydantic): what users
build and read. `EventRow` is what the hot paths use, a msgspec struct that encodes and decodes in
half a microsecond; the fold reads either, because the attribute names are the same (a test holds the
two together). `FoldRow` is an `EventRow` without what the fold does not read.

On the wire an event is one JSON object whose last member is its digest. The digest is chained: it
covers the bytes of the event and the digest of the event before it from the same process, so an
edited, removed or reordered event is found by position. The digest has a fixed length and stands
last, so it can be cut off without parsing.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from enum import StrEnum
from hashlib import blake2b
from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from store.errors import MalformedEntry

SCHEMA = 1
"""Version of the event schema that this code writes. Readers accept newer events and keep what they
do not know."""

REF_LIMIT = 512
"""Longest reference, in characters."""

Scalar = str | int | float | bool | None


class EventType(StrEnum):
    """What can be said of a resource."""

    CREATED = "created"
    REUSED = "reused"
    CLEANED_UP = "cleaned_up"
    CLEANUP_REQUESTED = "cleanup_requested"
    CLEANUP_FAILED = "cleanup_failed"
    CLEANUP_REFUSED = "cleanup_refused"
    ADOPTED = "adopted"
    PROCESS_STARTED = "process_started"
    PROCESS_STOPPED = "process_stopped"
    PROCESS_LOST = "process_lost"


EVENT_TYPES = frozenset(str(t) for t in EventType)


def check_ref(ref: str) -> str:
    """Returns `ref` if it is a reference, `kind/id`.

    Raises:
        ValueError: there is no slash, one side is empty, or it is longer than `REF_LIMIT`.
    """
    kind, slash, name = ref.partition("/")
    if not (kind and slash and name) or len(ref) > REF_LIMIT:
        raise ValueError(
            f"{ref[:80]!r} is not a reference: write kind/id, at most {REF_LIMIT} characters, "
            "for example session/abc"
        )
    return ref


class LifecycleEvent(BaseModel):
    """One immutable fact about one resource.

    Attributes:
        type: what happened.
        ref: the resource, `kind/id`.
        process: who wrote the event: one incarnation of a service, `name@hostname:pid:start`.
        seq: number of the event within its process: 1, 2, 3 … without gaps.
        at: seconds since 1970 by the clock of the writer. Information only: decisions use the time
            of Redis, which is in the id of the stream entry.
        holder: the process that holds the resource, where that is not the writer (a worker that
            asks a host for a teardown).
        uses: what the resource keeps alive; None says nothing new about it.
        owned_by: the resource it dies with; None says nothing new about it.
        reason: why, in words.
        order_id: the order this event belongs to.
        attrs: small and flat. `registry` and `key` in it make the event speak of an index entry
            that names `ref`; `in_use` tells how many hold the resource acquired.
        trace_id: of the request that caused it.
        schema_version: of the writer. Unknown members of a newer one are kept.
        digest: chained to the event before it of the same process; empty before it is encoded.

    Never in an event: conversation content, prompts, credentials.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    type: EventType
    ref: str
    process: Annotated[str, Field(min_length=1, max_length=512)]
    seq: Annotated[int, Field(ge=1)]
    at: float = 0.0
    holder: str | None = None
    uses: tuple[str, ...] | None = None
    owned_by: str | None = None
    reason: str | None = None
    order_id: str | None = None
    attrs: dict[str, Scalar] | None = None
    trace_id: str | None = None
    schema_version: int = SCHEMA
    digest: str = ""

    @field_validator("ref", "owned_by")
    @classmethod
    def _ref(cls, value: str | None) -> str | None:
        return value if value is None else check_ref(value)

    @field_validator("uses")
    @classmethod
    def _uses(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return value if value is None else tuple(check_ref(ref) for ref in value)

    @property
    def kind(self) -> str:
        return self.ref.partition("/")[0]


def is_ref(ref: str) -> bool:
    """`ref` is a reference that can be written: see `check_ref`."""
    try:
        check_ref(ref).encode()
    except ValueError:
        return False
    return True


ProcessName = Annotated[str, msgspec.Meta(min_length=1)]
Seq = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class EventRow(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The event as the hot paths carry it. Same attributes as `LifecycleEvent`; see there.

    It cannot be part of a cycle, so the garbage collector does not follow it.

    `digest` stands last, so that the encoder writes it last.
    """

    type: str
    ref: str
    process: ProcessName
    seq: Seq
    at: float = 0.0
    holder: str | None = None
    uses: tuple[str, ...] | None = None
    owned_by: str | None = None
    reason: str | None = None
    order_id: str | None = None
    attrs: dict[str, Scalar] | None = None
    trace_id: str | None = None
    schema_version: int = 1
    digest: str = ""


KnownType = Literal[
    "created", "reused", "cleaned_up", "cleanup_requested", "cleanup_failed", "cleanup_refused",
    "adopted", "process_started", "process_stopped", "process_lost",
]  # fmt: skip
"""The values of `EventType`, one string each however many events have it."""


class FoldRow(msgspec.Struct, frozen=True, gc=False):
    """What the fold reads of an event: `EventRow` without what it passes over.

    Of a type that a newer schema brought it is made by hand, the decoder knows the present ones only.
    """

    type: KnownType
    ref: str
    process: ProcessName
    seq: Seq
    holder: str | None = None
    uses: tuple[str, ...] | None = None
    owned_by: str | None = None
    reason: str | None = None
    order_id: str | None = None
    attrs: dict[str, Scalar] | None = None


class LogEntry(msgspec.Struct, frozen=True):
    """An event with its place in the log.

    Attributes:
        id: the stream entry id, `ms-n`: Redis time in milliseconds and a counter.
        partition: of the log.
        event: what was appended.
    """

    id: str
    partition: int
    event: LifecycleEvent

    @property
    def at_ms(self) -> int:
        """Redis time of the entry, in milliseconds since 1970."""
        return int(self.id.partition("-")[0])


DIGEST_CHARS = 32
NO_DIGEST = "0" * DIGEST_CHARS
"""The digest before the first event of a process."""

_encode = msgspec.json.Encoder().encode
_decode_row = msgspec.json.Decoder(EventRow).decode
_decode_fold_row = msgspec.json.Decoder(FoldRow).decode
_NOT_A_ROW = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_DIGEST_KEY = b',"digest":"'
_TAIL = len(_DIGEST_KEY) + DIGEST_CHARS + 2


def chain(previous: str, body: bytes) -> str:
    """The digest of an event.

    Args:
        previous: digest of the event before it of the same process, `NO_DIGEST` for the first.
        body: the encoded event without its digest.

    Returns:
        BLAKE2b (RFC 7693) with 16 bytes, keyed with nothing, as 32 hexadecimal characters.
    """
    return blake2b(previous.encode() + body, digest_size=DIGEST_CHARS // 2).hexdigest()


def encode(event: EventRow | LifecycleEvent, previous: str) -> tuple[bytes, str]:
    """Encodes an event and chains it to the one before.

    Args:
        event: what happened; a digest it already has is ignored.
        previous: digest of the event before it of the same process.

    Returns:
        The bytes for the log, and the digest for the next event.
    """
    if isinstance(event, LifecycleEvent):
        body = event.model_dump_json(exclude_defaults=True, exclude={"digest"}).encode()
    else:
        body = _encode(event)
    return seal(body, previous)


def encode_body(event: EventRow) -> bytes:
    """Encodes an event that has no digest yet; `seal` gives it one. The hot half of `encode`."""
    return _encode(event)


def seal(body: bytes, previous: str) -> tuple[bytes, str]:
    """Ends an encoded event with its digest; the other half of `encode`, with its result."""
    digest = blake2b(previous.encode() + body, digest_size=DIGEST_CHARS // 2).hexdigest()
    return b'%b,"digest":"%b"}' % (body[:-1], digest.encode()), digest


def seal_all(bodies: Iterable[bytes], previous: str) -> tuple[list[bytes], str]:
    """`seal` for events that follow each other: the payloads, and the digest for the next event."""
    payloads, digest = [], previous.encode()
    for body in bodies:
        digest = blake2b(digest + body, digest_size=DIGEST_CHARS // 2).hexdigest().encode()
        payloads.append(b'%b,"digest":"%b"}' % (body[:-1], digest))
    return payloads, digest.decode()


def split_digest(payload: bytes) -> tuple[bytes, str]:
    """Takes an encoded event apart: the body that the digest covers, and the digest.

    Raises:
        MalformedEntry: the payload does not end in a digest.
    """
    if payload[-_TAIL : -_TAIL + len(_DIGEST_KEY)] != _DIGEST_KEY:
        raise MalformedEntry("the entry does not end in a digest")
    return payload[:-_TAIL] + b"}", payload[-DIGEST_CHARS - 2 : -2].decode("ascii", "replace")


def decode_row(payload: bytes) -> EventRow:
    """Decodes an event for the hot paths: types are checked; of references only that they have a kind.

    Raises:
        MalformedEntry: the payload is not an event.
    """
    try:
        row = _decode_row(payload)
    except _NOT_A_ROW as error:
        raise MalformedEntry(str(error)) from None
    if row.type not in EVENT_TYPES and row.schema_version <= SCHEMA:
        raise MalformedEntry(f"unknown event type {row.type[:40]!r}")
    if "/" not in row.ref:
        raise MalformedEntry(f"{row.ref[:80]!r} is not a reference")
    return row


def decode_fold_rows(payloads: Iterable[bytes]) -> list[FoldRow]:
    """Decodes many events for the fold.

    What the fold does not read is passed over, not checked.

    Raises:
        MalformedEntry: one is not an event, or is of a newer schema: see `decode_fold_row`.
    """
    try:
        rows = list(map(_decode_fold_row, payloads))
    except _NOT_A_ROW as error:
        raise MalformedEntry(str(error)) from None
    if [row for row in rows if "/" not in row.ref]:
        raise MalformedEntry("an entry has no reference")
    return rows


def decode_fold_row(payload: bytes) -> FoldRow:
    """Decodes one event for the fold, of whatever schema.

    Raises:
        MalformedEntry: the payload is not an event.
    """
    try:
        return decode_fold_rows((payload,))[0]
    except MalformedEntry:
        row = decode_row(payload)
        return FoldRow(*(getattr(row, name) for name in FoldRow.__struct_fields__))


def decode(payload: bytes) -> LifecycleEvent:
    """Decodes and validates an event; unknown members are kept.

    Raises:
        MalformedEntry: the payload is not an event.
    """
    try:
        return LifecycleEvent.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the entry"
        raise MalformedEntry(f"{where}: {first['msg']}") from None


def check_name(name: str) -> str:
    """Returns `name` if a service or a worker can have it.

    Raises:
        ValueError: it is empty or too long, or has a space, a slash or an @ in it.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r} cannot be a name: it takes 1 to 100 characters without spaces, / and @, "
            "for example chat-api"
        )
    return name


def process_id(name: str) -> str:
    """A new incarnation of a process, `name@hostname:pid:start`; `start` in ms since 1970.

    Two incarnations made in one process within a millisecond still differ.
    """
    global _last_start  # noqa: PLW0603 - the one counter that keeps starts apart
    start = max(int(time.time() * 1000), _last_start + 1)
    _last_start = start
    return f"{name}@{socket.gethostname()}:{os.getpid()}:{start}"


_NAME = re.compile(r"[^\s/@]{1,100}")
_last_start = 0

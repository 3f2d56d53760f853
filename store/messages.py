"""What host and worker say to each other, as values: inventory, order, and the note of a change.

The outcome of an order has no message of its own: it is the event with the order's id in the log
(`cleaned_up`, `cleanup_refused`, `cleanup_failed`), so that the log tells the whole story.

A worker reaches hosts through Redis (`store.channel`); `HostPort` is the seam for whoever has the host
within reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Protocol, TypeVar

import msgspec

from store.errors import MalformedEntry

T = TypeVar("T")

SESSION_RETENTION = 30 * 86400.0
"""Seconds that a conversation is kept after its last use, unless the policy says otherwise."""
SHORTEST_RETENTION = 60.0
"""Seconds. Hosts note every third of it which sessions are in use, so that none of them is ever due."""

NO_PROCESS = "conversations"
"""In the log, the holder of what no process holds: the fold knows no such process, and passes over it."""

BUCKETS = 256
"""Buckets that an inventory is divided into."""


def hash_of(item: str) -> int:
    """64 bits of BLAKE2b of an inventory line: its bucket and its part in the bucket's digest."""
    return int.from_bytes(blake2b(item.encode(), digest_size=8).digest())


class IndexEntry(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One entry of an index registry: `registry[key]` names `target`.

    `target` is a reference. An entry that lists several resources counts as several of these. `whole`
    is True when the key itself names the target, so that the entry goes as a whole with it.
    """

    registry: str
    key: str
    target: str
    whole: bool = False


class Bucket(msgspec.Struct, array_like=True):
    """One bucket of an inventory: references held, and index entries."""

    held: list[str]
    entries: list[IndexEntry]


class RegistryCount(msgspec.Struct, array_like=True, frozen=True):
    """How full one registry is. `role` is `primary` or `index`; `kind` what it holds or names."""

    name: str
    role: str
    kind: str
    count: int


class Summary(msgspec.Struct, frozen=True):
    """What travels of an inventory each time.

    Attributes:
        process: whose.
        as_of: seq of the last event recorded at the instant the inventory was taken.
        kinds: the kinds that the primary registries of this process cover.
        registries: how full each is.
        rss: resident memory of the process, in bytes.
        fds: open file descriptors.
        outbox: events recorded and not yet acknowledged.
        spilled: how many of these wait in the spill file.
        dropped: events that were lost because memory and spill file were full.
        outbox_problem: why the spill file cannot be written, or empty.
        answers: ids of the `report` orders that this inventory answers.
        findings: kinds of what a leak probe found in the process; True where a teardown can end one.
    """

    process: str
    as_of: int
    kinds: tuple[str, ...] = ()
    registries: tuple[RegistryCount, ...] = ()
    rss: int = 0
    fds: int = 0
    outbox: int = 0
    spilled: int = 0
    dropped: int = 0
    outbox_problem: str = ""
    answers: tuple[str, ...] = ()
    findings: dict[str, bool] = {}


class Inventory(msgspec.Struct, frozen=True):
    """What the registries of one process held at one instant.

    Attributes:
        process: whose.
        as_of: seq of the last event recorded at that instant.
        held: references in the primary registries.
        entries: of the index registries.
        kinds: the kinds that the primary registries cover; of other kinds `held` says nothing.
        rss: resident memory of the process, in bytes; 0 is unknown.
        findings: kinds of what a leak probe found: never adopted, and torn down only where the
            policy says so and the value is True.
    """

    process: str
    as_of: int
    held: frozenset[str] = frozenset()
    entries: tuple[IndexEntry, ...] = ()
    kinds: frozenset[str] = frozenset()
    rss: int = 0
    findings: dict[str, bool] = {}


class InventoryChange(msgspec.Struct, frozen=True):
    """What became different between two readings of an inventory.

    Attributes:
        summary: of the newer one.
        held, let_go: references that came into the primary registries, and that left them.
        entered, struck: entries that came into the index registries, and that left them.
    """

    summary: Summary
    held: list[str]
    let_go: list[str]
    entered: list[IndexEntry]
    struck: list[IndexEntry]


class Action(StrEnum):
    """What an order asks for.

    `teardown` ends a resource; `drop_entry` removes one index entry; `close_ghost` closes in the log
    what the registry no longer holds; `adopt` records what the log has never heard of; `report` asks
    for a fresh inventory, taken from the registries themselves.
    """

    TEARDOWN = "teardown"
    DROP_ENTRY = "drop_entry"
    CLOSE_GHOST = "close_ghost"
    ADOPT = "adopt"
    REPORT = "report"


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that the worker asks a host for, with its preconditions.

    Attributes:
        id: of the order; the event that ends it carries the same.
        process: who is asked.
        action: see `Action`.
        ref: the resource; for `drop_entry` the one that the entry names.
        seq: the last seq of the resource that the worker had folded; the host refuses when its own
            is another.
        reason: why, in words.
        after: resources that must be gone before this one may go.
        stage: of orders sent together the lower begin first; one waits for those about what is named in
            `after`.
        timeout: seconds that a teardown may take.
        registry, key: the index entry of a `drop_entry`.
        traceparent: the worker's span of this order (W3C Trace Context); see `store.tracing`.
        circle: with what else it is in a circle of uses or owners that goes as a whole, each with the
            last seq that the worker had folded: these need not be gone first, if they too are unused.
    """

    id: str
    process: str
    action: str
    ref: str
    seq: int = 0
    reason: str = ""
    after: tuple[str, ...] = ()
    stage: int = 0
    timeout: float = 30.0
    registry: str | None = None
    key: str | None = None
    traceparent: str | None = None
    circle: dict[str, int] = {}


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line in a partition's inbox, for the worker that acts for it.

    `kind` is `inventory` (of `process` changed), `stopped` (`process` left), or a request, answered
    under `request`: `reconcile` (force a pass), `archive` (archive and trim now).
    """

    kind: str
    process: str | None = None
    request: str | None = None
    dry_run: bool = False
    deadline_ms: int = 0


encode_message = msgspec.json.Encoder().encode
_orders = msgspec.json.Decoder(Order)
_notes = msgspec.json.Decoder(Note)
_summaries = msgspec.json.Decoder(Summary)
_buckets = msgspec.json.Decoder(Bucket)


def decode_order(payload: bytes) -> Order:
    """Raises MalformedEntry when `payload` is not an order."""
    return _decode(_orders, payload)


def decode_note(payload: bytes) -> Note:
    """Raises MalformedEntry when `payload` is not a note."""
    return _decode(_notes, payload)


def decode_summary(payload: bytes) -> Summary:
    """Raises MalformedEntry when `payload` is not the summary of an inventory."""
    return _decode(_summaries, payload)


def decode_bucket(payload: bytes) -> Bucket:
    """Raises MalformedEntry when `payload` is not a bucket of an inventory."""
    return _decode(_buckets, payload)


def _decode(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedEntry(str(error)) from None


_NOTHING = Bucket([], [])


class InventoryMirror:
    """The reader's copy of one process's inventory, brought up to date bucket by bucket.

    Attributes:
        summary: as last read.
        root: digest over all buckets; empty before the first reading.
    """

    def __init__(self, process: str) -> None:
        self.process = process
        self.summary: Summary | None = None
        self.root = ""
        self._digests: dict[str, str] = {}
        # As they came: decoded they take three times the memory, and are looked at once, when they change.
        self._buckets: dict[str, bytes] = {}

    @property
    def digests(self) -> Mapping[str, str]:
        """Bucket number -> digest of the content held here."""
        return self._digests

    def update(
        self, summary: Summary, root: str, buckets: Mapping[str, tuple[str, bytes]]
    ) -> InventoryChange:
        """Takes over the buckets that changed.

        Args:
            summary: over all.
            root: digest over all buckets.
            buckets: bucket number -> (digest, content); one without content is dropped.

        Raises:
            MalformedEntry: a content is not that of a bucket; the mirror is of no use any more.
        """
        change = InventoryChange(summary, [], [], [], [])
        for number, (digest, content) in buckets.items():
            known = self._buckets.pop(number, b"")
            before = decode_bucket(known) if known else _NOTHING
            now = decode_bucket(content) if content else _NOTHING
            self._digests.pop(number, None)
            if content:
                self._buckets[number] = content
                self._digests[number] = digest
            held, entries = set(before.held), set(before.entries)
            change.held.extend(ref for ref in now.held if ref not in held)
            change.entered.extend(entry for entry in now.entries if entry not in entries)
            change.let_go.extend(held.difference(now.held))
            change.struck.extend(entries.difference(now.entries))
        self.summary, self.root = summary, root
        return change

    def everything(self) -> InventoryChange | None:
        """All of it, as a change from nothing; None before the first update."""
        if self.summary is None:
            return None
        change = InventoryChange(self.summary, [], [], [], [])
        for bucket in map(decode_bucket, self._buckets.values()):
            change.held.extend(bucket.held)
            change.entered.extend(bucket.entries)
        return change

    def inventory(self) -> Inventory | None:
        """The whole inventory as a value; None before the first update."""
        if self.summary is None:
            return None
        buckets = [decode_bucket(content) for content in self._buckets.values()]
        return Inventory(
            process=self.process,
            as_of=self.summary.as_of,
            held=frozenset(ref for bucket in buckets for ref in bucket.held),
            entries=tuple(entry for bucket in buckets for entry in bucket.entries),
            kinds=frozenset(self.summary.kinds),
            rss=self.summary.rss,
            findings=self.summary.findings,
        )


class HostPort(Protocol):
    """A host within reach: the narrow seam where real and simulated parts change places.

    A reconciler that runs in the same process as a host hands it orders through this instead of
    through Redis: same code, another transport.
    """

    @property
    def process(self) -> str:
        """The id of the process."""

    def execute(self, orders: Sequence[Order]) -> object:
        """Takes orders. Their outcomes come back as events in the log."""

"""The fold: events in, state of the fleet out. Pure; time comes with the entries.

`FleetState` is an accumulator: `apply` takes one event and changes it in place, because a worker
applies millions. Folding is deterministic and can be split anywhere: what `fold(a + b)` gives is what
`fold(b, fold(a))` gives (a property test holds this), so a snapshot and the tail after it are as good
as the whole log. Only what is alive is kept: a resource that was cleaned up leaves a short memory of
its last seq, nothing else.

The values are msgspec structs, not dataclasses: a million of them come out of a snapshot in a second,
and a resource, which cannot be part of a cycle, costs the garbage collector nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from sys import intern
from typing import Protocol

import msgspec

from store.event import Scalar

GONE_KEPT = 4096
"""How many cleaned-up resources of a process are remembered, to compare with inventories that were
taken a little earlier."""
GONE_MOST = GONE_KEPT * 3 // 2
"""Beyond this the oldest are forgotten together: one by one costs as much as the rest of a fold."""


class Event(Protocol):
    """What the fold reads of an event: `LifecycleEvent` and `EventRow` both have it."""

    @property
    def type(self) -> str: ...
    @property
    def ref(self) -> str: ...
    @property
    def process(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def holder(self) -> str | None: ...
    @property
    def uses(self) -> tuple[str, ...] | None: ...
    @property
    def owned_by(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def order_id(self) -> str | None: ...
    @property
    def attrs(self) -> dict[str, Scalar] | None: ...


class Resource(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """Something alive.

    Attributes:
        ref: `kind/id`.
        seq: of its last event (created, reused, adopted): the precondition of an order.
        created_ms, used_ms: Redis time in ms.
        uses: what it keeps alive.
        owned_by: what it dies with.
        in_use: acquired by how many; above 0 nothing tears it down.
        keep_until_ms: somebody asked for a stay until then; 0 is nobody.
        user: whose it is, for limits per user.
        awaits_owner: it is known that it will be owned, and not yet by whom.
    """

    ref: str
    seq: int
    created_ms: int
    used_ms: int
    uses: tuple[str, ...] = ()
    owned_by: str | None = None
    in_use: int = 0
    keep_until_ms: int = 0
    user: str | None = None
    awaits_owner: bool = False

    @property
    def kind(self) -> str:
        return self.ref.partition("/")[0]


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """The last try to end something, kept until it has gone.

    Attributes:
        order_id: of the last order.
        at_ms: when it was sent, or when its outcome came.
        seq: last seq of the resource that the order named.
        pending: no outcome yet.
        failures: failed so far, refusals included.
        reason: why the last one failed or was refused.
        refused: the last outcome was a refusal, not a failure.
    """

    order_id: str
    at_ms: int
    seq: int
    pending: bool = True
    failures: int = 0
    reason: str = ""
    refused: bool = False


class ProcessState(msgspec.Struct):
    """What the log says of one live host process.

    Attributes:
        id: `name@hostname:pid:start`.
        started_ms: Redis time of its first event.
        last_ms: Redis time of its last event.
        seq: of its last event.
        resources: alive, by reference, in the order of creation.
        attempts: teardowns that are under way or did not succeed, by target (see `target_of`).
        gone: target -> seq of the event that ended it, the latest last; the last `GONE_KEPT` at least,
            half as many again at most.
    """

    id: str
    started_ms: int
    last_ms: int
    seq: int = 0
    resources: dict[str, Resource] = {}
    attempts: dict[str, Attempt] = {}
    gone: dict[str, int] = {}

    def forget(self, target: str, seq: int) -> None:
        """A resource or an index entry is gone; what was tried on it is settled."""
        self.attempts.pop(target, None)
        self.gone.pop(target, None)
        self.gone[target] = seq
        if len(self.gone) > GONE_MOST:
            self.forget_oldest()

    def forget_oldest(self) -> None:
        """Forgets what is gone longest; what is left is in another dict from here on."""
        self.gone = dict(islice(self.gone.items(), len(self.gone) - GONE_KEPT, None))

    def close(self, ref: str, seq: int, at_ms: int) -> None:
        """Takes a resource out of what is alive."""
        resource = self.resources.pop(ref, None)
        self.forget(ref, seq)
        if resource is not None:
            # Its end is the last use of what it used: the idle time of that begins now.
            for used in resource.uses:
                target = self.resources.get(used)
                if target is not None and target.used_ms < at_ms:
                    target.used_ms = at_ms


def target_of(ref: str, registry: str | None, key: str | None) -> str:
    """The name under which attempts on a resource, or on an index entry, are counted."""
    return ref if registry is None else f"{ref}\0{registry}\0{key}"


class FleetState(msgspec.Struct):
    """What the log says is alive, in all processes.

    Attributes:
        processes: live host processes by id.
        events: how many events were folded.
        lost, stopped: processes that ended, how many by which way.
    """

    processes: dict[str, ProcessState] = {}
    events: int = 0
    lost: int = 0
    stopped: int = 0

    def apply(self, event: Event, at_ms: int) -> ProcessState | None:
        """Folds one event.

        Args:
            event: the event.
            at_ms: Redis time of its entry, in ms.

        Returns:
            The process that it speaks of, None when that has ended or never began.
        """
        self.events += 1
        kind = event.type
        writer = event.process
        holder = event.holder or writer
        process = self.processes.get(holder)
        if process is None:
            if kind in ENDS or holder != writer:
                return None
            process = self.processes[holder] = ProcessState(holder, at_ms, at_ms)
        if holder == writer:
            process.seq = event.seq
            process.last_ms = at_ms
        if kind in _ALIVE:
            _alive(process, event, at_ms)
        elif kind == "cleaned_up":
            attrs = event.attrs
            if attrs is not None and "registry" in attrs:
                process.forget(_target(event), event.seq)
            else:
                process.close(event.ref, event.seq, at_ms)
        elif kind == "cleanup_requested":
            _requested(process, event, at_ms)
        elif kind in _NOT_DONE:
            _not_done(process, event, at_ms)
        elif kind in ENDS:
            del self.processes[holder]
            if kind == "process_lost":
                self.lost += 1
            else:
                self.stopped += 1
        return process

    def find(self, ref: str) -> Iterator[tuple[ProcessState, Resource]]:
        """Every live resource with this reference; each process may have one."""
        for process in self.processes.values():
            resource = process.resources.get(ref)
            if resource is not None:
                yield process, resource

    def copy(self) -> FleetState:
        """An independent copy."""
        return copy.deepcopy(self)

    @property
    def size(self) -> int:
        """How many resources are alive."""
        return sum(len(process.resources) for process in self.processes.values())

    def take(self, part: FleetState) -> None:
        """Takes the processes of another partition in; they are shared with it."""
        self.processes.update(part.processes)
        self.events += part.events
        self.lost += part.lost
        self.stopped += part.stopped

    def leave(self, part: FleetState) -> None:
        """The opposite of `take`."""
        for process in part.processes:
            self.processes.pop(process, None)
        self.events -= part.events
        self.lost -= part.lost
        self.stopped -= part.stopped


LARGEST = 2**52
"""Larger numbers are taken for this one: a state must fit into a snapshot, whatever a host writes."""
_NUMBER = (int, float)
_ALIVE = frozenset({"created", "reused", "adopted"})
_NOT_DONE = frozenset({"cleanup_failed", "cleanup_refused"})
ENDS = frozenset({"process_stopped", "process_lost"})
"""Events after which a process is no more."""


def _alive(process: ProcessState, event: Event, at_ms: int) -> None:
    ref = event.ref
    resources = process.resources
    resource = resources.get(ref)
    if resource is None:
        resource = resources[ref] = Resource(ref, event.seq, at_ms, at_ms)
        process.gone.pop(ref, None)
        process.attempts.pop(ref, None)
    else:
        resource.seq = event.seq
        resource.used_ms = at_ms
    uses = event.uses
    if uses is not None:
        resource.uses = share(uses)
    for used in resource.uses:
        # Using a session is using its runner, and the runner's use is its agent's. One step is
        # enough: what is kept alive further down follows from the desired state.
        target = resources.get(used)
        if target is not None and target.used_ms < at_ms:
            target.used_ms = at_ms
    if event.owned_by is not None:
        resource.owned_by = event.owned_by
        resource.awaits_owner = False
    attrs = event.attrs
    if attrs is not None:
        take_attrs(resource, attrs, at_ms)


shared: dict[tuple[str, ...], tuple[str, ...]] = {}
"""What `share` knows."""
_SHARED_MOST = 16_384


def share(uses: tuple[str, ...]) -> tuple[str, ...]:
    """The same references, in memory once for all resources that use them: many use one runner."""
    known = shared.get(uses)
    if known is None:
        if len(shared) >= _SHARED_MOST:
            shared.clear()  # Runners come and go. What is in use is only no longer shared from here on.
        known = shared[uses] = tuple([intern(used) for used in uses])
    return known


def take_attrs(resource: Resource, attrs: dict[str, Scalar], at_ms: int) -> None:
    """Takes up what an event says in its attributes."""
    in_use = attrs.get("in_use")
    if in_use is not None:
        if isinstance(in_use, int):
            resource.in_use = int(in_use) if in_use < LARGEST else LARGEST
        if len(attrs) == 1:
            return  # A use, the most frequent event of all.
    stay = attrs.get("keep_alive_s")
    if isinstance(stay, _NUMBER):
        until = at_ms + int(min(stay, LARGEST / 1000) * 1000)
        resource.keep_until_ms = max(resource.keep_until_ms, until)
    user = attrs.get("user")
    if user is not None:
        resource.user = intern(str(user))
    if attrs.get("awaits_owner") and resource.owned_by is None:
        resource.awaits_owner = True


def _target(event: Event) -> str:
    attrs = event.attrs or {}
    registry, key = attrs.get("registry"), attrs.get("key")
    return target_of(event.ref, None if registry is None else str(registry), str(key))


def _requested(process: ProcessState, event: Event, at_ms: int) -> None:
    target = _target(event)
    before = process.attempts.get(target)
    expected = (event.attrs or {}).get("expected_seq")
    seq = min(expected, LARGEST) if isinstance(expected, int) else 0
    # A resource that changed since the last try is tried afresh.
    # One that was never answered failed, or a host that is silent would never be reported as stuck.
    again = before is not None and before.seq == seq
    failures = before.failures + before.pending if before is not None and again else 0
    process.attempts[target] = Attempt(event.order_id or "", at_ms, seq, True, failures)


def _not_done(process: ProcessState, event: Event, at_ms: int) -> None:
    attempt = process.attempts.get(_target(event))
    if attempt is None or attempt.order_id != (event.order_id or ""):
        return
    attempt.pending = False
    attempt.at_ms = at_ms
    attempt.failures += 1
    attempt.reason = event.reason or ""
    attempt.refused = event.type == "cleanup_refused"


def fold(entries: Iterable[tuple[int, Event]], state: FleetState | None = None) -> FleetState:
    """Folds events into a state.

    Args:
        entries: (Redis time in ms, event), in the order of the log.
        state: to go on from; it is left as it was. None begins with nothing.

    Returns:
        The new state.
    """
    result = FleetState() if state is None else state.copy()
    for at_ms, event in entries:
        result.apply(event, at_ms)
    return result

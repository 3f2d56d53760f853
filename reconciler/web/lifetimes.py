"""Lifetimes: from when to when each resource lived, when it was used, and why it ended. No I/O.

The fold forgets what has ended; a timeline must not. So this listens to the same events and keeps a
bounded memory of them: `LIFETIMES_KEPT` in all, the ones that ended first go first. Every change gets
the next number, and `changed_after` gives what changed since a number: paging through the whole and
keeping up with what is new are one and the same question.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

import msgspec

from reconciler.fold import Event, FleetState

LIFETIMES_KEPT = 50_000
MARKS_KEPT = 48
"""Use marks of one lifetime; beyond it every other one is left out, so that they still span it all."""

_END_WORDS = {
    "process_lost": "its process was lost",
    "process_stopped": "its process stopped",
}


class Lifetime(msgspec.Struct):
    """One resource from its beginning to its end.

    Attributes:
        n: number of this lifetime; a resource that was made again has another.
        version: number of its last change.
        ref, process: which resource, where.
        created_ms: Redis time of its first event.
        ended_ms: Redis time of its end; null while it lives.
        end: the type of the event that ended it.
        reason: why it ended, in words.
        order_id: of the order that ended it.
        owned_by: what it dies with.
        uses: what it keeps alive.
        used: Redis times of its uses; thinned out where there were many.
        use_count: how often it was used.
        in_use: acquired by how many.
    """

    n: int
    version: int
    ref: str
    process: str
    created_ms: int
    ended_ms: int | None = None
    end: str | None = None
    reason: str | None = None
    order_id: str | None = None
    owned_by: str | None = None
    uses: tuple[str, ...] = ()
    used: list[int] = []
    use_count: int = 0
    in_use: int = 0

    @property
    def kind(self) -> str:
        return self.ref.partition("/")[0]


class Lifetimes:
    """The lifetimes of a fleet, kept up by its events.

    Attributes:
        version: number of the last change.
        left_off: how many lifetimes are no longer kept, or never were for want of room.
        complete_since_ms: Redis time from which on nothing is left off; 0 is all of it.
    """

    def __init__(self, kept: int = LIFETIMES_KEPT) -> None:
        self.version = 0
        self.left_off = 0
        self.complete_since_ms = 0
        self._kept = kept
        self._numbers = 0
        self._by_change: OrderedDict[int, Lifetime] = OrderedDict()
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._live: dict[str, dict[str, Lifetime]] = {}

    def __len__(self) -> int:
        return len(self._by_change)

    def __iter__(self) -> Iterator[Lifetime]:
        return iter(self._by_change.values())

    def see(self, event: Event, at_ms: int) -> None:
        """Takes up one event, in the order of the log."""
        holder = event.holder or event.process
        if event.type in _END_WORDS:
            words = event.reason or _END_WORDS[event.type]
            for lifetime in self._live.pop(holder, {}).values():
                self._end(lifetime, event, at_ms, words)
        elif event.ref.startswith("process/"):
            return
        elif event.type in {"created", "adopted", "reused"}:
            self._alive(event, holder, at_ms)
        elif event.type == "cleaned_up" and "registry" not in (event.attrs or {}):
            ended = self._live.get(holder, {}).pop(event.ref, None)
            if ended is not None:
                self._end(ended, event, at_ms, event.reason)

    def begin(self, at_ms: int) -> None:
        """What ended up to this moment is not known."""
        self.complete_since_ms = max(self.complete_since_ms, at_ms)

    def seed(self, state: FleetState) -> None:
        """Takes up what is alive in a state whose events were not seen (it came from a snapshot)."""
        for process in state.processes.values():
            known = self._live.get(process.id, {})
            for resource in process.resources.values():
                if resource.ref in known:
                    continue
                made = self._new(resource.ref, process.id, resource.created_ms)
                if made is not None:
                    made.owned_by, made.uses = resource.owned_by, resource.uses
                    made.in_use = resource.in_use
                    if resource.used_ms > resource.created_ms:
                        made.used, made.use_count = [resource.used_ms], 1

    def changed_after(self, version: int, limit: int) -> list[Lifetime]:
        """Up to `limit` lifetimes that changed after a version, the earliest change first."""
        if version <= 0:
            return list(islice(self._by_change.values(), limit))
        later: list[Lifetime] = []
        for lifetime in reversed(self._by_change.values()):
            if lifetime.version <= version:
                break
            later.append(lifetime)
        later.reverse()
        return later[:limit]

    def of(self, ref: str) -> list[Lifetime]:
        """All lifetimes of a resource, in every process."""
        return [lifetime for lifetime in self._by_change.values() if lifetime.ref == ref]

    def refs(self) -> set[str]:
        return {lifetime.ref for lifetime in self._by_change.values()}

    def _new(self, ref: str, process: str, at_ms: int) -> Lifetime | None:
        if len(self._by_change) >= self._kept and not self._drop_one():
            self._leave_off(at_ms)
            return None
        self._numbers += 1
        made = Lifetime(self._numbers, 0, ref, process, at_ms, used=[])
        self._live.setdefault(process, {})[ref] = made
        self._change(made)
        return made

    def _drop_one(self) -> bool:
        if not self._ended:
            return False
        oldest, _ = self._ended.popitem(last=False)
        dropped = self._by_change.pop(oldest)
        self._leave_off(dropped.ended_ms or 0)
        return True

    def _leave_off(self, at_ms: int) -> None:
        self.left_off += 1
        self.complete_since_ms = max(self.complete_since_ms, at_ms)

    def _change(self, lifetime: Lifetime) -> None:
        self.version += 1
        lifetime.version = self.version
        self._by_change[lifetime.n] = lifetime
        self._by_change.move_to_end(lifetime.n)

    def _alive(self, event: Event, holder: str, at_ms: int) -> None:
        lifetime = self._live.get(holder, {}).get(event.ref)
        if lifetime is None:
            lifetime = self._new(event.ref, holder, at_ms)
            if lifetime is None:
                return
        else:
            lifetime.use_count += 1
            lifetime.used.append(at_ms)
            if len(lifetime.used) > MARKS_KEPT:
                del lifetime.used[1::2]
            self._change(lifetime)
        if event.uses is not None:
            lifetime.uses = event.uses
        if event.owned_by is not None:
            lifetime.owned_by = event.owned_by
        in_use = (event.attrs or {}).get("in_use")
        if isinstance(in_use, int):
            lifetime.in_use = int(in_use)

    def _end(self, lifetime: Lifetime, event: Event, at_ms: int, reason: str | None) -> None:
        lifetime.ended_ms = at_ms
        lifetime.end = event.type
        lifetime.reason = reason
        lifetime.order_id = event.order_id
        lifetime.in_use = 0
        self._change(lifetime)
        self._ended[lifetime.n] = None

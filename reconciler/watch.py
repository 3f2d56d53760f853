"""Watches one process and knows its drift at the cost of what changes, not of what is alive. Pure.

`find_drift` is the specification: it compares everything with everything. `ProcessWatch` gives the
same answer (a property test holds them together) from sets that it keeps up to date with each event
and each changed bucket of the inventory: which resources are past their moment, which are not held,
which are held and not known, which index entries name something dead. A pass then costs what is in
these sets, so a fleet that is in sync costs nothing however large it is.

A resource has at least one place in the agenda, at or before its moment, unless it is parked: kept
by something in use. What shortens a life (a user or an owner that goes) looks at the resource anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import inf

from reconciler.agenda import Agenda
from reconciler.desired import desired_until, evictions, own_limit, why_undesired
from reconciler.drift import (
    Drift,
    DriftItem,
    dangling_item,
    ghost_item,
    orphan_item,
    untracked_item,
)
from reconciler.fold import Event, FleetState, ProcessState
from reconciler.fold_page import Folded, fold_page
from reconciler.graph import Graph, Refs, graph_of
from reconciler.policy import Policy
from store.messages import IndexEntry, InventoryChange, Summary

_DEEPEST = 200
_REMEMBERED = 10_000
"""Moments that one look keeps at hand, as many may hang on the same ones."""


class _TooDeep(Exception):
    """The edges go round in a circle, or on and on: only a look at everything helps."""


class ProcessWatch:
    """The drift of one process, kept up to date.

    Args:
        process: its state; whoever folds into it tells the watch, see `fold_watched`.
        policy: what is desired.

    Attributes:
        graph: its edges, seen from above.
        fresh: it has not been told of an inventory yet.
    """

    def __init__(self, process: ProcessState, policy: Policy) -> None:
        self.process = process
        self.fresh = True
        self.graph: Graph = graph_of(process)
        self._policy = policy
        self._agenda = Agenda()
        self._parked: set[str] = set()
        self._look_at: set[str] = set()
        self._look_at_all = True
        self._orphans: dict[str, float] = {}
        self._summary: Summary | None = None
        self._kinds: frozenset[str] = frozenset()
        self._absent: set[str] | None = None  # alive and not held; None is all of them
        self._unheld: Refs = {}  # those of them whose kind the registries hold
        self._unknown: Refs = {}  # held and not alive
        self._dead_targets: Refs = {}

    # --- events -----------------------------------------------------------------------------------

    def changed(
        self, ref: str, uses: tuple[str, ...], owner: str | None, *, was_alive: bool
    ) -> None:
        """An event about `ref` was folded.

        Args:
            ref: the resource.
            uses, owner: its edges before the event.
            was_alive: it was alive before the event.
        """
        resource = self.process.resources.get(ref)
        if resource is None:
            if was_alive:
                self._ended(ref, uses, owner)
            return
        if not was_alive:
            self.graph.link(ref, resource.uses, resource.owned_by)
            self._look_at.add(ref)
            self._came(ref)
        elif resource.uses != uses or resource.owned_by != owner:
            self.graph.unlink(ref, uses, owner)
            self.graph.link(ref, resource.uses, resource.owned_by)
            self._shorten([ref, *uses])
        elif ref in self._parked:
            self._look_at.add(ref)

    def _came(self, ref: str) -> None:
        self._dead_targets.pop(ref, None)
        self._look_at.update(self.graph.owned_by(ref))
        if ref in self._unknown:
            del self._unknown[ref]
            return
        if self._absent is not None:
            self._absent.add(ref)
        if ref.partition("/")[0] in self._kinds:
            self._unheld[ref] = None

    def _ended(self, ref: str, uses: tuple[str, ...], owner: str | None) -> None:
        self.graph.unlink(ref, uses, owner)
        self._shorten([*uses, *self.graph.owned_by(ref)])
        self._orphans.pop(ref, None)
        self._parked.discard(ref)
        self._unheld.pop(ref, None)
        if self._absent is not None:
            if ref not in self._absent:
                self._unknown[ref] = None
                return
            self._absent.remove(ref)
        if self.graph.naming(ref):
            self._dead_targets[ref] = None

    def _shorten(self, refs: Iterable[str]) -> None:
        """Something that kept these alive is gone: their moment, and what hangs on it, may be nearer."""
        todo = list(refs)
        while todo:
            ref = todo.pop()
            resource = self.process.resources.get(ref)
            if resource is not None and ref not in self._look_at:
                self._look_at.add(ref)
                todo += resource.uses
                todo += self.graph.owned_by(ref)

    # --- inventory --------------------------------------------------------------------------------

    def inventory_changed(self, change: InventoryChange) -> None:
        """Some buckets of the inventory changed."""
        self._summary = change.summary
        kinds = frozenset(change.summary.kinds)
        resources = self.process.resources
        absent = self._absent
        if absent is None:
            # Copied, for a set that lost members keeps its size.
            absent = self._absent = set(resources.keys() - change.held)
        for ref in change.let_go:
            self._unknown.pop(ref, None)
            if ref in resources:
                absent.add(resources[ref].ref)
                self._unheld[ref] = None
            elif self.graph.naming(ref):
                self._dead_targets[ref] = None
        for ref in change.held:
            absent.discard(ref)
            self._unheld.pop(ref, None)
            self._dead_targets.pop(ref, None)
            if ref not in resources:
                self._unknown[ref] = None
        for entry in change.struck:
            named = self.graph.named.get(entry.target)
            if named is not None:
                named.pop(entry, None)
                if not named:
                    del self.graph.named[entry.target]
                    self._dead_targets.pop(entry.target, None)
        for entry in change.entered:
            self.graph.named.setdefault(entry.target, {})[entry] = None
            if entry.target not in resources and entry.target not in self._unknown:
                self._dead_targets[entry.target] = None
        if kinds != self._kinds:
            self._kinds = kinds
            self._unheld = {ref: None for ref in resources if ref in absent}

    # --- drift ------------------------------------------------------------------------------------

    def drift(self, now_ms: int) -> Drift:
        """What `find_drift` finds in this process, with the inventory last heard of."""
        summary = self._summary
        if summary is not None and summary.as_of > self.process.seq:
            summary = None
        orphans = tuple(self._find_orphans(now_ms, summary.rss if summary is not None else 0))
        if summary is None:
            return Drift(orphans)
        as_of = summary.as_of
        ghosts = {
            ref: item
            for ref in self._unheld
            if (item := ghost_item(self.process, ref, as_of, self._kinds)) is not None
        }
        return Drift(
            # What is not there cannot be torn down: it is a ghost, whatever the clock says.
            tuple(item for item in orphans if item.ref not in ghosts),
            tuple(self._find_dangling(as_of)),
            tuple(ghosts.values()),
            tuple(
                item
                for ref in sorted(self._unknown)
                if (item := untracked_item(self.process, ref, as_of, summary.findings)) is not None
            ),
        )

    def next_at(self) -> float:
        """When to look again although nothing happens, in ms of Redis time."""
        return self._agenda.next_at()

    def _find_dangling(self, as_of: int) -> Iterator[DriftItem]:
        for target in self._dead_targets:
            entries: Iterable[IndexEntry] = self.graph.naming(target)
            for entry in entries:
                item = dangling_item(self.process, entry, as_of, self._kinds)
                if item is not None:
                    yield item

    def _find_orphans(self, now_ms: int, rss: int) -> Iterator[DriftItem]:
        due = self._agenda.pop_due(now_ms)
        before: Iterable[str] = self._orphans
        look_at: Iterable[str] = self.process.resources if self._look_at_all else self._look_at
        self._orphans, self._look_at, self._look_at_all = {}, set(), False
        bounds: dict[str, float] = {}
        try:
            # What was an orphan is looked at again: a use may have given it more time.
            for ref in chain(before, due, look_at):
                if ref not in self._orphans:
                    self._place(ref, now_ms, bounds)
                if len(bounds) > _REMEMBERED:
                    bounds.clear()
        except _TooDeep:
            self._place_all(now_ms, bounds)
        process, policy = self.process, self._policy
        evicted = evictions(process, policy, now_ms, rss=rss)
        for ref, bound in self._orphans.items():
            reason = why_undesired(process.resources[ref], process, policy, now_ms)
            yield orphan_item(process, ref, reason, min(bound, now_ms))
        for ref, reason in evicted.items():
            if ref not in self._orphans:
                yield orphan_item(process, ref, reason, now_ms, "evicted")

    def _place(self, ref: str, now_ms: int, bounds: dict[str, float]) -> None:
        """Puts a resource where it belongs: among the orphans, on the agenda, or parked."""
        self._parked.add(ref)
        todo = [ref]
        while todo:
            ref = todo.pop()
            resource = self.process.resources.get(ref)
            if ref not in self._parked:
                continue  # It was in it twice.
            self._parked.discard(ref)
            if resource is None:
                continue
            bound = self._bound(ref, now_ms, bounds, 0)
            if bound == inf:
                self._parked.add(ref)
                continue
            if bound <= now_ms:
                self._orphans[ref] = bound
            else:
                self._agenda.add(bound, ref, now_ms)
            # What it may have kept alive for ever has a moment again.
            todo += [
                kept for kept in (*resource.uses, *self.graph.owned_by(ref)) if kept in self._parked
            ]

    def _bound(self, ref: str, now_ms: int, bounds: dict[str, float], depth: int) -> float:
        """Not later than the moment of `ref`, and exact when that has passed.

        The first keeper that lives is enough: to know that a runner has to stay, one of its ten
        thousand sessions is asked, not all.
        """
        known = bounds.get(ref)
        if known is not None:
            return known
        if depth > _DEEPEST:
            raise _TooDeep
        process, policy = self.process, self._policy
        resource = process.resources[ref]
        bound = own_limit(resource, process, policy)
        if bound <= now_ms:
            owner = resource.owned_by
            if owner is not None and owner in process.resources and owner != ref:
                bound = max(bound, self._bound(owner, now_ms, bounds, depth + 1))
        if bound <= now_ms:
            hop = policy.idle_ms(resource.kind) or 0.0
            for user in reversed(self.graph.users.get(ref, {})):
                if user in process.resources:
                    bound = max(bound, self._bound(user, now_ms, bounds, depth + 1) + hop)
                    if bound > now_ms:
                        break
        bounds[ref] = bound
        return bound

    def _place_all(self, now_ms: int, bounds: dict[str, float]) -> None:
        """The long way, for graphs with circles: a look at everything, again at the next moment."""
        bounds.clear()
        bounds.update(desired_until(self.process, self._policy))
        self._orphans = {ref: until for ref, until in bounds.items() if until <= now_ms}
        self._parked = {ref for ref, until in bounds.items() if until == inf}
        for ref, until in bounds.items():
            if now_ms < until < inf:
                self._agenda.add(until, ref, now_ms)


class Watches:
    """The watches of all processes that are folded here."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._of: dict[str, ProcessWatch] = {}

    def of(self, process: ProcessState) -> ProcessWatch:
        """The watch of a process; made, at the cost of all it holds, when there is none."""
        watch = self._of.get(process.id)
        if watch is None or watch.process is not process:
            watch = self._of[process.id] = ProcessWatch(process, self._policy)
        return watch

    def forget(self, process: str) -> None:
        self._of.pop(process, None)

    def fold_page(self, state: FleetState, events: Sequence[Event], times: Sequence[int]) -> Folded:
        """`fold_page`, and tells the watches of the processes, as far as there are any."""
        return fold_page(state, events, times, self.fold, self._watching)

    def _watching(self, process: ProcessState) -> ProcessWatch | None:
        watch = self._of.get(process.id)
        return watch if watch is not None and watch.process is process else None

    def fold(self, state: FleetState, event: Event, at_ms: int) -> ProcessState | None:
        """Folds an event and tells the watch of its process, if there is one; see `FleetState.apply`."""
        name = event.holder or event.process
        watch = self._of.get(name)
        if watch is None or state.processes.get(name) is not watch.process:
            return state.apply(event, at_ms)
        before = watch.process.resources.get(event.ref)
        uses, owner = ((), None) if before is None else (before.uses, before.owned_by)
        process = state.apply(event, at_ms)
        if name in state.processes:
            watch.changed(event.ref, uses, owner, was_alive=before is not None)
        else:
            del self._of[name]
        return process

"""What changed between two moments: what appeared, what went, by kind and reason. Pure.

Counts are exact however long the stretch is; single changes are kept up to a bound. Reasons differ by
a number or a name from case to case ("idle for 3612.4 s, …"), so they are counted without these.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

from reconciler.fold import Event, FleetState

CHANGES_KEPT = 10_000
"""Single changes that are kept, of those that appeared and of those that went; the latest."""

_NUMBER = re.compile(r"\b\d+(\.\d+)?(e-?\d+)?\b")
_REF = re.compile(r"\b([a-z_]+)/\S+")


@dataclass(frozen=True, slots=True)
class Change:
    """One resource that appeared or went.

    Attributes:
        id: of the log entry.
        ref, process: which, where.
        type: of the event that did it.
        reason: in words, empty where none was given.
        order_id: the order by which it went.
        lived_ms: how long it lived, of one that went.
    """

    id: str
    ref: str
    process: str
    type: str
    reason: str = ""
    order_id: str | None = None
    lived_ms: int | None = None

    @property
    def at_ms(self) -> int:
        return int(self.id.partition("-")[0])

    @property
    def kind(self) -> str:
        return self.ref.partition("/")[0]


class Changes:
    """Takes up the events of a stretch and counts what they changed.

    Args:
        state: the fold of everything before the stretch; it is carried on.

    Attributes:
        state: the fold up to the last event seen.
        events: how many were seen.
        before: how many of each kind were alive at the beginning.
        appeared: kind -> event type (`created`, `adopted`, …) -> count.
        went: kind -> reason without numbers and names -> count.
        refused, failed: teardowns that did not succeed, kind -> count.
        arrivals, departures: single changes, the latest.
        processes: what became of processes: `started`, `stopped`, `lost` -> ids.
    """

    def __init__(self, state: FleetState) -> None:
        self.state = state
        self.events = 0
        self.before = alive_by_kind(state)
        self.appeared: dict[str, Counter[str]] = defaultdict(Counter)
        self.went: dict[str, Counter[str]] = defaultdict(Counter)
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.arrivals: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self.departures: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self.processes: dict[str, list[str]] = {"started": [], "stopped": [], "lost": []}

    @property
    def after(self) -> Counter[str]:
        """How many of each kind are alive at the end."""
        return alive_by_kind(self.state)

    def see(self, entry_id: str, event: Event) -> None:
        """Takes up one event, in the order of its partition."""
        self.events += 1
        kind, at_ms = event.type, int(entry_id.partition("-")[0])
        holder = event.holder or event.process
        process = self.state.processes.get(holder)
        resource = None if process is None else process.resources.get(event.ref)
        if kind in {"process_lost", "process_stopped"} and process is not None:
            self.processes["lost" if kind == "process_lost" else "stopped"].append(holder)
            words = "its process was lost" if kind == "process_lost" else "its process stopped"
            for held in process.resources.values():
                self._gone(entry_id, held.ref, holder, event, words, at_ms - held.created_ms)
        elif kind == "cleanup_refused":
            self.refused[event.ref.partition("/")[0]] += 1
        elif kind == "cleanup_failed":
            self.failed[event.ref.partition("/")[0]] += 1
        self.state.apply(event, at_ms)
        after = self.state.processes.get(holder)
        if after is None:
            return
        if process is None:
            self.processes["started"].append(holder)
        there = event.ref in after.resources
        if there and resource is None:
            self.appeared[event.ref.partition("/")[0]][str(kind)] += 1
            reason = event.reason or ""
            self.arrivals.append(Change(entry_id, event.ref, holder, str(kind), reason))
        elif resource is not None and not there:
            reason = event.reason or "without a reason"
            self._gone(entry_id, event.ref, holder, event, reason, at_ms - resource.created_ms)

    def _gone(
        self, entry_id: str, ref: str, holder: str, event: Event, reason: str, lived_ms: int
    ) -> None:
        self.went[ref.partition("/")[0]][general(reason)] += 1
        self.departures.append(
            Change(entry_id, ref, holder, str(event.type), reason, event.order_id, lived_ms)
        )


def general(reason: str) -> str:
    """A reason without the numbers and names in it, so that alike ones are counted together."""
    return _NUMBER.sub("…", _REF.sub(r"\1/…", reason))


def alive_by_kind(state: FleetState) -> Counter[str]:
    """How many resources of each kind are alive."""
    return Counter(
        resource.kind
        for process in state.processes.values()
        for resource in process.resources.values()
    )

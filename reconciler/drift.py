"""Drift: the difference between what is desired and what is. Pure.

There is no grace period in it. An inventory says of which event it is the state (`as_of`), and only
what the fold knows to be older than that is compared; what changed since is compared with the next
inventory. So a difference is a difference, not a race.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from reconciler.desired import desired_until, evictions, why_undesired
from reconciler.fold import FleetState, ProcessState, target_of
from reconciler.policy import Policy
from store.messages import IndexEntry, Inventory

Sort = Literal["orphan", "dangling", "ghost", "untracked"]
Cause = Literal[
    "idle", "unused", "owner_gone", "no_owner", "evicted", "dangling", "ghost", "untracked"
]
"""Why something has to go, as one word of a closed set; `reason` says it in words."""


@dataclass(frozen=True, slots=True)
class DriftItem:
    """One difference.

    Attributes:
        sort: `orphan` alive and should not be; `dangling` an index entry that names something not
            alive; `ghost` should be alive and is not; `untracked` alive, the log never heard of it.
        process: where.
        ref: the resource; for `dangling` the one that the entry names.
        reason: in words.
        seq: last seq of the resource, 0 where the log has none.
        registry, key: the entry, for `dangling`.
        since_ms: Redis time since when it is so, as far as known; 0 is unknown.
        finding: for what a leak probe found, whether a teardown can end it; None for all else.
        why: an orphan is one because of this; see `cause`.
    """

    sort: Sort
    process: str
    ref: str
    reason: str
    seq: int = 0
    registry: str | None = None
    key: str | None = None
    since_ms: int = 0
    finding: bool | None = None
    why: Cause | None = None

    @property
    def cause(self) -> Cause:
        """Why it has to go, as one word."""
        if self.sort != "orphan":
            return self.sort
        return self.why or "idle"


@dataclass(frozen=True, slots=True)
class Drift:
    """All differences, by sort."""

    orphans: tuple[DriftItem, ...] = ()
    dangling: tuple[DriftItem, ...] = ()
    ghosts: tuple[DriftItem, ...] = ()
    untracked: tuple[DriftItem, ...] = ()

    def __iter__(self) -> Iterator[DriftItem]:
        yield from self.orphans
        yield from self.dangling
        yield from self.ghosts
        yield from self.untracked

    @classmethod
    def of(cls, parts: Iterable[Drift]) -> Drift:
        """The drift of several processes as one."""
        every = list(parts)
        return cls(
            tuple(item for part in every for item in part.orphans),
            tuple(item for part in every for item in part.dangling),
            tuple(item for part in every for item in part.ghosts),
            tuple(item for part in every for item in part.untracked),
        )

    def __bool__(self) -> bool:
        return bool(self.orphans or self.dangling or self.ghosts or self.untracked)


def find_drift(
    state: FleetState,
    inventories: Mapping[str, Inventory],
    policy: Policy,
    now_ms: int,
    *,
    processes: Iterable[str] | None = None,
) -> Drift:
    """Compares what is desired with what is.

    Args:
        state: the fold of the log.
        inventories: by process; of a process without one only orphans are found. An inventory that
            is ahead of the fold is left aside until the fold has caught up.
        policy: what is desired.
        now_ms: Redis time.
        processes: only these; None is all.
    """
    orphans: list[DriftItem] = []
    dangling: list[DriftItem] = []
    ghosts: list[DriftItem] = []
    untracked: list[DriftItem] = []
    chosen = state.processes if processes is None else processes
    for name in chosen:
        process = state.processes.get(name)
        if process is None:
            continue
        inventory = inventories.get(name)
        if inventory is not None and inventory.as_of > process.seq:
            inventory = None
        rss = inventory.rss if inventory is not None else 0
        missing: set[str] = set()
        if inventory is not None:
            dangling += _dangling(process, inventory)
            of_process = list(_ghosts(process, inventory))
            missing.update(ghost.ref for ghost in of_process)
            ghosts += of_process
            untracked += _untracked(process, inventory)
        # What is not there cannot be torn down: it is a ghost, whatever the clock says.
        orphans += (
            item
            for item in find_orphans(process, policy, now_ms, rss=rss)
            if item.ref not in missing
        )
    return Drift(tuple(orphans), tuple(dangling), tuple(ghosts), tuple(untracked))


def find_orphans(
    process: ProcessState, policy: Policy, now_ms: int, *, rss: int = 0
) -> Iterator[DriftItem]:
    """What is alive in a process and should not be: idle, unused, without owner, or in excess."""
    until = desired_until(process, policy)
    evicted = evictions(process, policy, now_ms, rss=rss)
    for ref, resource in process.resources.items():
        if until[ref] <= now_ms:
            reason = why_undesired(resource, process, policy, now_ms)
            yield orphan_item(process, ref, reason, until[ref])
        elif ref in evicted:
            yield orphan_item(process, ref, evicted[ref], now_ms, "evicted")


def _dangling(process: ProcessState, inventory: Inventory) -> Iterator[DriftItem]:
    for entry in inventory.entries:
        if entry.target in process.resources or entry.target in inventory.held:
            continue
        item = dangling_item(process, entry, inventory.as_of, inventory.kinds)
        if item is not None:
            yield item


def _ghosts(process: ProcessState, inventory: Inventory) -> Iterator[DriftItem]:
    for ref in process.resources:
        if ref not in inventory.held:
            item = ghost_item(process, ref, inventory.as_of, inventory.kinds)
            if item is not None:
                yield item


def _untracked(process: ProcessState, inventory: Inventory) -> Iterator[DriftItem]:
    for ref in sorted(inventory.held - process.resources.keys()):
        item = untracked_item(process, ref, inventory.as_of, inventory.findings)
        if item is not None:
            yield item


def orphan_item(
    process: ProcessState, ref: str, reason: str, since_ms: float, why: Cause | None = None
) -> DriftItem:
    """A resource that is alive and should not be; `why` None takes it from the resource."""
    resource = process.resources[ref]
    if why is None:
        if resource.owned_by is not None:
            why = "owner_gone"
        elif resource.awaits_owner:
            why = "no_owner"
        else:
            why = "idle" if resource.kind == "session" else "unused"
    since = max(0, int(since_ms))
    return DriftItem("orphan", process.id, ref, reason, resource.seq, since_ms=since, why=why)


def dangling_item(
    process: ProcessState, entry: IndexEntry, as_of: int, kinds: frozenset[str]
) -> DriftItem | None:
    """An index entry whose target is not alive; None where that cannot be said for sure."""
    target = entry.target
    ended = process.gone.get(target)
    if ended is None and target.partition("/")[0] not in kinds:
        return None  # Nothing in this process holds such things: whether it lives is not known.
    if ended is not None and ended > as_of:
        return None  # It ended after the inventory was taken: the entry may have gone with it.
    if process.gone.get(target_of(target, entry.registry, entry.key), 0) > as_of:
        return None  # It was removed after the inventory was taken.
    reason = f"{entry.registry}[{entry.key}] names {target}, which is not alive"
    return DriftItem("dangling", process.id, target, reason, registry=entry.registry, key=entry.key)


def ghost_item(
    process: ProcessState, ref: str, as_of: int, kinds: frozenset[str]
) -> DriftItem | None:
    """A resource that no registry holds; None where that cannot be said for sure."""
    resource = process.resources[ref]
    if resource.seq > as_of or resource.kind not in kinds:
        return None
    reason = "the log says that it is alive, its registry does not hold it"
    return DriftItem("ghost", process.id, ref, reason, resource.seq)


def untracked_item(
    process: ProcessState, ref: str, as_of: int, findings: Mapping[str, bool]
) -> DriftItem | None:
    """A resource that a registry holds and the log does not know; None if it only just ended."""
    if process.gone.get(ref, 0) > as_of:
        return None
    finding = findings.get(ref.partition("/")[0])
    reason = "its registry holds it, the log never heard of it"
    if finding is not None:
        reason = "a leak probe found it, nobody declared it"
    return DriftItem("untracked", process.id, ref, reason, finding=finding)

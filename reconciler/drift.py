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
from store.messages import Inventory

Sort = Literal["orphan", "dangling", "ghost", "untracked"]


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
        orphans += find_orphans(process, policy, now_ms, rss=rss)
        if inventory is not None:
            dangling += _dangling(process, inventory)
            ghosts += _ghosts(process, inventory)
            untracked += _untracked(process, inventory)
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
        elif ref in evicted:
            reason = evicted[ref]
        else:
            continue
        since = int(min(until[ref], now_ms))
        yield DriftItem("orphan", process.id, ref, reason, resource.seq, since_ms=since)


def _dangling(process: ProcessState, inventory: Inventory) -> Iterator[DriftItem]:
    for entry in inventory.entries:
        target = entry.target
        if target in process.resources or target in inventory.held:
            continue
        ended = process.gone.get(target)
        if ended is None and target.partition("/")[0] not in inventory.kinds:
            continue  # Nothing in this process holds such things: whether it lives is not known.
        if ended is not None and ended > inventory.as_of:
            continue  # It ended after the inventory was taken: the entry may have gone with it.
        if process.gone.get(target_of(target, entry.registry, entry.key), 0) > inventory.as_of:
            continue  # It was removed after the inventory was taken.
        yield DriftItem(
            "dangling",
            process.id,
            target,
            f"{entry.registry}[{entry.key}] names {target}, which is not alive",
            registry=entry.registry,
            key=entry.key,
        )


def _ghosts(process: ProcessState, inventory: Inventory) -> Iterator[DriftItem]:
    for ref, resource in process.resources.items():
        if (
            resource.seq <= inventory.as_of
            and ref not in inventory.held
            and resource.kind in inventory.kinds
        ):
            reason = "the log says that it is alive, its registry does not hold it"
            yield DriftItem("ghost", process.id, ref, reason, resource.seq)


def _untracked(process: ProcessState, inventory: Inventory) -> Iterator[DriftItem]:
    for ref in sorted(inventory.held - process.resources.keys()):
        if process.gone.get(ref, 0) <= inventory.as_of:
            finding = inventory.findings.get(ref.partition("/")[0])
            reason = "its registry holds it, the log never heard of it"
            if finding is not None:
                reason = "a leak probe found it, nobody declared it"
            yield DriftItem("untracked", process.id, ref, reason, finding=finding)

"""The plan: from drift to orders, in the order in which a teardown is safe. Pure.

A session goes before the runner it uses, a runner before its agent, an owner before what it owns,
and index entries last. A plan is closed: what the teardowns in it leave behind (things owned, index
entries that will dangle) is in it too, marked as a consequence, so that a dry run shows what a real
run does. A worker sends only what is due now, and finds consequences again in the next pass if they
are really there: a service that cleans up after itself is not told to do so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from zlib import crc32

from reconciler.drift import Cause, Drift, DriftItem
from reconciler.fold import Attempt, FleetState, ProcessState, target_of
from reconciler.graph import Graph, Refs, graph_of
from reconciler.policy import Policy
from reconciler.stages import before, stage_of_kind, stages_of
from store.messages import Action, Inventory

_CORRECTION_STAGE = -1
"""The log is set right first: a ghost that is closed no longer uses anything."""
ENTRY_STAGE = 1_000_000
_ANSWER_GRACE_MS = 10_000
"""An order without an outcome this long after its teardown's time limit counts as failed."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to be done.

    Attributes:
        action: see `store.messages.Action`.
        process, ref, seq, registry, key: as in an order.
        reason: in words.
        sort: the sort of drift that it ends.
        after: resources that must be gone before it.
        stage: steps of a lower one begin first.
        circle: what it is in a circle with, and their seqs: they go together.
        since_ms: Redis time since when it is due, as far as known.
        consequence: it becomes due only through other steps of this plan.
        cause: why it has to go, as one word.
    """

    action: Action
    process: str
    ref: str
    seq: int
    reason: str
    sort: str
    stage: int
    after: tuple[str, ...] = ()
    registry: str | None = None
    key: str | None = None
    consequence: bool = False
    since_ms: int = 0
    cause: Cause = "idle"
    circle: Mapping[str, int] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return target_of(self.ref, self.registry, self.key)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Drift that is not acted on now.

    Attributes:
        item: what.
        until_ms: Redis time of the next try; 0 where it waits for something else.
        reason: why it waits.
        failures: so far.
        stuck: it has failed so often that somebody should look.
    """

    item: DriftItem
    until_ms: int
    reason: str
    failures: int = 0
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in order, and what has to wait."""

    steps: tuple[Step, ...] = ()
    waiting: tuple[Waiting, ...] = ()

    @property
    def due(self) -> tuple[Step, ...]:
        """The steps that do not depend on the outcome of others."""
        return tuple(step for step in self.steps if not step.consequence)


def retry_at(target: str, attempt: Attempt, policy: Policy) -> int:
    """When a teardown may be tried again: exponential backoff with jitter, in ms of Redis time.

    The jitter is drawn from the target and the count of failures, so that the same state always
    gives the same plan, and a thousand teardowns that failed together do not return together.
    """
    if attempt.pending:
        return attempt.at_ms + int(policy.teardown_timeout * 1000) + _ANSWER_GRACE_MS
    wait = min(policy.backoff * 2.0 ** min(attempt.failures - 1, 32), policy.backoff_max)
    jitter = crc32(f"{target} {attempt.failures}".encode()) / 2**32
    return attempt.at_ms + int(wait * (0.5 + 0.5 * jitter) * 1000)


def make_plan(
    state: FleetState,
    drift: Drift,
    inventories: Mapping[str, Inventory],
    policy: Policy,
    now_ms: int,
    *,
    force: bool = False,
    graphs: Mapping[str, Graph] | None = None,
) -> Plan:
    """Makes a plan that ends the drift.

    Args:
        state: the fold of the log.
        drift: of that state.
        inventories: as given to `find_drift`; they tell which index entries will dangle.
        policy: backoff, and what to do with untracked resources.
        now_ms: Redis time.
        force: try again now what waits for its next try.
        graphs: by process, where somebody keeps them; otherwise they are derived.

    Returns:
        Steps in the order of teardown, and what waits: for a retry, an outcome, or a user that has
        not gone. Nothing in use is ever in it.
    """
    steps: list[Step] = []
    waiting: list[Waiting] = []
    by_process: dict[str, list[DriftItem]] = defaultdict(list)
    for item in drift:
        by_process[item.process].append(item)
    for name, items in by_process.items():
        process = state.processes.get(name)
        if process is None:
            continue
        ready: list[DriftItem] = []
        for item in items:
            held_up = _held_up(process, item, policy, now_ms, force=force)
            if held_up is None:
                ready.append(item)
            else:
                waiting.append(held_up)

        def free(item: DriftItem, process: ProcessState = process) -> bool:
            return _held_up(process, item, policy, now_ms, force=force) is None

        graph = graphs.get(name) if graphs is not None else None
        if graph is None:
            graph = graph_of(process, inventories.get(name))
        of_process = [*_teardowns(process, ready, waiting, graph, now_ms=now_ms, free=free)]
        of_process += _corrections(ready, policy)
        ending = dict.fromkeys(
            s.ref for s in of_process if s.action in {Action.TEARDOWN, Action.CLOSE_GHOST}
        )
        of_process += _entries(process, ready, graph, ending, free)
        steps += of_process
    steps.sort(key=lambda step: step.stage)
    return Plan(tuple(steps), tuple(waiting))


def _held_up(
    process: ProcessState, item: DriftItem, policy: Policy, now_ms: int, *, force: bool
) -> Waiting | None:
    """The reason to leave an item alone now, if there is one."""
    resource = process.resources.get(item.ref)
    if resource is not None and item.sort != "dangling" and resource.in_use > 0:
        return Waiting(item, 0, "it is in use")
    if item.sort == "untracked" and policy.untracked == "report":
        return Waiting(item, 0, "the policy says to report what is untracked")
    if item.finding is False:
        return Waiting(item, 0, "a trend is reported, there is nothing to tear down")
    if item.finding and policy.untracked != "teardown":
        # Nobody declared it, so nobody said how it should live: adopting it would hide the leak.
        return Waiting(item, 0, "a finding is torn down only where the policy says so")
    target = target_of(item.ref, item.registry, item.key)
    attempt = process.attempts.get(target)
    if attempt is None or attempt.seq != item.seq:
        return None
    at = retry_at(target, attempt, policy)
    if at <= now_ms or (force and not attempt.pending):
        return None
    reason = "its order is under way" if attempt.pending else attempt.reason
    stuck = attempt.failures >= policy.stuck_after
    return Waiting(item, at, reason, attempt.failures, stuck)


def _teardowns(
    process: ProcessState,
    ready: list[DriftItem],
    waiting: list[Waiting],
    graph: Graph,
    *,
    now_ms: int,
    free: Callable[[DriftItem], bool],
) -> Iterator[Step]:
    """Teardowns of orphans and of what they own, staged; what is still used or owned waits."""
    going = {item.ref: item for item in ready if item.sort == "orphan"}
    late = {w.item.ref for w in waiting if w.item.process == process.id}
    users, owned = graph.users, graph.owned
    # Whatever is used by something that stays has to stay; that in turn keeps what it uses, and
    # what it owns.
    ghosts = {item.ref for item in ready if item.sort == "ghost"}
    ending = going.keys() | ghosts
    kept = [ref for ref in going if any(user not in ending for user in users.get(ref, ()))]
    kept += [ref for owner in late for ref in owned.get(owner, ())]
    while kept:
        ref = kept.pop()
        item = going.pop(ref, None)
        if item is None:
            continue
        waiting.append(Waiting(item, 0, "something that uses or owns it is still alive"))
        kept += process.resources[ref].uses
        kept += owned.get(ref, ())
    staying = {w.item.ref for w in waiting if w.item.process == process.id}
    consequences = _owned_along(
        [*going, *ghosts], process, owned, users,
        free=lambda item: item.ref not in staying and free(item), now_ms=now_ms,
    )  # fmt: skip
    everything = going | consequences
    stages, circle_of = stages_of(process, everything, users)
    for ref, item in everything.items():
        yield Step(
            Action.TEARDOWN,
            process.id,
            ref,
            item.seq,
            item.reason,
            "orphan",
            stages[ref],
            before(process, ref, everything, users),
            consequence=ref in consequences,
            since_ms=item.since_ms,
            cause=item.cause,
            circle={one: everything[one].seq for one in circle_of.get(ref, ()) if one != ref},
        )


def _owned_along(
    ending: Sequence[str],
    process: ProcessState,
    owned: Mapping[str, Refs],
    users: Mapping[str, Refs],
    *,
    now_ms: int,
    free: Callable[[DriftItem], bool],
) -> dict[str, DriftItem]:
    """What will have lost its owner once `ending` is gone, and nothing else keeps alive."""
    gone = set(ending)
    along: dict[str, DriftItem] = {}
    todo = list(ending)
    while todo:
        ended = todo.pop()
        # Its user was all that kept alive what has lost its owner before.
        lonely = [_without_owner(process, used) for used in process.resources[ended].uses]
        for ref in [*owned.get(ended, ()), *chain.from_iterable(lonely)]:
            resource = process.resources[ref]
            if ref in gone or resource.in_use or resource.keep_until_ms > now_ms:
                continue
            reason = f"what it lives on, {ended}, goes in the same pass"
            item = DriftItem("orphan", process.id, ref, reason, resource.seq, why="owner_gone")
            if free(item):
                along[ref] = item
                gone.add(ref)
                todo.append(ref)
    # Candidates so far: those stay that something uses or owns that stays.
    kept = [
        ref for ref in along
        if any(user not in gone for user in users.get(ref, ()))
        or ((owner := process.resources[ref].owned_by) in process.resources and owner not in gone)
    ]  # fmt: skip
    while kept:
        ref = kept.pop()
        if along.pop(ref, None) is not None:
            gone.discard(ref)
            kept += process.resources[ref].uses
            kept += owned.get(ref, ())
    return along


def _without_owner(process: ProcessState, ref: str) -> list[str]:
    """It, if its owner is gone; the circle of owners that it is in, if it is; else nothing."""
    resource = process.resources.get(ref)
    if resource is None or resource.owned_by is None:
        return []
    circle = [ref]
    owner: str | None = resource.owned_by
    while owner is not None and (above := process.resources.get(owner)) is not None:
        if owner == ref:
            return circle
        if owner in circle:
            return []
        circle.append(owner)
        owner = above.owned_by
    return [ref] if len(circle) == 1 else []


def _corrections(ready: list[DriftItem], policy: Policy) -> Iterator[Step]:
    """Ghosts are closed in the log; untracked resources are adopted or torn down, by policy."""
    for item in ready:
        stage = _CORRECTION_STAGE
        if item.sort == "ghost":
            action = Action.CLOSE_GHOST
        elif item.sort != "untracked":
            continue
        elif policy.untracked == "adopt":
            action = Action.ADOPT
        else:
            action = Action.TEARDOWN
            stage = stage_of_kind(item.ref.partition("/")[0])
        yield Step(
            action, item.process, item.ref, item.seq, item.reason, item.sort, stage,
            cause=item.cause,
        )  # fmt: skip


def _entries(
    process: ProcessState,
    ready: list[DriftItem],
    graph: Graph,
    ending: Mapping[str, None],
    free: Callable[[DriftItem], bool],
) -> Iterator[Step]:
    """Index entries that dangle, and those that will once the teardowns of the plan are done."""
    for item in ready:
        if item.sort == "dangling":
            yield _drop(item)
    for target in ending:
        for entry in graph.naming(target):
            reason = f"{entry.registry}[{entry.key}] names {target}, which goes in the same pass"
            item = DriftItem("dangling", process.id, target, reason, 0, entry.registry, entry.key)
            if free(item):
                yield _drop(item, consequence=True)


def _drop(item: DriftItem, *, consequence: bool = False) -> Step:
    return Step(
        Action.DROP_ENTRY,
        item.process,
        item.ref,
        0,
        item.reason,
        "dangling",
        ENTRY_STAGE,
        registry=item.registry,
        key=item.key,
        consequence=consequence,
        cause=item.cause,
    )

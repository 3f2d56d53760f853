"""The plan: from drift to orders, in the order in which a teardown is safe. Pure.

A session goes before the runner it uses, a runner before its agent, an owner before what it owns,
and index entries last. A plan is closed: what the teardowns in it leave behind (things owned, index
entries that will dangle) is in it too, marked as a consequence, so that a dry run shows what a real
run does. A worker sends only what is due now, and finds consequences again in the next pass if they
are really there: a service that cleans up after itself is not told to do so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from reconciler.desired import users_of
from reconciler.drift import Drift, DriftItem
from reconciler.fold import Attempt, FleetState, ProcessState, target_of
from reconciler.policy import Policy
from store.messages import Action, Inventory

_KIND_STAGE = {"session": 0, "runner": 1, "agent": 2}
_OWNED_STAGE = 3
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
        stage: steps are carried out stage by stage.
        since_ms: Redis time since when it is due, as far as known.
        consequence: it becomes due only through other steps of this plan.
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

    @property
    def stuck(self) -> tuple[Waiting, ...]:
        return tuple(waiting for waiting in self.waiting if waiting.stuck)


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
) -> Plan:
    """Makes a plan that ends the drift.

    Args:
        state: the fold of the log.
        drift: of that state.
        inventories: as given to `find_drift`; they tell which index entries will dangle.
        policy: backoff, and what to do with untracked resources.
        now_ms: Redis time.
        force: try again now what waits for its next try.

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
        steps += _teardowns(process, ready, waiting)
        steps += _corrections(ready, policy)
        ending = {s.ref for s in steps if s.process == name and s.action == Action.TEARDOWN}
        inventory = inventories.get(name)
        steps += _entries(process, ready, inventory, ending)
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
    process: ProcessState, ready: list[DriftItem], waiting: list[Waiting]
) -> Iterator[Step]:
    """Teardowns of orphans and of what they own, staged; what is still used waits."""
    going = {item.ref: item for item in ready if item.sort == "orphan"}
    users = users_of(process)
    # Whatever is used by something that stays has to stay; that in turn keeps what it uses.
    kept = [ref for ref in going if any(user not in going for user in users.get(ref, ()))]
    while kept:
        ref = kept.pop()
        item = going.pop(ref, None)
        if item is None:
            continue
        waiting.append(Waiting(item, 0, "something that uses it is still alive"))
        kept += [used for used in process.resources[ref].uses if used in going]
    owned: dict[str, list[str]] = defaultdict(list)
    for resource in process.resources.values():
        if resource.owned_by is not None and resource.owned_by in process.resources:
            owned[resource.owned_by].append(resource.ref)
    consequences: dict[str, DriftItem] = {}
    todo = list(going)
    while todo:
        owner = todo.pop()
        for ref in owned.get(owner, ()):
            resource = process.resources[ref]
            if ref in going or ref in consequences or resource.in_use or ref in process.attempts:
                continue
            if any(u not in going and u not in consequences for u in users.get(ref, ())):
                continue
            reason = f"its owner {owner} goes in the same pass"
            consequences[ref] = DriftItem("orphan", process.id, ref, reason, resource.seq)
            todo.append(ref)
    everything = going | consequences
    stages = _stages(process, everything, users)
    for ref, item in everything.items():
        yield Step(
            Action.TEARDOWN,
            process.id,
            ref,
            item.seq,
            item.reason,
            "orphan",
            stages[ref],
            _before(process, ref, everything, users),
            consequence=ref in consequences,
            since_ms=item.since_ms,
        )


def _before(
    process: ProcessState,
    ref: str,
    going: Mapping[str, DriftItem],
    users: Mapping[str, list[str]],
) -> tuple[str, ...]:
    """What else of the plan must be gone before `ref` may go."""
    owner = process.resources[ref].owned_by
    before = [user for user in users.get(ref, ()) if user in going]
    return (*before, owner) if owner is not None and owner in going else tuple(before)


def _stages(
    process: ProcessState, going: Mapping[str, DriftItem], users: Mapping[str, list[str]]
) -> dict[str, int]:
    """A stage for each: after its users, after its owner, and not before its kind's turn."""
    before: dict[str, int] = dict.fromkeys(going, 0)
    after: dict[str, list[str]] = defaultdict(list)
    for ref in going:
        for user in users.get(ref, ()):
            if user in going:
                after[user].append(ref)
                before[ref] += 1
        owner = process.resources[ref].owned_by
        if owner is not None and owner in going and owner != ref:
            after[owner].append(ref)
            before[ref] += 1
    stages = {ref: _KIND_STAGE.get(process.resources[ref].kind, _OWNED_STAGE) for ref in going}
    free = [ref for ref, count in before.items() if count == 0]
    while free:
        ref = free.pop()
        for following in after[ref]:
            stages[following] = max(stages[following], stages[ref] + 1)
            before[following] -= 1
            if before[following] == 0:
                free.append(following)
    return stages


def _corrections(ready: list[DriftItem], policy: Policy) -> Iterator[Step]:
    """Ghosts are closed in the log; untracked resources are adopted or torn down, by policy."""
    for item in ready:
        if item.sort == "ghost":
            action = Action.CLOSE_GHOST
        elif item.sort == "untracked":
            action = Action.ADOPT if policy.untracked == "adopt" else Action.TEARDOWN
        else:
            continue
        yield Step(action, item.process, item.ref, item.seq, item.reason, item.sort, 0)


def _entries(
    process: ProcessState,
    ready: list[DriftItem],
    inventory: Inventory | None,
    ending: set[str],
) -> Iterator[Step]:
    """Index entries that dangle, and those that will once the teardowns of the plan are done."""
    for item in ready:
        if item.sort == "dangling":
            yield Step(
                Action.DROP_ENTRY,
                item.process,
                item.ref,
                0,
                item.reason,
                "dangling",
                ENTRY_STAGE,
                (),
                item.registry,
                item.key,
            )
    for entry in inventory.entries if inventory is not None else ():
        if entry.target not in ending:
            continue
        if target_of(entry.target, entry.registry, entry.key) in process.attempts:
            continue
        yield Step(
            Action.DROP_ENTRY,
            process.id,
            entry.target,
            0,
            f"{entry.registry}[{entry.key}] names {entry.target}, which goes in the same pass",
            "dangling",
            ENTRY_STAGE,
            (),
            entry.registry,
            entry.key,
            consequence=True,
        )

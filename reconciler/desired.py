"""The desired state: until when each resource should live, and which have to make room.

One question per resource, `until`: the moment from which it is no longer desired. In use is for
ever. Otherwise it is the latest of its own idle limit, the limit of whatever uses it plus its own
idle time, the end of its owner, and any stay that was asked for. Everything else follows: an orphan
is a resource whose moment has passed; what would end it, and when, is the same number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import inf

from reconciler.fold import ProcessState, Resource
from reconciler.graph import Refs, circles, graph_of
from reconciler.policy import Policy

MEMORY_SHARE = 10
"""Above the memory limit, one session in this many goes per pass, at least one."""


def own_limit(resource: Resource, process: ProcessState, policy: Policy) -> float:
    """Until when a resource is desired for its own sake, in ms; what uses it aside."""
    if resource.in_use > 0:
        return inf
    if resource.owned_by is not None:
        # While the owner lives, the owner's limit decides; see `desired_until`.
        return float(resource.keep_until_ms)
    if resource.awaits_owner:
        wait = policy.owner_timeout
        limit = inf if wait is None else resource.used_ms + wait * 1000
    else:
        idle = policy.idle_ms(resource.kind)
        limit = inf if idle is None else resource.used_ms + idle
    return max(limit, resource.keep_until_ms)


def desired_until(process: ProcessState, policy: Policy) -> dict[str, float]:
    """Until when each resource of a process is desired, in ms of Redis time; `inf` is for ever.

    Resources are taken in an order in which what keeps a thing alive comes before the thing. Where
    edges go round in a circle, its members live as long as the longest-lived among them.
    """
    resources = process.resources
    kept_by: dict[str, int] = dict.fromkeys(resources, 0)
    keeps: dict[str, list[tuple[str, float]]] = defaultdict(list)
    until: dict[str, float] = {}
    for ref, resource in resources.items():
        until[ref] = own_limit(resource, process, policy)
        for used in resource.uses:
            if used in resources and used != ref:
                after = policy.idle_ms(resources[used].kind)
                keeps[ref].append((used, inf if after is None else after))
                kept_by[used] += 1
        owner = resource.owned_by
        if owner is not None and owner in resources and owner != ref:
            keeps[owner].append((ref, 0.0))
            kept_by[ref] += 1
    ready = [ref for ref, count in kept_by.items() if count == 0]
    while ready:
        ref = ready.pop()
        del kept_by[ref]
        for kept, after in keeps[ref]:
            # What is owned, or has no idle time of its own, lives exactly as long as its keeper.
            hop = after if after != inf else 0.0
            until[kept] = max(until[kept], until[ref] + hop)
            kept_by[kept] -= 1
            if kept_by[kept] == 0:
                ready.append(kept)
    below = {ref: [kept for kept, _ in keeps[ref]] for ref in kept_by}
    for circle in circles(below):
        longest = max(until[ref] for ref in circle)
        for ref in circle:
            until[ref] = longest
            for kept, after in keeps[ref]:
                if kept not in circle:
                    until[kept] = max(until[kept], longest + (after if after != inf else 0.0))
    return until


def why_undesired(resource: Resource, process: ProcessState, policy: Policy, now_ms: int) -> str:
    """The reason, in words, that a resource is no longer desired."""
    if resource.owned_by is not None:
        state = "no longer desired" if resource.owned_by in process.resources else "gone"
        return f"its owner {resource.owned_by} is {state}"
    idle = (now_ms - resource.used_ms) / 1000
    if resource.awaits_owner:
        return f"no owner came within {policy.owner_timeout or 0:g} s"
    limit = (policy.idle_ms(resource.kind) or 0.0) / 1000
    if resource.kind == "session":
        return f"idle for {idle:.1f} s, the limit is {limit:g} s"
    return f"nothing has used it for {idle:.1f} s, the limit is {limit:g} s"


def evictions(
    process: ProcessState, policy: Policy, now_ms: int, *, rss: int = 0
) -> dict[str, str]:
    """What has to make room although it is not idle: reference -> reason.

    Limits take the least recently used first, and pass over what is in use or used by something in
    use; a runner takes the sessions that use it along. Rules of the user's own come last.

    Args:
        process: the process.
        policy: limits and rules.
        now_ms: Redis time.
        rss: resident memory of the process in bytes; 0 is unknown.
    """
    limited = policy.max_sessions_per_user or policy.max_runners or policy.max_process_memory
    if not (limited or policy.rules):
        return {}
    users = graph_of(process).users
    free = _evictable(process, now_ms)
    of_kind: dict[str, list[Resource]] = defaultdict(list)
    for resource in process.resources.values():
        of_kind[resource.kind].append(resource)
    sessions, runners = of_kind["session"], of_kind["runner"]
    chosen: dict[str, str] = {}

    def choose(refs: Iterable[str], reason: str) -> None:
        for ref in refs:
            for member in _with_users(ref, users):
                chosen.setdefault(member, reason)

    def excess(resources: list[Resource], limit: int) -> list[str]:
        over = max(0, len(resources) - limit)
        by_age = sorted(resources, key=lambda r: (r.used_ms, r.seq))
        return [r.ref for r in by_age if r.ref in free][:over]

    if policy.max_sessions_per_user:
        limit = policy.max_sessions_per_user
        by_user: dict[str, list[Resource]] = defaultdict(list)
        for session in sessions:
            if session.user is not None:
                by_user[session.user].append(session)
        for of_user in by_user.values():
            choose(excess(of_user, limit), f"its user has more than {limit} sessions")
    if policy.max_runners:
        limit = policy.max_runners
        choose(excess(runners, limit), f"the process has more than {limit} runners")
    if policy.max_process_memory and rss > policy.max_process_memory:
        share = 1 + len(sessions) // MEMORY_SHARE
        choose(
            excess(sessions, len(sessions) - share),
            f"the process has {rss} bytes of memory, the limit is {policy.max_process_memory}",
        )
    _apply_rules(process, policy, now_ms, free, choose)
    return chosen


def _apply_rules(
    process: ProcessState,
    policy: Policy,
    now_ms: int,
    free: set[str],
    choose: Callable[[Iterable[str], str], None],
) -> None:
    for rule in policy.rules:
        for resource in process.resources.values():
            if resource.ref in free and (reason := rule(resource, process, now_ms)):
                choose([resource.ref], str(reason))


def _evictable(process: ProcessState, now_ms: int) -> set[str]:
    """References of what nobody has acquired or asked a stay for, at whatever distance of use."""
    held = [r.ref for r in process.resources.values() if r.in_use > 0 or r.keep_until_ms > now_ms]
    busy = set(held)
    while held:
        resource = process.resources[held.pop()]
        for used in resource.uses:
            if used in process.resources and used not in busy:
                busy.add(used)
                held.append(used)
    return set(process.resources) - busy


def _with_users(ref: str, users: Mapping[str, Refs]) -> set[str]:
    """A reference with everything that uses it, at whatever distance."""
    found = {ref}
    todo = [ref]
    while todo:
        for user in users.get(todo.pop(), ()):
            if user not in found:
                found.add(user)
                todo.append(user)
    return found

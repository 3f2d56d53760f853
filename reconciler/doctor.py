"""What is wrong with a deployment, from facts that were looked up: findings with what to do. Pure.

Each check is a function of the facts and gives what it found. A check says nothing of what it could
not look at. Thresholds stand here with their reason; none of them is a matter of taste of a service.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reconciler.moment import span
from reconciler.phrases import counted
from reconciler.policy import Policy
from reconciler.stuck import Stuck

SILENT_MS = 15_000
"""A worker writes its heartbeat every 2 s: after this it is not there, or Redis is not for it."""
LAG_SECONDS = 30.0
SKEW_MS = 2_000
"""Decisions are taken by Redis time; more than this between the clocks misleads whoever reads logs."""
SKEW_EVENTS = 3
"""So many events must agree that a clock is behind: one may just have waited in an outbox."""
OUTBOX_DEEP = 10_000
"""A host sends thousands of events a second; this many waiting means that it does not get through."""
MEMORY_SHARE = 0.9
OVERDUE_MS = 600_000
"""Workers look every few seconds; a conversation that is overdue for so long cannot be archived."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        check: which check found it.
        what: is wrong, with names and numbers.
        do: about it.
    """

    check: str
    what: str
    do: str


@dataclass(frozen=True, slots=True)
class Clock:
    """How far the clock of one process was from that of Redis, over its latest events.

    Attributes:
        process: `name@host:pid:start`.
        ahead_ms: the largest of (time by the writer - time by Redis). Waiting makes it smaller, never
            larger, so that it tells the clock, not the way.
        events: looked at.
    """

    process: str
    ahead_ms: float
    events: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What was looked up.

    Attributes:
        now_ms: Redis time.
        policy: recorded by the last worker; None when none ever ran.
        workers: heartbeat by worker id.
        partitions: partition -> holder of its lease, None where nobody has it.
        processes: live host processes -> the partition of each.
        lapsed: host process -> ms since its lease lapsed, of those that nobody closed.
        servers: Redis server -> its answer to INFO.
        nodes_away: nodes of a Redis Cluster that the others cannot reach.
        clocks: one per process.
        stuck: teardowns that failed too often.
        quarantined: entry id -> why it is not an event.
        outboxes: process -> events waiting at a first and at a second look.
        spilled, dropped: process -> events in its spill file, and lost for want of room.
        archive: where history goes; None nowhere, `off` it is dropped.
        conversations: kept in Redis.
        overdue: of these, not used for longer than `session_retention`.
        overdue_ms: since when the oldest of them is.
    """

    now_ms: int
    policy: Policy | None
    workers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    partitions: Mapping[int, str | None] = field(default_factory=dict)
    processes: Mapping[str, int] = field(default_factory=dict)
    lapsed: Mapping[str, float] = field(default_factory=dict)
    servers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    nodes_away: Sequence[str] = ()
    clocks: Sequence[Clock] = ()
    stuck: Sequence[Stuck] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict)
    outboxes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    spilled: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    archive: str | None = None
    conversations: int = 0
    overdue: int = 0
    overdue_ms: float = 0.0


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, in the order in which to look at them."""
    return [finding for check in CHECKS.values() for finding in check(facts)]


def _workers(facts: Facts) -> Iterator[Finding]:
    alive = _alive(facts)
    if not alive:
        yield Finding(
            "workers",
            "no worker is alive: orphans are found and torn down by nobody",
            "start one: `agent-reconciler worker`; two, so that one takes over from the other",
        )
        return
    for worker, beat in alive.items():
        lag = float(beat.get("lag_seconds", 0))
        if lag > LAG_SECONDS:
            yield Finding(
                "workers",
                f"worker {worker} folds events {lag:.0f} s after they were written",
                "see whether it or Redis is short of CPU; start another worker to share partitions",
            )


def _partitions(facts: Facts) -> Iterator[Finding]:
    free = [partition for partition, holder in facts.partitions.items() if holder is None]
    if free and _alive(facts):
        there = sum(1 for partition in facts.processes.values() if partition in free)
        yield Finding(
            "partitions",
            f"nobody acts for partitions {', '.join(map(str, sorted(free)))}, with {there} live processes",
            "workers take free partitions within seconds: if it stays so, see their logs and /readyz",
        )
    for process, ms in facts.lapsed.items():
        yield Finding(
            "processes",
            f"{process} was not heard of for {span(ms)} beyond its lease, and nobody closed it",
            "a worker closes it as soon as one acts for its partition",
        )


def _policy(facts: Facts) -> Iterator[Finding]:
    policy = facts.policy
    if policy is None:
        return  # No worker ever ran here; that is said by another check.
    for name, value in (
        ("session_idle_timeout", policy.session_idle_timeout),
        ("runner_idle_timeout", policy.runner_idle_timeout),
        ("agent_idle_timeout", policy.agent_idle_timeout),
        ("owner_timeout", policy.owner_timeout),
        *((f"idle_timeouts.{kind}", value) for kind, value in policy.idle_timeouts.items()),
    ):
        if value is None:
            yield Finding(
                "policy",
                f"{name} is off: what it is about stays until its service ends it",
                f"give it a time: `agent-reconciler worker --set {name}=3600`",
            )


def _redis(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes_away:
        yield Finding(
            "redis",
            f"node {node} of the cluster does not answer the others",
            "start it again, or take it out: `redis-cli --cluster del-node`; nobody stands in for it",
        )
    for server, info in facts.servers.items():
        limit, used = int(info.get("maxmemory") or 0), int(info.get("used_memory") or 0)
        eviction = str(info.get("maxmemory_policy", "noeviction"))
        if eviction != "noeviction":
            when = "when its memory is full" if limit else "as soon as somebody sets maxmemory"
            yield Finding(
                "redis",
                f"{server}: maxmemory-policy is {eviction}: it drops parts of the log {when}",
                "`CONFIG SET maxmemory-policy noeviction`, and in its configuration file",
            )
        if limit and used > limit * MEMORY_SHARE:
            yield Finding(
                "redis",
                f"{server}: {used / limit:.0%} of maxmemory is used; full, it takes no more events",
                "raise maxmemory, or archive the log sooner",
            )
        if not int(info.get("aof_enabled", 1)):
            yield Finding(
                "redis",
                f"{server}: appendonly is off: a restart loses what was written since the last dump",
                "`CONFIG SET appendonly yes`, and in its configuration file",
            )
        elif info.get("aof_last_write_status", "ok") != "ok":
            yield Finding(
                "redis",
                f"{server}: the last write to its append-only file failed",
                "see its log: its disk is full, or may not be written to",
            )


def _clocks(facts: Facts) -> Iterator[Finding]:
    by_host: dict[str, list[Clock]] = defaultdict(list)
    for clock in facts.clocks:
        late = clock.ahead_ms < -SKEW_MS and clock.events >= SKEW_EVENTS
        if clock.ahead_ms > SKEW_MS or late:
            by_host[host_of(clock.process)].append(clock)
    for host, clocks in by_host.items():
        worst = max(clocks, key=lambda clock: abs(clock.ahead_ms))
        side = "ahead of" if worst.ahead_ms > 0 else "behind"
        yield Finding(
            "clocks",
            f"the clock of host {host} is {span(abs(worst.ahead_ms))} {side} that of Redis "
            f"(seen in {worst.process})",
            "nothing is decided by it, but its logs mislead: synchronise both clocks (chrony, NTP)",
        )


def _stuck(facts: Facts) -> Iterator[Finding]:
    for one in facts.stuck:
        what = f"{one.entry}, which names {one.ref}," if one.entry else one.ref
        yield Finding(
            "stuck teardowns",
            f"{what} in {one.process} failed to be torn down {one.failures} times: {one.reason}",
            f"`agent-reconciler explain {one.ref}`; mend the cause, then `agent-reconciler reconcile`",
        )


def _quarantine(facts: Facts) -> Iterator[Finding]:
    if facts.quarantined:
        entry, reason = next(iter(facts.quarantined.items()))
        yield Finding(
            "quarantine",
            f"{len(facts.quarantined)} log entries are not events, such as {entry}: {reason}",
            "see who writes to the log besides hosts and workers; `agent-reconciler status` lists them",
        )


def _outboxes(facts: Facts) -> Iterator[Finding]:
    for process, (first, second) in facts.outboxes.items():
        if second > OUTBOX_DEEP or 0 < first < second:
            yield Finding(
                "outboxes",
                f"{process} has {second} events waiting ({first} a moment before): it does not get "
                "through to Redis",
                "see the connection between the two, and whether Redis is short of CPU",
            )
    for process, count in facts.spilled.items():
        if count:
            yield Finding(
                "outboxes",
                f"{process} has {counted(count, 'event')} in its spill file",
                "they are sent when Redis takes them: see the connection between the two",
            )
    for process, count in facts.dropped.items():
        if count:
            yield Finding(
                "outboxes",
                f"{process} has lost {counted(count, 'event')}: memory and spill file were full",
                "give the spill file more room; `agent-reconciler reconcile` sets the log right",
            )


def _archive(facts: Facts) -> Iterator[Finding]:
    if facts.archive is None:
        yield Finding(
            "archive",
            "the namespace has no archive: its whole log stays in the memory of Redis, and grows",
            "name a place for old entries: `agent-reconciler archive --to URL`",
        )
    elif facts.archive == "off":
        yield Finding(
            "archive",
            "the archive is off: old entries are dropped, and with them what happened",
            "name a place for old entries: `agent-reconciler archive --to URL`",
        )


def _conversations(facts: Facts) -> Iterator[Finding]:
    policy = facts.policy
    if policy is not None and policy.session_retention is None and facts.conversations:
        yield Finding(
            "conversations",
            f"session_retention is off: {facts.conversations} conversations stay in the memory of "
            "Redis, and grow in number",
            "give it a time: `agent-reconciler worker --set session_retention=2592000`",
        )
    elif facts.overdue and facts.archive is None:
        yield Finding(
            "conversations",
            f"{facts.overdue} of {facts.conversations} conversations are older than session_retention, "
            "and stay: the namespace has no archive",
            "name a place for them: `agent-reconciler archive --to URL`; `--to off` deletes them",
        )
    elif facts.overdue_ms > OVERDUE_MS:
        yield Finding(
            "conversations",
            f"{facts.overdue} of {facts.conversations} conversations are older than session_retention, "
            f"the oldest for {span(facts.overdue_ms)}",
            "a worker archives them: see its log for why it cannot",
        )


def _alive(facts: Facts) -> dict[str, Mapping[str, Any]]:
    return {
        worker: beat
        for worker, beat in facts.workers.items()
        if facts.now_ms - int(beat.get("at_ms", 0)) <= SILENT_MS
    }


def host_of(process: str) -> str:
    """The host name in a process id, `name@host:pid:start`."""
    return process.rpartition("@")[2].rsplit(":", 2)[0]


CHECKS: Mapping[str, Callable[[Facts], Iterator[Finding]]] = {
    "workers": _workers,
    "partitions and processes": _partitions,
    "redis": _redis,
    "policy": _policy,
    "stuck teardowns": _stuck,
    "outboxes": _outboxes,
    "quarantine": _quarantine,
    "clocks": _clocks,
    "archive": _archive,
    "conversations": _conversations,
}
"""What is checked, by name, in the order in which it is told."""

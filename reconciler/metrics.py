"""What a worker counts, for Prometheus. Few labels, none with ids.

Each worker has a collector registry of its own, so that several can live in one process (tests, a
host that runs the reconciler within itself). Gauges speak of the partitions that this worker holds:
the sum over all workers is the fleet. What is in a label comes from a closed set, or is a kind; kinds
are open, so only the first `KINDS` of them have a label of their own. `docs/metrics.md` lists all.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from reconciler.drift import Cause, Sort
from reconciler.fold import FleetState
from store.event import EVENT_TYPES
from store.messages import Action, Summary

KINDS = 40
"""Kinds with a label of their own; a service that makes up kinds must not fill a Prometheus."""
KIND_LENGTH = 64
OTHER = "other"
SORTS: tuple[Sort, ...] = get_args(Sort)
CAUSES: tuple[Cause, ...] = get_args(Cause)
OUTCOMES = ("done", "failed", "refused")
LEASE_CHANGES = ("taken", "lost", "released", "renew_failed")
ACTIVITIES = ("archive", "heartbeat", "hosts", "leases", "log", "pass", "snapshot", "vitals")
"""What a worker was doing when Redis was away."""
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class KindLabels:
    """The label of each kind: its name, or `other` for those beyond the first `limit`."""

    def __init__(self, limit: int = KINDS) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}

    def of(self, kind: str) -> str:
        known = self._known.get(kind)
        if known is not None:
            return known
        if len(self._known) >= self._limit or len(kind) > KIND_LENGTH:
            return OTHER
        self._known[kind] = kind
        return kind


class Metrics:
    """The metrics of one reconciler."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.kinds = KindLabels()
        self._make_state()
        self._make_drift()
        self._make_log()
        self._make_worker()

    def _gauge(self, name: str, what: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"agent_reconciler_{name}", what, labels, registry=self.registry)

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"agent_reconciler_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"agent_reconciler_{name}", what, buckets=_BUCKETS, registry=self.registry)

    def _make_state(self) -> None:
        self.live = self._gauge("live_resources", "Resources alive, by kind", ["kind"])
        self.processes = self._gauge("processes", "Host processes alive")
        self.created = self._counter(
            "resources_created", "Resources created or adopted, by kind", ["kind"]
        )
        self.ended = self._counter(
            "resources_ended",
            "Resources cleaned up, or gone with their process, by kind",
            ["kind"],
        )
        self.lost = self._counter("processes_lost", "Host processes whose lease lapsed")
        self.outbox = self._gauge(
            "outbox_events", "Events that live hosts had not sent when last heard of, in all"
        )
        self.spilled = self._gauge(
            "outbox_spilled_events", "How many of these wait in spill files, in all"
        )
        self.dropped = self._gauge(
            "outbox_dropped_events",
            "Events that live hosts lost because memory and spill file were full, in all",
        )
        self.spill_problems = self._gauge(
            "outbox_problems", "Live hosts whose spill file cannot be written"
        )

    def _make_drift(self) -> None:
        self.drift = self._gauge("drift", "Differences found by the last passes, by sort", ["sort"])
        self.drift_age = self._gauge(
            "drift_age_seconds",
            "How long the oldest difference of a sort has been there",
            ["sort"],
        )
        self.stuck = self._gauge("stuck_teardowns", "Teardowns that failed too often")
        self.orders = self._counter("orders", "Orders sent, by action", ["action"])
        self.teardowns = self._counter(
            "teardowns",
            "Outcomes of orders, by kind, by why the resource had to go, and by outcome",
            ["kind", "reason", "outcome"],
        )
        self.teardown_seconds = self._histogram(
            "orphan_to_teardown_seconds", "From becoming drift to being torn down"
        )
        self.pass_seconds = self._histogram("pass_seconds", "Duration of a pass")
        for sort in SORTS:
            self.drift.labels(sort).set(0)
            self.drift_age.labels(sort).set(0)
        for action in Action:
            if action != Action.REPORT:
                self.orders.labels(action)

    def _make_log(self) -> None:
        self.events = self._counter("events", "Events folded, by type", ["type"])
        self.lag = self._gauge(
            "log_lag_seconds",
            "How late the fold is: the longest that an event has waited, or waits, for it",
        )
        self.behind = self._gauge(
            "log_lag_events",
            "Events in the log that are not folded yet, counted up to 1,000 a partition",
        )
        self.quarantined = self._counter("quarantined_entries", "Log entries that are not events")
        self.snapshot_age = self._gauge(
            "snapshot_age_seconds",
            "How long the oldest event that no snapshot covers has been in the log",
        )
        self.archive_lag = self._gauge(
            "archive_lag_seconds", "How long the oldest entry of a stream is overdue to leave it"
        )
        self.snapshot_failures = self._counter(
            "snapshot_failures", "Snapshots that could not be written"
        )
        self.archive_failures = self._counter(
            "archive_failures", "Rounds in which a partition could not be archived"
        )
        for type in EVENT_TYPES:
            self.events.labels(type)

    def _make_worker(self) -> None:
        self.ready = self._gauge("ready", "1 when the worker acts for its share, as /readyz tells")
        self.all_partitions = self._gauge("partitions", "Partitions of the namespace")
        self.partitions = self._gauge("partitions_held", "Partitions this worker acts for")
        self.workers = self._gauge("workers", "Workers of the namespace that this one knows of")
        self.lease_changes = self._counter(
            "lease_changes", "Leases taken, lost, released, and renewals that failed", ["event"]
        )
        self.redis_up = self._gauge("redis_up", "1 when Redis answered this worker when last asked")
        self.redis_errors = self._counter(
            "redis_errors",
            "How often Redis was away for this worker, by what it was doing",
            ["doing"],
        )
        for event in LEASE_CHANGES:
            self.lease_changes.labels(event)
        for doing in ACTIVITIES:
            self.redis_errors.labels(doing)

    # --- what happens -----------------------------------------------------------------------------

    def count_events(self, types: Mapping[str, int]) -> None:
        """Counts events that were folded, by type; those of a newer version are `other`."""
        for type, count in types.items():
            self.events.labels(type if type in EVENT_TYPES else OTHER).inc(count)

    def count_resources(self, created: Mapping[str, int], ended: Mapping[str, int]) -> None:
        """Counts resources that came and went, by kind."""
        for kind, count in created.items():
            label = self.kinds.of(kind)
            self.created.labels(label).inc(count)
            self.ended.labels(label)  # Both series are there, so that a rule can divide them.
        for kind, count in ended.items():
            self.ended.labels(self.kinds.of(kind)).inc(count)

    def count_outcome(self, kind: str, reason: Cause, outcome: str) -> None:
        """Counts the outcome of an order; see `CAUSES` and `OUTCOMES`."""
        self.teardowns.labels(self.kinds.of(kind), reason, outcome).inc()

    def redis_away(self, doing: str) -> None:
        """Redis was away while the worker did one of `ACTIVITIES`."""
        self.redis_errors.labels(doing).inc()

    # --- what is, when somebody asks ----------------------------------------------------------------

    def observe_state(self, state: FleetState, summaries: Sequence[Summary]) -> None:
        """Takes the gauges from the state; called when the metrics are read."""
        kinds: Count[str] = Count()
        for process in state.processes.values():
            kinds.update(resource.kind for resource in process.resources.values())
        labels: Count[str] = Count()
        for kind, count in kinds.items():
            labels[self.kinds.of(kind)] += count
        self.live.clear()
        for label, count in labels.items():
            self.live.labels(label).set(count)
        self.processes.set(len(state.processes))
        self.outbox.set(sum(summary.outbox for summary in summaries))
        self.spilled.set(sum(summary.spilled for summary in summaries))
        self.dropped.set(sum(summary.dropped for summary in summaries))
        self.spill_problems.set(sum(bool(summary.outbox_problem) for summary in summaries))

    def observe_drift(
        self, found: Iterable[Mapping[str, int]], oldest: Mapping[Sort, float]
    ) -> None:
        """Takes the gauges from what the last pass over each process found.

        Args:
            found: how many of each sort, and how many are `stuck`, process by process.
            oldest: age in seconds of the oldest of each sort, where there is one.
        """
        total: Count[str] = Count()
        for counts in found:
            total.update(counts)
        for sort in SORTS:
            self.drift.labels(sort).set(total[sort])
            self.drift_age.labels(sort).set(oldest.get(sort, 0.0))
        self.stuck.set(total["stuck"])

    def page(self) -> bytes:
        """The text that a collector reads."""
        return generate_latest(self.registry)

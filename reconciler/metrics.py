"""What the worker counts, for Prometheus. Few labels, none with ids.

Each worker has a collector registry of its own, so that several can live in one process (tests, a
host that runs the reconciler within itself).
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from reconciler.fold import FleetState
from store.messages import Summary

Counts = Mapping[str, int]
"""How many of each sort of drift, and how many are `stuck`, in one process."""
SORTS = ("orphan", "dangling", "ghost", "untracked")
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one reconciler."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.live = Gauge(
            "agent_reconciler_live_resources", "Resources alive, by kind", ["kind"], registry=r
        )
        self.processes = Gauge("agent_reconciler_processes", "Host processes alive", registry=r)
        self.drift = Gauge(
            "agent_reconciler_drift",
            "Differences found and not yet ended, by sort",
            ["sort"],
            registry=r,
        )
        self.stuck = Gauge(
            "agent_reconciler_stuck_teardowns", "Teardowns that failed too often", registry=r
        )
        self.orders = Counter(
            "agent_reconciler_orders", "Orders sent, by action", ["action"], registry=r
        )
        self.teardowns = Counter(
            "agent_reconciler_teardowns",
            "Outcomes of orders, by kind, sort of drift and outcome",
            ["kind", "reason", "outcome"],
            registry=r,
        )
        self.events = Counter(
            "agent_reconciler_events", "Events folded, by type", ["type"], registry=r
        )
        self.lag = Gauge(
            "agent_reconciler_log_lag_seconds",
            "Age of the newest event when it was folded",
            registry=r,
        )
        self.behind = Gauge(
            "agent_reconciler_log_lag_events",
            "Events read in the last round; a full page means that there are more",
            registry=r,
        )
        self.quarantined = Counter(
            "agent_reconciler_quarantined_entries", "Log entries that are not events", registry=r
        )
        self.outbox = Gauge(
            "agent_reconciler_outbox_depth",
            "Events that hosts have not sent yet, in all",
            registry=r,
        )
        self.spilled = Gauge(
            "agent_reconciler_outbox_spilled",
            "Events that wait in spill files of hosts, in all",
            registry=r,
        )
        self.dropped = Gauge(
            "agent_reconciler_outbox_dropped",
            "Events that live hosts lost because memory and spill file were full, in all",
            registry=r,
        )
        self.teardown_seconds = Histogram(
            "agent_reconciler_orphan_to_teardown_seconds",
            "From becoming drift to being torn down",
            buckets=_BUCKETS,
            registry=r,
        )
        self.pass_seconds = Histogram(
            "agent_reconciler_pass_seconds", "Duration of a pass", buckets=_BUCKETS, registry=r
        )
        self.partitions = Gauge(
            "agent_reconciler_partitions_held", "Partitions this worker acts for", registry=r
        )
        self.lost = Counter(
            "agent_reconciler_processes_lost", "Processes whose lease lapsed", registry=r
        )
        for sort in SORTS:
            self.drift.labels(sort).set(0)

    def observe_state(self, state: FleetState, summaries: Sequence[Summary]) -> None:
        """Takes the gauges from the state; called when the metrics are read."""
        kinds = Count(
            resource.kind
            for process in state.processes.values()
            for resource in process.resources.values()
        )
        self.live.clear()
        for kind, count in kinds.items():
            self.live.labels(kind).set(count)
        self.processes.set(len(state.processes))
        self.outbox.set(sum(summary.outbox for summary in summaries))
        self.spilled.set(sum(summary.spilled for summary in summaries))
        self.dropped.set(sum(summary.dropped for summary in summaries))

    def observe_drift(self, found: Iterable[Counts]) -> None:
        """Takes the gauges from what the last pass over each process found."""
        total: Count[str] = Count()
        for counts in found:
            total.update(counts)
        for sort in SORTS:
            self.drift.labels(sort).set(total[sort])
        self.stuck.set(total["stuck"])

    def page(self) -> bytes:
        """The text that a collector reads."""
        return generate_latest(self.registry)

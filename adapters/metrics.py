"""What a host counts, for Prometheus: what is recorded, what waits, what was torn down.

A service that has a `/metrics` of its own registers these with its registry, `host.metrics.register()`;
one that has none serves `host.metrics.page()`, or starts `host.metrics.serve(port)`. What can be looked
up when somebody asks is not counted on the way, so that recording an event costs nothing more.
`docs/metrics.md` lists all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from store.messages import Action

INCARNATIONS = ("start", "fenced", "forgotten", "full")
"""Why a process of the log began: with the host; because it was declared lost; because Redis forgot more
than is kept; because the outbox of the one before was full."""
OUTCOMES = ("done", "failed", "timed_out", "not_saved", "stale", "gone", "busy", "refused")
"""What became of an order. The last four are refusals; `refused` is that of a service's own teardown."""
SAVES = ("saved", "failed")
OTHER = "other"
_ACTIONS = tuple(str(action) for action in Action if action != Action.REPORT)
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PREFIX = "agent_reconciler_host_"


@dataclass(frozen=True, slots=True)
class Look:
    """What a host sees of itself at one instant; counts are over all its incarnations.

    Attributes:
        outbox: events recorded and not yet acknowledged.
        spilled: how many of these wait in the spill file.
        spill_bytes: size of that file.
        recorded, dropped: events so far.
        redis_up: Redis answered when last asked.
        resources: alive in this process.
    """

    outbox: int
    spilled: int
    spill_bytes: int
    recorded: int
    dropped: int
    redis_up: bool
    resources: int


class Looks(Protocol):
    """A host."""

    def look(self) -> Look: ...


class _Shown(Collector):
    """A registry within another one, which then sees when a name is in it twice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()

    describe = collect


class HostMetrics(Collector):
    """The metrics of one host, through all its incarnations.

    Attributes:
        registry: where they are; a registry of their own, so that several hosts can be in one process.
    """

    def __init__(self, host: Looks) -> None:
        self._host = host
        self.registry = CollectorRegistry()
        self.sent = self._counter("events_sent", "Events that Redis has acknowledged")
        self.sent_again = self._counter(
            "events_sent_again",
            "Events that Redis had acknowledged and forgot, as after a failover",
        )
        self.append_seconds = self._histogram(
            "append_seconds", "Time of one append: a batch of events, there and back"
        )
        self.incarnations = self._counter(
            "incarnations", "Processes of the log that this host began, by why", "reason"
        )
        self.orders = Counter(
            f"{_PREFIX}orders",
            "Orders carried out or refused, by action and outcome",
            ["action", "outcome"],
            registry=self.registry,
        )
        self.teardown_seconds = self._histogram("teardown_seconds", "Time that a teardown took")
        self.saves = self._counter(
            "recovery_saves", "Recovery records saved before a session went, or not", "outcome"
        )
        for reason in INCARNATIONS:
            self.incarnations.labels(reason)
        for outcome in SAVES:
            self.saves.labels(outcome)
        self.registry.register(self)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(_PREFIX + name, what, buckets=_BUCKETS, registry=self.registry)

    def count_order(self, action: str, outcome: str) -> None:
        """Counts what became of an order; see `OUTCOMES`."""
        if action != Action.REPORT:
            self.orders.labels(action if action in _ACTIONS else OTHER, outcome).inc()

    def collect(self) -> Iterable[Metric]:
        """What is looked up, when somebody asks."""
        look = self._host.look()
        for name, what, value in (
            ("outbox_events", "Events recorded and not yet acknowledged", look.outbox),
            ("spilled_events", "How many of these wait in the spill file", look.spilled),
            ("spill_bytes", "Size of the spill file", look.spill_bytes),
            ("resources", "Resources alive in this process", look.resources),
            ("redis_up", "1 when Redis answered this host when last asked", int(look.redis_up)),
        ):
            yield GaugeMetricFamily(_PREFIX + name, what, value)
        for name, what, value in (
            ("events_recorded", "Events recorded", look.recorded),
            ("events_dropped", "Events lost because memory and spill file were full", look.dropped),
        ):
            yield CounterMetricFamily(_PREFIX + name, what, value)

    # --- for collectors ---------------------------------------------------------------------------

    def register(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Shows them in another registry as well, such as the one of the service.

        Raises:
            ValueError: another host of this process is in it already.
        """
        registry.register(_Shown(self.registry))

    def page(self) -> bytes:
        """The text that a collector reads; its content type is `text/plain; version=0.0.4`."""
        return generate_latest(self.registry)

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Serves `/metrics` in a thread, for as long as the process lives; the port.

        Args:
            port: to listen on; 0 takes a free one.
            address: to listen on.

        Raises:
            OSError: it cannot listen there.
        """
        server, _ = start_http_server(port, address, self.registry)
        return int(server.server_port)

"""What a worker counts: few labels from closed sets, and no more of them than there may be."""

from __future__ import annotations

import re
from typing import get_args

from adapters import Host
from reconciler import Policy, Reconciler
from reconciler.drift import Cause
from reconciler.fold import FleetState
from reconciler.metrics import CAUSES, KINDS, OTHER, Metrics
from store import Store
from store.messages import Summary
from tests.support import eventually, row


def series(metrics: Metrics, name: str) -> dict[str, float]:
    """The samples of a metric, by their labels as they are written."""
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", metrics.page().decode(), re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def sessions(count: int) -> FleetState:
    """A state with resources of that many kinds."""
    state = FleetState()
    for number in range(count):
        state.apply(row(number + 1, ref=f"kind{number}/x"), 1)
    return state


class TestLabels:
    def test_kinds_are_bounded(self) -> None:
        """A service that makes up kinds gets 40 labels, and the rest is `other`, for good."""
        metrics = Metrics()
        metrics.observe_state(sessions(500), [])
        live = series(metrics, "agent_reconciler_live_resources")
        assert len(live) == KINDS + 1
        assert live['kind="other"'] == 500 - KINDS
        metrics.count_resources({f"more{n}": 1 for n in range(500)}, {})
        metrics.count_outcome("still-more", "idle", "done")
        assert set(series(metrics, "agent_reconciler_resources_created_total")) == {
            f'kind="{OTHER}"'
        }
        metrics.observe_state(sessions(3), [])
        assert 'kind="kind0"' in series(metrics, "agent_reconciler_live_resources")

    def test_long_kinds_are_other(self) -> None:
        """A kind that is longer than a label should be is `other`, and takes nobody's place."""
        metrics = Metrics()
        metrics.count_resources({"k" * 1000: 1}, {})
        assert set(series(metrics, "agent_reconciler_resources_created_total")) == {'kind="other"'}

    def test_types_of_a_newer_version_are_other(self) -> None:
        """Event types that this version does not know share a label."""
        metrics = Metrics()
        metrics.count_events({"created": 2, "invented": 3, "dreamt": 1})
        events = series(metrics, "agent_reconciler_events_total")
        assert events['type="created"'] == 2
        assert events['type="other"'] == 4

    def test_series_are_there_from_the_start(self) -> None:
        """Counters with labels begin at 0, so that the first increase is one."""
        metrics = Metrics()
        for name in ("lease_changes_total", "redis_errors_total", "orders_total", "events_total"):
            values = series(metrics, f"agent_reconciler_{name}")
            assert values, name
            assert set(values.values()) == {0.0}, name

    def test_created_and_ended_can_be_divided(self) -> None:
        """A kind that was created has both series."""
        metrics = Metrics()
        metrics.count_resources({"session": 2}, {})
        assert series(metrics, "agent_reconciler_resources_ended_total") == {'kind="session"': 0}

    def test_causes_are_those_of_drift(self) -> None:
        """The reasons of teardowns are the closed set that drift has, not its words."""
        assert set(CAUSES) == set(get_args(Cause))


class TestOutboxes:
    def test_sums_over_hosts(self) -> None:
        """What hosts say of their outboxes is summed, without naming them."""
        metrics = Metrics()
        metrics.observe_state(
            FleetState(),
            [
                Summary("a", 1, outbox=3, spilled=2),
                Summary("b", 1, outbox=4, dropped=5, outbox_problem="disk full"),
            ],
        )
        for name, expected in {
            "outbox_events": 7, "outbox_spilled_events": 2, "outbox_dropped_events": 5, "outbox_problems": 1,
        }.items():  # fmt: skip
            assert series(metrics, f"agent_reconciler_{name}") == {"": expected}


class TestWorker:
    async def test_counts_why_things_went(self, store: Store, namespace: str) -> None:
        """A session that was idle, its runner and what it owned go by different reasons."""
        policy = Policy(session_idle_timeout=0.2, runner_idle_timeout=0.2)
        async with (
            Host.connect(store, name="svc", namespace=namespace) as host,
            Reconciler(store, namespace=namespace, policy=policy) as worker,
        ):
            ends = {"teardown": lambda id, obj: None}
            host.registry("runner", **ends)["r"] = object()
            host.registry("session", uses=lambda id, obj: ["runner/r"], **ends)["s"] = object()
            host.registry("lock", owned_by=lambda id, obj: "runner/r", **ends)["l"] = object()
            index = host.index("by_name", names="runner")
            index["x"] = "r"
            await eventually(lambda: not index and not host.entries, 20)

            def counted() -> dict[str, str]:
                found = series(worker.metrics, "agent_reconciler_teardowns_total")
                pairs = [re.findall(r'(\w+)="(\w+)"', labels) for labels, v in found.items() if v]
                return {d["kind"]: d["reason"] for d in map(dict, pairs) if d["outcome"] == "done"}

            expected = {
                "session": "idle", "runner": "unused", "lock": "owner_gone", "index_entry": "dangling",
            }  # fmt: skip
            await eventually(lambda: counted() == expected, 20)
            ended = series(worker.metrics, "agent_reconciler_resources_ended_total")
            assert ended == {'kind="session"': 1, 'kind="runner"': 1, 'kind="lock"': 1}

    async def test_what_goes_with_its_process_has_ended(self, store: Store, namespace: str) -> None:
        """Resources of a process that stops are counted as ended."""
        async with Reconciler(store, namespace=namespace) as worker:
            await eventually(lambda: not worker.unready(), 20)
            async with Host.connect(store, name="svc", namespace=namespace) as host:
                registry = host.registry("session")
                for number in range(5):
                    registry[str(number)] = object()
            await eventually(
                lambda: (
                    series(worker.metrics, "agent_reconciler_resources_ended_total")
                    == {'kind="session"': 5}
                ),
                20,
            )

    async def test_history_is_not_counted_again(self, store: Store, namespace: str) -> None:
        """A worker that takes over counts what happens from then on, not what it reads of the past."""
        async with Host.connect(store, name="svc", namespace=namespace) as host:
            registry = host.registry("session")
            registry["before"] = object()
            await eventually(lambda: len(host.recorder) == 0)
            async with Reconciler(store, namespace=namespace) as worker:
                await eventually(lambda: worker.tail.state.size == 1, 20)
                registry["after"] = object()
                await eventually(lambda: worker.tail.state.size == 2, 20)
                created = series(worker.metrics, "agent_reconciler_resources_created_total")
                assert created == {'kind="session"': 1}

    async def test_age_of_drift(self, store: Store, namespace: str) -> None:
        """Drift that stays grows older, and its age goes when it does."""
        policy = Policy(session_idle_timeout=0.05, backoff=30, untracked="report")
        failing = True

        def teardown(id: str, obj: object) -> None:
            if failing:
                raise RuntimeError("not yet")

        async with (
            Host.connect(store, name="svc", namespace=namespace) as host,
            Reconciler(store, namespace=namespace, policy=policy) as worker,
        ):
            sessions = host.registry("session", teardown=teardown)
            sessions["s"] = object()
            ages = worker.outlook.drift_ages
            first = await eventually(lambda: ages().get("orphan"), 20)
            await eventually(lambda: ages()["orphan"] > first + 0.2, 20)
            failing = False
            await eventually(lambda: not worker.unready(), 20)
            await worker.reconcile()
            await eventually(lambda: not sessions and "orphan" not in ages(), 20)

    async def test_vitals(self, store: Store, namespace: str) -> None:
        """Lag, partitions and workers are known after a look, and Redis is up."""
        async with (
            Host.connect(store, name="svc", namespace=namespace, partitions=4) as host,
            Reconciler(store, namespace=namespace) as worker,
        ):
            host.record("created", "thing/a")

            def told(name: str) -> float:
                worker.observe()
                return series(worker.metrics, f"agent_reconciler_{name}")[""]

            await eventually(lambda: told("redis_up") == 1 and told("snapshot_age_seconds") > 0, 20)
            assert told("partitions") == told("partitions_held") == 4
            assert told("workers") == told("ready") == 1
            assert told("log_lag_events") == 0
            assert told("archive_lag_seconds") == 0

"""What a host counts: appends, what waits, and what became of orders."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from adapters import Host
from adapters.executor import Refusal
from adapters.metrics import OUTCOMES
from store import Store
from store.messages import Action, Order
from tests.support import RedisProcess, eventually


def value(host: Host, name: str, **labels: str) -> float | None:
    """A sample as a collector reads it, without the prefix."""
    for family in text_string_to_metric_families(host.metrics.page().decode()):
        for sample in family.samples:
            if sample.name == f"agent_reconciler_host_{name}" and sample.labels == labels:
                return float(sample.value)
    return None


def teardown_of(host: Host, ref: str, **more: Any) -> Order:
    """An order that ends what is there now."""
    entry = host.entries.get(ref)
    seq = 0 if entry is None else entry.seq
    return Order(f"o-{ref}", host.process, Action.TEARDOWN, ref, seq, **more)


class TestEvents:
    async def test_counts_what_is_recorded_and_sent(self, host: Host) -> None:
        """Recorded and acknowledged events are counted; nothing waits in the end; appends were timed."""
        before = value(host, "events_recorded_total")
        for number in range(10):
            host.record("created", f"thing/{number}")
        assert value(host, "events_recorded_total") == (before or 0) + 10
        assert value(host, "outbox_events") == 10
        await eventually(lambda: value(host, "outbox_events") == 0)
        assert value(host, "events_sent_total") == value(host, "events_recorded_total")
        assert (value(host, "append_seconds_count") or 0) >= 2
        assert value(host, "resources") == 10
        assert value(host, "redis_up") == 1
        assert value(host, "incarnations_total", reason="start") == 1

    async def test_tells_what_waits_while_redis_is_away(
        self, own_redis: RedisProcess, folder: Path
    ) -> None:
        """Without Redis the outbox, the spill file and what found no room are seen, and the way back."""
        async with Host.connect(
            own_redis.url, name="svc", outbox_limit=100, spill_dir=folder / "spill", spill_limit=20_000
        ) as host:  # fmt: skip
            own_redis.kill()
            host.record("created", "thing/first")
            await eventually(lambda: value(host, "redis_up") == 0, 20)
            for number in range(1000):
                host.record("created", f"thing/{number}")
                await asyncio.sleep(0)
            await eventually(lambda: (value(host, "spill_bytes") or 0) > 0, 20)
            assert (value(host, "spilled_events") or 0) > 0
            dropped = value(host, "events_dropped_total") or 0
            assert dropped > 0
            assert value(host, "events_recorded_total") == 1002
            own_redis.start()
            await eventually(lambda: value(host, "incarnations_total", reason="full") == 1, 30)
            await eventually(lambda: value(host, "outbox_events") == 0, 30)
            assert value(host, "events_dropped_total") == dropped
            await eventually(lambda: value(host, "redis_up") == 1, 30)

    async def test_begins_anew_when_it_was_declared_lost(self, host: Host, store: Store) -> None:
        """A host that finds itself fenced counts that."""
        namespace = host._sender._namespace
        keys = namespace.partition_keys(host.process)
        await store.redis.hset(keys.seqs, host.process, "lost")
        host.record("created", "thing/a")
        await eventually(lambda: value(host, "incarnations_total", reason="fenced") == 1)


class TestOrders:
    async def test_outcomes_are_of_a_closed_set(self, host: Host) -> None:
        """Done, failed, timed out, not saved, and each refusal are counted apart."""

        async def hang(id: str, obj: object) -> None:
            await asyncio.Event().wait()

        def fail(id: str, obj: object) -> None:
            raise RuntimeError("whatever is in here is no label")

        def decline(id: str, obj: object) -> None:
            raise Refusal("not while the moon is full")

        well = host.registry("well", teardown=lambda id, obj: None, save=lambda id, obj: None)
        for kind, options in {
            "hanging": {"teardown": hang}, "failing": {"teardown": fail},
            "unsaved": {"save": fail}, "declining": {"teardown": decline},
        }.items():  # fmt: skip
            host.registry(kind, **options)["x"] = object()
        for id in ("done", "stale", "busy"):
            well[id] = object()
        orders = [
            *(teardown_of(host, f"{kind}/x") for kind in ("failing", "unsaved", "declining")),
            teardown_of(host, "hanging/x", timeout=0.01),
            *(teardown_of(host, f"well/{id}") for id in ("done", "stale", "gone")),
        ]
        host.record("reused", "well/stale")
        with host.acquire("well/busy"):
            await host.execute([*orders, teardown_of(host, "well/busy")])
        counted = {o: value(host, "orders_total", action="teardown", outcome=o) for o in OUTCOMES}
        assert counted == {**dict.fromkeys(OUTCOMES, 1.0)}
        assert value(host, "recovery_saves_total", outcome="failed") == 1
        assert value(host, "recovery_saves_total", outcome="saved") == 1
        assert value(host, "teardown_seconds_count") == 5

    async def test_unknown_actions_share_a_label(self, host: Host) -> None:
        """What a newer worker asks for is refused, and counted under one name."""
        await host.execute([Order("o", host.process, f"action-{n}", "a/b") for n in range(3)])
        assert value(host, "orders_total", action="other", outcome="gone") == 3


class TestCollectors:
    async def test_registers_with_the_registry_of_the_service(self, host: Host) -> None:
        """A service's own /metrics shows them; a second host in the same one is refused."""
        own = CollectorRegistry()
        host.metrics.register(own)
        assert own.get_sample_value("agent_reconciler_host_redis_up") == 1
        other = Host.connect(host.store, name="other")
        with pytest.raises(ValueError, match="Duplicated"):
            other.metrics.register(own)

    async def test_serves_them(self, host: Host) -> None:
        """`serve` answers on /metrics, on loopback."""
        port = host.metrics.serve(0)
        read = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()
        )
        assert b"agent_reconciler_host_outbox_events" in read

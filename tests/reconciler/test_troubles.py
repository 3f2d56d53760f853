"""One thing that goes wrong costs no more than itself: the rest of the fleet is looked after."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

import reconciler.tail as tail_module
from adapters import Host
from reconciler import Policy, Reconciler
from reconciler.fold import ProcessState, Resource
from reconciler.outlook import Outlook
from reconciler.tail import Tail
from store import EventLog, Store, connect
from store.errors import ArchiveError
from store.inbox import ask
from store.messages import Note
from store.namespace import open_namespace
from store.refusals import Unavailable
from store.retention import Retention, write_retention
from tests.support import RedisProcess, batch, eventually

LEASE = 1.0


def fails_for_one(resource: Resource, process: ProcessState, now_ms: int) -> str | None:
    if resource.ref == "session/odd":
        raise ZeroDivisionError("not thought of")
    return "the rule says so" if resource.ref == "session/due" else None


class TestOfAUser:
    async def test_a_rule_that_raises(
        self, store: Store, namespace: str, caplog: pytest.LogCaptureFixture
    ):
        """It says nothing of what it raised for; what it says of others is done."""
        policy = Policy(rules=(fails_for_one,))
        async with (
            Host.connect(store, name="svc", namespace=namespace) as host,
            Reconciler(store, namespace=namespace, policy=policy, hosts=[host]),
        ):
            sessions = host.registry("session", {"odd": 1, "due": 2}, teardown=lambda *_: None)
            await eventually(lambda: list(sessions) == ["odd"])
        assert "a rule of the policy failed" in caplog.text

    async def test_a_process_that_cannot_be_looked_at(
        self,
        store: Store,
        namespace: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """The others are, in the same pass."""
        async with (
            Host.connect(store, name="one", namespace=namespace) as one,
            Host.connect(store, name="two", namespace=namespace) as two,
        ):
            look = Outlook.look

            def fails(outlook: Outlook, processes: Collection[str]) -> Any:
                if one.process in processes:
                    raise LookupError("not thought of")
                return look(outlook, processes)

            monkeypatch.setattr(Outlook, "look", fails)
            policy = Policy(session_idle_timeout=0.2)
            async with Reconciler(store, namespace=namespace, policy=policy):
                sessions = two.registry("session", {"s": 1}, teardown=lambda *_: None)
                await eventually(lambda: not sessions)
        assert "a pass failed; it is tried again" in caplog.text

    async def test_a_request_that_fails(self, store: Store, namespace: str):
        """Who asked is told, instead of waiting in vain."""
        async with Reconciler(store, namespace=namespace) as running:
            await eventually(lambda: not running.unready())

            async def broken(*_: object, **__: object) -> None:
                raise ResponseError("WRONGTYPE")

            running._forced.reconcile = broken  # type: ignore[method-assign,assignment]
            told = await ask(running.namespace, 0, Note("reconcile"), 4)
        assert b"the worker failed, its log says more" in (told or b"")


class TestPartitions:
    async def test_one_that_cannot_be_read(
        self, store: Store, namespace: str, monkeypatch: pytest.MonkeyPatch
    ):
        """The worker acts for the others, says why it is not ready, and takes it when it can."""
        monkeypatch.setattr("reconciler.partitions._UNREAD_SECONDS", 0.05)
        add, away = Tail.add, [True]

        async def broken(tail: Tail, partitions: Collection[int]) -> list[str]:
            if 3 in partitions and away:
                raise ArchiveError("the archive is away")
            return await add(tail, partitions)

        monkeypatch.setattr(Tail, "add", broken)
        async with Reconciler(store, namespace=namespace, lease_seconds=LEASE) as running:
            await eventually(lambda: len(running.partitions) == 15)
            assert running.unready() == [
                "the log of partition 3 cannot be read: the archive is away"
            ]
            assert not running._acting.opening  # So a failover is noticed meanwhile.
            away.clear()
            await eventually(lambda: len(running.partitions) == 16 and not running.unready())

    async def test_one_that_is_lost_while_its_log_is_read(
        self, store: Store, namespace: str, monkeypatch: pytest.MonkeyPatch
    ):
        """Nothing of it stays in the fold."""
        async with Host.connect(store, name="svc", namespace=namespace) as host:
            one = Reconciler(store, namespace=namespace)
            await one.open()
            mine = one.namespace.partition_of(host.process)
            gate, reached = asyncio.Event(), asyncio.Event()
            real = tail_module.nearest_snapshot

            async def slow(space: Any, partition: int, *rest: Any) -> Any:
                found = await real(space, partition, *rest)
                if partition == mine:
                    reached.set()
                    await gate.wait()
                return found

            monkeypatch.setattr(tail_module, "nearest_snapshot", slow)
            await one._acting.look()
            opening = asyncio.create_task(one._acting.open_gained())
            await reached.wait()
            one._acting.lose(mine, "now held by another")
            gate.set()
            await opening
            assert mine not in one.tail.positions
            assert host.process not in one.tail.state.processes
            await one.release()

    async def test_one_that_cannot_be_archived(self, store: Store, namespace: str, tmp_path: Path):
        """The others are archived and trimmed."""
        space = await open_namespace(store, namespace, 4)
        log = EventLog(store, space)
        processes: dict[int, str] = {}
        number = 0
        while len(processes) < 4:
            number += 1
            processes[space.partition_of(f"svc@h:{number}:1")] = f"svc@h:{number}:1"
        for process in processes.values():
            await log.append(batch(1, 5, process))
        await write_retention(space, Retention(str(tmp_path), keep_seconds=0))
        folder = tmp_path / namespace
        folder.mkdir()
        (folder / "p0000").write_text("a file stands where the folder should be")
        worker = Reconciler(store, namespace=namespace)
        await worker.open()
        await worker.keep_leases()
        await worker.housekeeping.archive()
        await worker.release()
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
            "p0001", "p0002", "p0003",
        ]  # fmt: skip


class TestOutage:
    async def test_a_worker_that_held_nothing_gives_hosts_time(self, own_redis: RedisProcess):
        """Redis was away, and back it gives a worker its first partition: hosts may not be back yet."""
        async with connect(own_redis.url) as store:
            one = Reconciler(store, namespace="n", lease_seconds=LEASE, partitions=1)
            two = Reconciler(store, namespace="n", lease_seconds=LEASE)
            for worker in (one, two):
                await worker.open()
                await worker.keep_leases()
            assert (one.partitions, two.partitions) == ([0], [])
            own_redis.kill()
            with pytest.raises(Unavailable):
                await two.keep_leases()
            loop = asyncio.get_running_loop()
            until = loop.time() + 3.5  # Beyond three seconds nobody knows what happened meanwhile.

            async def still_away() -> bool:
                with pytest.raises(Unavailable):
                    await two.keep_leases()
                return loop.time() > until

            await eventually(still_away, 10)
            own_redis.start()

            async def takes_it() -> bool:
                try:
                    await two.keep_leases()
                except Unavailable:
                    return False
                return two.partitions == [0]

            await eventually(takes_it, 10)
            assert not two._acting.watches()
            await two.release()

    async def test_orders_that_were_not_sent(self, own_redis: RedisProcess):
        """They are not waited for: with each try there would be more of them."""
        policy = Policy(session_idle_timeout=0.3)
        async with (
            connect(own_redis.url) as store,
            Host.connect(own_redis.url, name="svc", namespace="n") as host,
            Reconciler(store, namespace="n", policy=policy, lease_seconds=LEASE) as running,
        ):
            await eventually(lambda: not running.unready())
            tried = []
            put_off = running._try_pass

            async def trying(processes: set[str]) -> None:
                tried.append(len(running._orders._sent))
                await put_off(processes)

            running._try_pass = trying  # type: ignore[method-assign]
            sessions = host.registry("session", {str(n): n for n in range(50)}, teardown=print)
            await eventually(lambda: running.tail.state.size == 50)
            own_redis.kill()
            tried.clear()
            await eventually(lambda: len(tried) > 8, 10)
            assert max(tried) <= 50
            own_redis.start()
            await eventually(lambda: not sessions, 30)
            await eventually(lambda: not running._orders._sent, 10)

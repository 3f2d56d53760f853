"""Redis restarts, fails over and forgets; hosts send again what was forgotten."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import Host
from adapters.spill import spill_files
from reconciler import Policy, Reconciler
from reconciler.fleet import fold_log
from store import EventLog, connect
from tests.adapters.outages import BACK, Pair, log_of, sent
from tests.support import RedisProcess, eventually, whole


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    one = Pair(folder)
    yield one
    one.kill()


class TestRestarts:
    """redis-server with an append-only file is killed and started again, under load."""

    @pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("fsync", ["always", "everysec"])
    async def test_nothing_is_lost_or_doubled(self, folder: Path, times: int, fsync: str):
        """Whatever the fsync policy: a killed process loses nothing that it had written."""
        redis = RedisProcess(folder / "r", "--port", "0", "--appendfsync", fsync)
        redis.start()
        try:
            async with (
                Host.connect(redis.url, name="a", namespace="t") as one,
                Host.connect(redis.url, name="b", namespace="t") as other,
            ):
                running = True

                async def load(host: Host) -> None:
                    while running:
                        for _ in range(20):
                            host.record("reused", "session/s")
                        await asyncio.sleep(0.01)

                loads = [asyncio.create_task(load(host)) for host in (one, other)]

                async def more(host: Host) -> None:
                    mark = host.recorder.outbox.acknowledged + 500
                    await eventually(lambda: host.recorder.outbox.acknowledged > mark, BACK)

                for _ in range(times):
                    await asyncio.gather(more(one), more(other))
                    redis.kill()
                    redis.start()
                running = False
                await asyncio.gather(*loads)
                async with log_of(redis) as log:
                    for host in (one, other):
                        await sent(host)
                        assert await whole(log, host.process) == host.recorder.seq
        finally:
            redis.kill()


class TestFailover:
    """A replica is promoted that misses what the master had acknowledged."""

    @pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "under load"])
    async def test_hosts_send_again(
        self, pair: Pair, quiet: bool, caplog: pytest.LogCaptureFixture
    ):
        """The last 500 events are sent again, by a host that goes on and by one that has nothing new."""
        await pair.linked()
        with caplog.at_level(logging.WARNING):
            async with Host.connect(pair.url, name="svc", namespace="t", lease_seconds=5) as host:
                registry = host.registry("session")
                for number in range(300):
                    registry[f"s{number}"] = object()
                await sent(host)
                log = EventLog(host._store, "t")
                await pair.has(log, host.process, host.recorder.seq)
                await pair.cut()
                for number in range(500):
                    registry[f"t{number}"] = object()
                await sent(host)
                pair.fail_over()
                if not quiet:
                    for number in range(50):
                        registry[f"u{number}"] = object()
                async with log_of(pair.replica) as promoted:

                    async def all_there() -> bool:
                        return await promoted.last_seq(host.process) == host.recorder.seq

                    await eventually(all_there, BACK)
                    assert await whole(promoted, host.process) == host.recorder.seq
                    state = (await fold_log(promoted)).processes[host.process]
                    assert len(state.resources) == len(registry)
        assert caplog.text.count("forgot events that it had acknowledged") == 1

    async def test_the_worker_folds_afresh(self, pair: Pair):
        """A worker that had folded what was forgotten agrees with the log again, and goes on acting."""
        await pair.linked()
        policy = Policy(session_idle_timeout=3600)
        async with (
            connect(pair.url) as store,
            Host.connect(pair.url, name="svc", namespace="t") as host,
            Reconciler(store, namespace="t", policy=policy, lease_seconds=2) as worker,
        ):
            runners = host.registry("runner")
            runners["r"] = object()
            index = host.index("by_user", names="runner")
            index["u"] = "r"
            await sent(host)
            log = EventLog(host._store, "t")
            await pair.has(log, host.process, host.recorder.seq)
            await pair.cut()
            for number in range(200):
                runners[f"r{number}"] = object()
            await sent(host)
            seq = host.recorder.seq

            def folded(seq: int) -> bool:
                state = worker.tail.state.processes.get(host.process)
                return state is not None and state.seq == seq

            await eventually(lambda: folded(seq), BACK)
            pair.fail_over()
            del runners["r"]
            await eventually(lambda: "u" not in index, BACK, "the dangling entry goes")
            await sent(host)
            await eventually(lambda: folded(host.recorder.seq), BACK)
            run_id = await store.run_id()
            await eventually(lambda: worker._run_id == run_id and folded(host.recorder.seq), BACK)
            mine = worker.tail.state.processes[host.process]
            there = (await fold_log(EventLog(store, "t"))).processes[host.process]
            assert set(mine.resources) == set(there.resources)
            assert len(mine.resources) == len(runners)


class TestForgetful:
    """Redis comes back with nothing at all, or will not hear of this process any more."""

    async def test_everything_forgotten(self, own_redis: RedisProcess):
        """All that is kept is sent again, to a namespace that is made anew."""
        async with (
            connect(own_redis.url) as store,
            Host.connect(own_redis.url, name="svc", namespace="t", lease_seconds=2) as host,
        ):
            sessions = host.registry("session", {f"s{number}": object() for number in range(800)})
            await sent(host)
            await store.redis.flushall()
            async with log_of(own_redis) as log:

                async def again() -> bool:
                    return await log.last_seq(host.process) == host.recorder.seq

                await eventually(again, BACK)
                assert await whole(log, host.process) == host.recorder.seq
                assert len((await fold_log(log)).processes[host.process].resources) == len(sessions)

    async def test_more_forgotten_than_kept(
        self, own_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
    ):
        """A process that cannot send it all again goes on as a new one, and adopts what it holds."""
        monkeypatch.setattr("adapters.outbox.KEPT_EVENTS", 100)
        async with (
            connect(own_redis.url) as store,
            Host.connect(own_redis.url, name="svc", namespace="t", lease_seconds=2) as host,
        ):
            host.registry("session", {f"s{number}": object() for number in range(800)})
            await sent(host)
            old = host.process
            await store.redis.flushall()
            await eventually(lambda: host.process != old, BACK)
            await sent(host)
            async with log_of(own_redis) as log:
                assert list((await fold_log(log)).processes) == [host.process]
                assert await whole(log, host.process) == host.recorder.seq

    async def test_declared_lost(self, own_redis: RedisProcess, tmp_path: Path):
        """A fenced process goes on as a new one; its spill file goes, the new one has its own."""
        async with (
            connect(own_redis.url) as store,
            Host.connect(
                own_redis.url, name="svc", namespace="t", lease_seconds=2, spill_dir=tmp_path
            ) as host,
        ):
            host.registry("session", {f"s{number}": object() for number in range(8)})
            await sent(host)
            old, log = host.process, EventLog(store, "t")
            await store.redis.hset((await log.namespace()).partition_keys(old).seqs, old, "lost")
            host.record("reused", "session/s1")
            await eventually(lambda: host.process != old, BACK)
            await sent(host)
            await eventually(lambda: len(spill_files(tmp_path)) == 1)
            assert len((await fold_log(log)).processes[host.process].resources) == 8

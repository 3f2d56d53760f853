"""Hosts while Redis is away, full, or refuses writes."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import psutil
import pytest

from adapters import Host
from adapters.outbox import KEPT_BYTES
from adapters.sender import RETRY_LONGEST
from reconciler import Reconciler
from reconciler.fleet import fold_log
from store import connect
from tests.adapters.outages import BACK, LoadedHost, log_of, sent
from tests.support import RedisProcess, eventually, story, whole


class TestOutage:
    """Redis is away for long: the service does not notice."""

    @pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
    @pytest.mark.timeout(200)
    async def test_a_thousand_operations_a_second(
        self, own_redis: RedisProcess, tmp_path: Path, seconds: int
    ):
        """No operation fails or waits, memory stays under its bound, all is there afterwards."""
        limit = 2000
        async with Host.connect(
            own_redis.url, name="svc", namespace="t", spill_dir=tmp_path, outbox_limit=limit
        ) as host:
            sessions = host.registry("session")
            outbox = host.recorder.outbox
            longest = most = operations = 0.0
            spilled = size = 0
            own_redis.kill()
            began = time.monotonic()
            while (now := time.monotonic() - began) < seconds:
                while operations < now * 1000:
                    start = time.perf_counter()
                    if f"s{operations % 50}" in sessions:
                        del sessions[f"s{operations % 50}"]
                    else:
                        sessions[f"s{operations % 50}"] = object()
                    longest = max(longest, time.perf_counter() - start)
                    operations += 1
                events, held = outbox.held
                most, size, spilled = (
                    max(most, events),
                    max(size, held),
                    max(spilled, outbox.spilled),
                )
                await asyncio.sleep(0.005)
            own_redis.start()
            await sent(host, 60)
            print(
                f"\n{operations:.0f} operations in {seconds} s, longest {longest * 1e3:.2f} ms, "
                f"most in memory {most:.0f} events, {size / 1024:.0f} KiB; {spilled} in the file"
            )
            assert host.recorder.outbox is outbox
            assert outbox.dropped == 0
            assert longest < 0.25
            assert most <= limit + 1000 + outbox._kept_events
            assert size <= limit * 512 + KEPT_BYTES
            assert spilled > limit
            async with log_of(own_redis) as log:
                assert await whole(log, host.process) == host.recorder.seq
                assert host.recorder.seq > operations
                state = await fold_log(log)
                assert len(state.processes[host.process].resources) == len(sessions)

    async def test_hosts_are_not_declared_lost(self, own_redis: RedisProcess):
        """Every lease lapses while Redis is away: the worker waits for the hosts to be back."""
        async with (
            connect(own_redis.url) as store,
            Host.connect(own_redis.url, name="svc", namespace="t", lease_seconds=2) as host,
            Reconciler(store, namespace="t") as worker,
        ):
            process = host.process
            await eventually(lambda: process in worker.tail.state.processes)
            await eventually(worker._acting.watches, 10, "the worker has watched for a while")
            own_redis.kill()
            away = time.monotonic()
            await eventually(lambda: time.monotonic() > away + 5, 10)
            own_redis.start()
            host.record("created", "session/s")
            await sent(host)
            await eventually(worker._acting.watches, 10)
            assert host.process == process
            assert worker.tail.state.lost == 0

    async def test_full(self, own_redis: RedisProcess, caplog: pytest.LogCaptureFixture):
        """Memory full and no file: the log ends where it is whole; a new process adopts what lives."""
        async with Host.connect(own_redis.url, name="svc", namespace="t", outbox_limit=500) as host:
            sessions = host.registry("session")
            old = host.recorder
            own_redis.kill()
            for number in range(2000):
                sessions[f"s{number}"] = object()
            for number in range(1990):
                del sessions[f"s{number}"]
            assert old.outbox.dropped > 3000
            own_redis.start()
            await eventually(lambda: host.recorder is not old, BACK)
            await sent(host)
            async with log_of(own_redis) as log:
                assert await whole(log, old.process) == old.outbox.recorded
                state = await fold_log(log)
                assert list(state.processes) == [host.process]
                assert set(state.processes[host.process].resources) == {
                    f"session/s{number}" for number in range(1990, 2000)
                }
                assert await whole(log, host.process) == host.recorder.seq
                assert host._summary().dropped == old.outbox.dropped
        assert caplog.text.count("the outbox is full") == 1

    async def test_taking_in_more_than_the_bound(self, own_redis: RedisProcess):
        """A service may hold more than its outbox: taking it in, and adopting it anew, is not dropped."""
        held = {f"s{number}": object() for number in range(3000)}
        async with Host.connect(own_redis.url, name="svc", namespace="t", outbox_limit=500) as host:
            host.registry("session", held)
            await sent(host)
            await host._sender.go_on_as_new("the test says so", "fenced")
            await sent(host)
            assert host._summary().dropped == 0
            async with log_of(own_redis) as log:
                assert len((await fold_log(log)).processes[host.process].resources) == 3000

    async def test_full_disk(self, own_redis: RedisProcess, tmp_path: Path):
        """A file size limit stands in for a full disk: one line, then memory, then a new process."""
        host = LoadedHost(tmp_path, own_redis.url, "t", str(400_000))
        try:
            began = await host.until(lambda line: line["acknowledged"] > 500)
            own_redis.kill()
            await host.until(lambda line: line["dropped"] > 100)
            own_redis.start()
            after = await host.until(lambda line: line["process"] != began["process"])
            await host.until(lambda line: line["acknowledged"] > 100)
        finally:
            host.kill()
        async with log_of(own_redis) as log:
            assert await whole(log, began["process"]) > 2000
            assert await whole(log, after["process"]) > 100
        text = host.log.read_text()
        assert text.count("the spill file cannot be written") == 1
        assert text.count("the outbox is full") == 1


@pytest.mark.parametrize("rounds", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
async def test_memory_is_flat(own_redis: RedisProcess, rounds: int):
    """A host that creates, uses and cleans up for ever does not grow."""
    async with Host.connect(own_redis.url, name="svc", namespace="t", outbox_limit=5000) as host:
        sessions = host.registry("session")
        rss: list[int] = []
        for number in range(rounds):
            ref = f"s{number}"
            sessions[ref] = object()
            with host.acquire(f"session/{ref}"):
                pass
            del sessions[ref]
            if number % 250 == 0:
                await eventually(lambda: len(host.recorder) < 1000, BACK)
            if number % (rounds // 10) == 0:
                gc.collect()
                rss.append(psutil.Process().memory_info().rss)
        assert host.recorder.outbox.dropped == 0
        print(f"\n{rounds} rounds, MiB: {[round(size / 2**20, 1) for size in rss]}")
        assert rss[-1] - rss[2] < 8 * 2**20
        assert len(host.entries) == 0


async def test_a_server_that_refuses_writes(own_redis: RedisProcess):
    """A server that is out of memory is as good as away: all is sent when it takes writes again."""
    async with (
        connect(own_redis.url) as store,
        Host.connect(own_redis.url, name="svc", namespace="t") as host,
    ):
        await store.redis.config_set("maxmemory", 1)
        for _ in range(10):
            host.record("reused", "session/s")
        await eventually(lambda: not host._sender.connected, BACK)
        await store.redis.config_set("maxmemory", 0)
        await sent(host)
        async with log_of(own_redis) as log:
            assert await whole(log, host.process) == host.recorder.seq


async def test_story_of_a_short_outage(own_redis: RedisProcess):
    """What happened while Redis was away stands in the log as it happened."""
    async with Host.connect(own_redis.url, name="svc", namespace="t") as host:
        sessions = host.registry("session")
        own_redis.kill()
        sessions["a"] = object()
        del sessions["a"]
        own_redis.start()
        await sent(host, RETRY_LONGEST + BACK)
        async with log_of(own_redis) as log:
            assert await story(log) == [("created", "session/a"), ("cleaned_up", "session/a")]

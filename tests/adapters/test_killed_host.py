"""Hosts that are killed while Redis is away: what they spilled is sent by the next incarnation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import Host
from adapters.spill import SpillFile, spill_files
from reconciler import Policy, Reconciler
from reconciler.fleet import fold_log
from store import connect
from tests.adapters.outages import BACK, LoadedHost, log_of, sent
from tests.support import RedisProcess, eventually, whole


@pytest.fixture
def loaded(tmp_path: Path, own_redis: RedisProcess) -> Iterator[LoadedHost]:
    one = LoadedHost(tmp_path, own_redis.url, "t")
    yield one
    one.kill()


class TestKilledHost:
    """A host that is killed leaves a log that is true."""

    async def test_acknowledged_events_stay(self, loaded: LoadedHost, own_redis: RedisProcess):
        """SIGKILL under load: what was acknowledged is in the log once, the rest is closed."""
        before = await loaded.until(lambda line: line["acknowledged"] > 3000)
        process = before["process"]
        last = loaded.kill() or before
        async with log_of(own_redis) as log, connect(own_redis.url) as store:
            assert await whole(log, process) >= last["acknowledged"]
            async with Reconciler(store, namespace="t", policy=Policy()) as reconciler:
                assert process in reconciler.tail.state.processes or await eventually(
                    lambda: process in reconciler.tail.state.processes
                )
                await eventually(lambda: not reconciler.tail.state.processes, BACK)
                assert reconciler.tail.state.lost == 1

    async def test_the_next_incarnation_sends_what_waited(
        self, loaded: LoadedHost, own_redis: RedisProcess
    ):
        """Redis away, events spilled, host killed: the next start sends them as what they were."""
        began = await loaded.until(lambda line: line["acknowledged"] > 1000)
        own_redis.kill()
        spilled = await loaded.until(lambda line: line["spilled"] > 2500)
        loaded.kill()
        own_redis.start()
        async with (
            log_of(own_redis) as log,
            Host.connect(
                own_redis.url, name="loaded", namespace="t", spill_dir=loaded.spill_dir
            ) as host,
        ):
            await eventually(lambda: len(spill_files(loaded.spill_dir)) == 1, BACK)
            assert await whole(log, began["process"]) >= spilled["acknowledged"] + 2000
            await sent(host)
            assert await whole(log, host.process) == host.recorder.seq

    async def test_unless_it_was_declared_lost(
        self, own_redis: RedisProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        """Events of a process that the log has closed are given up, with one line."""
        file = SpillFile.create(tmp_path, "loaded@host:1:1")
        file.append(1, [b"{}"])
        file.close()
        async with log_of(own_redis) as log, connect(own_redis.url) as store:
            key = (await log.namespace()).partition_keys("loaded@host:1:1").seqs
            await store.redis.hset(key, "loaded@host:1:1", "lost")
            with caplog.at_level(logging.WARNING):
                async with Host.connect(store, name="loaded", namespace="t", spill_dir=tmp_path):
                    await eventually(lambda: "given up" in caplog.text, BACK)
                    await eventually(lambda: not file.path.exists())
        assert caplog.text.count("given up") == 1

    async def test_a_good_end_without_redis(self, own_redis: RedisProcess, tmp_path: Path):
        """A host that ends while Redis is away leaves everything, its stop included, to the next."""
        host = await Host.connect(own_redis.url, name="svc", namespace="t", spill_dir=tmp_path)
        host.registry("session")["s"] = object()
        await sent(host)
        own_redis.kill()
        for _ in range(700):
            host.record("reused", "session/s")
        await host.close()
        assert len(spill_files(tmp_path)) == 1
        own_redis.start()
        async with Host.connect(own_redis.url, name="svc", namespace="t", spill_dir=tmp_path):
            await eventually(lambda: len(spill_files(tmp_path)) == 1, BACK)
            async with log_of(own_redis) as log:
                await eventually(lambda: log.last_seq(host.process))
                assert await whole(log, host.process) == host.recorder.seq
                state = await fold_log(log)
                assert (host.process in state.processes, state.stopped) == (False, 1)

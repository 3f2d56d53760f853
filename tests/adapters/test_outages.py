"""Hosts while Redis goes away, forgets or comes back, and when they are killed themselves."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis

from adapters import Host
from adapters.outbox import KEPT_BYTES
from adapters.sender import RETRY_LONGEST
from adapters.spill import SpillFile, spill_files
from reconciler import Policy, Reconciler
from reconciler.fleet import fold_log
from store import EventLog, connect
from tests.support import RedisProcess, eventually, free_port, story, whole

ROOT = Path(__file__).parent.parent.parent
BACK = 20.0
"""Seconds within which everything must be well again."""


class LoadedHost:
    """`tests.adapters.loaded_host` as a process."""

    def __init__(
        self, folder: Path, url: str, namespace: str, *limits: str, rate: int = 2000
    ) -> None:
        self.log = folder / "host.log"
        self.spill_dir = folder / "spill"
        arguments = [url, namespace, str(self.spill_dir), str(rate), *limits]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.loaded_host", *arguments],
            stdout=subprocess.PIPE, stderr=self.log.open("ab"), text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._said = self._process.stdout

    def said(self) -> dict[str, Any]:
        """The next line of the host."""
        line = self._said.readline()
        assert line, self.log.read_text()[-2000:]
        return dict(json.loads(line))

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first line for which `condition` holds."""

        def wait() -> dict[str, Any]:
            while not condition(line := self.said()):
                pass
            return line

        return await asyncio.wait_for(asyncio.to_thread(wait), 30)

    def kill(self) -> dict[str, Any]:
        """SIGKILL; the last line it said."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        lines = [
            json.loads(line) for line in self._said.read().splitlines(True) if line[-1] == "\n"
        ]
        return dict(lines[-1]) if lines else {}


@pytest.fixture
def loaded(tmp_path: Path, own_redis: RedisProcess) -> Iterator[LoadedHost]:
    one = LoadedHost(tmp_path, own_redis.url, "t")
    yield one
    one.kill()


@asynccontextmanager
async def log_of(redis: RedisProcess, namespace: str = "t") -> AsyncIterator[EventLog]:
    async with connect(redis.url) as store:
        yield EventLog(store, namespace)


async def sent(host: Host, timeout: float = BACK) -> None:
    """Everything recorded was acknowledged."""
    await eventually(lambda: len(host.recorder) == 0, timeout, "the outbox drains")


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


class Pair:
    """A master and its replica, behind one address that can be moved, as a proxy would."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.master = RedisProcess(folder / "m", "--port", str(port), "--bind", "127.0.0.1")
        self.replica = RedisProcess(
            folder / "s", "--port", "0", "--replicaof", "127.0.0.1", str(port),
            "--repl-diskless-sync-delay", "0",
        )  # fmt: skip
        self._address = folder / "address"
        self.url = f"unix://{self._address}"
        self.master.start()
        self.replica.start()
        self._point_to(self.master)

    def _point_to(self, server: RedisProcess) -> None:
        new = self._address.with_suffix(".new")
        new.symlink_to(server.socket)
        new.replace(self._address)

    def _replica(self) -> Redis:
        """A plain client: `connect` refuses a replica."""
        return Redis.from_url(self.replica.url)

    async def linked(self) -> None:
        """The replica follows."""

        async def up() -> bool:
            async with self._replica() as redis:
                info = await redis.info("replication")
                return bool(info["master_link_status"] == "up")

        await eventually(up, BACK)

    async def has(self, log: EventLog, process: str, seq: int) -> None:
        """The replica has events of a process up to `seq`."""
        async with self._replica() as redis:
            key = (await log.namespace()).partition_keys(process).seqs

            async def there() -> bool:
                return int(await redis.hget(key, process) or 0) >= seq

            await eventually(there, BACK)

    async def cut(self) -> None:
        """The replica follows no longer; it could be promoted as it is."""
        async with self._replica() as redis:
            await redis.execute_command("REPLICAOF", "NO", "ONE")

    def fail_over(self) -> None:
        """The master dies, the replica stands at its address."""
        self._point_to(self.replica)
        self.master.kill()

    def kill(self) -> None:
        self.master.kill()
        self.replica.kill()


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    one = Pair(folder)
    yield one
    one.kill()


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

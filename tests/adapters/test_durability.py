"""Durability: what is acknowledged when, and what is refused with one clear line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import Host
from store import Durability, DurabilityError, EventLog, NotConfirmed, connect
from store.client import make_client
from store.durability import confirmation, confirmed
from store.namespace import Namespace
from tests.adapters.outages import Pair, sent
from tests.support import RedisProcess, batch, eventually, server_with_waitaof, whole


@pytest.fixture
def everysec(folder: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(folder / "r", "--port", "0", "--appendfsync", "everysec")
    server.start()
    yield server
    server.kill()


class TestRefused:
    """What the server cannot give is said when the host starts."""

    async def test_no_replica(self, own_redis: RedisProcess):
        """`replicated` without a replica."""
        with pytest.raises(DurabilityError, match=r"needs a replica, and Redis at .* has none"):
            async with Host.connect(own_redis.url, name="svc", durability="replicated"):
                pass

    async def test_no_fsync(self, everysec: RedisProcess):
        """`fsync` on a 6.2 that flushes every second; the message names what would do."""
        with pytest.raises(DurabilityError, match=r"appendfsync always, or Redis 7\.2"):
            async with Host.connect(f"{everysec.url}?durability=fsync", name="svc"):
                pass

    async def test_no_file(self, folder: Path):
        """`fsync` without an append-only file."""
        server = RedisProcess(folder / "r", "--port", "0", "--appendonly", "no")
        server.start()
        try:
            with pytest.raises(DurabilityError, match="--appendonly yes"):
                async with Host.connect(server.url, name="svc", durability=Durability.FSYNC):
                    pass
        finally:
            server.kill()

    @pytest.mark.parametrize("url", ["?durability=eternal", "?db=0&durability=eternal"])
    async def test_unknown(self, own_redis: RedisProcess, url: str):
        """A name that does not exist."""
        with pytest.raises(
            DurabilityError, match="'eternal' is not known: choose of memory, fsync"
        ):
            async with Host.connect(own_redis.url + url, name="svc"):
                pass


class TestGiven:
    """What was asked for is true when an event is acknowledged."""

    async def test_fsync_always(self, own_redis: RedisProcess):
        """A server that flushes before it answers needs no confirmation."""
        async with connect(f"{own_redis.url}?durability=fsync&db=0") as store:
            assert await confirmation(store, None) is None
            assert store.url.endswith("?db=0")
        async with Host.connect(
            own_redis.url, name="svc", namespace="t", durability="fsync"
        ) as host:
            host.record("created", "session/s")
            await sent(host)

    async def test_waitaof(self, folder: Path, caplog: pytest.LogCaptureFixture):
        """A server that flushes every second is asked, with each batch, to have it on disk."""
        binary = server_with_waitaof()
        server = RedisProcess(
            folder / "r", "--port", "0", "--appendfsync", "everysec", binary=binary
        )
        server.start()
        try:
            async with connect(f"{server.url}?durability=fsync") as store:
                assert (await confirmation(store, None) or ())[0] == "WAITAOF"
                async with Host.connect(store, name="svc", namespace="t") as host:
                    for _ in range(100):
                        host.record("reused", "session/s")
                    await sent(host)
                    assert await whole(EventLog(store, "t"), host.process) == host.recorder.seq
                    # A file that is switched off meanwhile: nothing is acknowledged, nothing lost.
                    await store.redis.config_set("appendonly", "no")
                    host.record("reused", "session/s")
                    with caplog.at_level(logging.WARNING):
                        await eventually(lambda: "WAITAOF" in caplog.text, 15)
                    assert len(host.recorder) == 1
                    await store.redis.config_set("appendonly", "yes")
                    await sent(host, 30)
                server.kill()
                server.start()
                assert await whole(EventLog(store, "t"), host.process) == host.recorder.seq
        finally:
            server.kill()

    async def test_replicated(self, folder: Path, caplog: pytest.LogCaptureFixture):
        """What is acknowledged is on the replica; without a replica nothing is, and nothing is lost."""
        pair = Pair(folder)
        try:
            await pair.linked()
            async with connect(f"{pair.url}?durability=replicated") as store:
                host = await Host.connect(store, name="svc", namespace="t")
                for _ in range(100):
                    host.record("reused", "session/s")
                await sent(host)
                replica = connect(pair.replica.url)
                replica._redis = make_client(pair.replica.url)  # `open` refuses a replica
                async with replica:
                    space = await EventLog(store, "t").namespace()
                    there = EventLog(replica, Namespace(replica, space.keys, space.partitions))
                    assert await whole(there, host.process) == host.recorder.seq
                pair.replica.kill()
                host.record("reused", "session/s")
                with caplog.at_level(logging.WARNING):
                    await eventually(lambda: "was answered 0" in caplog.text, 15)
                assert len(host.recorder) == 1
                pair.replica.start()
                await sent(host, 30)
                await host.close()
                assert await whole(EventLog(store, "t"), host.process) == host.recorder.seq
        finally:
            pair.kill()

    async def test_a_batch_sent_again_is_not_confirmed_for_nothing(self, folder: Path):
        """WAIT speaks of its own connection: a batch that the log has already is a write all the same."""
        pair = Pair(folder)
        try:
            await pair.linked()
            async with connect(pair.url) as store, connect(pair.url) as another:
                log = EventLog(store, "t")
                await log.append(batch(1, 3))
                pair.replica.kill()
                again = EventLog(another, "t")
                payloads = [
                    fields[1]
                    for _, fields in await store.redis.xrange(
                        (await log.namespace()).partition_keys("p").log
                    )
                ]
                with pytest.raises(NotConfirmed):
                    await again.append_encoded("p", 1, payloads, ("WAIT", "1", "100"))
        finally:
            pair.kill()

    def test_answers(self):
        """WAIT answers a number, WAITAOF one for the server and one for its replicas."""
        assert confirmed(1)
        assert not confirmed(0)
        assert confirmed([1, 0])
        assert not confirmed([0, 1])

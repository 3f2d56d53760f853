"""What a Redis must be to hold a log, told at once by `connect`: on real servers, in one line each."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from store import BadAddress, RedisUnavailable, connect, server_check
from store.errors import RedisBusy
from tests.redis_processes import Server, free_port, until

Start = Callable[..., Server]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts a redis-server with options."""
    started: list[Server] = []

    def begin(*options: str, with_bus: bool = False) -> Server:
        started.append(Server(folder, *options, with_bus=with_bus))
        started[-1].start()
        return started[-1]

    yield begin
    for server in started:
        server.kill()


async def refusal(url: str, error: type[Exception] = RedisUnavailable) -> str:
    with pytest.raises(error) as caught:
        await connect(url).open()
    message = str(caught.value)
    assert "\n" not in message
    return message


def url_of(server: Server) -> str:
    return f"redis://127.0.0.1:{server.port}"


class TestObjections:
    """Each is told before anything is written."""

    async def test_too_old(self, start: Start, monkeypatch: pytest.MonkeyPatch):
        """A server older than what is needed is named with both versions."""
        server = start()
        version = server.client.info("server")["redis_version"]
        monkeypatch.setattr(server_check, "OLDEST_SERVER", (99, 1))
        assert f"is version {version}: 99.1 or newer" in await refusal(url_of(server))

    async def test_replica(self, start: Start):
        """A replica is refused, with the address of its master."""
        master = start()
        replica = start("--replicaof", "127.0.0.1", str(master.port))
        until(
            lambda: replica.client.info("replication")["master_link_status"] == "up", "it follows"
        )
        message = await refusal(url_of(replica))
        assert "is a replica" in message
        assert f"127.0.0.1:{master.port}" in message

    async def test_eviction(self, start: Start):
        """A policy that would drop the log is refused, with the command that mends it."""
        server = start("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
        message = await refusal(url_of(server))
        assert "maxmemory-policy allkeys-lru" in message
        assert "CONFIG SET maxmemory-policy noeviction" in message

    async def test_eviction_without_a_limit(self, start: Start):
        """Without a limit on memory nothing is ever evicted, whatever the policy says."""
        server = start("--maxmemory-policy", "allkeys-lru")
        async with connect(url_of(server)):
            pass

    async def test_out_of_memory(self, start: Start):
        """A full memory is told, with how much is used."""
        server = start("--maxmemory", "1mb")

        def fill() -> None:
            for number in range(10_000):
                server.client.set(f"k{number}", "x" * 10_000)

        with pytest.raises(redis.exceptions.OutOfMemoryError):
            fill()
        message = await refusal(url_of(server))
        assert "is out of memory" in message
        assert "CONFIG SET maxmemory" in message

    async def test_memory_fills_up_later(self, start: Start):
        """A write that finds the memory full is told apart from one that is wrong: it may be tried again."""
        server = start()
        async with connect(url_of(server)) as store:
            server.client.config_set("maxmemory", 1)
            with pytest.raises(RedisBusy, match="its memory is full"):
                await store.script("append", ["{x}log", "{x}seqs"], ["p", 1, 1, "{}"])
            server.client.config_set("maxmemory", 0)
            assert await store.script("append", ["{x}log", "{x}seqs"], ["p", 1, 1, "{}"]) == [1, 1]

    async def test_becomes_a_replica_later(self, start: Start):
        """So is a write to a master that was made a replica."""
        master, server = start(), start()
        async with connect(url_of(server)) as store:
            server.client.replicaof("127.0.0.1", master.port)
            with pytest.raises(RedisBusy, match="it is a replica now"):
                await store.script("append", ["{x}log", "{x}seqs"], ["p", 1, 1, "{}"])


class TestWrongScheme:
    """The right kind of address is named."""

    async def test_node_of_a_cluster(self, start: Start):
        """redis:// to a node of a cluster."""
        server = start("--cluster-enabled", "yes", with_bus=True)
        assert "write redis+cluster://" in await refusal(url_of(server))

    async def test_not_a_cluster(self, start: Start):
        """redis+cluster:// to a single server."""
        server = start()
        message = await refusal(f"redis+cluster://127.0.0.1:{server.port}")
        assert "is not a cluster: write redis://" in message

    async def test_sentinel(self, folder: Path):
        """redis:// to a sentinel; and a master that the sentinel does not know."""
        sentinel = Server(folder)
        sentinel.config = sentinel.folder / "sentinel.conf"
        sentinel.config.write_text("sentinel monitor known 127.0.0.1 1 1\n")
        sentinel.start()
        try:
            assert "write redis+sentinel://" in await refusal(url_of(sentinel))
            message = await refusal(f"redis+sentinel://127.0.0.1:{sentinel.port}/other")
            assert "name no master" in message
        finally:
            sentinel.kill()

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("redis+cluster://", "names no host"),
            ("redis+cluster://a:b", "port is not a number"),
            ("redis+cluster://a:1/3", "no databases"),
            ("redis+sentinel://a:1", "name-of-the-master"),
            ("redis+sentinel://a:1/m/x", "name-of-the-master"),
            ("redis+sentinel://user:secret@a:1", "cannot be parsed"),
        ],
    )
    async def test_bad_address(self, url: str, says: str):
        """An address that cannot be meant is told in one line, without a password."""
        message = await refusal(url, BadAddress)
        assert says in message
        assert "secret" not in message

    async def test_tls_to_a_server_without_it(self, start: Start, monkeypatch: pytest.MonkeyPatch):
        """rediss:// to a plain server: it is there, so nothing is to be started."""
        monkeypatch.setattr("store.client._CONNECT_TIMEOUT", 0.5)
        message = await refusal(f"rediss://127.0.0.1:{start().port}")
        assert "something listens at rediss://" in message
        assert "write redis:// if it has no TLS" in message

    async def test_server_with_tls(self, folder: Path):
        """redis:// to a server with TLS, and a certificate that nobody vouches for."""
        key, certificate = folder / "key.pem", folder / "certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.close()

        async with await asyncio.start_server(hear, "127.0.0.1", 0, ssl=context) as server:
            at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            assert "write rediss:// if it has TLS" in await refusal(f"redis://{at}")
            message = await refusal(f"rediss://{at}")
            assert "self-signed certificate" in message
            assert "?ssl_ca_certs=PATH" in message

    async def test_not_a_sentinel(self, start: Start):
        """redis+sentinel:// to a server."""
        message = await refusal(f"redis+sentinel://127.0.0.1:{start().port}/m")
        assert "is not a sentinel: write redis://" in message

    @pytest.mark.parametrize("kind", ["cluster", "sentinel"])
    async def test_nobody_there(self, kind: str):
        """No node answers: the message says what to look at."""
        port, other = free_port(), free_port()
        message = await refusal(f"redis+{kind}://127.0.0.1:{port},127.0.0.1:{other}/" + (
            "m" if kind == "sentinel" else ""))  # fmt: skip
        assert f"127.0.0.1:{port}" in message
        assert "redis-cli" in message
        assert f"no {kind} answers" in message
        assert "(connection refused)" in message

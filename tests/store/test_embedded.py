"""`embedded://PATH`: one owner, many users, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from store import connect
from store.embedded import EmbeddedServer, socket_of
from store.errors import RedisUnavailable
from tests.support import answers, eventually

PROGRAM = """
import asyncio, sys
from store import connect

async def main():
    async with connect(sys.argv[1]) as store:
        await store.redis.set("seen", sys.argv[2])
        print(store.owns_server, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def other_process(folder: Path, name: str) -> subprocess.Popen[str]:
    """A process that opens the folder, prints whether it owns the server, and waits for a line."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"embedded://{folder}", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


class TestOwner:
    """Whoever opens the folder first owns the server."""

    async def test_shared_with_another_process(self, folder: Path):
        """Another process shares the server, and does not stop it when it ends."""
        async with connect(f"embedded://{folder}") as store:
            assert store.owns_server
            with other_process(folder, "other") as other:
                assert line_of(other) == "False"
                assert await store.redis.get("seen") == b"other"
                other.communicate("go\n", timeout=10)
            assert await store.redis.ping()

    async def test_shared_within_a_process(self, folder: Path):
        """A second handle in the same process shares the server, too."""
        async with connect(f"embedded://{folder}") as first:
            async with connect(f"embedded://{folder}") as second:
                assert not second.owns_server
                assert await second.redis.ping()
            assert await first.redis.ping()

    async def test_stopped_with_its_owner(self, folder: Path):
        """The server ends when its owner closes it, and the data is there for the next owner."""
        async with connect(f"embedded://{folder}") as store:
            await store.redis.set("kept", "yes")
        assert not answers(socket_of(folder))
        async with connect(f"embedded://{folder}") as store:
            assert store.owns_server
            assert await store.redis.get("kept") == b"yes"

    async def test_stopped_when_its_owner_is_killed(self, folder: Path):
        """The server ends in good order when its owner is killed with SIGKILL; the data is kept."""
        with other_process(folder, "killed") as owner:
            assert line_of(owner) == "True"
            assert answers(socket_of(folder))
            os.kill(owner.pid, signal.SIGKILL)
        await eventually(lambda: not answers(socket_of(folder)))
        async with connect(f"embedded://{folder}") as store:
            assert store.owns_server
            assert await store.redis.get("seen") == b"killed"

    async def test_a_server_that_is_killed_makes_way_for_another(self, folder: Path):
        """The next one to open the folder starts it anew, though the owner before lives; both use it."""
        async with connect(f"embedded://{folder}") as first:
            pid = (await first.redis.info("server"))["process_id"]
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda: not first.owns_server)
            async with connect(f"embedded://{folder}") as second:
                assert second.owns_server
                assert await first.redis.ping()
        assert not answers(socket_of(folder))

    async def test_one_server_can_be_started_again(self, folder: Path):
        """Its own owner, too, gets another one for a server that was killed."""
        server = EmbeddedServer(folder)
        await server.start()
        async with connect(f"unix://{server.socket}") as store:
            pid = (await store.redis.info("server"))["process_id"]
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not server.owned)
        await server.start()
        assert server.owned
        server.stop()
        assert not answers(server.socket)

    async def test_a_server_that_does_not_start_is_told_at_once(self, folder: Path):
        """Nobody waits for a server that has ended, and the folder is free again."""
        (folder / "appendonlydir").mkdir()  # From Redis 7.0 on; the file itself before.
        spoilt = [folder / "appendonlydir/appendonly.aof.manifest", folder / "appendonly.aof"]
        for file in spoilt:
            file.write_text("nonsense\n")
        server = EmbeddedServer(folder)
        async with asyncio.timeout(10):
            with pytest.raises(RedisUnavailable, match="ended at its start"):
                await server.start()
        assert not server.owned
        for file in spoilt:
            file.unlink()
        await server.start()
        server.stop()

    async def test_a_process_with_many_open_files(self, folder: Path):
        """A service that has many files open can own a server."""
        with ExitStack() as files:
            for _ in range(30):
                files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            async with connect(f"embedded://{folder}") as store:
                assert store.owns_server
        assert not answers(socket_of(folder))


class TestFolder:
    """Where the server lives."""

    async def test_deep_folder(self, folder: Path):
        """A folder too deep for a unix socket works, with its socket elsewhere."""
        deep = folder / ("d" * 60) / ("e" * 60)
        assert len(str(socket_of(deep))) < 100
        async with connect(f"embedded://{deep}") as store:
            assert await store.redis.ping()
        assert (deep / "redis.log").exists()

    async def test_stop_twice(self, folder: Path):
        """Stopping a server twice, or one that is not owned, does nothing."""
        server = EmbeddedServer(folder)
        await server.start()
        shared = EmbeddedServer(folder)
        await shared.start()
        shared.stop()
        assert answers(server.socket)
        server.stop()
        server.stop()
        assert not answers(server.socket)

    @pytest.mark.parametrize("data", ["appendonly", "owner.lock"])
    async def test_keeps_to_its_folder(self, folder: Path, data: str):
        """Data and lock are in the folder."""
        async with connect(f"embedded://{folder}") as store:
            await store.redis.set("k", "v")
            assert any(name.startswith(data) for name in os.listdir(folder))

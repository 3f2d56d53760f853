"""Hosts that can be killed, a master with a replica, and ways to look at what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from adapters import Host
from store import EventLog, connect
from tests.support import RedisProcess, eventually, free_port

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


@asynccontextmanager
async def log_of(redis: RedisProcess, namespace: str = "t") -> AsyncIterator[EventLog]:
    async with connect(redis.url) as store:
        yield EventLog(store, namespace)


async def sent(host: Host, timeout: float = BACK) -> None:
    """Everything recorded was acknowledged."""
    await eventually(lambda: len(host.recorder) == 0, timeout, "the outbox drains")


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

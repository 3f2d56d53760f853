"""A service under load: at least one host in every partition, each making sessions and using them.

It watches what no reconciler may do: tear down what is in use, or the same thing twice. Each line on
its standard input is answered with what it has counted so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import sys
from collections import Counter
from typing import Any

from adapters import Host
from store import Store, connect
from store.namespace import open_namespace


class Load:
    """Counts what happens to the sessions of all hosts."""

    def __init__(self) -> None:
        self.made = 0
        self.torn_down: Counter[str] = Counter()
        self.in_use: set[str] = set()
        self.touched_in_use: list[str] = []

    def teardown(self, id: str, _: Any) -> None:
        self.torn_down[id] += 1
        if id in self.in_use:
            self.touched_in_use.append(id)

    async def work(self, host: Host, prefix: str, pause: float) -> None:
        """Makes sessions, uses each for a while, and leaves it to the reconciler."""
        sessions = host.registry("session", teardown=self.teardown)
        users: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            id = f"{prefix}-{number}"
            sessions[id] = object()
            self.made += 1
            task = asyncio.create_task(self._use(host, id))
            users.add(task)
            task.add_done_callback(users.discard)
            await asyncio.sleep(pause)

    async def _use(self, host: Host, id: str) -> None:
        async with host.acquire(f"session/{id}"):
            self.in_use.add(id)
            await asyncio.sleep(random.uniform(0, 0.8))
            self.in_use.discard(id)

    def report(self) -> dict[str, Any]:
        twice = [id for id, times in self.torn_down.items() if times > 1]
        return {
            "made": self.made,
            "torn_down": len(self.torn_down),
            "twice": twice,
            "touched_in_use": self.touched_in_use,
        }


async def one_in_each_partition(
    store: Store, namespace: str, stack: contextlib.AsyncExitStack
) -> list[Host]:
    """Hosts in all partitions; which one a host is in follows from its id."""
    space = await open_namespace(store, namespace)
    hosts: dict[int, Host] = {}
    while len(hosts) < space.partitions:
        host = Host.connect(store, name="load", namespace=namespace, lease_seconds=6)
        hosts.setdefault(space.partition_of(host.process), host)
    return [await stack.enter_async_context(host) for host in hosts.values()]


async def main(url: str, namespace: str, pause: float) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    load = Load()
    async with connect(url) as store, contextlib.AsyncExitStack() as stack:
        hosts = await one_in_each_partition(store, namespace, stack)
        tasks = [
            asyncio.create_task(load.work(host, f"h{number}", pause))
            for number, host in enumerate(hosts)
        ]
        print(json.dumps({"processes": [host.process for host in hosts]}), flush=True)
        while line := await reader.readline():
            if line.strip() == b"stop":
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            print(json.dumps(load.report()), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))

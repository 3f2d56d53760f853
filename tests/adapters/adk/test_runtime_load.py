"""Many chats through AdkRuntime with idle eviction on: nothing is left, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

import psutil
import pytest
from google.adk.sessions import InMemorySessionService

from adapters import Host
from adapters.adk import AdkRuntime, RedisSessionService
from reconciler import Policy, Reconciler
from store import Store
from tests.adapters.adk.talk import Workshop, say
from tests.support import eventually

AT_ONCE = 20
CONFIGS = [{"name": f"agent_{number}", "topic": number} for number in range(8)]


class Gauge:
    """Memory, objects and file descriptors of this process, as they go.

    Connections to Redis are counted apart: a pool keeps as many as were once needed at the same time.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.memory: list[float] = []
        self.objects: list[int] = []
        self.files: list[int] = []
        self.connections: list[int] = []

    async def read(self, chats: int, live: int, store: Store) -> None:
        gc.collect()
        self.connections.append((await store.redis.info("clients"))["connected_clients"])
        self.memory.append(self._process.memory_info().rss / 2**20)
        self.objects.append(len(gc.get_objects()))
        self.files.append(self._process.num_fds() - self.connections[-1])
        print(
            f"{chats:>7} chats, {live:>5} live, {self.memory[-1]:6.1f} MiB, "
            f"{self.objects[-1]:>7} objects, {self.files[-1]} files, "
            f"{self.connections[-1]} connections to Redis"
        )


async def converse(
    runtime: AdkRuntime, host: Host, store: Store, namespace: str, chats: int, idle: float
) -> Gauge:
    """Begins so many chats, of which every 50th returns after it was evicted."""
    gauge = Gauge()
    numbers = iter(range(chats))
    returned = 0

    async def begin(number: int) -> None:
        config = CONFIGS[number % len(CONFIGS)]
        async with runtime.chat(f"chat-{number}", f"user-{number // 3}", config) as chat:
            await say(chat, f"the word is w{number}")

    async def come_back(number: int) -> None:
        nonlocal returned
        name = f"chat-{number}"
        await eventually(lambda: name not in runtime.chats, 60, what=f"{name} is evicted")
        config = CONFIGS[(number + 1) % len(CONFIGS)]
        async with runtime.chat(name, f"user-{number // 3}", config) as chat:
            assert f"the word is w{number}" in await say(chat, "what was the word?")
        returned += 1

    async def visitor() -> None:
        for number in numbers:
            await begin(number)
            if number % 50 == 0:
                # One that has ended is let go: with its context it would be counted as a leak.
                task = asyncio.create_task(come_back(number))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            if number % (chats // 10) == 0:
                await gauge.read(number, len(runtime.chats), store)

    waiting: set[asyncio.Task[None]] = set()
    policy = Policy(session_idle_timeout=idle, runner_idle_timeout=idle)
    async with Reconciler(
        store, namespace=namespace, policy=policy, hosts=[host], lease_seconds=60
    ):
        await asyncio.gather(*(visitor() for _ in range(AT_ONCE)))
        await asyncio.gather(*waiting)
        await eventually(
            lambda: not any(runtime.sizes().values()), 120, what=f"{runtime.sizes()} all go"
        )
        await gauge.read(chats, len(runtime.chats), store)
    assert returned == (chats + 49) // 50
    assert not any(e for ref, e in host.entries.items() if ref.partition("/")[0] != "process")
    return gauge


def workshop() -> Workshop:
    made = Workshop()
    made.model.remembers = False
    return made


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_hundreds_of_chats(
    host: Host, store: Store, namespace: str, kind: str,
    make_service: Callable[..., RedisSessionService],
) -> None:  # fmt: skip
    """Every registry ends empty, and who was evicted and returns is remembered."""
    service = InMemorySessionService() if kind == "memory" else make_service()
    async with AdkRuntime(host, service, workshop()) as runtime:
        await converse(runtime, host, store, namespace, 300, idle=0.2)
    if isinstance(service, InMemorySessionService):
        assert not service.sessions["chat"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "chats"), [("memory", 100_000), ("redis", 20_000)])
async def test_memory_stays_flat(
    host: Host, store: Store, namespace: str, kind: str, chats: int,
    make_service: Callable[..., RedisSessionService],
) -> None:  # fmt: skip
    """From the second tenth of the chats to the last, neither memory nor open files grow.

    A chat that left one object behind would leave 80,000. Memory has more play: how many chats live at
    a time depends on how busy the machine is, and what Python once had it does not give back.
    """
    service = InMemorySessionService() if kind == "memory" else make_service(cache_bytes=8 * 2**20)
    begun = time.monotonic()
    async with AdkRuntime(host, service, workshop()) as runtime:
        gauge = await converse(runtime, host, store, namespace, chats, idle=2.0)
    seconds = time.monotonic() - begun
    print(f"{chats} chats on {kind} in {seconds:.0f} s, {chats / seconds:.0f} a second")
    assert gauge.objects[-1] < gauge.objects[2] * 1.05
    assert max(gauge.memory[2:]) < gauge.memory[2] * 1.3
    assert max(gauge.files[2:]) <= gauge.files[2] + 10
    assert max(gauge.connections) < 10 * AT_ONCE

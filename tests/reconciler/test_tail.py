"""The tail: whoever reads, each event is folded exactly once."""

from __future__ import annotations

import asyncio

import pytest

from reconciler.fold import FleetState
from reconciler.fold_page import Folded
from reconciler.metrics import Metrics
from reconciler.tail import Tail
from store import EventLog
from store.log import Page
from tests.support import batch, eventually


@pytest.fixture
def seen() -> list[int]:
    return []


@pytest.fixture
def tail(log: EventLog, seen: list[int]) -> Tail:
    def hook(page: Page, folded: Folded) -> None:
        seen.extend(event.seq for event in page.events)

    return Tail(log, Metrics(), hook)


@pytest.fixture
async def partition(log: EventLog) -> int:
    return (await log.namespace()).partition_of("p")


class TestTail:
    """One state, several readers."""

    async def test_history_then_news(
        self, tail: Tail, log: EventLog, seen: list[int], partition: int
    ):
        """What is there is folded when a partition is added, what comes is folded as it comes."""
        await log.append(batch(1, 1200))
        await tail.add([partition])
        assert seen == list(range(1, 1201))
        await log.append(batch(1201, 1202))
        assert await tail.wait(block_ms=1000)
        assert seen[-1] == 1202
        assert not await tail.wait(block_ms=1)

    async def test_two_readers_at_once(
        self, tail: Tail, log: EventLog, seen: list[int], partition: int
    ):
        """A loop that waits and a pass that catches up fold each event once."""
        await tail.add([partition])

        async def follow() -> None:
            while True:
                await tail.wait(block_ms=50)

        following = asyncio.create_task(follow())
        for n in range(1, 200):
            await log.append(batch(n, n))
            if n % 3 == 0:
                await tail.catch_up()
        await eventually(lambda: len(seen) >= 199)
        following.cancel()
        assert seen == list(range(1, 200))

    async def test_given_up(self, tail: Tail, log: EventLog, partition: int):
        """A partition that is given up takes its processes along; catching up with it does nothing."""
        await log.append(batch(1, 2))
        await tail.add([partition])
        tail.drop([partition])
        assert (tail.positions, tail.state.processes) == ({}, {})
        await tail.catch_up([partition])
        assert tail.state.processes == {}

    async def test_begun_anew_while_a_read_is_on_its_way(
        self, tail: Tail, log: EventLog, seen: list[int], partition: int
    ):
        """A late answer to a read from before does not make it skip what lies before."""
        await log.append(batch(1, 3))
        await tail.add([partition])
        waiting = asyncio.create_task(tail.wait(block_ms=2000))
        await asyncio.sleep(0)
        tail.drop([partition])
        seen.clear()
        tail.parts[partition], tail.positions[partition] = FleetState(), "0-0"
        await log.append(batch(4, 4))
        await waiting
        await tail.catch_up()
        assert seen == [1, 2, 3, 4]
        assert set(tail.state.processes["p"].resources) == {f"session/s{n}" for n in range(1, 5)}

    async def test_malformed_entries_are_set_aside_once(
        self, tail: Tail, log: EventLog, partition: int
    ):
        """A malformed entry is counted and quarantined once, whoever reads it."""
        key = (await log.namespace()).keys.partition(partition).log
        await log._store.redis.xadd(key, {"e": "rubbish"})
        await log.append(batch(1, 1))
        await tail.add([partition])
        await tail.catch_up()
        assert len(await log.quarantined()) == 1
        assert b"quarantined_entries_total 1.0" in tail._metrics.page()
        assert set(tail.state.processes) == {"p"}

"""Shares of partitions: the rule as a function, and several workers at it on a real Redis."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from reconciler import Reconciler
from reconciler.leases import Leases, share
from store import Store, connect
from store.lease import holders
from store.namespace import Namespace, open_namespace
from tests.support import RedisProcess, eventually

LEASE = 1.0


@pytest.fixture
async def space(store: Store, namespace: str) -> Namespace:
    return await open_namespace(store, namespace)


@pytest.fixture
async def two(space: Namespace) -> AsyncIterator[tuple[Leases, Leases]]:
    """Two workers that look when they are told to."""
    made = Leases(space, "w1", LEASE), Leases(space, "w2", LEASE)
    yield made
    for leases in made:
        await leases.leave()


async def looked(leases: Leases) -> int:
    """One look, with what is too much given back at once; how many it holds then."""
    change = await leases.look()
    await leases.give_back(change.surplus)
    return len(leases.held)


class TestShare:
    """How many each may hold."""

    @given(st.sets(st.text(min_size=1), min_size=1, max_size=40), st.integers(1, 300))
    def test_even_and_complete(self, workers: set[str], partitions: int):
        """All shares add up to all partitions, and differ by one at most."""
        shares = [share(worker, workers, partitions) for worker in workers]
        assert sum(shares) == partitions
        assert max(shares) - min(shares) <= 1

    def test_order_does_not_matter(self):
        """Everybody computes the same, in whatever order they know each other."""
        assert [share(w, ["b", "a", "c"], 16) for w in "abc"] == [6, 5, 5]

    def test_not_known_yet(self):
        """Who is not in the list counts itself."""
        assert share("b", [], 16) == 16


class TestLook:
    """One look after another."""

    async def test_alone(self, two: tuple[Leases, Leases]):
        """A single worker holds everything."""
        assert await looked(two[0]) == 16

    async def test_hand_over(self, two: tuple[Leases, Leases]):
        """The second gets its share as soon as the first has looked."""
        first, second = two
        await looked(first)
        assert await looked(second) == 0
        assert await looked(first) == 8
        assert await looked(second) == 8

    async def test_busy_partitions_stay(self, two: tuple[Leases, Leases]):
        """What is being worked on is not given back."""
        first, second = two
        await looked(first)
        await looked(second)
        change = await first.look(busy=range(4, 16))
        assert change.surplus == [0, 1, 2, 3]

    async def test_take_over(self, two: tuple[Leases, Leases]):
        """What a worker held that is not heard of any more, the other takes, under new epochs."""
        first, second = two
        for leases in (first, second, first, second):
            await looked(leases)
        epochs = {partition: lease.epoch for partition, lease in first.held.items()}

        async def has_all() -> bool:
            return await looked(second) == 16

        await eventually(has_all)
        assert all(second.held[partition].epoch > epoch for partition, epoch in epochs.items())
        change = await first.look()
        assert sorted(change.lost) == sorted(epochs)

    async def test_lease_that_a_failover_forgot(self, space: Namespace, two: tuple[Leases, Leases]):
        """A lease that Redis forgot is taken anew; its holder's name on one it gave back is no obstacle."""
        first, _ = two
        await looked(first)
        key = space.keys.partition(3).lease
        await space.store.redis.delete(key)
        change = await first.look()
        assert [lease.partition for lease in change.gained] == [3]
        token = await space.store.redis.get(key)
        await first.give_back([3])
        await space.store.redis.set(key, token)
        change = await first.look()
        assert [(lease.partition, lease.epoch) for lease in change.gained] == [(3, 3)]

    async def test_redis_goes_away_half_way(
        self, space: Namespace, two: tuple[Leases, Leases], monkeypatch: pytest.MonkeyPatch
    ):
        """What was renewed before Redis went away is heard of: a lease with a new epoch is gained."""
        first, _ = two
        await looked(first)
        await space.store.redis.delete(space.keys.partition(3).lease)

        async def away(*_: object) -> list[str]:
            raise RedisConnectionError("away")

        with monkeypatch.context() as failing:
            failing.setattr("reconciler.leases.join", away)
            change = await first.look()
        assert [(lease.partition, lease.epoch) for lease in change.gained] == [(3, 2)]
        assert first.held[3].epoch == 2

    async def test_take_free(self, two: tuple[Leases, Leases]):
        """A command takes what is free of what it needs, and is no worker that others share with."""
        first, second = two
        assert sorted((await second.take_free([2, 5])).gained, key=lambda lease: lease.partition)
        assert sorted(second.held) == [2, 5]
        assert await looked(first) == 14
        assert first.workers == ["w1"]


class TestSeveralReconcilers:
    """Three of them, in one event loop."""

    async def test_share_and_take_over(self, store: Store, namespace: str, space: Namespace):
        """They share evenly; when two go, the third acts for everything."""

        def sizes(*some: Reconciler) -> list[int]:
            return sorted(len(one.partitions) for one in some)

        async with Reconciler(store, namespace=namespace, lease_seconds=LEASE) as first:
            await eventually(lambda: sizes(first) == [16])
            async with (
                Reconciler(store, namespace=namespace, lease_seconds=LEASE) as second,
                Reconciler(store, namespace=namespace, lease_seconds=LEASE) as third,
            ):
                await eventually(lambda: sizes(first, second, third) == [5, 5, 6])
                found = await holders(space, space.all_partitions())
                for one in (first, second, third):
                    assert one.unready() == []
                    mine = [p for p, token in found.items() if token and one.process in token]
                    assert mine == one.partitions
            await eventually(lambda: sizes(first) == [16])

    async def test_more_workers_than_partitions(self, store: Store, namespace: str):
        """Who has no share stands by, and is ready."""
        await open_namespace(store, namespace, 1)
        async with (
            Reconciler(store, namespace=namespace, lease_seconds=LEASE) as first,
            Reconciler(store, namespace=namespace, lease_seconds=LEASE) as second,
        ):
            await eventually(lambda: sorted([first.partitions, second.partitions]) == [[], [0]])
            await eventually(lambda: first.unready() == second.unready() == [])


class TestReady:
    async def test_redis_that_hangs_makes_unready(
        self, own_redis: RedisProcess, namespace: str
    ) -> None:
        """A Redis that takes requests and answers none makes a worker unready within a lease time or so,
        although nothing has failed yet; once it answers, it is ready again."""
        async with (
            connect(own_redis.url) as store,
            Reconciler(store, namespace=namespace, lease_seconds=1.0) as reconciler,
        ):
            await eventually(lambda: reconciler.unready() == [])
            os.kill(own_redis.pid, signal.SIGSTOP)
            try:
                await eventually(reconciler.unready, timeout=5)
                assert "Redis has not answered for" in reconciler.unready()[0]
            finally:
                os.kill(own_redis.pid, signal.SIGCONT)
            await eventually(lambda: reconciler.unready() == [], timeout=20)

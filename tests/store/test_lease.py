"""Leases and epochs: who may act for a partition."""

from __future__ import annotations

import pytest

from store import EventLog, Fenced, Store
from store.channel import WorkerChannel
from store.lease import HeldByOther, Lease, release_lease, take_lease
from store.namespace import Namespace, open_namespace
from tests.support import entries_of, eventually, row

TTL = 60_000


@pytest.fixture
async def space(store: Store, namespace: str) -> Namespace:
    return await open_namespace(store, namespace)


async def taken(space: Namespace, holder: str, held: Lease | None = None, ttl: int = TTL) -> Lease:
    lease = await take_lease(space, 3, holder, ttl, held)
    assert isinstance(lease, Lease)
    return lease


class TestTakeLease:
    """Taking, renewing, stealing."""

    async def test_free(self, space: Namespace):
        """A free lease can be taken; it has an epoch and ends by itself."""
        lease = await taken(space, "w1")
        assert (lease.partition, lease.holder, lease.epoch) == (3, "w1", 1)
        assert 0 < await space.store.redis.pttl(space.keys.partition(3).lease) <= TTL

    async def test_renewed(self, space: Namespace):
        """Renewing keeps the epoch and moves the end."""
        lease = await taken(space, "w1", ttl=1000)
        assert await taken(space, "w1", lease) == lease
        assert await space.store.redis.pttl(space.keys.partition(3).lease) > 1000

    async def test_cannot_be_stolen(self, space: Namespace):
        """Another worker does not get it, and learns who has it."""
        lease = await taken(space, "w 1")
        answer = await take_lease(space, 3, "w2", TTL)
        assert answer == HeldByOther(3, "w 1", lease.epoch)

    async def test_epoch_grows_with_each_take(self, space: Namespace):
        """Whoever takes it, the epoch is higher than all before."""
        epochs = []
        for holder in ("w1", "w2", "w1"):
            lease = await taken(space, holder)
            epochs.append(lease.epoch)
            await release_lease(space, lease)
        assert epochs == [1, 2, 3]

    async def test_taken_after_it_has_lapsed(self, space: Namespace):
        """When the holder is not heard of, another takes it; the holder finds out at its renewal."""
        lease = await taken(space, "w1", ttl=20)

        async def other() -> Lease | None:
            got = await take_lease(space, 3, "w2", TTL)
            return got if isinstance(got, Lease) else None

        assert (await eventually(other)).epoch == 2
        assert await take_lease(space, 3, "w1", TTL, lease) == HeldByOther(3, "w2", 2)

    async def test_same_worker_that_forgot(self, space: Namespace):
        """A holder that asks afresh gets it under a new epoch: what it had begun is fenced."""
        first = await taken(space, "w1")
        second = await taken(space, "w1")
        assert second.epoch == first.epoch + 1

    async def test_release_of_a_lost_lease(self, space: Namespace):
        """Giving back a lease that is no longer held does not touch the new holder's."""
        old = await taken(space, "w1")
        await release_lease(space, old)
        new = await taken(space, "w2")
        await release_lease(space, old)
        assert await taken(space, "w2", new) == new

    async def test_partitions_are_apart(self, space: Namespace):
        """Each partition has a lease and an epoch of its own."""
        await taken(space, "w1")
        other = await take_lease(space, 4, "w2", TTL)
        assert isinstance(other, Lease)
        assert other.epoch == 1


class TestFencing:
    """A worker that was paused and comes back can do no harm."""

    async def test_stale_write_is_refused_as_a_whole(self, space: Namespace, store: Store):
        """A write under an old epoch is refused inside the script: nothing is written."""
        old = WorkerChannel(space, await taken(space, "w1", ttl=20), "w1-p3")
        await old.write([row(1)])

        async def lapsed() -> bool:
            return isinstance(await take_lease(space, 3, "w2", TTL), Lease)

        await eventually(lapsed)
        with pytest.raises(Fenced):
            await old.write([row(1)])
        found = await entries_of(EventLog(store, space), partition=3)
        assert [entry.event.process for entry in found] == ["w1-p3"]

    async def test_lapsed_lease_without_a_new_holder(self, space: Namespace):
        """A lapsed lease fences its holder although nobody has taken it."""
        channel = WorkerChannel(space, await taken(space, "w1"), "w1-p3")
        await space.store.redis.delete(space.keys.partition(3).lease)
        with pytest.raises(Fenced):
            await channel.write([row(1)])

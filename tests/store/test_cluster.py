"""The store on a real cluster of three masters and three replicas, and when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from store import DurabilityError, EventLog, NotConfirmed, connect
from store.durability import confirmation
from store.event import NO_DIGEST, encode_body, seal_all
from store.lease import Lease, holders, take_leases
from store.namespace import Namespace, open_namespace
from store.refusals import Unavailable
from tests.redis_processes import RedisCluster, Server, running
from tests.support import batch, entries_of, eventually, row, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with running(RedisCluster(tmp_path_factory.mktemp("cluster"))) as made:
        yield made


@pytest.fixture
def dead(cluster: RedisCluster, namespace: str) -> Iterator[Server]:
    """The master of partition 0; whoever takes it away need not bring it back."""
    yield cluster.master_of(f"ar:{{{namespace}/0}}:log")
    cluster.mend()


async def spread(space: Namespace, cluster: RedisCluster) -> set[int]:
    """Ports of the masters that hold the partitions."""
    keys = [space.keys.partition(p).log for p in space.all_partitions()]
    return {await asyncio.to_thread(lambda k=key: cluster.master_of(k).port) for key in keys}


async def append_somewhere(log: EventLog, space: Namespace) -> dict[int, str]:
    """One event in each partition; partition -> process."""
    processes: dict[int, str] = {}
    number = 0
    while len(processes) < space.partitions:
        processes.setdefault(space.partition_of(f"p{number}"), f"p{number}")
        number += 1
    for process in processes.values():
        await log.append(batch(1, 1, process))
    return processes


class TestWhole:
    """All nodes are there."""

    async def test_log(self, cluster: RedisCluster, namespace: str):
        """Partitions are on all masters; they are written, read, merged and followed as one log."""
        async with connect(cluster.url) as store:
            log = EventLog(store, namespace)
            space = await log.namespace()
            assert len(await spread(space, cluster)) == 3
            ends = await log.last()
            processes = await append_somewhere(log, space)
            assert {e.event.process for e in await entries_of(log)} == set(processes.values())
            assert await log.length() == 16
            seen: set[str] = set()
            async with asyncio.timeout(10):
                async for entry in log.follow(ends):
                    seen.add(entry.event.process)
                    if len(seen) == 16:
                        break
            assert seen == set(processes.values())

    async def test_forgotten_scripts(self, cluster: RedisCluster, namespace: str):
        """Nodes that forgot the scripts are sent them again, each for itself."""
        async with connect(cluster.url) as store:
            space = await open_namespace(store, namespace)
            for node in cluster.nodes[:3]:
                node.client.script_flush()
            taken = await take_leases(space, dict.fromkeys(range(16)), "w", 5000)
            assert all(isinstance(lease, Lease) for lease in taken.values())


class TestAMasterDies:
    """Its partitions wait for the replica; the others do not."""

    async def test_others_go_on(self, cluster: RedisCluster, dead: Server, namespace: str):
        """Leases and logs on the other masters are written and read meanwhile; then all are again."""
        async with connect(cluster.url) as store:
            log = EventLog(store, namespace)
            space = await log.namespace()
            processes = await append_somewhere(log, space)
            taken = await take_leases(space, dict.fromkeys(range(16)), "w", 60_000)
            of_the_dead = {
                p for p in range(16)
                if (await asyncio.to_thread(cluster.master_of, space.keys.partition(p).log)) is dead
            }  # fmt: skip
            assert 0 < len(of_the_dead) < 16
            ends = await log.last()
            following = asyncio.create_task(self.follow_until(log, ends, 16))
            # Replication is asynchronous: what was appended must be on the replica before its master goes.
            await asyncio.to_thread(dead.client.wait, 1, 2000)
            dead.kill()
            held = {p: lease for p, lease in taken.items() if isinstance(lease, Lease)}
            renewed = await take_leases(space, held, "w", 60_000)
            away = {p for p, answer in renewed.items() if isinstance(answer, Exception)}
            assert away <= of_the_dead or all(isinstance(renewed[p], Unavailable) for p in away)

            async def back() -> bool:
                answers = await take_leases(space, held, "w", 60_000)
                return all(isinstance(one, Lease) for one in answers.values())

            await eventually(back, 20)
            assert {
                t and t.rpartition(" ")[0] for t in (await holders(space, range(16))).values()
            } == {"w"}

            async def written(process: str) -> bool:
                try:
                    await log.append(batch(2, 2, process))
                except Unavailable:
                    return False
                return True

            for process in processes.values():
                await eventually(lambda p=process: written(p), 20, "it can be written again")
            assert await following == set(processes.values())

    async def follow_until(self, log: EventLog, ends: dict[int, str], count: int) -> set[str]:
        """Follows from there on, until so many processes were heard of."""
        seen: set[str] = set()
        async with asyncio.timeout(40):
            async for entry in log.follow(ends):
                if entry.event.seq == 2:
                    seen.add(entry.event.process)
                if len(seen) == count:
                    break
        return seen


class TestDurability:
    """What is acknowledged as replicated is on a replica of the very node that has the partition."""

    async def test_replicated(self, cluster: RedisCluster, dead: Server, namespace: str):
        """Confirmed with a replica, not without, and again after the replica has taken over."""
        async with connect(f"{cluster.url}?durability=replicated") as store:
            confirm = await confirmation(store, None) or ()
            assert confirm[:2] == ("WAIT", "1")
            log = EventLog(store, namespace)
            space = await log.namespace()
            process = next(p for n in range(1000) if space.partition_of(p := f"p{n}") == 0)
            payloads, _ = seal_all(
                [encode_body(row(n, process=process)) for n in (1, 2, 3)], NO_DIGEST
            )
            assert (await log.append_encoded(process, 1, payloads[:1], confirm)).added == 1

            replica = cluster.replica_of(dead)
            replica.kill()
            with pytest.raises(NotConfirmed):
                await log.append_encoded(process, 2, payloads[1:2], ("WAIT", "1", "200"))
            await eventually(lambda: dead.client.info("replication")["connected_slaves"] == 0, 20)
            with pytest.raises(DurabilityError, match=f"node .*:{dead.port} of .* has none"):
                await confirmation(store, None)

            await asyncio.to_thread(cluster.mend)
            assert (await log.append_encoded(process, 2, payloads[1:2], confirm)).added == 0
            dead.kill()
            last = [0]

            async def confirmed_again() -> bool:
                with contextlib.suppress(NotConfirmed, *Unavailable):
                    last[:] = [
                        (await log.append_encoded(process, 3, payloads[2:], confirm)).last_seq
                    ]
                return last == [3]

            # The promoted replica takes it, and has nobody to confirm it until a replica is back.
            await eventually(lambda: cluster.replica_leads(replica), 60)
            mending = asyncio.create_task(asyncio.to_thread(cluster.mend))
            await eventually(confirmed_again, 60)
            await mending
            assert await whole(log, process) == 3

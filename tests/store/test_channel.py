"""The messages between host and worker, through a real Redis."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from store import EventLog, Fenced, Order, SequenceGap, Store
from store.channel import HostChannel, WorkerChannel
from store.inbox import Inbox, answer, ask
from store.inventories import InventoryReader
from store.lease import Lease, take_lease
from store.messages import (
    Action,
    Bucket,
    IndexEntry,
    Note,
    Summary,
    decode_order,
    encode_message,
)
from store.namespace import Namespace, open_namespace
from tests.support import batch, entries_of, row

PROCESS = "svc@h:1:1"


@pytest.fixture
async def space(store: Store, namespace: str) -> Namespace:
    return await open_namespace(store, namespace)


@pytest.fixture
def host_end(space: Namespace) -> HostChannel:
    return HostChannel(space, PROCESS)


@pytest.fixture
async def worker_end(space: Namespace) -> WorkerChannel:
    lease = await take_lease(space, space.partition_of(PROCESS), "w", 60_000)
    assert isinstance(lease, Lease)
    return WorkerChannel(space, lease, "w-writer")


def bucket(*refs: str, entries: tuple[IndexEntry, ...] = ()) -> bytes:
    return encode_message(Bucket(list(refs), list(entries)))


async def publish(host_end: HostChannel, as_of: int, *changed: str | bytes, **more: Any) -> None:
    """Publishes buckets given as number, digest, content, one after the other."""
    parts = [changed[i : i + 3] for i in range(0, len(changed), 3)]
    buckets: Any = {number: (digest, content) for number, digest, content in parts}
    await host_end.publish(Summary(PROCESS, as_of, **more), f"root-{as_of}", buckets)


def order(number: int) -> Order:
    return Order(f"o-{number}", PROCESS, Action.TEARDOWN, f"session/s{number}", seq=number)


def request(number: int) -> Any:
    return row(1, "cleanup_requested", f"session/s{number}", holder=PROCESS, order_id=f"o-{number}")


async def log_of(space: Namespace) -> list[tuple[str, str | None]]:
    found = await entries_of(EventLog(space.store, space))
    return [(str(e.event.type), e.event.order_id) for e in found]


class TestInventory:
    """Only what changed is moved."""

    async def test_nothing_published(self, space: Namespace):
        """Of a process that published nothing there is no inventory."""
        assert await InventoryReader(space).read(PROCESS) is None

    async def test_read_whole(self, space: Namespace, host_end: HostChannel):
        """A first read gives all that was published, with its as_of."""
        entry = IndexEntry("index", "k", "runner/r")
        held = ("0", "aa", bucket("session/a"), "9", "bb", bucket("session/b", entries=(entry,)))
        await publish(host_end, 7, *held, kinds=("session",), rss=5)
        found = await InventoryReader(space).read(PROCESS)
        assert found is not None
        assert (found.as_of, found.held) == (7, {"session/a", "session/b"})
        assert (found.entries, found.kinds, found.rss) == ((entry,), {"session"}, 5)

    async def test_only_changed_buckets_are_moved(self, space: Namespace, host_end: HostChannel):
        """A second read moves the changed bucket only, whatever else is held."""
        big = [f"session/{n}" for n in range(1000)]
        reader = InventoryReader(space)
        await publish(host_end, 1, "0", "aa", bucket(*big), "1", "bb", bucket("a/1"))
        await reader.read(PROCESS)
        before = reader.bytes_moved
        await publish(host_end, 2, "1", "cc", bucket("a/1", "a/2"))
        found = await reader.read(PROCESS)
        assert found is not None
        assert found.held == {*big, "a/1", "a/2"}
        assert reader.bytes_moved - before < 300 < before

    async def test_in_sync(self, space: Namespace, host_end: HostChannel):
        """Where nothing changed only the summary travels, and first news after nothing is heard of."""
        reader = InventoryReader(space)
        await publish(host_end, 1)
        await reader.read(PROCESS)
        await publish(host_end, 2, "0", "aa", bucket("a/1"))
        found = await reader.read(PROCESS)
        assert found is not None
        assert found.held == {"a/1"}
        before = reader.bytes_moved
        assert await reader.update(PROCESS) is not None
        assert reader.bytes_moved - before < 250

    async def test_emptied_bucket(self, space: Namespace, host_end: HostChannel):
        """A bucket in which nothing is left goes, at the host and at the reader."""
        reader = InventoryReader(space)
        await publish(host_end, 1, "0", "aa", bucket("a/1"))
        await reader.read(PROCESS)
        await publish(host_end, 2, "0", "", b"")
        found = await reader.read(PROCESS)
        assert found is not None
        assert (found.as_of, found.held) == (2, frozenset())
        key = space.partition_keys(PROCESS).inventory(PROCESS)
        assert set(await space.store.redis.hkeys(key)) == {b"summary", b"root", b"number"}

    @pytest.mark.parametrize(
        "rubbish",
        [{"summary": "rubbish"}, {"summary": "[]"}, {"summary": "{}"}, {"0": "rubbish"}],
    )
    async def test_malformed(
        self, space: Namespace, host_end: HostChannel, rubbish: dict[str, str]
    ):
        """An inventory that something else wrote is as good as none, and is read when it is mended."""
        reader = InventoryReader(space)
        await publish(host_end, 1, "0", "aa", bucket("a/1"))
        key = space.partition_keys(PROCESS).inventory(PROCESS)
        await space.store.redis.hset(key, mapping=rubbish)
        assert await reader.read(PROCESS) is None
        await publish(host_end, 2, "0", "aa", bucket("a/1"))
        found = await reader.read(PROCESS)
        assert found is not None
        assert found.held == {"a/1"}

    async def test_fenced(self, space: Namespace, host_end: HostChannel):
        """A lost process can neither publish nor renew its lease."""
        await space.store.redis.hset(space.partition_keys(PROCESS).seqs, PROCESS, "lost")
        with pytest.raises(Fenced):
            await publish(host_end, 1)
        with pytest.raises(Fenced):
            await host_end.beat(1000)


class TestOrders:
    """From worker to host."""

    async def test_writes_at_once_follow_each_other(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """Several tasks of a worker may write at the same time: each write has numbers of its own, and
        none is taken for a repetition of another."""
        await asyncio.gather(
            *(worker_end.write([request(n)], [order(n)]) for n in range(1, 21)),
        )
        assert len(await host_end.orders(block_ms=50)) == 20
        events = [entry.event async for entry in EventLog(space.store, space).read()]
        assert [event.seq for event in events] == list(range(1, 21))

    async def test_delivered_once_in_order(self, host_end: HostChannel, worker_end: WorkerChannel):
        """Each order comes once, in the order of sending, as it was sent."""
        await worker_end.write([request(1), request(2)], [order(1), order(2)])
        assert await host_end.orders(block_ms=50) == [order(1), order(2)]
        assert await host_end.orders(block_ms=10) == []
        await worker_end.write([request(3)], [order(3)])
        assert await host_end.orders(block_ms=50) == [order(3)]

    async def test_wakes_a_waiting_host(self, host_end: HostChannel, worker_end: WorkerChannel):
        """A host that waits gets the order as it is sent."""
        waiting = asyncio.create_task(host_end.orders())
        await worker_end.write([request(1)], [order(1)])
        async with asyncio.timeout(2):
            assert await waiting == [order(1)]

    async def test_not_lost_when_redis_goes_after_the_read(
        self, host_end: HostChannel, worker_end: WorkerChannel, monkeypatch: pytest.MonkeyPatch
    ):
        """Orders that were read are carried out although the house-keeping after it failed."""

        async def away(*_: object, **__: object) -> None:
            raise RedisConnectionError("away")

        await worker_end.write([request(1)], [order(1)])
        monkeypatch.setattr(type(worker_end._namespace.store.redis), "xtrim", away)
        assert await host_end.orders(block_ms=50) == [order(1)]

    async def test_malformed_order(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """An order that is not one is passed over."""
        key = space.partition_keys(PROCESS).orders(PROCESS)
        await space.store.redis.xadd(key, {"o": "rubbish"})
        await worker_end.write([request(1)], [order(1)])
        assert await host_end.orders(block_ms=50) == [order(1)]

    async def test_written_if_and_only_if_announced(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """Event and order are written together, or neither is."""
        await worker_end.write([request(1)], [order(1)])
        assert await log_of(space) == [("cleanup_requested", "o-1")]
        await space.store.redis.delete(space.partition_keys(PROCESS).lease)
        with pytest.raises(Fenced):
            await worker_end.write([request(2)], [order(2)])
        assert await log_of(space) == [("cleanup_requested", "o-1")]
        assert await host_end.orders(block_ms=50) == [order(1)]

    async def test_reply_lost(
        self,
        space: Namespace,
        host_end: HostChannel,
        worker_end: WorkerChannel,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """After a write whose reply was lost, the next one is neither swallowed nor doubled."""
        script = Store.script

        async def lose_the_reply(self: Store, *args: Any) -> None:
            await script(self, *args)
            raise RedisConnectionError("reply lost")

        monkeypatch.setattr(Store, "script", lose_the_reply)
        with pytest.raises(RedisConnectionError):
            await worker_end.write([request(1)], [order(1)])
        monkeypatch.undo()
        await worker_end.write([request(2)], [order(2)])
        await worker_end.write([request(3), request(4)], [order(3), order(4)])
        wanted = [f"o-{n}" for n in range(1, 5)]
        found = await entries_of(EventLog(space.store, space))
        assert [entry.event.order_id for entry in found] == wanted
        assert len({(entry.event.process, entry.event.seq) for entry in found}) == 4
        assert [one.id for one in await host_end.orders(block_ms=50)] == wanted

    async def test_forgotten_by_the_log(self, space: Namespace, worker_end: WorkerChannel):
        """When Redis came back with less than it acknowledged, the write is refused, the next works."""
        await worker_end.write([request(1)], [order(1)])
        await space.store.redis.delete(space.partition_keys(PROCESS).seqs)
        with pytest.raises(SequenceGap, match="w-writer starts at seq 2"):
            await worker_end.write([request(2)], [order(2)])
        await worker_end.write([request(2)], [order(2)])
        assert [order_id for _, order_id in await log_of(space)] == ["o-1", "o-2"]

    async def test_sent_twice_by_the_client(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel,
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        """A client that repeats the very same write, as redis-py does on its own, doubles nothing."""
        script = Store.script

        async def twice(self: Store, *args: Any) -> Any:
            await script(self, *args)
            return await script(self, *args)

        monkeypatch.setattr(Store, "script", twice)
        await worker_end.write([request(1)], [order(1)])
        await worker_end.write([request(2)], [order(2)])
        monkeypatch.undo()
        assert [order_id for _, order_id in await log_of(space)] == ["o-1", "o-2"]
        assert [one.id for one in await host_end.orders(block_ms=50)] == ["o-1", "o-2"]

    async def test_trimmed(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """What was read is dropped from the stream: it stays short."""
        for n in range(1, 300):
            await worker_end.write([request(n)], [order(n)])
        assert len(await host_end.orders(block_ms=50)) == 299
        await worker_end.write([request(300)], [order(300)])
        assert len(await host_end.orders(block_ms=50)) == 1
        key = space.partition_keys(PROCESS).orders(PROCESS)
        assert await space.store.redis.xlen(key) < 200

    async def test_roundtrip_of_all_members(self):
        """An order comes out of its encoding as it went in."""
        full = Order(
            "o", "p", Action.DROP_ENTRY, "a/b", 3, "why", ("c/d",), 5, 1.5, "reg", "key", "t"
        )
        assert decode_order(encode_message(full)) == full


class TestProcessLost:
    """A process whose lease has lapsed is closed and fenced."""

    def lost(self) -> Any:
        return row(1, "process_lost", f"process/{PROCESS}", holder=PROCESS)

    async def test_fences(self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel):
        """After it the process can write nothing, and its inventory and orders are gone."""
        log = EventLog(space.store, space)
        await log.append(batch(1, 1, PROCESS))
        await publish(host_end, 1, "0", "aa", bucket("a/1"))
        await host_end.beat(-1)
        assert await worker_end.lapsed_hosts() == [PROCESS]
        assert await worker_end.close_lost(PROCESS, self.lost())
        assert await worker_end.lapsed_hosts() == []
        with pytest.raises(Fenced):
            await log.append(batch(2, 2, PROCESS))
        with pytest.raises(Fenced):
            await host_end.beat(1000)
        assert await InventoryReader(space).read(PROCESS) is None
        assert [type for type, _ in await log_of(space)] == ["created", "process_lost"]

    async def test_renewed_meanwhile(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """A process that renewed its lease before the worker could close it stays."""
        await host_end.beat(-1)
        assert await worker_end.lapsed_hosts() == [PROCESS]
        await host_end.beat(60_000)
        assert not await worker_end.close_lost(PROCESS, self.lost())
        assert await log_of(space) == []

    async def test_sent_twice_by_the_client(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel,
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        """When the client repeats it, it is written once, and the writer goes on after it."""
        script = Store.script

        async def twice(self: Store, *args: Any) -> Any:
            await script(self, *args)
            return await script(self, *args)

        await host_end.beat(-1)
        monkeypatch.setattr(Store, "script", twice)
        assert await worker_end.close_lost(PROCESS, self.lost())
        monkeypatch.undo()
        await worker_end.write([request(1)])
        assert await log_of(space) == [("process_lost", None), ("cleanup_requested", "o-1")]

    async def test_under_the_lease(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """A worker without its lease cannot close anybody."""
        await host_end.beat(-1)
        await space.store.redis.delete(space.partition_keys(PROCESS).lease)
        with pytest.raises(Fenced):
            await worker_end.close_lost(PROCESS, self.lost())
        assert await host_end.beat(1000) > 0

    async def test_left_in_good_order(
        self, space: Namespace, host_end: HostChannel, worker_end: WorkerChannel
    ):
        """A process that left has no lease that could lapse, no inventory and no orders."""
        await host_end.beat(-1)
        await publish(host_end, 1)
        await worker_end.write([request(1)], [order(1)])
        await host_end.leave()
        assert await worker_end.lapsed_hosts() == []
        keys = space.partition_keys(PROCESS)
        assert not await space.store.redis.exists(keys.inventory(PROCESS), keys.orders(PROCESS))


class TestInbox:
    """Notes to the worker, and requests with answers."""

    async def test_notes(self, space: Namespace, host_end: HostChannel):
        """A published inventory and a leaving process each leave a note."""
        partition = space.partition_of(PROCESS)
        inbox = Inbox(space)
        await inbox.open([partition])
        await publish(host_end, 1)
        await host_end.leave()
        notes: list[tuple[int, Note]] = []
        while len(notes) < 2:
            notes += await inbox.wait(block_ms=500)
        assert notes == [
            (partition, Note("inventory", PROCESS)),
            (partition, Note("stopped", PROCESS)),
        ]

    async def test_begins_at_the_present_end(self, space: Namespace, host_end: HostChannel):
        """What was noted before is not read; a partition that is given up is not read either."""
        partition = space.partition_of(PROCESS)
        await publish(host_end, 1)
        inbox = Inbox(space)
        await inbox.open([partition])
        assert await inbox.wait(block_ms=10) == []
        await inbox.open([])
        await publish(host_end, 2)
        assert await inbox.wait(block_ms=10) == []

    async def test_malformed_note(self, space: Namespace):
        """A note that is not one is passed over."""
        inbox = Inbox(space)
        await inbox.open([0])
        key = space.keys.partition(0).inbox
        await space.store.redis.xadd(key, {"m": "rubbish"})
        await space.store.redis.xadd(key, {"m": encode_message(Note("stopped", "p"))})
        assert await inbox.wait(block_ms=500) == [(0, Note("stopped", "p"))]

    async def test_asked_and_answered(self, space: Namespace):
        """A request is answered to whoever asked."""
        inbox = Inbox(space)
        await inbox.open([0])
        asking = asyncio.create_task(ask(space, 0, Note("reconcile", dry_run=True), 5))
        [(partition, note)] = await inbox.wait(block_ms=2000)
        assert (note.kind, note.dry_run, note.deadline_ms > 0) == ("reconcile", True, True)
        assert note.request is not None
        await answer(space, partition, note.request, b"done")
        assert await asking == b"done"

    async def test_nobody_answers(self, space: Namespace):
        """A request that nobody answers ends with None after its time."""
        assert await ask(space, 0, Note("reconcile"), 0.05) is None


async def test_a_stream_of_orders_that_cannot_be_trimmed(
    space: Namespace, host_end: HostChannel, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Orders that were read are given, whatever becomes of the stream they were in."""
    await store.redis.xadd(
        space.partition_keys(PROCESS).orders(PROCESS), {"o": encode_message(order(1))}
    )

    async def refused(*_: object, **__: object) -> None:
        raise ResponseError("MISCONF Redis cannot write to its disk")

    monkeypatch.setattr(store.redis, "xtrim", refused)
    assert [one.id for one in await host_end.orders(block_ms=10)] == ["o-1"]

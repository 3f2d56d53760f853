"""The host agent on a real Redis: life, use, drift behind its back, and Redis going away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ReadOnlyError

from adapters import Host
from adapters.host import restore
from reconciler.fold import FleetState, ProcessState
from store import EventLog, NotAlive, Store, connect
from store.event import NO_DIGEST, chain, decode_row, split_digest
from store.inventories import InventoryReader
from store.messages import Inventory
from store.namespace import open_namespace
from tests.support import RedisProcess, entries_of, eventually, story


async def settled(host: Host) -> None:
    """Waits until the host has sent all that it recorded."""
    await eventually(lambda: len(host.recorder) == 0)


async def state_of(log: EventLog) -> FleetState:
    """The fold of the whole log."""
    state = FleetState()
    for entry in await entries_of(log):
        state.apply(entry.event, entry.at_ms)
    return state


async def process_of(log: EventLog, host: Host) -> ProcessState:
    await settled(host)
    return (await state_of(log)).processes[host.process]


async def published(log: EventLog, host: Host) -> Inventory | None:
    return await InventoryReader(await log.namespace()).read(host.process)


async def lose(store: Store, namespace: str, process: str) -> None:
    """Does to a process what a worker does when its lease has lapsed."""
    keys = (await open_namespace(store, namespace)).partition_keys(process)
    await store.redis.hset(keys.seqs, process, "lost")


class TestLife:
    """From start to close."""

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"name": ""}, "cannot be a name"),
            ({"name": "a b"}, "without spaces"),
            ({"name": "svc@h"}, "cannot be a name"),
            ({"lease_seconds": -1}, "take more than 0"),
            ({"outbox_limit": 0}, "take more than 0"),
        ],
    )
    async def test_arguments_that_cannot_be_meant(
        self, store: Store, wrong: dict[str, Any], says: str
    ):
        """They are told at once, in one line, not when something fails because of them."""
        with pytest.raises(ValueError, match=says):
            Host.connect(store, **{"name": "svc", **wrong})

    async def test_parts_that_cannot_be_meant(self, host: Host):
        """The same for what a host is told of."""
        with pytest.raises(ValueError, match="no kind of resource"):
            host.registry("run ner/x")
        with pytest.raises(ValueError, match="say what it names"):
            host.index("by_user", "")
        with pytest.raises(TypeError, match="cannot be"):
            host.handle("session", "close")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="these are: adopted, cleaned_up"):
            host.record("createdd", "session/a")

    async def test_good_end_of_a_cancelled_task(
        self, store: Store, namespace: str, log: EventLog
    ) -> None:
        """A service that is ended by cancelling its task, as by Ctrl-C, says all that it has to say."""
        inside = asyncio.Event()

        async def serve() -> None:
            async with Host.connect(store, name="svc", namespace=namespace) as host:
                host.record("created", "session/last")
                inside.set()
                await asyncio.Event().wait()

        service = asyncio.create_task(serve())
        await inside.wait()
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
        types = [entry.event.type for entry in await entries_of(log)]
        assert types == ["process_started", "created", "process_stopped"]

    async def test_announced_and_closed(self, store: Store, namespace: str, log: EventLog):
        """A host announces its process, renews its lease while it lives, and says when it ends."""
        async with Host.connect(store, name="svc", namespace=namespace) as host:
            keys = (await log.namespace()).partition_keys(host.process)
            assert await store.redis.zscore(keys.hosts, host.process) > await store.now_ms()
            host.record("created", "session/s")
            process = host.process
        types = [str(e.event.type) for e in await entries_of(log)]
        assert types == ["process_started", "created", "process_stopped"]
        assert await store.redis.zscore(keys.hosts, process) is None
        assert not await store.redis.exists(keys.inventory(process), keys.orders(process))
        assert await store.redis.ping(), "a store that was given open is left open"

    async def test_own_connection(self, redis_url: str, namespace: str):
        """A host that was given an address closes its own connection; closing twice does nothing."""
        host = await Host.connect(redis_url, name="svc", namespace=namespace)
        await host.close()
        await host.close()
        with pytest.raises(Exception, match="is not connected"):
            _ = host._store.redis

    async def test_lease_is_renewed(self, store: Store, namespace: str, log: EventLog):
        """The lease goes on being renewed although nothing happens."""
        async with Host.connect(store, name="svc", namespace=namespace, lease_seconds=0.3) as host:
            keys = (await log.namespace()).partition_keys(host.process)
            first = await store.redis.zscore(keys.hosts, host.process)

            async def later() -> bool:
                return bool(await store.redis.zscore(keys.hosts, host.process) > first + 300)

            await eventually(later)

    async def test_adopts_what_is_there(self, host: Host, log: EventLog):
        """What a registry holds when it joins is adopted into the log."""
        host.registry("session", {"a": 1, "b": 2})
        assert set((await process_of(log, host)).resources) == {"session/a", "session/b"}
        assert {t for t, _ in await story(log)} == {"adopted"}

    async def test_recorded_before_the_start(self, store: Store, namespace: str, log: EventLog):
        """What was recorded before the host was started is sent, too."""
        host = Host.connect(store, name="svc", namespace=namespace)
        host.registry("session", {"a": 1})
        async with host:
            await settled(host)
            assert await story(log) == [("adopted", "session/a")] * 2

    async def test_inventory_is_published(self, host: Host, log: EventLog):
        """Index entries that change without an event reach the worker, too."""
        index = host.index("i", "runner")
        index["k"] = "r1"

        async def known() -> bool:
            found = await published(log, host)
            return found is not None and [e.target for e in found.entries] == ["runner/r1"]

        await eventually(known)

    async def test_restored(self, host: Host):
        """An observed attribute can be given back its plain dict."""

        class Service:
            def __init__(self) -> None:
                self.runners: Any = {"r": 1}

        service = Service()
        host.observe(service, "runners", kind="runner")
        restore(service, "runners", host)
        assert type(service.runners) is dict
        assert host.entries == {}


class TestUse:
    """Acquire, release, stay."""

    async def test_acquired_while_it_is_used(self, host: Host, log: EventLog):
        """A resource is in use from enter to exit, also when the body fails; use can be nested."""
        session = object()
        host.registry("session")["s"] = session
        async with host.acquire("session/s") as found:
            assert found is session
            with host.acquire("session/s"):
                assert (await process_of(log, host)).resources["session/s"].in_use == 2
            assert (await process_of(log, host)).resources["session/s"].in_use == 1
        with pytest.raises(RuntimeError), host.acquire("session/s"):
            raise RuntimeError
        assert (await process_of(log, host)).resources["session/s"].in_use == 0
        assert host.entries["session/s"].in_use == 0

    async def test_not_alive(self, host: Host):
        """What is not alive, or is being torn down, cannot be used, linked or kept."""
        with pytest.raises(NotAlive, match="session/s is not alive"), host.acquire("session/s"):
            pass
        with pytest.raises(NotAlive):
            host.keep_alive("session/s", 1)
        with pytest.raises(NotAlive):
            host.link("session/s", uses=())
        host.registry("session")["s"] = 1
        host.entries["session/s"].terminating = "o-1"
        with pytest.raises(NotAlive, match="being torn down"), host.acquire("session/s"):
            pass

    async def test_stay(self, host: Host, log: EventLog):
        """A client can ask for a stay of more than 0 seconds."""
        host.registry("session")["s"] = 1
        with pytest.raises(ValueError, match="more than 0"):
            host.keep_alive("session/s", 0)
        host.keep_alive("session/s", 60)
        assert (await process_of(log, host)).resources["session/s"].keep_until_ms > 0

    async def test_replaced_while_in_use(self, host: Host, log: EventLog):
        """When another object takes its place, the new one is not in use, whatever the old one is."""
        registry = host.registry("session", {"s": object()})
        with host.acquire("session/s"):
            registry["s"] = object()
            assert host.entries["session/s"].in_use == 0
        assert (await process_of(log, host)).resources["session/s"].in_use == 0

    async def test_replaced_behind_its_back_while_in_use(self, host: Host, log: EventLog):
        """So it is when the old one left behind the observer's back."""
        registry = host.registry("session", {"s": object()})
        with host.acquire("session/s"):
            dict.__delitem__(registry, "s")
            registry["s"] = object()
        assert (await process_of(log, host)).resources["session/s"].in_use == 0
        assert registry.noted == 1

    async def test_recorded_without_a_registry(self, host: Host, log: EventLog):
        """A resource that no registry holds lives from `created` to `cleaned_up`."""
        host.record("created", "http_client/c", owned_by="runner/r")
        host.link("http_client/c", uses=["pool/p"])
        found = (await process_of(log, host)).resources["http_client/c"]
        assert (found.owned_by, found.uses) == ("runner/r", ("pool/p",))
        host.record("cleaned_up", "http_client/c")
        assert host.entries == {}
        assert (await process_of(log, host)).resources == {}


class TestBehindItsBack:
    """A registry changed past the observer."""

    async def test_ghost_and_untracked(self, host: Host, log: EventLog):
        """What came or went behind the observer's back stands in the inventory, not in the log."""
        registry = host.registry("session", {"a": 1})
        dict.__delitem__(registry, "a")
        dict.__setitem__(registry, "b", 2)
        assert host.inventory().held == {"session/b"}
        assert set((await process_of(log, host)).resources) == {"session/a"}

        async def seen() -> bool:
            found = await published(log, host)
            return found is not None and found.held == {"session/b"}

        host.report("r-1")
        await eventually(seen)

    async def test_noticed_without_being_asked(self, host: Host, log: EventLog):
        """The host looks by itself, from time to time."""
        registry = host.registry("session")
        dict.__setitem__(registry, "b", 2)

        async def seen() -> bool:
            found = await published(log, host)
            return found is not None and found.held == {"session/b"}

        await eventually(seen)
        dict.clear(registry)

        async def gone() -> bool:
            found = await published(log, host)
            return found is not None and found.held == frozenset()

        await eventually(gone)

    async def test_a_function_that_raises_does_not_end_the_lease(
        self, store: Store, namespace: str, log: EventLog
    ):
        """A function of the service that raises while the host looks does not stop the host."""
        async with Host.connect(store, name="svc", namespace=namespace, lease_seconds=0.3) as host:
            host.index("i", targets=lambda key, value: [f"a/{value.missing}"]).update(k=None)
            locks = host.registry("lock", owned_by=lambda id, lock: lock.get("owner"))
            locks["l"] = {}
            locks["l"].update(owner=7)  # No reference: recording it raises.
            keys = (await log.namespace()).partition_keys(host.process)
            first = await store.redis.zscore(keys.hosts, host.process)

            async def renewed() -> bool:
                return bool(await store.redis.zscore(keys.hosts, host.process) > first + 300)

            await eventually(renewed)


class TestGoingOn:
    async def test_a_task_that_fails_goes_on(
        self, host: Host, log: EventLog, monkeypatch: pytest.MonkeyPatch
    ):
        """What nobody expected in the task that sends is said, and does not end it."""
        monkeypatch.setattr("adapters.host._GO_ON_SECONDS", 0.01)
        batch, failed = host.recorder.outbox.batch, []

        def fails_once() -> tuple[int, list[bytes]]:
            if not failed:
                failed.append(True)
                raise LookupError("not expected")
            return batch()

        monkeypatch.setattr(host.recorder.outbox, "batch", fails_once)
        host.record("created", "session/s")
        await settled(host)
        assert failed
        assert "session/s" in (await process_of(log, host)).resources


class TestRedisAway:
    """The service goes on; nothing is lost, nothing doubled."""

    @pytest.fixture
    async def away(self, own_redis: RedisProcess) -> AsyncIterator[Host]:
        async with Host.connect(own_redis.url, name="svc") as host:
            yield host

    async def test_events_arrive_once_and_in_order(self, away: Host, own_redis: RedisProcess):
        """Killed in the middle and started again: each event is in the log once, in order, chained."""
        registry = away.registry("session")
        for n in range(300):
            registry[n] = n
        own_redis.kill()
        for n in range(300, 1300):
            registry[n] = n
            if n % 100 == 0:
                await asyncio.sleep(0)  # The service goes on.
        assert len(away.recorder) > 0
        own_redis.start()
        await eventually(lambda: len(away.recorder) == 0, timeout=15)
        async with connect(own_redis.url) as store:
            log = EventLog(store)
            found = await entries_of(log, process=away.process)
            assert [e.event.seq for e in found] == list(range(1, away.recorder.seq + 1))
            assert [e.event.ref for e in found[1:]] == [f"session/{n}" for n in range(1300)]
            before = NO_DIGEST
            key = (await log.namespace()).partition_keys(away.process).log
            for _, (_, payload) in await store.redis.xrange(key):
                if decode_row(payload).process == away.process:
                    body, digest = split_digest(payload)
                    assert chain(before, body) == digest
                    before = digest

    async def test_inventory_arrives_afterwards(self, away: Host, own_redis: RedisProcess):
        """What changed in an index meanwhile is known to the worker afterwards."""
        index = away.index("i", "runner", content={"a": "1"})
        own_redis.kill()
        index["b"] = "2"
        del index["a"]
        own_redis.start()
        async with connect(own_redis.url) as store:

            async def known() -> bool:
                found = await published(EventLog(store), away)
                return found is not None and [e.target for e in found.entries] == ["runner/2"]

            await eventually(known, timeout=15)

    async def test_refuses_to_write(
        self, host: Host, log: EventLog, monkeypatch: pytest.MonkeyPatch
    ):
        """A Redis that answers but refuses (a failover, no memory) is waited for, too."""
        script, refused = Store.script, []

        async def read_only(self: Store, *args: Any) -> Any:
            if len(refused) < 2:
                refused.append(args)
                raise ReadOnlyError("You can't write against a read only replica.")
            return await script(self, *args)

        monkeypatch.setattr(Store, "script", read_only)
        host.record("created", "session/s")
        await settled(host)
        assert len(refused) == 2
        assert await story(log) == [("created", "session/s")]

    async def test_closing_without_redis(self, own_redis: RedisProcess):
        """A host can be closed while Redis is away; what is left is lost with it."""
        host = await Host.connect(own_redis.url, name="svc")
        own_redis.kill()
        host.record("created", "session/s")
        async with asyncio.timeout(10):
            await host.close()
        assert len(host.recorder) > 0


class TestFenced:
    """A process that was declared lost although it was only paused."""

    async def test_goes_on_as_a_new_process(
        self, host: Host, store: Store, namespace: str, log: EventLog
    ):
        """It starts again under a new name and adopts what it holds, with its links and uses."""
        sessions = host.registry("session", user=lambda id, s: "ann", uses=lambda id, s: ["a/b"])
        sessions["s"] = object()
        host.record("created", "lock/l", owned_by="session/s")
        with host.acquire("session/s"):
            await settled(host)
            before = host.process
            await lose(store, namespace, before)
            host.keep_alive("session/s", 60)
            await eventually(lambda: host.process != before)
            found = (await process_of(log, host)).resources
            assert (found["session/s"].in_use, found["session/s"].user) == (1, "ann")
            assert found["session/s"].uses == ("a/b",)
            assert found["lock/l"].owned_by == "session/s"
        assert (await process_of(log, host)).resources["session/s"].in_use == 0

        async def seen() -> bool:
            inventory = await published(log, host)
            return inventory is not None and inventory.held == {"session/s"}

        await eventually(seen)

    async def test_what_the_service_cannot_say_then(
        self, host: Host, store: Store, namespace: str, log: EventLog
    ):
        """A function of the service that raises costs what it would have said, and nothing else."""
        sessions = host.registry("session", user=lambda _, session: session["user"])
        sessions["bare"], sessions["whole"] = {"user": "ann"}, {"user": "bob"}
        await settled(host)
        before = host.process
        del sessions["bare"]["user"]
        await lose(store, namespace, before)
        host.entry_used("session/whole")
        await eventually(lambda: host.process != before)
        found = (await process_of(log, host)).resources
        assert {ref: one.user for ref, one in found.items()} == {
            "session/bare": None,
            "session/whole": "bob",
        }

    async def test_a_stay_goes_on(self, host: Host, store: Store, namespace: str, log: EventLog):
        """What is left of a stay that was asked for is asked for again."""
        host.registry("session", {"s": 1, "t": 2})
        host.keep_alive("session/s", 900)
        asked = (await process_of(log, host)).resources["session/s"].keep_until_ms
        before = host.process
        await lose(store, namespace, before)
        host.entry_used("session/t")
        await eventually(lambda: host.process != before)
        found = (await process_of(log, host)).resources
        assert abs(found["session/s"].keep_until_ms - asked) < 5000
        assert found["session/t"].keep_until_ms == 0

    async def test_found_out_by_its_heartbeat(self, store: Store, namespace: str, log: EventLog):
        """A host in which nothing happens finds out, too; it becomes one new process, not several."""
        async with Host.connect(store, name="svc", namespace=namespace, lease_seconds=0.3) as host:
            host.registry("session", {"s": 1})
            await settled(host)
            before = host.process
            await lose(store, namespace, before)
            await eventually(lambda: host.process != before)
            await eventually(lambda: len(host.recorder) == 0)
            now = host.process
            keys = (await log.namespace()).partition_keys(now)

            async def renewed() -> bool:
                return await store.redis.zscore(keys.hosts, now) is not None

            await eventually(renewed)
            assert host.process == now
            processes = set((await state_of(log)).processes)
            assert processes == {before, now}

    async def test_log_that_forgot(self, host: Host, store: Store, log: EventLog):
        """When Redis came back without events that are no longer kept, the host goes on as a new process."""
        host.registry("session", {"s": 1})
        await settled(host)
        before = host.process
        keys = (await log.namespace()).partition_keys(before)
        host.recorder.outbox._kept.clear()
        host.recorder.outbox._kept_events = host.recorder.outbox._kept_bytes = 0
        await store.redis.hset(keys.seqs, before, 1)
        host.entry_used("session/s")
        await eventually(lambda: host.process != before)
        assert set((await process_of(log, host)).resources) == {"session/s"}

"""The reconciler with a host, on a real Redis: from a leak to a clean process, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from adapters import Host
from reconciler import Policy, Reconciler, forced
from store import EventLog, Store, UnknownProcess
from store.event import NO_DIGEST, encode
from store.inbox import ask
from store.messages import Note
from store.tasks import end_tasks
from tests.support import entries_of, eventually, row, story

pytestmark = pytest.mark.parametrize("near", [False, True], ids=["through-redis", "in-process"])

QUICK = {"session_idle_timeout": 0.1, "runner_idle_timeout": 0.05, "agent_idle_timeout": 0.05}
Start = Callable[..., Any]


class Service:
    """A host with the registries of a small chat service, and what it closed, in order."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.closed: list[str] = []
        self.fail = ""
        self.agents = host.registry("agent", teardown=self._end)
        self.runners = host.registry(
            "runner", teardown=self._end, uses=lambda id, a: [f"agent/{a}"]
        )
        self.sessions = host.registry(
            "session", teardown=self._end, uses=lambda id, r: [f"runner/{r}"]
        )
        self.locks = host.registry("lock", teardown=self._end, owned_by=lambda id, r: f"runner/{r}")
        self.agent_runners = host.index("_agent_runners", "runner")

    def _end(self, id: str, obj: Any) -> None:
        if self.fail:
            raise RuntimeError(self.fail)
        self.closed.append(id)

    def chat(self, name: str = "") -> None:
        """A session with a runner, an agent, a lock and an index entry, all of its own."""
        self.agents[f"a{name}"] = object()
        self.runners[f"r{name}"] = f"a{name}"
        self.agent_runners[f"a{name}"] = f"r{name}"
        self.locks[f"l{name}"] = f"r{name}"
        self.sessions[f"s{name}"] = f"r{name}"

    @property
    def held(self) -> int:
        registries = (self.agents, self.runners, self.sessions, self.locks, self.agent_runners)
        return sum(map(len, registries))


@pytest.fixture
def service(host: Host) -> Service:
    return Service(host)


@pytest.fixture
async def start(store: Store, namespace: str, host: Host, near: bool) -> AsyncIterator[Start]:
    """Starts reconcilers, near the host (in its process) or reaching it through Redis."""
    async with AsyncExitStack() as stack:

        async def begin(run: bool = True, **policy: Any) -> Reconciler:
            made = Reconciler(
                store, namespace=namespace, policy=Policy(**policy), hosts=[host] if near else []
            )
            if run:
                await stack.enter_async_context(made)
            else:
                await made.open()
                await made.keep_leases()
                stack.push_async_callback(made.release)
            return made

        yield begin


def refs(rows: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    return sorted((row["ref"], row.get("key")) for row in rows)


class TestTeardown:
    """From a leak to a clean process."""

    async def test_dangling_entry_goes_at_once(self, service: Service, start: Start, log: EventLog):
        """When the service pops a runner, the stale entry that names it is gone at once."""
        await start()
        service.agents["a"] = object()
        service.runners["r"] = "a"
        service.agent_runners["a"] = "r"
        del service.runners["r"]
        await eventually(lambda: not service.agent_runners)
        assert service.closed == [], "what the service ended itself is not ended again"

        async def told() -> bool:
            return (await story(log))[-3:] == [
                ("cleaned_up", "runner/r"),
                ("cleanup_requested", "runner/r"),
                ("cleaned_up", "runner/r"),
            ]

        await eventually(told)

    async def test_circle(self, service: Service, start: Start):
        """What uses each other in a circle goes like everything else, and what hangs on it after it."""
        host = service.host
        closed: list[str] = []
        pool = host.registry("pool", teardown=lambda id, _: closed.append(id))
        wheel = host.registry(
            "wheel", teardown=lambda id, _: closed.append(id),
            uses=lambda id, _: {"a": ["wheel/b"], "b": ["wheel/c"], "c": ["wheel/a", "pool/p"]}[id],
        )  # fmt: skip
        pool["p"] = object()
        for name in "abc":
            wheel[name] = object()
        reconciler = await start(idle_timeouts={"wheel": 0.05, "pool": 0.05})
        await eventually(lambda: not wheel and not pool)
        assert (sorted(closed[:3]), closed[3:]) == (["a", "b", "c"], ["p"])
        assert not reconciler.outlook.stuck

    async def test_idle_session_then_runner_then_agent(
        self, service: Service, start: Start, log: EventLog
    ):
        """A session nobody comes back to goes, then its runner, its agent, and what they owned."""
        service.chat()
        await start(**QUICK)
        await eventually(lambda: service.held == 0)
        assert service.closed.index("s") < service.closed.index("r")
        assert service.closed.index("r") < min(map(service.closed.index, "al"))
        await eventually(lambda: len(service.host.recorder) == 0)
        found = await entries_of(log)
        asked = {e.event.order_id for e in found if e.event.type == "cleanup_requested"}
        done = {e.event.order_id for e in found if e.event.type == "cleaned_up"}
        assert asked == done
        reasons = {e.event.ref: e.event.reason for e in found if e.event.type == "cleaned_up"}
        assert "the limit is 0.1 s" in (reasons["session/s"] or "")

    async def test_not_before_its_time(self, service: Service, start: Start):
        """What is not idle for long enough stays."""
        service.chat()
        reconciler = await start()
        result = await reconciler.reconcile()
        assert not any(v for k, v in result.as_dict().items() if k != "processes")
        assert service.held == 5

    async def test_acquired_is_never_torn_down(self, service: Service, start: Start):
        """A session in use stays whatever the clock says, with all it uses; after it, it goes."""
        service.chat()
        async with service.host.acquire("session/s"):
            reconciler = await start(**QUICK)
            reconciler._clock_offset_ms += 10_000_000_000
            for _ in range(3):
                result = (await reconciler.reconcile()).as_dict()
                assert (result["torn_down"], result["failed"]) == ([], [])
            assert service.held == 5
            await reconciler._set_clock()
        await eventually(lambda: service.held == 0)

    async def test_limits(self, service: Service, start: Start):
        """Beyond a limit the least recently used goes, with its sessions."""
        service.chat("1")
        service.chat("2")
        await start(max_runners=1)
        await eventually(lambda: set(service.runners) == {"r2"})
        assert set(service.sessions) == {"s2"}

    async def test_untracked_is_adopted(self, service: Service, start: Start, log: EventLog):
        """What came in behind the observer's back is adopted, and the pass says so at once."""
        dict.__setitem__(service.sessions, "s", "r")
        reconciler = await start(run=False)
        async with asyncio.timeout(10):
            result = (await reconciler.reconcile()).as_dict()
        assert refs(result["untracked"]) == refs(result["corrected"]) == [("session/s", None)]
        assert result["failed"] == []
        assert "session/s" in service.host.entries

    async def test_ghost_is_closed(self, service: Service, start: Start, log: EventLog):
        """What left behind the observer's back is closed in the log, with what hangs on it."""
        service.chat()
        dict.__delitem__(service.runners, "r")
        reconciler = await start(run=False)
        result = (await reconciler.reconcile()).as_dict()
        assert refs(result["ghosts"]) == [("runner/r", None)]
        assert service.agent_runners == {}
        assert service.locks == {}
        assert "runner/r" not in service.host.entries


class TestRetry:
    """Teardowns that fail."""

    async def test_backoff_then_stuck(self, service: Service, start: Start, log: EventLog):
        """A failed teardown is tried again after longer and longer, then reported as stuck."""
        service.fail = "it broke"
        service.sessions["s"] = "r"
        reconciler = await start(**QUICK, backoff=0.02, backoff_max=0.1, stuck_after=3)
        await eventually(lambda: reconciler.outlook.stuck, timeout=10)
        found = await entries_of(log)
        asked = [e.at_ms for e in found if e.event.type == "cleanup_requested"]
        assert len(asked) >= 3
        assert asked[1] - asked[0] >= 10
        [row] = (await reconciler.reconcile(dry_run=True)).as_dict()["orphans"]
        assert row["ref"] == "session/s"
        service.fail = ""
        await eventually(lambda: not service.sessions)
        await eventually(lambda: not reconciler.outlook.stuck)

    async def test_reported_by_a_forced_pass(self, service: Service, start: Start):
        """A forced pass tries at once, and says what failed and why."""
        service.fail = "it broke"
        service.chat()
        reconciler = await start(run=False, **QUICK)
        reconciler._clock_offset_ms += 10_000
        for _ in range(2):
            result = (await reconciler.reconcile()).as_dict()
            failed = {row["ref"]: row["reason"] for row in result["failed"]}
            assert failed["session/s"] == "it broke"
            assert result["torn_down"] == []
            reconciler._clock_offset_ms += 10_000

    async def test_outcome_of_another_resource(self, service: Service, start: Start):
        """What went along with a teardown that then failed does not count as its success."""

        def end(id: str, obj: Any) -> None:
            service.agent_runners.clear()
            service.locks.clear()
            raise RuntimeError("half done")

        service.sessions.teardown = end
        service.sessions["s"] = "r"
        service.runners["x"] = "a"
        service.locks["l"] = "x"
        reconciler = await start(run=False, session_idle_timeout=0.1)
        reconciler._clock_offset_ms += 1000
        result = (await reconciler.reconcile()).as_dict()
        assert [row["reason"] for row in result["failed"]] == ["half done"]
        assert result["torn_down"] == []


class TestForcedPass:
    """`reconcile`: what a dry run lists is what a real run does."""

    async def leak(self, service: Service) -> None:
        service.chat("1")
        service.chat("2")
        service.chat("3")
        service.agent_runners["gone"] = "never"
        del service.runners["r2"]
        dict.__delitem__(service.sessions, "s3")
        dict.__setitem__(service.sessions, "s4", "r3")

    @pytest.mark.parametrize("untracked", ["adopt", "teardown"])
    async def test_dry_run_lists_what_a_run_does(
        self, service: Service, start: Start, log: EventLog, untracked: str
    ):
        """A dry run changes nothing, and lists exactly what the run after it then does."""
        await self.leak(service)
        # Long enough that what is adopted in the run is not idle before the run has ended.
        reconciler = await start(run=False, untracked=untracked, session_idle_timeout=60)
        await eventually(lambda: len(service.host.recorder) == 0)
        before = (service.held, await story(log))
        dry = (await reconciler.reconcile(dry_run=True)).as_dict()
        assert (service.held, await story(log)) == before
        real = (await reconciler.reconcile()).as_dict()
        for sort in ("orphans", "dangling", "ghosts", "untracked"):
            assert refs(dry[sort]) == refs(real[sort])
            assert dry[sort], f"no {sort} in this test"
        done = refs(real["torn_down"] + real["corrected"])
        listed = refs(dry["orphans"] + dry["dangling"] + dry["ghosts"] + dry["untracked"])
        assert done == listed
        assert (real["refused"], real["failed"], real["waiting"]) == ([], [], [])
        again = (await reconciler.reconcile(dry_run=True)).as_dict()
        assert not any(again[sort] for sort in ("orphans", "dangling", "ghosts", "untracked"))

    async def test_while_it_runs(self, service: Service, start: Start):
        """A forced pass works beside the loop in the background, too."""
        reconciler = await start()
        service.chat()
        dict.__delitem__(service.runners, "r")
        await reconciler.reconcile()
        await eventually(lambda: not service.agent_runners)

    async def test_one_process(self, service: Service, start: Start, store: Store, namespace: str):
        """Only the processes asked for are looked at; one that is not alive is an error."""
        async with Host.connect(store, name="other", namespace=namespace) as other:
            mine = other.index("i", "runner", content={"k": "gone"})
            other.registry("runner")
            service.agent_runners["a"] = "gone"
            reconciler = await start(run=False)
            result = (await reconciler.reconcile([service.host.process])).as_dict()
            assert result["processes"] == [service.host.process]
            assert (service.agent_runners, mine) == ({}, {"k": "gone"})
            with pytest.raises(UnknownProcess, match="process nobody is not alive"):
                await reconciler.reconcile(["nobody"])

    async def test_silent_host(
        self, service: Service, start: Start, near: bool, monkeypatch: pytest.MonkeyPatch
    ):
        """A host that gives no fresh inventory in time is named; what it had published is used."""
        if near:
            pytest.skip("a host in the same process cannot be silent")
        monkeypatch.setattr(forced, "_FRESH_SECONDS", 0.2)
        reconciler = await start(run=False)
        service.agent_runners["a"] = "gone"
        await eventually(lambda: len(service.host.recorder) == 0)
        await end_tasks([t for t in service.host._tasks if t.get_name().endswith("_receive")])
        await eventually(lambda: not service.host.book.dirty)
        result = await reconciler.reconcile(dry_run=True)
        assert result.silent == {service.host.process}
        assert refs(result.as_dict()["dangling"]) == [("runner/gone", "a")]


class TestProcesses:
    """Processes that end, one way or the other."""

    async def test_lost(self, start: Start, store: Store, namespace: str, log: EventLog):
        """A process that is not heard of is closed in the log, with all that it held."""
        lost = await Host.connect(store, name="lost", namespace=namespace, lease_seconds=0.3)
        lost.registry("session", {"s": 1})
        await eventually(lambda: len(lost.recorder) == 0)
        for task in lost._tasks:
            task.cancel()
        await asyncio.gather(*lost._tasks, return_exceptions=True)
        reconciler = await start()

        async def closed() -> bool:
            found = await entries_of(log)
            return [e.event.holder for e in found if e.event.type == "process_lost"] == [
                lost.process
            ]

        await eventually(closed, timeout=10)
        await eventually(lambda: lost.process not in reconciler.tail.state.processes)

    async def test_stopped(self, start: Start, store: Store, namespace: str):
        """A process that says it ends is gone from the state at once."""
        reconciler = await start()
        async with Host.connect(store, name="short", namespace=namespace) as short:
            await eventually(lambda: short.process in reconciler.tail.state.processes)
        await eventually(lambda: short.process not in reconciler.tail.state.processes)

    async def test_malformed_entry(
        self, service: Service, start: Start, store: Store, log: EventLog
    ):
        """A malformed entry put into the stream by hand is quarantined and counted; work goes on."""
        reconciler = await start()
        namespace = await log.namespace()
        key = namespace.partition_keys(service.host.process).log
        await store.redis.xadd(key, {"e": "rubbish"})
        await store.redis.xadd(key, {"e": encode(row(1, process="q"), NO_DIGEST)[0], "x": "y"})
        service.agent_runners["a"] = "gone"
        await eventually(lambda: not service.agent_runners)
        assert len(await log.quarantined()) == 2
        assert b"agent_reconciler_quarantined_entries_total 2.0" in reconciler.metrics.page()


class TestWorkers:
    """One acts for a partition at a time."""

    async def test_requests_through_the_inbox(self, service: Service, start: Start, log: EventLog):
        """A forced pass can be asked for through Redis, and is answered."""
        reconciler = await start()
        await eventually(lambda: reconciler.unready() == [])
        service.chat()
        namespace = await log.namespace()
        partition = namespace.partition_of(service.host.process)
        await eventually(lambda: len(service.host.recorder) == 0)
        answer = await ask(namespace, partition, Note("reconcile", service.host.process), 5)
        assert answer is not None
        assert service.host.process.encode() in answer
        unknown = await ask(namespace, partition, Note("reconcile", "nobody"), 5)
        assert unknown is not None
        assert b"not alive" in unknown

"""Orders carried out: teardowns, index entries, corrections."""

from __future__ import annotations

import asyncio
from typing import Any

from adapters import Host
from adapters.entry import current_order
from store import EventLog
from store.messages import Action, Order
from tests.adapters.orders import Closing, carried_out, order, outcome
from tests.support import eventually


class TestTeardown:
    """What an order does when its preconditions hold."""

    async def test_closed_and_removed(self, host: Host):
        """The object is closed, its entry goes, and the event carries order and reason."""
        registry = host.registry("session", {"s": Closing()})
        session = registry["s"]
        assert await outcome(host, order(host, "session/s")) == ("cleaned_up", "idle")
        assert (session.closed, registry, host.entries) == (1, {}, {})

    async def test_own_teardown(self, host: Host):
        """A registry's own teardown is called with id and object, plain or async."""
        ended: list[tuple[str, Any]] = []

        async def end(id: str, obj: Any) -> None:
            ended.append((id, obj))

        for teardown in (end, lambda id, obj: ended.append((id, obj))):
            registry = host.registry("session", {"s": 7}, teardown=teardown)
            assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"
            assert registry == {}
        assert ended == [("s", 7)] * 2

    async def test_teardown_that_removes_the_entry_itself(self, host: Host):
        """A teardown that takes the entry out is recorded once, by way of the observer or not."""
        for remove in (lambda d, k: d.pop(k), dict.pop):
            registry = host.registry("session", {"s": 7})
            registry.teardown = lambda id, obj, d=registry, pop=remove: pop(d, id)
            assert await outcome(host, order(host, "session/s")) == ("cleaned_up", "idle")
            assert host.entries == {}
            assert registry.noted == 0

    async def test_things_that_go_along(self, host: Host):
        """What a teardown takes along is recorded as going with it."""
        runners = host.registry("runner", {"r": 1})
        host.registry("session", {"s": 1}, teardown=lambda id, obj: runners.clear())
        answers = await carried_out(host, order(host, "session/s"))
        assert answers == {
            "o-session/s": [("cleaned_up", "went with session/s"), ("cleaned_up", "idle")]
        }

    async def test_object_without_close(self, host: Host):
        """An object that has no close needs none."""
        host.registry("session", {"s": 7})
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_recorded_only(self, host: Host):
        """What no registry holds is ended by the handler of its kind; without one that fails."""
        host.record("created", "http_client/c")
        kind, reason = await outcome(host, order(host, "http_client/c"))
        assert (kind, "no handler" in reason) == ("cleanup_failed", True)
        ended: list[str] = []
        host.handle("http_client", lambda id, _: ended.append(id))
        assert (await outcome(host, order(host, "http_client/c")))[0] == "cleaned_up"
        assert ended == ["c"]

    async def test_stages(self, host: Host):
        """Orders that came together are carried out stage by stage, whatever their order."""
        went: list[str] = []

        async def end(id: str, obj: Any) -> None:
            await asyncio.sleep(0)
            went.append(id)

        host.registry("agent", {"a": 1}, teardown=end)
        host.registry("runner", {"r": 1}, teardown=end, uses=lambda *_: ["agent/a"])
        host.registry("session", {"s": 1}, teardown=end, uses=lambda *_: ["runner/r"])
        await carried_out(
            host,
            order(host, "agent/a", stage=2, after=("runner/r",)),
            order(host, "runner/r", stage=1, after=("session/s",)),
            order(host, "session/s"),
        )
        assert went == ["s", "r", "a"]

    async def test_one_that_hangs_delays_only_what_hangs_on_it(self, host: Host):
        """A runner goes though another chat's session hangs; that chat's own runner waits for it."""
        go = asyncio.Event()
        went: list[str] = []

        async def end(id: str, obj: Any) -> None:
            if id == "hangs":
                await go.wait()
            went.append(id)

        host.registry("runner", {"r1": 1, "r2": 1}, teardown=end)
        host.registry(
            "session", {"hangs": "r1", "s2": "r2"}, teardown=end,
            uses=lambda id, runner: [f"runner/{runner}"],
        )  # fmt: skip
        host.index("session_to_runner", "runner", content={"hangs": "r1", "x": "gone"})
        drop = {"action": Action.DROP_ENTRY, "registry": "session_to_runner", "stage": 9}
        done = asyncio.create_task(
            carried_out(
                host,
                order(host, "session/hangs"),
                order(host, "session/s2"),
                order(host, "runner/r1", stage=1, after=("session/hangs",)),
                order(host, "runner/r2", stage=1, after=("session/s2",)),
                order(host, "runner/r1", id="o-1", key="hangs", **drop),
                order(host, "runner/gone", id="o-2", key="x", **drop),
            )
        )
        await eventually(lambda: "runner/r2" not in host.entries)
        assert went == ["s2", "r2"]
        assert host.indexes["session_to_runner"] == {"hangs": "r1"}
        assert set(host.entries) >= {"session/hangs", "runner/r1"}
        go.set()
        answers = await done
        assert went == ["s2", "r2", "hangs", "r1"]
        assert {type for outcomes in answers.values() for type, _ in outcomes} == {"cleaned_up"}
        assert host.indexes["session_to_runner"] == {}

    async def test_told_which_order(self, host: Host):
        """A teardown can ask which order it carries out; nobody else sees one."""
        seen: list[Order | None] = []
        host.registry("session", {"s": 1}, teardown=lambda *_: seen.append(current_order.get()))
        one = order(host, "session/s")
        await carried_out(host, one)
        assert seen == [one]
        assert current_order.get() is None


class TestEntriesAndCorrections:
    """Orders that end in one tick."""

    async def test_drop_entry(self, host: Host):
        """The entry goes; one that is gone already is as good."""
        index = host.index("i", "runner", content={"k": "r"})
        one = order(host, "runner/r", action=Action.DROP_ENTRY, registry="i", key="k")
        assert await outcome(host, one) == ("cleaned_up", "idle")
        assert index == {}
        assert await outcome(host, one) == ("cleaned_up", "the entry was gone already")

    async def test_drop_entry_of_something_alive(self, host: Host):
        """An entry whose resource is alive by now stays."""
        host.registry("runner", {"r": 1})
        index = host.index("i", "runner", content={"k": "r"})
        one = order(host, "runner/r", action=Action.DROP_ENTRY, registry="i", key="k")
        assert (await outcome(host, one))[0] == "cleanup_refused"
        assert index == {"k": "r"}

    async def test_close_ghost(self, host: Host):
        """A ghost is closed in the log; what is there is not."""
        registry = host.registry("session", {"s": 1})
        one = order(host, "session/s", action=Action.CLOSE_GHOST)
        assert await outcome(host, one) == ("cleanup_refused", "stale: it is alive")
        dict.__delitem__(registry, "s")
        assert await outcome(host, one) == ("cleaned_up", "idle")
        assert host.entries == {}

    async def test_adopt(self, host: Host):
        """What a registry holds and nobody knew of is adopted, in answer to the order."""
        registry = host.registry("session")
        one = order(host, "session/s", action=Action.ADOPT)
        assert await outcome(host, one) == ("cleanup_refused", "gone: no registry holds it")
        dict.__setitem__(registry, "s", 1)
        assert await outcome(host, one) == ("adopted", "")
        assert set(host.entries) == {"session/s"}
        assert (await outcome(host, one))[0] == "cleanup_refused"

    async def test_teardown_of_what_nobody_knew(self, host: Host):
        """Where the policy wants it, what was untracked is torn down at once."""
        registry = host.registry("session")
        session = Closing()
        dict.__setitem__(registry, "s", session)
        assert await outcome(host, order(host, "session/s", seq=0)) == ("cleaned_up", "idle")
        assert (session.closed, registry) == (1, {})

    async def test_report(self, host: Host, log: EventLog):
        """A report is answered with a fresh inventory, not with an event."""
        one = order(host, "process/x", action=Action.REPORT, id="r-1")
        assert await carried_out(host, one) == {}
        await eventually(lambda: not host._sender.answers)

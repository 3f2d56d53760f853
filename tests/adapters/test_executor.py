"""Orders and their preconditions: nothing in use is ever torn down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapters import Host
from adapters.entry import current_order
from store import EventLog, NotAlive
from store.event import EventRow
from store.messages import Action, Order, hash_of
from tests.support import entries_of, eventually, waiting

Outcome = tuple[str, str]


class Closing:
    """Something that can be closed."""

    def __init__(self) -> None:
        self.closed = 0

    async def aclose(self) -> None:
        self.closed += 1


def order(host: Host, ref: str, **more: Any) -> Order:
    """A teardown as the worker would order it now, unless told otherwise."""
    entry = host.entries.get(ref)
    values: dict[str, Any] = {
        "id": f"o-{ref}", "process": host.process, "action": Action.TEARDOWN, "ref": ref,
        "seq": entry.seq if entry is not None else 0, "reason": "idle",
    }  # fmt: skip
    return Order(**values | more)


async def carried_out(host: Host, *orders: Order) -> dict[str, list[Outcome]]:
    """Carries orders out; the answer is (type, reason) of the events with their ids."""
    seq = host.recorder.seq
    rows: list[EventRow] = []
    record = host.recorder.record

    def listening(type: str, ref: str, **more: Any) -> int:
        number = record(type, ref, **more)
        rows.append(waiting(host.recorder)[-1])
        return number

    host.recorder.record = listening  # type: ignore[method-assign]
    try:
        await host.execute(orders)
    finally:
        host.recorder.record = record  # type: ignore[method-assign]
    assert host.recorder.seq == seq + len(rows)
    answers: dict[str, list[Outcome]] = {}
    for row in rows:
        if row.order_id is not None:
            answers.setdefault(row.order_id, []).append((row.type, row.reason or ""))
    return answers


async def outcome(host: Host, one: Order) -> Outcome:
    """The one outcome of an order."""
    [answer] = (await carried_out(host, one))[one.id]
    return answer


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


class TestPreconditions:
    """When an order is refused, and why."""

    async def refused(self, host: Host, one: Order, why: str) -> None:
        kind, reason = await outcome(host, one)
        assert kind == "cleanup_refused"
        assert reason.startswith(why)

    async def test_stale(self, host: Host):
        """Used since the worker looked: its last event is another."""
        host.registry("session", {"s": Closing()})
        one = order(host, "session/s")
        with host.acquire("session/s") as session:
            pass
        await self.refused(host, one, "stale: its last event is seq")
        assert session.closed == 0

    async def test_gone(self, host: Host):
        """No longer there."""
        registry = host.registry("session", {"s": 1})
        one = order(host, "session/s")
        del registry["s"]
        await self.refused(host, one, "gone: it is not alive")

    async def test_in_use(self, host: Host):
        """Acquired by somebody."""
        host.registry("session", {"s": 1})
        with host.acquire("session/s"):
            await self.refused(host, order(host, "session/s"), "busy: it is acquired by 1")
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_used_by_something_alive(self, host: Host):
        """Used by something that is alive, whether the worker knew of it or not."""
        host.registry("runner", {"r": 1})
        host.registry("session", {"s": 1}, uses=lambda *_: ["runner/r"])
        await self.refused(host, order(host, "runner/r"), "busy: session/s uses it")

    async def test_uses_itself(self, host: Host):
        """What uses itself is not busy because of that."""
        host.registry("session", {"s": 1}, uses=lambda *_: ["session/s"])
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_circle_goes_as_a_whole(self, host: Host):
        """What uses each other in a circle can be ended, if all of it is as the worker saw it."""
        host.registry("left", {"l": 1}, uses=lambda *_: ["right/r"])
        host.registry("right", {"r": 1}, uses=lambda *_: ["left/l"])
        await self.refused(host, order(host, "left/l"), "busy: right/r uses it")
        seqs = {ref: host.entries[ref].seq for ref in ("left/l", "right/r")}
        left = order(host, "left/l", circle={"right/r": seqs["right/r"]}, after=("right/r",))
        with host.acquire("right/r"):
            await self.refused(host, left, "busy: right/r is in a circle with it, and was used")
        await self.refused(host, left, "busy: right/r is in a circle with it, and was used")
        seqs = {ref: host.entries[ref].seq for ref in ("left/l", "right/r")}
        left = order(host, "left/l", circle={"right/r": seqs["right/r"]}, after=("right/r",))
        right = order(host, "right/r", circle={"left/l": seqs["left/l"]}, after=("left/l",))
        answers = await carried_out(host, left, right)
        assert [[type for type, _ in said] for said in answers.values()] == [["cleaned_up"]] * 2
        assert not host.entries

    async def test_something_has_to_go_first(self, host: Host):
        """What should go before it is still alive."""
        host.registry("lock", {"l": 1})
        host.registry("runner", {"r": 1})
        one = order(host, "lock/l", after=("runner/r",))
        await self.refused(host, one, "busy: runner/r has to go first")

    async def test_another_object(self, host: Host):
        """The registry holds another object under the key, put there behind the observer's back."""
        registry = host.registry("session", {"s": Closing()})
        other = Closing()
        dict.__setitem__(registry, "s", other)
        await self.refused(host, order(host, "session/s"), "gone: its registry does not hold it")
        dict.__delitem__(registry, "s")
        await self.refused(host, order(host, "session/s"), "gone: its registry does not hold it")
        assert other.closed == 0

    async def test_none_is_an_object(self, host: Host):
        """An entry with the value None that is gone is gone."""
        registry = host.registry("session", {"s": None})
        dict.__delitem__(registry, "s")
        await self.refused(host, order(host, "session/s"), "gone: its registry does not hold it")

    async def test_twice(self, host: Host):
        """While one order is ending it, another is refused, and nobody can acquire it."""
        begun, go = asyncio.Event(), asyncio.Event()

        async def end(id: str, obj: Any) -> None:
            begun.set()
            await go.wait()

        host.registry("session", {"s": 1}, teardown=end)
        first = host.execute([order(host, "session/s", id="o-1")])
        await begun.wait()
        await self.refused(host, order(host, "session/s", id="o-2"), "busy: order o-1 is ending")
        with pytest.raises(NotAlive, match="being torn down"), host.acquire("session/s"):
            pass
        go.set()
        await first
        assert host.entries == {}

    async def test_unknown_action(self, host: Host):
        """An action of a newer worker is refused, not misunderstood."""
        one = order(host, "session/s", action="explode")
        await self.refused(host, one, "gone: this host does not know the action 'explode'")


class TestFailure:
    """A teardown that fails, hangs, or would lose data."""

    async def test_fails(self, host: Host):
        """It stays, with the reason, and can be used and tried again."""

        def end(id: str, obj: Any) -> None:
            raise RuntimeError("it broke")

        registry = host.registry("session", {"s": 1}, teardown=end)
        assert await outcome(host, order(host, "session/s")) == ("cleanup_failed", "it broke")
        with host.acquire("session/s"):
            assert registry == {"s": 1}
        registry.teardown = None
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_not_saved(self, host: Host):
        """When its recovery record cannot be saved it stays, and is not torn down."""
        session = Closing()

        def save(id: str, obj: Any) -> None:
            raise OSError("disk full")

        registry = host.registry("session", {"s": session}, save=save)
        kind, reason = await outcome(host, order(host, "session/s"))
        assert (kind, reason) == (
            "cleanup_failed", "it stays, its recovery record was not saved: disk full",
        )  # fmt: skip
        assert (session.closed, dict(registry)) == (0, {"s": session})

    async def test_saved_first(self, host: Host):
        """Its recovery record is saved before it is torn down."""
        did: list[str] = []
        host.registry(
            "session", {"s": 1},
            save=lambda *_: did.append("saved"), teardown=lambda *_: did.append("ended"),
        )  # fmt: skip
        await carried_out(host, order(host, "session/s"))
        assert did == ["saved", "ended"]

    async def test_hangs(self, host: Host):
        """A teardown that hangs is cancelled after its time; others are not held up by it."""
        cancelled = asyncio.Event()

        async def hang(id: str, obj: Any) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        host.registry("session", {"s": 1}, teardown=hang)
        host.registry("lock", {"l": 1})
        answers = await carried_out(
            host, order(host, "session/s", timeout=0.05), order(host, "lock/l")
        )
        assert answers["o-lock/l"] == [("cleaned_up", "idle")]
        assert answers["o-session/s"] == [
            ("cleanup_failed", "no end after 0.05 s; it was cancelled")
        ]
        await cancelled.wait()
        await eventually(lambda: not host.entries["session/s"].terminating)
        with host.acquire("session/s"):
            pass

    async def test_hangs_and_swallows_its_cancellation(self, host: Host):
        """One that goes on after its cancellation fails in time; until it ends nobody gets the object."""
        go = asyncio.Event()

        async def stubborn(id: str, obj: Any) -> None:
            while not go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await go.wait()

        registry = host.registry("session", {"s": 1}, teardown=stubborn)
        kind, _ = await outcome(host, order(host, "session/s", timeout=0.05))
        assert kind == "cleanup_failed"
        with pytest.raises(NotAlive), host.acquire("session/s"):
            pass
        kind, reason = await outcome(host, order(host, "session/s", id="o-2"))
        assert (kind, reason.startswith("busy")) == ("cleanup_refused", True)
        go.set()
        await eventually(lambda: not host.entries)
        assert registry == {}

    async def test_cancels_itself(self, host: Host):
        """A teardown that ends in a cancellation of its own has failed."""

        async def end(id: str, obj: Any) -> None:
            raise asyncio.CancelledError

        host.registry("session", {"s": 1}, teardown=end)
        assert (await outcome(host, order(host, "session/s")))[0] == "cleanup_failed"
        assert not host.entries["session/s"].terminating

    async def test_host_closes_meanwhile(self, host: Host):
        """A teardown that runs when the host is closed is cancelled with it."""
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def end(id: str, obj: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        host.registry("session", {"s": 1}, teardown=end)
        host.execute([order(host, "session/s")])
        await begun.wait()
        await host.close()
        async with asyncio.timeout(1):
            await cancelled.wait()

    async def test_one_that_raises_does_not_stop_the_others(self, host: Host):
        """An order that fails in a way nobody thought of leaves the others alone."""
        host.index("i", targets=lambda key, value: value, content={"k": ["session/x"]})
        host.registry("session", {"s": 1})
        drop = order(host, "session/x", action=Action.DROP_ENTRY, registry="i", key="k", id="o-1")

        def broken(key: Any, value: Any) -> list[str]:
            raise RuntimeError("broken")

        host.indexes["i"]._targets = broken
        answers = await carried_out(host, drop, order(host, "session/s", stage=1))
        assert answers["o-1"] == [("cleanup_failed", "broken")]
        assert answers["o-session/s"] == [("cleaned_up", "idle")]


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


class TestNoAwaitBetweenCheckAndMark:
    """G1 under contention."""

    async def test_acquire_or_teardown_never_both(self, host: Host):
        """Whoever comes first wins: a session that was acquired is not closed while it is in use."""
        torn_in_use: list[str] = []
        sessions = host.registry("session")

        async def end(id: str, obj: Any) -> None:
            if host.entries[f"session/{id}"].in_use:
                torn_in_use.append(id)
            await asyncio.sleep(0)
            if host.entries[f"session/{id}"].in_use:
                torn_in_use.append(id)

        sessions.teardown = end
        used = 0

        async def use(ref: str) -> None:
            nonlocal used
            for _ in range(hash_of(ref) % 5):
                await asyncio.sleep(0)
            with contextlib.suppress(NotAlive):
                async with host.acquire(ref):
                    used += 1
                    await asyncio.sleep(0)

        async def tear(ref: str) -> None:
            await host.execute([order(host, ref)])

        for n in range(200):
            sessions[n] = object()
        work: list[Callable[[str], Awaitable[None]]] = [use, tear, use, tear]
        await asyncio.gather(*(do(f"session/{n}") for n in range(200) for do in work[n % 2 :]))
        assert torn_in_use == []
        assert 0 < used < 800
        assert len(sessions) < 200

    async def test_story_in_the_log(self, host: Host, log: EventLog):
        """What the host did is in the log, with the order's id."""
        host.registry("session", {"s": 1})
        await carried_out(host, order(host, "session/s"))
        await eventually(lambda: len(host.recorder) == 0)
        last = (await entries_of(log))[-1].event
        assert (last.type, last.order_id) == ("cleaned_up", "o-session/s")
